"""A real Kubernetes control plane, nodes that are not real, and a network that fails on demand; for tests.

`ControlPlane` runs etcd and the Kubernetes control plane on loopback; `FakeKubelet` (or `KubeletProcess`, in a process
of its own) gives it nodes and makes its pods run; `FaultProxy` stands between it and whoever is tested. The names are
imported on first use: nodes need the extra `agentfleet[kubernetes]`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentfleet.testing.kube.access import Access
    from agentfleet.testing.kube.assets import find_assets
    from agentfleet.testing.kube.behaviour import Behaviour, Timing
    from agentfleet.testing.kube.client import Client
    from agentfleet.testing.kube.errors import ApiRefused, AssetsMissing, PlaneFailed
    from agentfleet.testing.kube.faults import NodeFaults, PodSeen
    from agentfleet.testing.kube.kubelet import FakeKubelet
    from agentfleet.testing.kube.kubeletoptions import KubeletOptions
    from agentfleet.testing.kube.kubeletprocess import KubeletProcess
    from agentfleet.testing.kube.plane import ControlPlane, PlaneOptions
    from agentfleet.testing.kube.proxy import FaultProxy

_HOME_OF = {
    "Access": "access",
    "ApiRefused": "errors",
    "AssetsMissing": "errors",
    "Behaviour": "behaviour",
    "Client": "client",
    "ControlPlane": "plane",
    "FakeKubelet": "kubelet",
    "FaultProxy": "proxy",
    "KubeletOptions": "kubeletoptions",
    "KubeletProcess": "kubeletprocess",
    "NodeFaults": "faults",
    "PlaneFailed": "errors",
    "PlaneOptions": "plane",
    "PodSeen": "faults",
    "Timing": "behaviour",
    "find_assets": "assets",
}

__all__ = [
    "Access",
    "ApiRefused",
    "AssetsMissing",
    "Behaviour",
    "Client",
    "ControlPlane",
    "FakeKubelet",
    "FaultProxy",
    "KubeletOptions",
    "KubeletProcess",
    "NodeFaults",
    "PlaneFailed",
    "PlaneOptions",
    "PodSeen",
    "Timing",
    "find_assets",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
