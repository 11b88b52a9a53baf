"""Rolls a configuration out in rings: observes its trials, has `core.configrollout` decide, writes down, and tells.

Who may have the new revision stands in the store (`RolloutRecord`), written by the fleet's leader before anybody
is given it, and read by all that deliver: the leader's `feed`, and every `delivery`. So it is the same for the next
leader, which goes on where this one was; instances that have not proved the revision then bake once more.

**What it costs in disruption.** An instance on trial is in service: counting it as disrupted until it has proved the
revision would stop all repair for as long as a ring bakes. But for a moment after it has been given the revision it may
fall out of service by our own doing, and those are the disruptions that the budget is about. So it asks the disruption
governor, last of all causes, and takes from the same budget until what the revision does to it would show in its
health: until it has acknowledged it and a failing check would have found it sick, for `recovery.settle` at most. Thus a
revision that kills at once never has more than the budget out of service, also in the ring of 100 %, and a fleet in a
storm, or with too few healthy instances, starts no trial at all. Taking a revision back asks nobody: it is the cure.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import anyio

from agentfleet.clock import Clock
from agentfleet.configacks import AckBook
from agentfleet.configspec import ConfigRollout
from agentfleet.configstore import ConfigStore
from agentfleet.configtrials import Trials
from agentfleet.configwords import told_of
from agentfleet.core.configrollout import ConfigDecision, ConfigMemory, ConfigPhase, begin, decide
from agentfleet.core.fence import Fence
from agentfleet.core.reason import Reason
from agentfleet.desk import Desk
from agentfleet.errors import (
    ConfigConflict,
    ConfigError,
    ConfigInvalid,
    ConfigNotFound,
    DeadlineExceeded,
    NotLeader,
    SpecError,
)
from agentfleet.stores.config import ConfigRevision, RolloutRecord
from agentfleet.turn import Turn

log = logging.getLogger(__name__)

AUTHOR = "agentfleet"
"""Who publishes a revision that takes another one back."""
TICK = 1.0
"""Seconds between two looks at the trials."""
RETRY = 5.0
"""Seconds before the store is asked again when it has failed."""
_QUIET = frozenset({"config.release", "config.wait", "config.proved", "governor.budget"})
"""Reasons of a rollout that simply goes on."""


class ConfigRings:
    """Rolls one key's revisions out in one fleet, while its manager leads.

    Args:
        store: Where revisions and rollouts are kept.
        key: Of the documents: the fleet's name.
        desk: The fleet's working place.
        turn: Asks the governor.
        acks: What instances have said; run by the feed.
        clock: Times it.
        record: Writes events.
        fence: Lets nothing be written by who leads no more.
        sees: Whether the fleet is seen as a whole.
    """

    def __init__(
        self,
        store: ConfigStore,
        key: str,
        *,
        desk: Desk,
        turn: Turn,
        acks: AckBook,
        clock: Clock,
        record: Callable[..., Any],
        fence: Fence,
        sees: Callable[[], bool],
    ) -> None:
        self._store, self._key = store, key
        self._desk, self._turn = desk, turn
        self._acks = acks
        self._clock = clock
        self._record = record
        self._fence = fence
        self._sees = sees
        self._trials: Trials | None = None
        self._moved = anyio.Event()
        self._ends: dict[int, RolloutRecord] = {}
        self._told: object = None

    async def over(self, revision: int) -> RolloutRecord:
        """Wait until the rollout of a revision has ended, one way or another."""
        while revision not in self._ends:
            await self._moved.wait()
        return self._ends[revision]

    async def run(self) -> None:
        """Roll out what is published to be, until cancelled."""
        while True:
            try:
                self._fence.ensure()
                await self._attend()
            except NotLeader:  # the term goes on, or it ends and this loop with it
                await self._clock.sleep(TICK)
            except ConfigConflict:
                await self._clock.sleep(0)  # somebody else has written: look anew
            except (ConfigError, DeadlineExceeded) as error:
                log.warning("the rollout of configuration %s cannot go on: %s", self._key, error)
                self._hold(Reason("config.unavailable", f"the store cannot be asked: {told_of(error)['message']}"))
                await self._clock.sleep(RETRY)

    async def _attend(self) -> None:
        """Look at what is published, do what it asks for, and wait for what comes next."""
        try:
            newest = await self._store.get(self._key)
        except ConfigNotFound:
            await self._store.changed(self._key, 0)
            return
        record = await self._store.rollout(self._key)
        if newest.rollout:
            record = await self._roll_out(newest, record)
        elif record is not None and record.phase in (ConfigPhase.PROGRESSING, ConfigPhase.FAILED):
            record = await self._close(record, newest)
        await self._store.changed(self._key, newest.revision, 0 if record is None else record.version)

    # ------------------------------------------------------------------------------------------ one rollout

    async def _roll_out(self, newest: ConfigRevision, record: RolloutRecord | None) -> RolloutRecord:
        """Take a revision from ring to ring until it is over, or another one is published."""
        try:
            policy = ConfigRollout.from_json(newest.rollout)
        except SpecError as error:  # a later version of this library wrote it
            self._hold(Reason("config.unreadable", f"the way to roll it out cannot be read: {error}"))
            return record or RolloutRecord(self._key, 0, 0, 0, ConfigPhase.PROGRESSING)
        known = record if record is not None and record.revision == newest.revision else None
        if known is not None and known.phase in (ConfigPhase.COMPLETE, ConfigPhase.ROLLED_BACK):
            return known
        self._trials = trials = Trials(self._desk, self._acks, newest.revision, known.trials if known else None)
        now = self._clock.now()
        memory = begin(now, trials.total()) if known is None else ConfigMemory.from_dict(known.memory)
        if known is None:
            data = {"revision": newest.revision, "base": newest.base, "rings": list(policy.rings)}
            self._record("config.rollout", data=data | {"author": newest.author, "reason": newest.reason})
        version = 0 if record is None else record.version
        blank = RolloutRecord(self._key, version, newest.revision, newest.base, memory.phase)
        # written at once, so that an earlier leader's next write is refused
        record = await self._write(known or blank, memory, known.reasons if known else (), version)
        try:
            trials.resume(self._desk.spec.recovery.settle)
            while not _is_over(record, policy):
                record, memory = await self._step(policy, record, memory)
                if not _is_over(record, policy) and await self._pause(newest, record):
                    return record
        finally:
            self._trials = None
        self._end(record)
        return record

    async def _step(
        self, policy: ConfigRollout, record: RolloutRecord, memory: ConfigMemory
    ) -> tuple[RolloutRecord, ConfigMemory]:
        assert self._trials is not None
        trials, now = self._trials, self._clock.now()
        observed = trials.observe(policy, memory, now, self._why_not())
        decision, after = decide(policy, observed, memory, now)
        if decision.forgive:
            trials.forgive()
        chosen: list[str] = []
        reasons = decision.reasons
        if decision.release:
            admitted, held = self._turn.put_on_trial(trials.choose(decision.release), now)
            trials.add(admitted, now)
            chosen = [member.instance.id for member in admitted]
            reasons = reasons if chosen or held is None else (held, *reasons)
        said = [each.to_dict() for each in reasons] or record.reasons  # while it waits to be taken back
        record = await self._write(record, after, said, record.version)
        self._tell(policy, record, (memory, after), chosen, replace(decision, reasons=reasons))
        if decision.roll_back:
            record = await self._roll_back(record, after, decision)
        return record, after

    async def _write(
        self, record: RolloutRecord, memory: ConfigMemory, reasons: Sequence[Any], version: int
    ) -> RolloutRecord:
        """Write down how far it has come, if that has changed."""
        assert self._trials is not None
        epoch = self._fence.ensure()
        fresh = replace(
            record,
            phase=memory.phase.value,
            memory=memory.to_dict(),
            trials=self._trials.to_record(),
            reasons=tuple(reasons),
            epoch=epoch,
        )
        same = [each["code"] for each in fresh.reasons] == [each["code"] for each in record.reasons]
        if same and record.version and replace(fresh, reasons=record.reasons) == record:
            return record
        fresh = replace(fresh, version=version + 1)
        await self._store.advance(fresh, expect=version)
        return fresh

    async def _pause(self, newest: ConfigRevision, record: RolloutRecord) -> bool:
        """Wait for the next look; whether something was published meanwhile."""
        with anyio.move_on_after(TICK):
            await self._store.changed(self._key, newest.revision, record.version)
            return (await self._store.get(self._key)).revision != newest.revision
        return False

    def _why_not(self) -> Reason | None:
        """Why nothing may be tried or concluded now."""
        state = self._desk.state
        if not self._sees():
            return Reason("config.blind", "the fleet is not seen as a whole")
        if state is None or not state.desired:
            return Reason("config.stopped", "the fleet is not deployed, or stopped")
        if state.paused:
            return Reason("config.paused", "the fleet is paused")
        if state.rolling:
            return Reason("config.rolling", "a new version is being rolled out; one change at a time can be judged")
        if self._turn.frozen:
            return Reason("config.frozen", "so many instances are sick that nothing is tried")
        return None

    # ------------------------------------------------------------------------------------------ its ends

    async def _roll_back(self, record: RolloutRecord, memory: ConfigMemory, decision: ConfigDecision) -> RolloutRecord:
        """Publish the content from before, for all, under a new number."""
        why = next((str(reason) for reason in decision.reasons), "") or _said(record)
        try:
            self._fence.ensure()
            restored = await self._store.rollback(
                self._key,
                record.base,
                author=AUTHOR,
                reason=f"revision {record.revision} has failed: {why}"[:4000],
                expect=record.revision,
            )
        except (ConfigInvalid, ConfigNotFound) as error:
            reason = Reason("config.not_restored", f"revision {record.base} cannot be published again: {error}")
            self._hold(reason)
            return await self._finish(record, ConfigPhase.FAILED, [reason.to_dict(), *record.reasons])
        record = await self._finish(replace(record, memory=memory.to_dict()), ConfigPhase.ROLLED_BACK, record.reasons)
        self._note_rolled_back(record, restored)
        return record

    async def _close(self, record: RolloutRecord, newest: ConfigRevision) -> RolloutRecord:
        """Another revision was published for all: by an earlier leader, to take this one back, or by somebody else."""
        back = newest.restores == record.base and newest.author == AUTHOR
        phase = ConfigPhase.ROLLED_BACK if back else ConfigPhase.SUPERSEDED
        record = await self._finish(record, phase, record.reasons)
        self._end(record)
        if back:
            self._note_rolled_back(record, newest)
        else:
            data = {"revision": record.revision, "by": newest.revision, "author": newest.author}
            self._record("config.superseded", data=data)
        return record

    async def _finish(self, record: RolloutRecord, phase: ConfigPhase, reasons: Sequence[Any]) -> RolloutRecord:
        epoch = self._fence.ensure()
        memory = dict(record.memory) | {"phase": phase.value}
        ended = replace(record, phase=phase.value, memory=memory, reasons=tuple(reasons), epoch=epoch)
        ended = replace(ended, version=record.version + 1)
        await self._store.advance(ended, expect=record.version)
        return ended

    def _note_rolled_back(self, record: RolloutRecord, restored: ConfigRevision) -> None:
        data = {"revision": record.revision, "to": restored.revision, "restores": restored.restores}
        self._record("config.rolled_back", data=data)

    def _end(self, record: RolloutRecord) -> None:
        self._ends[record.revision] = record
        moved, self._moved = self._moved, anyio.Event()
        moved.set()

    # ------------------------------------------------------------------------------------------ what is told

    def _tell(
        self,
        policy: ConfigRollout,
        record: RolloutRecord,
        turned: tuple[ConfigMemory, ConfigMemory],
        chosen: list[str],
        decision: ConfigDecision,
    ) -> None:
        before, after = turned
        data: dict[str, Any] = {"revision": record.revision, "ring": after.ring}
        ended = decision.phase is not before.phase
        if after.target and not before.target:
            self._record("config.ring", data=data | {"share": policy.rings[after.ring], "target": after.target})
        if chosen:
            self._record("config.released", data=data | {"instances": chosen}, reasons=decision.reasons)
        if ended and decision.phase is ConfigPhase.COMPLETE:
            data |= {"seconds": round(self._clock.now() - after.began_at, 3)}
            self._record("config.rolled_out", data=data, reasons=decision.reasons)
        elif ended and decision.phase is ConfigPhase.FAILED:
            data |= {"rolls_back": policy.auto_rollback, "instances": sorted(record.trials)}
            self._record("config.halted", data=data, reasons=decision.reasons)
        elif decision.reasons and decision.reasons[0].code not in _QUIET:
            self._hold(decision.reasons[0])
        elif decision.reasons:
            self._told = None

    def _hold(self, reason: Reason) -> None:
        """Tell once why a rollout does not go on."""
        if self._told != reason.code:
            self._told = reason.code
            self._record("config.held", reasons=(reason,))


def _is_over(record: RolloutRecord, policy: ConfigRollout) -> bool:
    halted = record.phase == ConfigPhase.FAILED and not policy.auto_rollback
    stuck = any(each["code"] == "config.not_restored" for each in record.reasons)
    return halted or stuck or record.phase in (ConfigPhase.COMPLETE, ConfigPhase.ROLLED_BACK, ConfigPhase.SUPERSEDED)


def _said(record: RolloutRecord) -> str:
    return next((str(each["text"]) for each in record.reasons), "it has failed")
