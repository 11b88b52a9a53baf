"""agentfleet runs fleets of AI-agent instances: deploy, scale, watch, heal, upgrade, configure.

The public names live here and are imported on first use, so that `import agentfleet` costs next to nothing and an agent
process that only wants `agentfleet.agent` pays for nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentfleet.autoscaler import Autoscaler
    from agentfleet.backends.memory import MemoryBackend
    from agentfleet.backends.process import ProcessBackend
    from agentfleet.clock import Clock, SystemClock
    from agentfleet.configspec import ConfigRollout
    from agentfleet.configstatus import ConfigStatus
    from agentfleet.configstore import ConfigStore
    from agentfleet.dispatch import Dispatcher
    from agentfleet.endpoints import Endpoint, Endpoints
    from agentfleet.errors import (
        AgentFleetError,
        BackendError,
        BackendRefused,
        BackendUnavailable,
        ConfigConflict,
        ConfigError,
        ConfigInvalid,
        ConfigNotFound,
        Conflict,
        DeadlineExceeded,
        InstanceGone,
        JournalError,
        MissingExtra,
        NotFound,
        NotLeader,
        OperationRefused,
        Outdated,
        RolloutFailed,
        SpecError,
    )
    from agentfleet.events import Event
    from agentfleet.fleet import Fleet
    from agentfleet.health import HealthMonitor
    from agentfleet.instances import AgentStatus, HealthState, Instance, Isolation, Node, Phase, Usage
    from agentfleet.leadership import Leadership
    from agentfleet.manager import FleetManager
    from agentfleet.specs import (
        AgentTemplate,
        Backoff,
        CpuTarget,
        CustomCheck,
        FleetSpec,
        HealthPolicy,
        HeartbeatCheck,
        HttpCheck,
        MemoryTarget,
        MetricTarget,
        QueueTarget,
        RecoveryPolicy,
        RolloutPolicy,
        ScalingBehavior,
        ScalingPolicy,
        ScalingRule,
        TcpCheck,
    )
    from agentfleet.stores.jsonl_journal import JsonlJournal
    from agentfleet.stores.leases import MemoryLeases
    from agentfleet.stores.memory_journal import MemoryJournal
    from agentfleet.telemetry import Telemetry

__version__ = "0.1.0"

_HOMES = {
    "autoscaler": ("Autoscaler",),
    "backends.memory": ("MemoryBackend",),
    "backends.process": ("ProcessBackend",),
    "clock": ("Clock", "SystemClock"),
    "configspec": ("ConfigRollout",),
    "configstatus": ("ConfigStatus",),
    "configstore": ("ConfigStore",),
    "dispatch": ("Dispatcher",),
    "endpoints": ("Endpoint", "Endpoints"),
    "errors": (
        "AgentFleetError",
        "BackendError",
        "BackendRefused",
        "BackendUnavailable",
        "ConfigConflict",
        "ConfigError",
        "ConfigInvalid",
        "ConfigNotFound",
        "Conflict",
        "DeadlineExceeded",
        "InstanceGone",
        "JournalError",
        "MissingExtra",
        "NotFound",
        "NotLeader",
        "OperationRefused",
        "Outdated",
        "RolloutFailed",
        "SpecError",
    ),
    "events": ("Event",),
    "fleet": ("Fleet",),
    "health": ("HealthMonitor",),
    "instances": ("AgentStatus", "HealthState", "Instance", "Isolation", "Node", "Phase", "Usage"),
    "leadership": ("Leadership",),
    "manager": ("FleetManager",),
    "specs": (
        "AgentTemplate",
        "Backoff",
        "CpuTarget",
        "CustomCheck",
        "FleetSpec",
        "HealthPolicy",
        "HeartbeatCheck",
        "HttpCheck",
        "MemoryTarget",
        "MetricTarget",
        "QueueTarget",
        "RecoveryPolicy",
        "RolloutPolicy",
        "ScalingBehavior",
        "ScalingPolicy",
        "ScalingRule",
        "TcpCheck",
    ),
    "stores.jsonl_journal": ("JsonlJournal",),
    "stores.leases": ("MemoryLeases",),
    "stores.memory_journal": ("MemoryJournal",),
    "telemetry": ("Telemetry",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AgentFleetError",
    "AgentStatus",
    "AgentTemplate",
    "Autoscaler",
    "BackendError",
    "BackendRefused",
    "BackendUnavailable",
    "Backoff",
    "Clock",
    "ConfigConflict",
    "ConfigError",
    "ConfigInvalid",
    "ConfigNotFound",
    "ConfigRollout",
    "ConfigStatus",
    "ConfigStore",
    "Conflict",
    "CpuTarget",
    "CustomCheck",
    "DeadlineExceeded",
    "Dispatcher",
    "Endpoint",
    "Endpoints",
    "Event",
    "Fleet",
    "FleetManager",
    "FleetSpec",
    "HealthMonitor",
    "HealthPolicy",
    "HealthState",
    "HeartbeatCheck",
    "HttpCheck",
    "Instance",
    "InstanceGone",
    "Isolation",
    "JournalError",
    "JsonlJournal",
    "Leadership",
    "MemoryBackend",
    "MemoryJournal",
    "MemoryLeases",
    "MemoryTarget",
    "MetricTarget",
    "MissingExtra",
    "Node",
    "NotFound",
    "NotLeader",
    "OperationRefused",
    "Outdated",
    "Phase",
    "ProcessBackend",
    "QueueTarget",
    "RecoveryPolicy",
    "RolloutFailed",
    "RolloutPolicy",
    "ScalingBehavior",
    "ScalingPolicy",
    "ScalingRule",
    "SpecError",
    "SystemClock",
    "TcpCheck",
    "Telemetry",
    "Usage",
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'agentfleet' has no attribute {name!r}")
    value = getattr(import_module(f"agentfleet.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
