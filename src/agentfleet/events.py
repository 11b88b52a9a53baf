"""What happened: the one record type that loops write, journals keep and users read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agentfleet.errors import JournalError


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a fleet.

    Attributes:
        at: Seconds since the epoch.
        fleet: Name of the fleet.
        kind: Dotted, stable, machine-readable: "instance.ready", "rollout.failed", "recovery.held".
        instance: Id of the instance concerned, if it is about one.
        data: JSON-ready details.
        reasons: Why, as dictionaries with code, text and numbers, most decisive first.
        seq: Position in the journal that recorded it, from 1; 0 while unrecorded.
        epoch: The term of the leader that tells it (`agentfleet.leadership`); 0 where there are no leaders.
    """

    at: float
    fleet: str
    kind: str
    instance: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    reasons: tuple[Mapping[str, Any], ...] = ()
    seq: int = 0
    epoch: int = 0

    def to_json(self) -> str:
        """One line of JSON."""
        record: dict[str, Any] = {"seq": self.seq, "at": self.at, "fleet": self.fleet, "kind": self.kind}
        if self.instance is not None:
            record["instance"] = self.instance
        if self.data:
            record["data"] = dict(self.data)
        if self.reasons:
            record["reasons"] = [dict(reason) for reason in self.reasons]
        if self.epoch:
            record["epoch"] = self.epoch
        return json.dumps(record, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> Event:
        """Read back what `to_json` wrote; raises `JournalError` when it is not that."""
        try:
            record = json.loads(line)
            return cls(
                at=float(record["at"]),
                fleet=record["fleet"],
                kind=record["kind"],
                instance=record.get("instance"),
                data=record.get("data", {}),
                reasons=tuple(record.get("reasons", ())),
                seq=record["seq"],
                epoch=record.get("epoch", 0),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise JournalError(f"not a journal line: {bytes(str(line), 'utf-8')[:120]!r}") from error
