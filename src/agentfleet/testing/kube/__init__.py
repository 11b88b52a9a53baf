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
    from agentfleet.testing.kube.certificates import Authority, Certificate
    from agentfleet.testing.kube.client import Client
    from agentfleet.testing.kube.errors import ApiRefused, AssetsMissing, PlaneFailed
    from agentfleet.testing.kube.faults import NodeFaults, PodSeen
    from agentfleet.testing.kube.kubelet import FakeKubelet
    from agentfleet.testing.kube.kubeletoptions import KubeletOptions
    from agentfleet.testing.kube.kubeletprocess import KubeletProcess
    from agentfleet.testing.kube.plane import ControlPlane, PlaneOptions
    from agentfleet.testing.kube.programs import free_ports
    from agentfleet.testing.kube.proxy import FaultProxy
    from agentfleet.testing.kube.proxyfaults import (
        Answer,
        EventFault,
        Fault,
        Injection,
        NoAnswer,
        Reset,
        SlowBody,
        TruncatedBody,
        drop_event,
        duplicate_event,
        expired_event,
        html_502,
        status_answer,
        swap_events,
    )

_HOME_OF = {
    "Access": "access",
    "Answer": "proxyfaults",
    "ApiRefused": "errors",
    "AssetsMissing": "errors",
    "Authority": "certificates",
    "Behaviour": "behaviour",
    "Certificate": "certificates",
    "Client": "client",
    "ControlPlane": "plane",
    "EventFault": "proxyfaults",
    "FakeKubelet": "kubelet",
    "Fault": "proxyfaults",
    "FaultProxy": "proxy",
    "Injection": "proxyfaults",
    "KubeletOptions": "kubeletoptions",
    "KubeletProcess": "kubeletprocess",
    "NoAnswer": "proxyfaults",
    "NodeFaults": "faults",
    "PlaneFailed": "errors",
    "PlaneOptions": "plane",
    "PodSeen": "faults",
    "Reset": "proxyfaults",
    "SlowBody": "proxyfaults",
    "Timing": "behaviour",
    "TruncatedBody": "proxyfaults",
    "drop_event": "proxyfaults",
    "duplicate_event": "proxyfaults",
    "expired_event": "proxyfaults",
    "find_assets": "assets",
    "free_ports": "programs",
    "html_502": "proxyfaults",
    "status_answer": "proxyfaults",
    "swap_events": "proxyfaults",
}

__all__ = [
    "Access",
    "Answer",
    "ApiRefused",
    "AssetsMissing",
    "Authority",
    "Behaviour",
    "Certificate",
    "Client",
    "ControlPlane",
    "EventFault",
    "FakeKubelet",
    "Fault",
    "FaultProxy",
    "Injection",
    "KubeletOptions",
    "KubeletProcess",
    "NoAnswer",
    "NodeFaults",
    "PlaneFailed",
    "PlaneOptions",
    "PodSeen",
    "Reset",
    "SlowBody",
    "Timing",
    "TruncatedBody",
    "drop_event",
    "duplicate_event",
    "expired_event",
    "find_assets",
    "free_ports",
    "html_502",
    "status_answer",
    "swap_events",
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
