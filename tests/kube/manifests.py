"""The example's manifests as `kubectl apply -k` sends them, and a server that has heard of the Prometheus operator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tests.kube.permissions import NAMESPACE
from tests.kube.story import EXAMPLES, leaves

from agentfleet.testing.kube import ApiRefused, ControlPlane
from agentfleet.testing.kube.client import APPLY

Manifest = dict[str, Any]

CLUSTER_WIDE = ("Namespace", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition")
PLURALS = {"NetworkPolicy": "networkpolicies"}
OLDER = {"policy/v1": "policy/v1beta1"}
"""What the server of these tests, 1.20, calls differently; the fields that the example uses are the same."""

TEXT, NUMBER = {"type": "string"}, {"type": "integer"}
SPAN = {"type": "string", "pattern": "^(0|([0-9]+(y|w|d|h|m|s|ms))+)$"}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "object", "properties": properties}
    return found | ({"required": list(required)} if required else {})


def _list(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


_KEY = _object(("key",), name=TEXT, key=TEXT)
SCHEMAS = {
    "ServiceMonitor": _object(
        ("selector", "endpoints"),
        selector=_object(matchLabels=TEXTS),
        endpoints=_list(
            _object(
                port=TEXT,
                path=TEXT,
                scheme={"type": "string", "enum": ["http", "https"]},
                interval=SPAN,
                scrapeTimeout=SPAN,
                authorization=_object(type=TEXT, credentials=_KEY),
                tlsConfig=_object(ca=_object(secret=_KEY), serverName=TEXT),
            )
        ),
    ),
    "PrometheusRule": _object(
        groups=_list(
            _object(
                ("name",),
                name=TEXT,
                interval=SPAN,
                rules=_list(
                    _object(("expr",), alert=TEXT, expr=TEXT, labels=TEXTS, annotations=TEXTS, **{"for": SPAN})
                ),
            )
        )
    ),
}
"""The Prometheus operator's kinds, as far as the example uses them."""


def kustomized(folder: Path = EXAMPLES) -> list[Manifest]:
    """The manifests that a kustomization names, in its order; it does nothing but name them."""
    found = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert found.keys() == {"apiVersion", "kind", "resources"}, found.keys()
    return [each for name in found["resources"] for each in yaml.safe_load_all((folder / name).read_text())]


def everything() -> list[Manifest]:
    """All of the example."""
    return [*kustomized(), *kustomized(EXAMPLES / "monitoring")]


def one(kind: str, name: str | None = None) -> Manifest:
    """The example's only manifest of a kind (and name)."""
    named = [each for each in everything() if each["kind"] == kind and name in (None, each["metadata"]["name"])]
    (found,) = named
    return found


def definitions() -> Iterator[Manifest]:
    """Definitions of the Prometheus operator's kinds."""
    for kind, schema in SCHEMAS.items():
        names = {"kind": kind, "plural": f"{kind.lower()}s", "singular": kind.lower()}
        version = {
            "name": "v1",
            "served": True,
            "storage": True,
            "schema": {"openAPIV3Schema": _object(("spec",), spec=schema)},
        }
        yield {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{names['plural']}.monitoring.coreos.com"},
            "spec": {"group": "monitoring.coreos.com", "scope": "Namespaced", "names": names, "versions": [version]},
        }


def path_of(manifest: Manifest) -> str:
    """Where an object of this kind is written to."""
    version, kind, metadata = manifest["apiVersion"], manifest["kind"], manifest["metadata"]
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    plural = PLURALS.get(kind, "poddisruptionbudgets" if kind == "PodDisruptionBudget" else f"{kind.lower()}s")
    space = "" if kind in CLUSTER_WIDE else f"/namespaces/{metadata['namespace']}"
    return f"{root}{space}/{plural}/{metadata['name']}"


def moved(manifest: Manifest, namespace: str) -> Manifest:
    """The manifest for a namespace of a test, in this server's words."""
    there: Manifest = yaml.safe_load(yaml.safe_dump(manifest).replace(NAMESPACE, namespace))
    there["apiVersion"] = OLDER.get(there["apiVersion"], there["apiVersion"])
    return there


async def dry_run(plane: ControlPlane, manifest: Manifest) -> Manifest:
    """What the server would keep; nothing is kept.

    Raises:
        ApiRefused: The server does not take it, or would leave something of it out (`status` 0).
    """
    path = f"{path_of(manifest)}?fieldManager=test&force=true&dryRun=All"
    kept: Manifest = await plane.api.patch(path, manifest, kind=APPLY)
    says, keeps = leaves(manifest), leaves(kept)
    lost = {place: value for place, value in says.items() if keeps.get(place) != value}
    if lost:
        raise ApiRefused(f"{manifest['kind']}: the server leaves out or changes {lost}")
    return kept


async def define(plane: ControlPlane) -> None:
    """Make the Prometheus operator's kinds known to the server; it waits until they are."""
    for definition in definitions():
        path = path_of(definition)
        await plane.api.patch(f"{path}?fieldManager=test&force=true", definition, kind=APPLY)
        await plane.api.wait(path, _established)


def _established(definition: Manifest) -> bool:
    found = {each["type"]: each["status"] for each in definition.get("status", {}).get("conditions") or ()}
    return found.get("Established") == "True"
