"""Configuration on its way to the agents: each is pushed the revision that it is to have, and acknowledges it.

The feed follows what is assigned (`configassign`): the newest revision to all, or while one is rolled out in steps,
that to the instances on trial and its base to the others. An agent that refuses a revision keeps its last good one and
is reported; one that cannot be reached is tried again until it is gone or has it. Who has its configuration from a
stream (`delivery`) is pushed it only where the stream does not bring it. A new instance is given work only after it has
been offered its configuration.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import anyio
from anyio.abc import TaskGroup

from agentfleet.clock import Clock
from agentfleet.configacks import AckBook, readable
from agentfleet.configassign import Assignment, Assignments, parcel
from agentfleet.configstore import ConfigStore
from agentfleet.configwords import revision_in, told_of
from agentfleet.desk import Record
from agentfleet.errors import BackendError, ConfigError, DeadlineExceeded, NotLeader, SpecError
from agentfleet.instances import Instance
from agentfleet.signals.http import HttpError, Requests
from agentfleet.stores.acks import ConfigAck
from agentfleet.stores.config import ConfigRevision
from agentfleet.stores.config_journaled import STATE

log = logging.getLogger(__name__)

Keep = Callable[[int, Any], Awaitable[None]]
"""`keep(revision, document)`: has the engine keep a document; raises like `backends.base.ConfigKeeping.configure`."""
PUSH_TIMEOUT = 5.0
"""Seconds that an agent may take to acknowledge."""
RETRY = (0.2, 5.0)
"""Seconds before the first repetition, and the most before any."""
SKEW = 2.0
"""Seconds by which the clocks of engine and managers may differ."""
STREAM_GRACE = 3.0
"""Seconds that a stream has to bring a revision before it is pushed."""


@dataclass(slots=True)
class _Target:
    """One instance's process, as the feed knows it."""

    address: str
    started_at: float | None
    met: bool
    """Whether it has answered, so that it may be given work."""
    acked: int = 0
    answered: int = 0
    """The newest revision that it has answered for, well or not."""
    streams: bool = False
    pushing: bool = False
    nudge: anyio.Event = field(default_factory=anyio.Event)
    """Set when there is reason to try again at once."""


class ConfigFeed:
    """Delivers one key's revisions to one fleet's instances.

    Args:
        store: Where revisions come from.
        key: Which document.
        http: Carries the pushes.
        clock: Times them.
        record: Writes events.
        acks: Where it is noted who runs what; run by the feed.
        credential: The bearer token of an instance.
        on_met: Told when an instance has answered for the first time.
        keep: Has the engine keep the revision that is for all, too, where instances may read it.
        remember: Whether that revision is journaled, because the store may not outlive its manager, or be out of reach.
        concurrency: Pushes under way at one time.
    """

    def __init__(
        self,
        store: ConfigStore,
        key: str,
        *,
        http: Requests,
        clock: Clock,
        record: Record,
        acks: AckBook,
        credential: Callable[[str], str | None],
        on_met: Callable[[str], None],
        keep: Keep | None = None,
        remember: bool = True,
        concurrency: int = 128,
    ) -> None:
        self._store = store
        self._key = key
        self._http = http
        self._clock = clock
        self._record = record
        self._acks = acks
        acks.listen(self._heard)
        self._credential = credential
        self._on_met = on_met
        self._keep = keep
        self._keepings = 1
        self._remember = remember
        self._assigned = Assignment()
        self._bodies: dict[int, bytes] = {}
        self._concurrency = concurrency
        self._limiter: anyio.CapacityLimiter | None = None
        self._tasks: TaskGroup | None = None
        self._targets: dict[str, _Target] = {}
        self._behind: set[str] = set()
        self._expected: dict[str, float] = {}
        """Those behind whose stream is to bring it, the earliest first, and until when."""
        self._expecting = False
        self._published_at: float | None = None
        self._latencies: list[float] = []
        self._moved = anyio.Event()
        self.refused: dict[str, str] = {}
        """Instances that refused the revision that they are to have, and why."""

    @property
    def revision(self) -> int:
        """The revision that is for all; 0 if there is none."""
        return 0 if self._assigned.everyone is None else self._assigned.everyone.revision

    @property
    def running(self) -> dict[str, int]:
        """Which revision each instance has acknowledged; 0 is none."""
        return {id: target.acked for id, target in self._targets.items()}

    def restore(self, assigned: Assignment) -> None:
        """Take up what an earlier manager delivered last."""
        self._assigned = assigned
        self._bodies = {each.revision: parcel(each) for each in assigned.revisions}

    async def run(self) -> None:
        """Follow the store until cancelled."""
        self._limiter = anyio.CapacityLimiter(self._concurrency)
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            try:
                tasks.start_soon(self._acks.run, name=f"acknowledgements {self._key}")
                tasks.start_soon(self._forget_the_gone, name=f"forget {self._key}")
                if self._keep is not None:
                    tasks.start_soon(self._keep_newest, self._keep, name=f"keep config {self._key}")
                for id in tuple(self._targets):
                    self._begin(id)
                await self._follow()
            finally:
                self._tasks, self._expecting = None, False  # while the others end, instances may still come and go

    async def _forget_the_gone(self) -> None:
        """Whoever went while nobody led is not counted any more."""
        await self._acks.synced.wait()
        for id in [id for id in self._acks.known if id not in self._targets]:
            self._acks.forget(id)

    async def _follow(self) -> None:
        """Follow what is assigned; while that cannot be known agents keep what they have, and it is tried again."""
        assignments = Assignments(self._store, self._key)
        while True:
            try:
                self._assign(await anext(assignments))
            except (ConfigError, DeadlineExceeded) as error:
                log.warning("configuration %s cannot be followed: %s", self._key, error)
                self._record("config.unavailable", data=told_of(error))
                await self._clock.sleep(RETRY[1])

    def _assign(self, assigned: Assignment) -> None:
        before, self._assigned = self._assigned, assigned
        self._bodies = {each.revision: parcel(each) for each in assigned.revisions}
        if before.everyone != assigned.everyone and assigned.everyone is not None:
            self._publish(assigned.everyone, first=before.everyone is None)
        for id in self._targets:
            self._see(id, renew=True)
        self._check_done()

    def _publish(self, revision: ConfigRevision, *, first: bool) -> None:
        if first:  # whoever served without a configuration goes on serving
            for target in self._targets.values():
                target.met = True
        self._published_at = self._clock.now()
        self._latencies.clear()
        self.refused.clear()
        if self._remember:
            self._record(STATE, data=asdict(revision))

    async def _keep_newest(self, keep: Keep) -> None:
        """Have the engine keep what is for all, however often that takes; the first failure of each is told."""
        kept, told = (0, 0), 0
        while True:
            newest, keeping = self._assigned.everyone, self._keepings
            if newest is None or (newest.revision, keeping) == kept:
                await self._moved.wait()
                continue
            try:
                await keep(newest.revision, newest.document)
            except (BackendError, DeadlineExceeded, NotLeader, SpecError) as error:
                if told != newest.revision:
                    self._record("config.not_kept", data={"revision": newest.revision, "error": str(error)})
                told = newest.revision
                if not isinstance(error, SpecError):  # which repeating does not make right
                    await self._clock.sleep(RETRY[1])
                    continue
            kept = newest.revision, keeping

    def keep_again(self) -> None:
        """Have the engine keep what is for all once more: it has forgotten it."""
        self._keepings += 1
        self._stir()

    def feed(self, instance: Instance, *, adopted: bool = False) -> None:
        """Deliver to this instance from now on; a restarted one is fed again.

        Args:
            instance: A running instance.
            adopted: Whether it ran before this manager, whose predecessor has configured it.
        """
        if instance.address is None:
            return
        target = self._targets.get(instance.id)
        if target is None or (target.address, target.started_at) != (instance.address, instance.started_at):
            is_new, met = target is None, adopted or not self._assigned.revisions
            self._targets[instance.id] = target = _Target(instance.address, instance.started_at, met)
            known = self._acks.known.get(instance.id)
            if not is_new:  # another process runs nothing before it says so
                self._acks.hear(ConfigAck(instance.id, 0))
            elif known is not None:
                self._heard(known)
            self._see(instance.id)
        target.nudge.set()
        self._begin(instance.id)

    def forget(self, id: str) -> None:
        """The instance is gone or leaving."""
        target = self._targets.pop(id, None)
        if target is not None:
            target.nudge.set()
            self.refused.pop(id, None)
            self._acks.forget(id)
            self._answered(id)

    def met(self, id: str) -> bool:
        """Whether an instance has been offered its configuration, and may be given work."""
        target = self._targets.get(id)
        return self._assigned.of(id) is None or (target is not None and target.met)

    async def wait_settled(self, revision: int) -> None:
        """Wait until `revision` (or a newer one) is for all and every instance has answered."""
        while self.revision < revision or self._behind:
            await self._moved.wait()

    # ------------------------------------------------------------------------------------------ one instance

    def _wanted(self, id: str) -> int:
        revision = self._assigned.of(id)
        return 0 if revision is None else revision.revision

    def _see(self, id: str, *, renew: bool = False) -> None:
        """Note whether an instance is behind. None ever goes back: what it has may be newer, then it is left alone."""
        target = self._targets[id]
        if self._wanted(id) <= target.answered:
            self._caught_up(id)
            return
        self._behind.add(id)
        if renew:
            self.refused.pop(id, None)
            self._expected.pop(id, None)
            target.nudge.set()
        self._begin(id)

    def _caught_up(self, id: str) -> None:
        self._behind.discard(id)
        self._expected.pop(id, None)

    def _begin(self, id: str) -> None:
        """Have an instance that is behind brought forward: by its stream, if it has one, or else by pushes."""
        target = self._targets[id]
        if id not in self._behind or target.pushing or self._tasks is None:
            return
        if not target.streams:
            self._push_to(id, target, self._tasks)
            return
        self._expected.setdefault(id, self._clock.now() + STREAM_GRACE)
        if not self._expecting:  # one task for all of them: a thousand would delay the very streams
            self._expecting = True
            self._tasks.start_soon(self._push_late, self._tasks, name=f"late {self._key}")

    async def _push_late(self, tasks: TaskGroup) -> None:
        """Push to those whose stream has not brought what they are to have."""
        while self._expected:
            id, due = next(iter(self._expected.items()))
            if (rest := due - self._clock.now()) > 0:
                await self._clock.sleep(rest)
                continue
            del self._expected[id]
            if not self._targets[id].pushing:
                self._push_to(id, self._targets[id], tasks)
        self._expecting = False

    def _push_to(self, id: str, target: _Target, tasks: TaskGroup) -> None:
        target.pushing = True
        tasks.start_soon(self._deliver, id, target, name=f"configure {id}")

    async def _deliver(self, id: str, target: _Target) -> None:
        """Push until this process has what it is to have, refused it, or is gone."""
        assert self._limiter is not None
        pause = RETRY[0]
        try:
            while self._targets.get(id) is target and id in self._behind:
                async with self._limiter:
                    answered = await self._push(id, target)
                if not answered:
                    with anyio.move_on_after(pause):
                        target.nudge = anyio.Event()
                        await target.nudge.wait()
                    pause = min(RETRY[1], pause * 2)
        finally:
            target.pushing = False

    async def _push(self, id: str, target: _Target) -> bool:
        """One attempt; False when it must be repeated."""
        revision, token = self._wanted(id), self._credential(id)
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
        try:
            answer = await self._http.request(
                "PUT", target.address, "/config", body=self._bodies[revision], headers=headers, timeout=PUSH_TIMEOUT
            )
        except (HttpError, DeadlineExceeded):
            return False  # repeated until the instance is gone; health has its own opinion of it
        if self._targets.get(id) is not target:
            return True  # the answer is about something that is over
        status, present = answer.status, revision_in(answer.body)
        if status == 200 or (status == 409 and present >= revision):
            self._acks.hear(ConfigAck(id, max(revision, present)))
        elif 400 <= status < 500 and status != 429:
            why = answer.body[:500].decode("utf-8", "replace")
            self._acks.hear(ConfigAck(id, present if present < revision else 0, revision, why))
            self._note_refusal(id, revision, why, status)
        else:
            return False
        return True

    def _heard(self, ack: ConfigAck) -> None:
        """Take in what an instance has said, to whomever."""
        target = self._targets.get(ack.instance)
        if target is None or ack.at < (target.started_at or 0.0) - SKEW:
            return  # or it was an earlier process that said so
        target.acked, target.answered, target.streams = ack.revision, ack.answered, ack.via == "stream"
        wanted = self._wanted(ack.instance)
        if ack.via != "push" and wanted and ack.refused == wanted:
            self._note_refusal(ack.instance, wanted, ack.why, None)
        if ack.revision == wanted and self._published_at is not None and ack.instance in self._behind:
            self._latencies.append(self._clock.now() - self._published_at)
        if ack.answered or not wanted:
            if not target.met:
                target.met = True
                self._on_met(ack.instance)
            target.nudge.set()
        self._see(ack.instance)
        if ack.instance not in self._behind:
            self._check_done()

    def _note_refusal(self, id: str, revision: int, why: str, status: int | None) -> None:
        if id not in self.refused:
            self.refused[id] = why
            data = {"revision": revision, "why": readable(why)} | ({} if status is None else {"status": status})
            self._record("config.refused", id, data)

    def _answered(self, id: str) -> None:
        if id in self._behind:
            self._caught_up(id)
            self._check_done()

    def _stir(self) -> None:
        moved, self._moved = self._moved, anyio.Event()
        moved.set()

    def _check_done(self) -> None:
        self._stir()
        if self._published_at is None or self._behind:
            return
        spans = sorted(self._latencies)
        data: dict[str, Any] = {"revision": self.revision, "instances": len(spans), "refused": len(self.refused)}
        if spans:
            data |= {"p50_s": _quantile(spans, 0.5), "p99_s": _quantile(spans, 0.99), "last_s": round(spans[-1], 4)}
        self._record("config.delivered", data=data)
        self._published_at = None


def _quantile(ordered: list[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)], 4)
