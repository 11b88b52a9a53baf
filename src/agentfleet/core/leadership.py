"""Who leads: one candidate's part in an election over a lease, without ever comparing two machines' clocks.

A lease is a record that anybody reads, and that is written only by who knows its version. Whoever leads writes it again
and again; who waits for it watches whether it *changes*. Nothing in the record is a time to anybody but its writer:

- **The leader** may act until `renew_deadline` after the moment just before it *sent* the last write that succeeded, on
  its own monotonic clock. An answer that never comes, or a process that was stopped meanwhile, prolongs nothing.
- **A candidate** takes the lease over when it has seen it unchanged for the whole `duration` on its own monotonic
  clock, counted from when it *received* the answer that showed the last change, and has listened all the while.

The write was sent before it was applied, and applied before anyone saw it. So the old leader has stopped before the new
one starts, as long as no replica's monotonic clock runs more than `duration / renew_deadline` times as fast as another
one's (`LeasePolicy.drift`: 2 by default; real ones differ by less than a thousandth). Wall clocks may say anything.

Each take-over raises the *epoch* by one, under the same compare-and-set, so epochs strictly increase, and a write that
carries its epoch can be told from those of an earlier leader. A leader that could not renew in time has *lapsed*: it
must not act, but if its next renewal finds the lease untouched, nobody has led in between, and the same term goes on.

The memory holds dates of this process's monotonic clock and must not outlive it: it is the one memory that is not kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Self

from pydantic import model_validator

from agentfleet.core.reason import Number, Reason
from agentfleet.specbase import Spec
from agentfleet.units import Period

LONGEST = 60.0
"""No lease lasts longer than this many seconds: a record that says more is believed so far and no farther."""
_REMEMBERED = 8
"""Versions by which an old answer is told from a change."""
_FIRST_BACKOFF = 0.2


class LeasePolicy(Spec):
    """How fast a lease changes hands, and what that costs. `docs/leadership.md` says why the defaults are these."""

    duration: Period = 7.0
    """A lease that has not changed for so long may be taken; at most 60 s."""
    renew_deadline: Period = 3.5
    """The leader stops acting so long after it sent its last successful renewal."""
    renew: Period = 2.0
    """The leader writes the lease so often: this is the whole steady cost of leading."""
    poll: Period = 0.7
    """The others read it so often: this is how soon they know that it was given up."""
    request: Period = 1.0
    """Deadline of each read and write of the lease."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.renew < self.renew_deadline < self.duration <= LONGEST:
            raise ValueError(f"must be: renew < renew_deadline < duration <= {LONGEST:g} s")
        if self.poll + self.request > self.duration / 2:
            raise ValueError("poll + request must be at most half of duration, or the watchers do not hear enough")
        return self

    @property
    def drift(self) -> float:
        """How many times as fast as another's any replica's monotonic clock may run."""
        return float(self.duration / self.renew_deadline)


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """A lease as its store holds it."""

    holder: str | None
    """Identity of who leads; None: it was given up."""
    epoch: int
    """Raised by one with each take-over."""
    duration: float = 0.0
    """What the holder's policy says; a candidate waits for the longer of this and its own."""
    renewed: str = ""
    """The store's mark of the last write: shown to people, compared with nothing."""
    version: str = ""
    """What an update must name, so that it changes nothing but this very state."""
    uid: str = ""
    """A lease that was deleted and made again has another."""
    taken: bool = False
    """In a write: whether it begins a term."""


class Action(StrEnum):
    """What to do now."""

    HOLD = "hold"
    """Nothing until `wake`."""
    LOOK = "look"
    """Read the lease."""
    ACQUIRE = "acquire"
    """Write it to lead in a new epoch."""
    RENEW = "renew"
    """Write it to go on leading."""
    RELEASE = "release"
    """Write it to give it up."""
    DONE = "done"
    """Nothing is left to give up."""


@dataclass(frozen=True, slots=True)
class Looked:
    """The lease was read; None: there is none."""

    record: LeaseRecord | None


@dataclass(frozen=True, slots=True)
class Wrote:
    """The decision's write was accepted: the lease is now `record`. It had not been sent before `sent_at`."""

    record: LeaseRecord
    sent_at: float


@dataclass(frozen=True, slots=True)
class Refused:
    """The write found another version, or nothing is known of the lease any more: look again."""


@dataclass(frozen=True, slots=True)
class Failed:
    """No answer, or none that says anything: a write may or may not have been applied."""

    error: str


News = Looked | Wrote | Refused | Failed


@dataclass(frozen=True, slots=True)
class LeaseObserved:
    """What a candidate knows of itself and has just learnt."""

    identity: str
    """Of this process and no other, ever."""
    news: News | None = None
    """The outcome of the last decision, None if only time has passed."""
    luck: float = 1.0
    """A random number between 0 and 1: shortens the waits, so that candidates do not act in step."""
    leaving: bool = False
    """Whether this candidate wants nothing any more but to give up what it has."""


@dataclass(frozen=True, slots=True)
class LeaseMemory:
    """What a candidate remembers. Every date is of its own monotonic clock."""

    known: bool = False
    """Whether `record` is what an update could be based on."""
    record: LeaseRecord | None = None
    past: tuple[str, ...] = ()
    """Versions seen of this lease: who reads one of them again reads an old answer."""
    seen_at: float = -math.inf
    """Since when `record` is known to be unchanged, as far as this candidate has listened."""
    looked_at: float = -math.inf
    highest: int = 0
    """The highest epoch seen."""
    epoch: int | None = None
    """Of the term that this candidate holds."""
    valid_until: float = -math.inf
    """Up to when it may act in it."""
    failures: int = 0
    """Since the last answer."""
    due: float = -math.inf
    """When to do the next thing."""


@dataclass(frozen=True, slots=True)
class LeaseDecision:
    """What to do now, and whether this candidate leads."""

    action: Action
    write: LeaseRecord | None
    """What to store, for the actions that write: with a version it is an update of that version, without one a new
    lease."""
    epoch: int | None
    """The term that this candidate holds, None if none. It may act in it only before `valid_until`."""
    valid_until: float
    holder: str | None
    """Who holds the lease, as far as known."""
    wake: float
    """When to ask again if `action` is to hold."""
    reasons: tuple[Reason, ...]


def decide(
    policy: LeasePolicy, observed: LeaseObserved, memory: LeaseMemory, now: float
) -> tuple[LeaseDecision, LeaseMemory]:
    """Look, acquire, renew, hold or release.

    Args:
        policy: The time spans.
        observed: The outcome of the last decision.
        memory: From the last decision.
        now: This process's monotonic clock, in seconds; read *after* the news arrived.

    Returns:
        The decision and the memory for the next one. Carry the action out, and tell its outcome as `news`.
    """
    held = memory.epoch
    memory = _folded(policy, observed, memory, now)
    notes: list[Reason] = []
    if held is not None and memory.epoch is None and not observed.leaving:
        who = "nobody" if memory.record is None or memory.record.holder is None else memory.record.holder
        notes.append(Reason("lease.lost", f"the lease is held by {who}: the term is over", {"epoch": held}))
    elif memory.epoch is not None and now >= memory.valid_until:
        text = "not renewed in time: nothing may be done in this term until a renewal succeeds"
        notes.append(Reason("lease.lapsed", text, {"epoch": memory.epoch, "late_s": now - memory.valid_until}))
    if isinstance(observed.news, Failed):
        numbers: dict[str, Number] = {"failures": memory.failures}
        notes.append(Reason("lease.failed", f"the store did not answer: {observed.news.error}", numbers))
    action, reason = (_leave if observed.leaving else _next)(policy, observed, memory, now)
    decision = LeaseDecision(
        action=action,
        write=_write(action, policy, observed.identity, memory),
        epoch=memory.epoch,
        valid_until=memory.valid_until,
        holder=None if memory.record is None else memory.record.holder,
        wake=memory.due if action is Action.HOLD else now,
        reasons=(*notes, reason),
    )
    return decision, memory


# ------------------------------------------------------------------------------------------------ what was learnt


def _folded(policy: LeasePolicy, observed: LeaseObserved, memory: LeaseMemory, now: float) -> LeaseMemory:
    match observed.news:
        case None:
            return memory
        case Looked(record):
            return _looked(policy, observed, memory, now, record)
        case Wrote() as wrote:
            return _wrote(policy, observed, memory, wrote, now)
        case Refused():
            due = now + _backoff(policy, memory.failures + 1, observed.luck)
            return replace(memory, known=False, failures=memory.failures + 1, due=due)
        case Failed():
            due = now + _backoff(policy, memory.failures + 1, observed.luck)
            return replace(memory, failures=memory.failures + 1, due=due)


def _looked(
    policy: LeasePolicy, observed: LeaseObserved, memory: LeaseMemory, now: float, record: LeaseRecord | None
) -> LeaseMemory:
    first = memory.looked_at == -math.inf
    heard = now - memory.looked_at <= policy.duration / 2
    if not first and _is_old(record, memory):
        record = memory.record
        seen_at = memory.seen_at if heard else now  # silence counts only while someone listens
        past = memory.past
    else:
        seen_at = now
        same = record is not None and memory.record is not None and record.uid == memory.record.uid
        past = _remembered(memory.past if same else (), record)
    epoch = memory.epoch
    if record is None or record.holder != observed.identity or record.epoch != epoch:
        epoch = None
    memory = replace(
        memory,
        known=True,
        record=record,
        past=past,
        seen_at=-math.inf if first and record is None else seen_at,  # there has never been one, for all we know
        looked_at=now,
        highest=max(memory.highest, 0 if record is None else record.epoch),
        epoch=epoch,
        valid_until=memory.valid_until if epoch is not None else -math.inf,
        failures=0,
    )
    if epoch is not None:
        return replace(memory, due=now)  # the only reason to look while leading was a refused renewal
    spread = 0.8 + 0.2 * observed.luck
    return replace(memory, due=max(now, min(now + policy.poll * spread, _free_at(policy, observed.identity, memory))))


def _is_old(record: LeaseRecord | None, memory: LeaseMemory) -> bool:
    """Whether an answer shows nothing new: the state already known, or an even older one."""
    if record is None or memory.record is None:
        return record is memory.record
    if record.uid != memory.record.uid:
        return False
    return record.version in memory.past or record.epoch < memory.record.epoch


def _remembered(past: tuple[str, ...], record: LeaseRecord | None) -> tuple[str, ...]:
    return past if record is None else (*past[-(_REMEMBERED - 1) :], record.version)


def _wrote(policy: LeasePolicy, observed: LeaseObserved, memory: LeaseMemory, wrote: Wrote, now: float) -> LeaseMemory:
    record = wrote.record
    same = memory.record is not None and record.uid == memory.record.uid
    leads = record.holder == observed.identity
    return replace(
        memory,
        known=True,
        record=record,
        past=_remembered(memory.past if same else (), record),
        seen_at=now,
        looked_at=now,
        highest=max(memory.highest, record.epoch),
        epoch=record.epoch if leads else None,
        valid_until=wrote.sent_at + policy.renew_deadline if leads else -math.inf,
        failures=0,
        due=wrote.sent_at + policy.renew * (0.9 + 0.1 * observed.luck),
    )


def _backoff(policy: LeasePolicy, failures: int, luck: float) -> float:
    span = min(policy.renew, _FIRST_BACKOFF * 2.0 ** min(failures - 1, 16))
    return float(span * (0.5 + luck / 2))


def _free_at(policy: LeasePolicy, identity: str, memory: LeaseMemory) -> float:
    """From when on the lease may be taken, if nothing changes."""
    record = memory.record
    if record is None:  # none, or deleted: whoever held it may act until its deadline
        return memory.seen_at + float(policy.duration)
    if record.holder is None or record.holder == identity:  # given up; or ours by a write whose answer was lost
        return -math.inf
    return memory.seen_at + max(float(policy.duration), min(record.duration, LONGEST))


# ------------------------------------------------------------------------------------------------ what to do


def _next(policy: LeasePolicy, observed: LeaseObserved, memory: LeaseMemory, now: float) -> tuple[Action, Reason]:
    if now < memory.due:
        return Action.HOLD, _holding(memory, now)
    if not memory.known:
        return Action.LOOK, Reason("lease.look", "the lease's present state is not known")
    if memory.epoch is not None:
        numbers: dict[str, Number] = {"epoch": memory.epoch, "left_s": memory.valid_until - now}
        return Action.RENEW, Reason("lease.renew", "it is time to renew the lease", numbers)
    free_at = _free_at(policy, observed.identity, memory)
    if now < free_at:
        return Action.LOOK, Reason("lease.look", "it is time to see whether the lease has changed")
    if memory.record is None:
        return Action.ACQUIRE, Reason("lease.absent", "there is no lease: make it", {"epoch": memory.highest + 1})
    if free_at == -math.inf:
        text = "the lease was given up" if memory.record.holder is None else "the lease is ours by a lost answer"
        return Action.ACQUIRE, Reason("lease.free", text, {"epoch": memory.highest + 1})
    if now - memory.looked_at > policy.duration / 2:
        return Action.LOOK, Reason("lease.look", "nobody has listened for a while: look before taking it over")
    silent = now - memory.seen_at
    text = f"{memory.record.holder} has not renewed the lease for {silent:.1f} s"
    return Action.ACQUIRE, Reason("lease.expired", text, {"silent_s": silent, "epoch": memory.highest + 1})


def _leave(
    policy: LeasePolicy,  # noqa: ARG001 - the same shape as `_next`
    observed: LeaseObserved,
    memory: LeaseMemory,
    now: float,
) -> tuple[Action, Reason]:
    ours = memory.record is not None and memory.record.holder == observed.identity
    if not ours and (memory.known or not memory.failures):
        return Action.DONE, Reason("lease.left", "nothing is held")
    if memory.failures and now < memory.due:
        return Action.HOLD, _holding(memory, now)
    if not memory.known:
        return Action.LOOK, Reason("lease.look", "see whether there is anything to give up")
    return Action.RELEASE, Reason("lease.release", "give the lease up, so that another takes it at once")


def _holding(memory: LeaseMemory, now: float) -> Reason:
    numbers: dict[str, Number] = {"wait_s": memory.due - now}
    if memory.failures:
        return Reason("lease.backoff", "wait before asking again", numbers)
    if memory.epoch is not None:
        numbers |= {"epoch": memory.epoch, "left_s": memory.valid_until - now}
        return Reason("lease.leading", "the lease is ours", numbers)
    who = "somebody" if memory.record is None else memory.record.holder
    return Reason("lease.following", f"{who} holds the lease", numbers)


def _write(action: Action, policy: LeasePolicy, identity: str, memory: LeaseMemory) -> LeaseRecord | None:
    record = memory.record
    if action not in (Action.ACQUIRE, Action.RENEW, Action.RELEASE):
        return None
    epoch = memory.highest + 1 if action is Action.ACQUIRE else record.epoch if record else 0
    return LeaseRecord(
        holder=None if action is Action.RELEASE else identity,
        epoch=epoch,
        duration=policy.duration,
        renewed="" if record is None else record.renewed,
        version="" if record is None else record.version,
        uid="" if record is None else record.uid,
        taken=action is Action.ACQUIRE,
    )
