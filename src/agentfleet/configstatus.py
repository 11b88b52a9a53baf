"""How a configuration stands: what is out, who runs what, and how far a rollout in rings has come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from agentfleet.configassign import Assignment, Assignments
from agentfleet.configspec import ConfigRollout
from agentfleet.configstore import ConfigStore
from agentfleet.core.configrollout import ConfigPhase
from agentfleet.core.configtrial import Trial
from agentfleet.stores.acks import ConfigAck
from agentfleet.stores.config import RolloutRecord


@dataclass(frozen=True, slots=True)
class RingStatus:
    """How far the newest rollout in rings has come."""

    revision: int
    base: int
    """The revision that the others keep."""
    phase: str
    """See `core.configrollout.ConfigPhase`."""
    ring: int
    """Number of the present ring, from 0."""
    rings: tuple[int | str, ...]
    """What they hold; empty where that is kept no longer."""
    target: int
    """How many instances the present ring is to have."""
    trials: int
    proved: int
    failed: int
    """Instances that have refused it, turned sick, exited or restarted."""
    reasons: tuple[Mapping[str, Any], ...] = ()
    """Why it is where it is, most decisive first."""


@dataclass(frozen=True, slots=True)
class ConfigStatus:
    """How one fleet's configuration stands."""

    revision: int
    """The revision that is for all; 0 if there is none."""
    trial: int
    """The revision that is on trial; 0 if none is."""
    running: Mapping[str, int] = field(default_factory=dict)
    """Which revision each instance has said it runs; 0 is none. Who has said nothing is absent."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Instances that have refused the newest revision that they were given, and why."""
    rollout: RingStatus | None = None
    """The newest rollout in rings; None if there never was one."""

    @property
    def counts(self) -> Mapping[int, int]:
        """How many instances run each revision."""
        return dict(sorted(Counter(self.running.values()).items()))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)


async def config_status(store: ConfigStore, key: str, acks: Iterable[ConfigAck]) -> ConfigStatus:
    """How a key's configuration stands, in any manager: all of it is in the stores.

    Args:
        store: Where revisions and rollouts are kept.
        key: Of the documents: the fleet's name.
        acks: What its instances have said.

    Raises:
        ConfigError: The store cannot be asked.
        DeadlineExceeded: It did not answer in time.
    """
    assigned = await anext(Assignments(store, key))
    record = await store.rollout(key)
    said = list(acks)
    return ConfigStatus(
        revision=0 if assigned.everyone is None else assigned.everyone.revision,
        trial=0 if assigned.trial is None else assigned.trial.revision,
        running={ack.instance: ack.revision for ack in said},
        refused={ack.instance: ack.why for ack in said if ack.refused > ack.revision},
        rollout=None if record is None else _rings(record, assigned),
    )


def _rings(record: RolloutRecord, assigned: Assignment) -> RingStatus:
    trials = [Trial.from_list(data) for data in record.trials.values()]
    made = next((each.rollout for each in assigned.revisions if each.revision == record.revision), "")
    return RingStatus(
        revision=record.revision,
        base=record.base,
        phase=str(ConfigPhase(record.phase)),
        ring=record.memory["ring"],
        rings=tuple(ConfigRollout.from_json(made).rings) if made else (),
        target=record.memory["target"],
        trials=len(trials),
        proved=sum(trial.proved for trial in trials),
        failed=sum(bool(trial.failure) for trial in trials),
        reasons=tuple(record.reasons),
    )
