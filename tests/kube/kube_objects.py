"""Objects that the tests of the fake nodes and of the proxy need."""

from __future__ import annotations

from typing import Any


def deployment(name: str, replicas: int, *, image: str = "agent:1", **pod: Any) -> dict[str, Any]:
    """A Deployment whose pods have one container with one port; `pod` are further fields of the pods' spec."""
    container = {"name": "agent", "image": image, "ports": [{"containerPort": 8080}]}
    return {
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": {"containers": [container], **pod}},
        },
    }


def ready(replicas: int) -> Any:
    """Whether a Deployment has so many ready replicas."""
    return lambda seen: seen["status"].get("readyReplicas", 0) == replicas


def condition(seen: dict[str, Any] | None, kind: str) -> dict[str, Any]:
    """A condition of a pod or node; empty if it has none such."""
    found = [each for each in (seen or {}).get("status", {}).get("conditions", []) if each["type"] == kind]
    return found[0] if found else {}


def container(seen: dict[str, Any] | None) -> dict[str, Any]:
    """The status of a pod's first container; empty if it has none yet."""
    found: list[dict[str, Any]] = (seen or {}).get("status", {}).get("containerStatuses", [])
    return found[0] if found else {}
