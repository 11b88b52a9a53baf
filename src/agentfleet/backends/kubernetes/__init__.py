"""Kubernetes: calls to an API server, and a live copy of what it has. Needs the extra `agentfleet[kubernetes]`.

The names here are imported on first use, so that importing the package loads neither the client library nor anything
heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agentfleet.errors import MissingExtra

if TYPE_CHECKING:
    from agentfleet.backends.kubernetes.backend import KubernetesBackend
    from agentfleet.backends.kubernetes.connection import (
        APPLY,
        JSON,
        JSON_PATCH,
        MERGE_PATCH,
        Connection,
        Requests,
        Traffic,
    )
    from agentfleet.backends.kubernetes.credentials import Access, Credentials, InCluster, KubeConfig, Tls
    from agentfleet.backends.kubernetes.discovery import Discovery
    from agentfleet.backends.kubernetes.errors import (
        AlreadyExists,
        DisruptionBlocked,
        Expired,
        FieldConflict,
        Forbidden,
        Invalid,
        NotFound,
        Overloaded,
        Replaced,
        Unauthenticated,
        Unreachable,
    )
    from agentfleet.backends.kubernetes.informer import Informer
    from agentfleet.backends.kubernetes.informer_cache import Changed, Removed, Snapshot
    from agentfleet.backends.kubernetes.informer_metrics import InformerMetrics
    from agentfleet.backends.kubernetes.objects import Deployment, Lease, Meta, Node, Pod, PodMetrics, ReplicaSet
    from agentfleet.backends.kubernetes.resources import (
        DEPLOYMENTS,
        LEASES,
        NODES,
        POD_METRICS,
        PODS,
        REPLICA_SETS,
        Resource,
    )

_HOMES = {
    "connection": ("APPLY", "JSON", "JSON_PATCH", "MERGE_PATCH", "Connection", "Requests", "Traffic"),
    "credentials": ("Access", "Credentials", "InCluster", "KubeConfig", "Tls"),
    "discovery": ("Discovery",),
    "errors": (
        "AlreadyExists",
        "DisruptionBlocked",
        "Expired",
        "FieldConflict",
        "Forbidden",
        "Invalid",
        "NotFound",
        "Overloaded",
        "Replaced",
        "Unauthenticated",
        "Unreachable",
    ),
    "backend": ("KubernetesBackend",),
    "informer": ("Informer",),
    "informer_cache": ("Changed", "Removed", "Snapshot"),
    "informer_metrics": ("InformerMetrics",),
    "objects": ("Deployment", "Lease", "Meta", "Node", "Pod", "PodMetrics", "ReplicaSet"),
    "resources": ("DEPLOYMENTS", "LEASES", "NODES", "PODS", "POD_METRICS", "REPLICA_SETS", "Resource"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "APPLY",
    "DEPLOYMENTS",
    "JSON",
    "JSON_PATCH",
    "LEASES",
    "MERGE_PATCH",
    "NODES",
    "PODS",
    "POD_METRICS",
    "REPLICA_SETS",
    "Access",
    "AlreadyExists",
    "Changed",
    "Connection",
    "Credentials",
    "Deployment",
    "Discovery",
    "DisruptionBlocked",
    "Expired",
    "FieldConflict",
    "Forbidden",
    "InCluster",
    "Informer",
    "InformerMetrics",
    "Invalid",
    "KubeConfig",
    "KubernetesBackend",
    "Lease",
    "Meta",
    "Node",
    "NotFound",
    "Overloaded",
    "Pod",
    "PodMetrics",
    "Removed",
    "Replaced",
    "ReplicaSet",
    "Requests",
    "Resource",
    "Snapshot",
    "Tls",
    "Traffic",
    "Unauthenticated",
    "Unreachable",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"{__name__}.{home}")
    except ModuleNotFoundError as error:
        if error.name not in ("msgspec", "kubernetes_asyncio"):
            raise
        raise MissingExtra("Kubernetes needs its extra: pip install 'agentfleet[kubernetes]'") from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
