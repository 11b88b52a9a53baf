"""The examples' permissions, given to a namespace of a test: what a manager does there it may do, and no more."""

from __future__ import annotations

import yaml
from tests.kube.story import EXAMPLES

from agentfleet.backends.kubernetes import apply
from agentfleet.testing.kube import ControlPlane
from agentfleet.testing.kube.access import Access

NAMESPACE = "ai-agents"
"""The namespace that the examples are written for."""
ACCOUNT = "agentfleet-manager"


async def grant(plane: ControlPlane, namespace: str = NAMESPACE) -> Access:
    """Apply examples/kubernetes/rbac.yaml as its head says, and return the manager's own way in.

    What lies outside the namespace is called after it, so that tests do not take one another's permissions away.
    """
    for manifest in yaml.safe_load_all((EXAMPLES / "rbac.yaml").read_text().replace(NAMESPACE, namespace)):
        version, metadata, kind = manifest["apiVersion"], manifest["metadata"], manifest["kind"]
        if kind != "Namespace" and metadata.get("namespace") != namespace:
            metadata["name"] += f"-{namespace}"
            if "roleRef" in manifest:
                manifest["roleRef"]["name"] += f"-{namespace}"
        root = f"/apis/{version}" if "/" in version else f"/api/{version}"
        space = f"/namespaces/{metadata['namespace']}" if "namespace" in metadata else ""
        path = f"{root}{space}/{kind.lower()}s/{metadata['name']}?fieldManager=test&force=true"
        await plane.api.patch(path, manifest, kind=apply.CONTENT_TYPE)
    return await plane.service_account(namespace, ACCOUNT)
