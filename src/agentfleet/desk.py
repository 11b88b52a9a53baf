"""What the parts of one fleet's turn share: the spec, the view, the wanted state, and the ways to act and to record.

There is one `Desk` per fleet, and only its turn (`turn.Turn` with `sizing` and `repair`) changes `state`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from agentfleet.actuator import Actuator
from agentfleet.core.governor import Disruption
from agentfleet.disruptions import Disruptions, InFlight
from agentfleet.instances import Instance, Node
from agentfleet.recovery import Wish
from agentfleet.specs import FleetSpec
from agentfleet.state import FleetState
from agentfleet.view import FleetView, Member

Record = Callable[..., Any]
"""`record(kind, instance=None, data=None, reasons=())`: writes one event of this fleet."""


@dataclass
class Desk:
    """One fleet's working place."""

    spec: FleetSpec
    view: FleetView
    actuator: Actuator
    record: Record
    rng: random.Random
    """Makes instance ids."""
    state: FleetState | None = None
    nodes: dict[str, Node] = field(default_factory=dict)
    relocates: bool = False
    """Whether the engine can have an instance replaced away from its node."""
    moving: set[str] = field(default_factory=set)
    """Instances whose stand-in is awaited or takes their place: nothing else is done to them."""
    disruptions: Disruptions = field(init=False)

    def __post_init__(self) -> None:
        self.disruptions = Disruptions(self._note_disruption)

    def _note_disruption(self, slot: int, entry: InFlight | None) -> None:
        self.record(f"state.disruption.{slot}", data={} if entry is None else entry.to_dict())

    @property
    def wanted(self) -> FleetState:
        """The state of a fleet that is deployed."""
        assert self.state is not None, "nothing is decided before the first deployment"
        return self.state

    def acted_upon(self, id: str) -> bool:
        """Whether something is being done to an instance."""
        return id in self.actuator.busy or id in self.moving

    def drain_of(self, instance: Instance) -> float:
        """Seconds that an instance may finish its work, by its own revision's template."""
        revision = self.wanted.revision(instance.revision)
        return float(revision.template.drain if revision is not None else self.wanted.template.drain)

    def end(self, member: Member, grace: float) -> None:
        """Take an instance out of service and tell it to go."""
        self.disruptions.emptied(member.instance.slot)
        self.view.drain(member.instance.id)
        self.actuator.stop(member.instance.id, grace=grace)

    def restart(self, member: Member, grace: float) -> None:
        """Take an instance out of service and tell it to start again in its place."""
        self.view.renew(member.instance.id)
        self.actuator.restart(member.instance.id, grace=grace)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A disruption that a part of the turn wants, for the governor to admit or hold."""

    disruption: Disruption
    member: Member
    wish: Wish | None = None
    """The remedy, if there is to be one; otherwise the instance is to go."""
    going: str = "remove"
    """In which way it goes."""

    @property
    def action(self) -> str:
        """What would be done."""
        return self.going if self.wish is None else self.wish.remedy.value
