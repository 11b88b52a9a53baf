"""What fake nodes are like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from agentfleet.errors import SpecError
from agentfleet.testing.kube.behaviour import Behaviour, Timing


@dataclass(frozen=True, slots=True)
class KubeletOptions:
    """How many nodes, and what they and their pods are like. Times are seconds.

    Attributes:
        nodes: How many.
        prefix: They are called prefix-0, prefix-1, …
        zones: Their zones, in turn.
        region: Their region.
        capacity: What each has.
        labels: Further labels of each.
        behaviour: How containers behave, unless their image has a rule of its own.
        timing: Restarts and back-offs.
        lease_period: Between two renewals of a lease.
        status_period: Between two reports of a node's status.
        sync_period: Between two comparisons of what was reported of the pods with what is so.
        addresses: The network that nodes and pods get theirs from, all of it on loopback. By default one of
            127.16.0.0/16 to 127.250.0.0/16 that no other kubelet of this machine has.
        writers: How many writes to the API server may be under way at once.
        events: Whether Warning events are written, as a kubelet does.
        remove: Whether nodes and their pods are deleted at the end.
        leave_within: Seconds that this may take.
    """

    nodes: int = 20
    prefix: str = "node"
    zones: Sequence[str] = ("zone-a", "zone-b", "zone-c")
    region: str = "region-1"
    capacity: Mapping[str, str] = field(default_factory=lambda: {"cpu": "64", "memory": "256Gi", "pods": "110"})
    labels: Mapping[str, str] = field(default_factory=dict)
    behaviour: Behaviour = field(default_factory=Behaviour)
    timing: Timing = field(default_factory=Timing)
    lease_period: float = 10.0
    status_period: float = 60.0
    sync_period: float = 10.0
    addresses: str | None = None
    writers: int = 32
    events: bool = True
    remove: bool = True
    leave_within: float = 15.0

    def __post_init__(self) -> None:
        if self.nodes < 1 or not self.zones:
            raise SpecError(f"{self.nodes} nodes in {len(self.zones)} zones: there must be one at least")

    @classmethod
    def from_fields(cls, told: Mapping[str, Any]) -> Self:
        """Make options of JSON.

        Raises:
            SpecError: A field does not exist.
        """
        known = {each.name for each in fields(cls)}
        if unknown := set(told) - known:
            raise SpecError(f"KubeletOptions has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
        made = dict(told)
        for name, kind in (("behaviour", Behaviour), ("timing", Timing)):
            if isinstance(made.get(name), Mapping):
                made[name] = kind(**made[name])
        return cls(**made)
