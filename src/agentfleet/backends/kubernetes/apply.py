"""The requests by which manifests come into being and go, as values: where to, with which query, type and body.

Server-side apply (KEP-555) with one field manager and `force`: what agentfleet says holds, what it does not say is
left to others. Whoever sends these is the connection's business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlencode

from agentfleet.backends.kubernetes import naming
from agentfleet.backends.kubernetes.apiversions import ApiVersions
from agentfleet.backends.kubernetes.rendering import Manifest

CONTENT_TYPE = "application/apply-patch+yaml"
"""JSON is YAML."""
_PLURALS = {
    "ConfigMap": "configmaps",
    "Deployment": "deployments",
    "HorizontalPodAutoscaler": "horizontalpodautoscalers",
    "PodDisruptionBudget": "poddisruptionbudgets",
    "Service": "services",
}


@dataclass(frozen=True, slots=True)
class Request:
    """One request to an API server."""

    method: str
    path: str
    query: Mapping[str, str]
    content_type: str | None = None
    body: bytes = b""

    @property
    def target(self) -> str:
        """Path and query, as a request line has them."""
        return f"{self.path}?{urlencode(self.query)}" if self.query else self.path


def collection_path(api_version: str, kind: str, namespace: str) -> str:
    """Where the objects of a kind are listed."""
    root = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
    return f"{root}/namespaces/{quote(namespace, safe='')}/{_PLURALS[kind]}"


def path_of(manifest: Manifest) -> str:
    """Where an object is; it must name its namespace."""
    metadata = manifest["metadata"]
    root = collection_path(manifest["apiVersion"], manifest["kind"], metadata["namespace"])
    return f"{root}/{quote(metadata['name'], safe='')}"


def apply(manifest: Manifest, *, dry_run: bool = False, force: bool = True, manager: str = naming.MANAGER) -> Request:
    """Create the object or make it what the manifest says.

    `force` takes over fields that others have set; without it that is a conflict. `dry_run` lets the server do
    everything but store it. `manager` is the field manager: what one says is not taken back by another's silence.
    """
    query = {"fieldManager": manager, "force": "true" if force else "false"}
    if dry_run:
        query["dryRun"] = "All"
    body = json.dumps(manifest, ensure_ascii=False, separators=(",", ":")).encode()
    return Request("PATCH", path_of(manifest), query, CONTENT_TYPE, body)


def kept_collections(api: ApiVersions, namespace: str, fleet: str) -> dict[str, Request]:
    """By kind: the request that lists everything of a fleet, also what its present spec no longer asks for.

    In the order in which to delete: first what would act or be acted on by others, the configuration last.
    """
    versions = {
        "HorizontalPodAutoscaler": f"autoscaling/{api.autoscaling}",
        "Deployment": "apps/v1",
        "PodDisruptionBudget": f"policy/{api.policy}",
        "Service": "v1",
        "ConfigMap": "v1",
    }
    labels = {naming.FLEET: fleet, "app.kubernetes.io/managed-by": naming.MANAGER}
    query = {"labelSelector": naming.selector_text(labels)}
    return {
        kind: Request("GET", collection_path(version, kind, namespace), query) for kind, version in versions.items()
    }


def deletion(manifest: Manifest, *, uid: str | None = None) -> Request:
    """Delete the object and what it owns; with `uid` only that very object, not one that took its name since."""
    options: dict[str, object] = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
    if uid is not None:
        options["preconditions"] = {"uid": uid}
    return Request("DELETE", path_of(manifest), {}, "application/json", json.dumps(options).encode())
