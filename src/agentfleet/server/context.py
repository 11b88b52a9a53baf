"""What the gate and the routes of one server share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from starlette.types import Receive, Scope, Send

from agentfleet.clock import Clock
from agentfleet.manager import FleetManager
from agentfleet.server.admission import Admission
from agentfleet.server.leaving import Leaving
from agentfleet.server.limits import Limits, Rates
from agentfleet.server.metrics import ApiMetrics
from agentfleet.server.principals import Source
from agentfleet.server.streams import Hub, Places
from agentfleet.stores.audit import AuditTrail

Check = Callable[[], Awaitable[None]]
"""Returns if something can be reached, and raises an `AgentFleetError` otherwise."""


class Beside(Protocol):
    """An ASGI application that answers some requests by itself, and judges by itself who may ask them, and how often.

    Its requests come through the gate: they have an id, headers and a line in the log like all others, and what it
    raises is answered as a problem. They are audited where it says so (`Exchange.counts`), once it has said who asks.
    """

    def claims(self, scope: Scope) -> bool:
        """Whether a request is for it."""
        ...

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        ...


@dataclass(frozen=True, slots=True)
class Api:
    """What the gate and the routes share."""

    manager: FleetManager
    admission: Admission
    limits: Limits
    metrics: ApiMetrics
    audit: AuditTrail
    sources: Sequence[Source]
    rates: Rates
    failures: Rates
    hub: Hub
    places: Places
    waits: Places
    agents: Places
    leaving: Leaving
    checks: Mapping[str, Check]
    insecure_loopback: bool
    open_metrics: bool
    beside: Sequence[Beside] = ()

    @property
    def clock(self) -> Clock:
        """The manager's."""
        return self.manager.clock
