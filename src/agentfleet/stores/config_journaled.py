"""RECORD: configuration in memory that a journal remembers: what the next manager must know, not its history."""

from __future__ import annotations

from dataclasses import asdict

from agentfleet.clock import Clock
from agentfleet.core.configrollout import ConfigPhase
from agentfleet.events import Event
from agentfleet.stores.config import ConfigRevision, RolloutRecord
from agentfleet.stores.config_memory import MemoryConfig
from agentfleet.stores.journal import Journal

STATE = "state.config"
"""Kind of the event that remembers the newest revision that is for all."""
TRIAL = "state.config_trial"
"""And the one that was last rolled out in steps."""
ROLLOUT = "state.config_rollout"
"""And how far that has come."""


class JournaledConfig(MemoryConfig):
    """`MemoryConfig` whose present state outlives its process, in the journal of the fleet that is its one key.

    Args:
        journal: Where it is remembered.
        key: The fleet's name.
        clock: Dates the events.
    """

    __slots__ = ("_clock", "_journal", "_key")

    def __init__(self, journal: Journal, key: str, clock: Clock) -> None:
        super().__init__()
        self._journal, self._key, self._clock = journal, key, clock
        self.recall()

    def recall(self) -> None:
        """Take up what another manager has written to the same journal since."""
        known = (remembered(self._journal, self._key, kind) for kind in (STATE, TRIAL))
        for revision in sorted((each for each in known if each is not None), key=lambda each: each.revision):
            self._add(revision)
        record = self._journal.last_state(self._key, ROLLOUT)
        if record is not None:
            self._set(RolloutRecord.from_dict(record.data))

    async def append(self, revision: ConfigRevision, *, expect: int) -> None:
        """Keep a revision; remembered before it is."""
        self._check(revision, expect)
        self._note(TRIAL if revision.rollout else STATE, revision)
        await super().append(revision, expect=expect)

    async def advance(self, record: RolloutRecord, *, expect: int) -> None:
        """Write how far a rollout has come; remembered before it is."""
        self._check_record(record, expect)
        self._journal.append(Event(self._clock.now(), record.key, ROLLOUT, data=asdict(record)))
        found = await self.find(record.key, record.revision)
        if record.phase == ConfigPhase.COMPLETE and found is not None:
            self._note(STATE, found)
        await super().advance(record, expect=expect)

    def _note(self, kind: str, revision: ConfigRevision) -> None:
        """Write a revision down so that earlier versions can read it."""
        said = {name: value for name, value in asdict(revision).items() if name != "request"}
        self._journal.append(Event(self._clock.now(), revision.key, kind, data=said))


def remembered(journal: Journal, fleet: str, kind: str = STATE) -> ConfigRevision | None:
    """A revision that an earlier manager delivered."""
    found = journal.last_state(fleet, kind)
    return None if found is None else ConfigRevision(**found.data)
