"""Configuration on its way to the agents: each new revision is pushed to every running instance and acknowledged.

The feed follows one key of a `ConfigStore`. What it delivers last is journaled as "state.config", so that a restarted
manager still feeds new instances although its store is empty. An agent that refuses a revision keeps its last good one
and is reported; one that cannot be reached is tried again until it is gone or has it. A new instance is given work
only after it has been offered its configuration.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import anyio
from anyio.abc import TaskGroup

from agentfleet.clock import Clock
from agentfleet.configstore import ConfigStore
from agentfleet.desk import Record
from agentfleet.errors import BackendError, ConfigError, DeadlineExceeded, NotLeader, SpecError
from agentfleet.instances import Instance
from agentfleet.signals.http import HttpError, Requests
from agentfleet.stores.config import ConfigRevision
from agentfleet.stores.config_memory import MemoryConfig
from agentfleet.stores.journal import Journal

STATE = "state.config"
"""Kind of the event that remembers the newest revision."""
Keep = Callable[[int, Any], Awaitable[None]]
"""`keep(revision, document)`: has the engine keep a document; raises like `backends.base.ConfigKeeping.configure`."""
PUSH_TIMEOUT = 5.0
"""Seconds that an agent may take to acknowledge."""
RETRY = (0.2, 5.0)
"""Seconds before the first repetition, and the most before any."""


@dataclass(slots=True)
class _Target:
    """One instance's process, as the feed knows it."""

    address: str
    started_at: float | None
    met: bool
    """Whether it has answered a push, so that it may be given work."""
    acked: int = 0
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
        credential: The bearer token of an instance.
        on_met: Told when an instance has answered its first push.
        keep: Has the engine keep the newest revision, too, where instances may read it.
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
        credential: Callable[[str], str | None],
        on_met: Callable[[str], None],
        keep: Keep | None = None,
        concurrency: int = 128,
    ) -> None:
        self._store = store
        self._key = key
        self._http = http
        self._clock = clock
        self._record = record
        self._credential = credential
        self._on_met = on_met
        self._keep = keep
        self._newest: ConfigRevision | None = None
        self._concurrency = concurrency
        self._limiter: anyio.CapacityLimiter | None = None
        self._tasks: TaskGroup | None = None
        self._targets: dict[str, _Target] = {}
        self._behind: set[str] = set()
        self._published_at: float | None = None
        self._latencies: list[float] = []
        self._moved = anyio.Event()
        self._body = b""
        self.revision = 0
        """The newest revision that is being delivered; 0 if there is none."""
        self.refused: dict[str, str] = {}
        """Instances that refused the newest revision, and why."""

    @property
    def running(self) -> dict[str, int]:
        """Which revision each instance has acknowledged; 0 is none."""
        return {id: target.acked for id, target in self._targets.items()}

    def restore(self, revision: ConfigRevision) -> None:
        """Take up what an earlier manager delivered last (see `remembered`)."""
        self.revision = revision.revision
        self._newest = revision
        self._body = _body(revision)

    async def run(self) -> None:
        """Follow the store until cancelled."""
        self._limiter = anyio.CapacityLimiter(self._concurrency)
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            try:
                if self._keep is not None:
                    tasks.start_soon(self._keep_newest, self._keep, name=f"keep config {self._key}")
                for id in tuple(self._targets):
                    self._begin(id)
                while True:
                    await self._follow()
            finally:
                self._tasks = None  # while the others end, instances may still come and go

    async def _follow(self) -> None:
        """Follow the store until it fails; agents keep what they have, and it is tried again."""
        try:
            async for revision in self._store.watch(self._key, after=self.revision):
                self._publish(revision)
        except (ConfigError, DeadlineExceeded) as error:
            self._record("config.unavailable", data={"error": str(error)})
            await self._clock.sleep(RETRY[1])

    def _publish(self, revision: ConfigRevision) -> None:
        if not self.revision:  # whoever served without a configuration goes on serving
            for target in self._targets.values():
                target.met = True
        self.revision = revision.revision
        self._newest = revision
        self._body = _body(revision)
        self._published_at = self._clock.now()
        self._latencies.clear()
        self.refused.clear()
        self._behind = set(self._targets)
        self._record(STATE, data=asdict(revision))
        for id in self._targets:
            self._begin(id)
        self._check_done()

    async def _keep_newest(self, keep: Keep) -> None:
        """Have the engine keep the newest revision, however often that takes; the first failure of each is told."""
        kept = told = 0
        while True:
            newest = self._newest
            if newest is None or newest.revision == kept:
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
            kept = newest.revision

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
            target = _Target(instance.address, instance.started_at, met=adopted or not self.revision)
            self._targets[instance.id] = target
            if self.revision:
                self._behind.add(instance.id)
        target.nudge.set()
        self._begin(instance.id)

    def forget(self, id: str) -> None:
        """The instance is gone or leaving."""
        target = self._targets.pop(id, None)
        if target is not None:
            target.nudge.set()
            self.refused.pop(id, None)
            self._answered(id)

    def met(self, id: str) -> bool:
        """Whether an instance has been offered its configuration, and may be given work."""
        target = self._targets.get(id)
        return not self.revision or (target is not None and target.met)

    async def wait_settled(self, revision: int) -> None:
        """Wait until `revision` (or a newer one) is delivered and every instance has answered."""
        while self.revision < revision or self._behind:
            await self._moved.wait()

    # ------------------------------------------------------------------------------------------ one instance

    def _begin(self, id: str) -> None:
        target = self._targets[id]
        if id in self._behind and not target.pushing and self._tasks is not None:
            target.pushing = True
            self._tasks.start_soon(self._deliver, id, target, name=f"configure {id}")

    async def _deliver(self, id: str, target: _Target) -> None:
        """Push until this process has the newest revision, refused it, or is gone."""
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
        revision, token = self.revision, self._credential(id)
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
        try:
            answer = await self._http.request(
                "PUT", target.address, "/config", body=self._body, headers=headers, timeout=PUSH_TIMEOUT
            )
        except (HttpError, DeadlineExceeded):
            return False  # repeated until the instance is gone; health has its own opinion of it
        if self._targets.get(id) is not target or revision != self.revision:
            return True  # the answer is about something that is over; the loop looks again
        if answer.status == 200:
            target.acked = revision
            if self._published_at is not None:
                self._latencies.append(self._clock.now() - self._published_at)
        elif 400 <= answer.status < 500 and answer.status != 429:
            self.refused[id] = answer.body[:500].decode("utf-8", "replace")
            self._record("config.refused", id, {"revision": revision, "status": answer.status, "why": self.refused[id]})
        else:
            return False
        self._answered(id)
        if not target.met:
            target.met = True
            self._on_met(id)
        return True

    def _answered(self, id: str) -> None:
        if id in self._behind:
            self._behind.discard(id)
            self._check_done()

    def _check_done(self) -> None:
        moved, self._moved = self._moved, anyio.Event()
        moved.set()
        if self._published_at is None or self._behind:
            return
        spans = sorted(self._latencies)
        data: dict[str, Any] = {"revision": self.revision, "instances": len(spans), "refused": len(self.refused)}
        if spans:
            data |= {"p50_s": _quantile(spans, 0.5), "p99_s": _quantile(spans, 0.99), "last_s": round(spans[-1], 4)}
        self._record("config.delivered", data=data)
        self._published_at = None


def remembered(journal: Journal, fleet: str) -> ConfigRevision | None:
    """The configuration that an earlier manager delivered last."""
    found = journal.last_state(fleet, STATE)
    return None if found is None else ConfigRevision(**found.data)


async def catch_up(store: MemoryConfig | None, journal: Journal, fleet: str) -> None:
    """Have a store in memory know what another manager has published since; None: the store is not ours."""
    known = remembered(journal, fleet)
    if store is None or known is None:
        return
    newest = await store.newest(fleet)
    present = 0 if newest is None else newest.revision
    if present < known.revision:
        await store.append(known, expect=present)


def _body(revision: ConfigRevision) -> bytes:
    return f'{{"revision":{revision.revision},"document":{revision.text}}}'.encode()


def _quantile(ordered: list[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)], 4)
