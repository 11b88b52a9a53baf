"""What a pod's variables come from, and what of it is missing: asked of the API server, as a kubelet does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from agentfleet.testing.kube.apiclient import ApiClient
from agentfleet.testing.kube.podview import Container, Pod


async def missing(api: ApiClient, pod: Pod) -> dict[int, str]:
    """Why containers cannot be made, in a kubelet's words, by their place in the pod; those that can are left out."""
    found: dict[str, Mapping[str, Any] | str] = {}
    told = {}
    for index, container in enumerate(pod.spec.containers):
        why = await _missing_to(api, pod.metadata.namespace, container, found)
        if why is not None:
            told[index] = why
    return told


async def _missing_to(
    api: ApiClient, namespace: str, container: Container, found: dict[str, Mapping[str, Any] | str]
) -> str | None:
    """The first thing that a container needs and does not find; `found` is what was asked for already."""
    for kind, named in container.needs:
        path = f"/api/v1/namespaces/{namespace}/{kind}s/{named.name}"
        if path not in found:
            found[path] = await _read(api, path, f'{kind} "{named.name}"')
        there = found[path]
        if isinstance(there, str):
            return there
        if named.key and named.key not in {**(there.get("data") or {}), **(there.get("binaryData") or {})}:
            written = {"secret": "Secret", "configmap": "ConfigMap"}[kind]
            return f"couldn't find key {named.key} in {written} {namespace}/{named.name}"
    return None


async def _read(api: ApiClient, path: str, what: str) -> Mapping[str, Any] | str:
    """An object, or why there is none."""
    status, said = await api.send("GET", path)
    if status == 200:
        read: Mapping[str, Any] = json.loads(said)
        return read
    return f"{what} not found" if status == 404 else f"{what}: the API server answers {status}"
