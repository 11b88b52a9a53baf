"""Configuration on its way to the agents: each new revision is pushed to every running instance and acknowledged.

The feed follows one key of a `ConfigStore`. What it delivers last is journaled as "state.config", so that a restarted
manager still feeds new instances although its store is empty. An agent that refuses a revision keeps its last good one
and is reported; one that cannot be reached is tried again until it is gone or has it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import anyio
from anyio.abc import TaskGroup

from agentfleet.clock import Clock
from agentfleet.configstore import ConfigStore
from agentfleet.desk import Record
from agentfleet.errors import ConfigError, DeadlineExceeded
from agentfleet.instances import Instance
from agentfleet.signals.http import HttpClient, HttpError
from agentfleet.stores.config import ConfigRevision
from agentfleet.stores.journal import Journal

STATE = "state.config"
"""Kind of the event that remembers the newest revision."""
PUSH_TIMEOUT = 5.0
"""Seconds that an agent may take to acknowledge."""
RETRY = (0.2, 5.0)
"""Seconds before the first repetition, and the most before any."""


class ConfigFeed:
    """Delivers one key's revisions to one fleet's instances.

    Args:
        store: Where revisions come from.
        key: Which document.
        http: Carries the pushes.
        clock: Times them.
        record: Writes events.
        credential: The bearer token of an instance.
        concurrency: Pushes under way at one time.
    """

    def __init__(
        self,
        store: ConfigStore,
        key: str,
        *,
        http: HttpClient,
        clock: Clock,
        record: Record,
        credential: Callable[[str], str | None],
        concurrency: int = 128,
    ) -> None:
        self._store = store
        self._key = key
        self._http = http
        self._clock = clock
        self._record = record
        self._credential = credential
        self._concurrency = concurrency
        self._limiter: anyio.CapacityLimiter | None = None
        self._tasks: TaskGroup | None = None
        self._targets: dict[str, str] = {}
        self._pushing: set[str] = set()
        self._published_at = 0.0
        self._latencies: list[float] = []
        self.revision = 0
        """The newest revision that is being delivered; 0 if there is none."""
        self._body = b""
        self.running: dict[str, int] = {}
        """Which revision each instance has acknowledged."""
        self.refused: dict[str, str] = {}
        """Instances that refused the newest revision, and why."""
        self._moved = anyio.Event()

    def restore(self, revision: ConfigRevision) -> None:
        """Take up what an earlier manager delivered last (see `remembered`)."""
        self.revision = revision.revision
        self._body = _body(revision)

    async def run(self) -> None:
        """Follow the store until cancelled."""
        self._limiter = anyio.CapacityLimiter(self._concurrency)
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            try:
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
        self.revision = revision.revision
        self._body = _body(revision)
        self._published_at = self._clock.now()
        self._latencies.clear()
        self.refused.clear()
        self._record(STATE, data=asdict(revision))
        for id in tuple(self._targets):
            self._begin(id)
        self._check_done()

    def feed(self, instance: Instance) -> None:
        """Deliver to this instance from now on; a restarted one is fed again."""
        if instance.address is None:
            return
        if self._targets.get(instance.id) != instance.address:
            self._targets[instance.id] = instance.address
            self.running.pop(instance.id, None)
        self._begin(instance.id)

    def forget(self, id: str) -> None:
        """The instance is gone or leaving."""
        if self._targets.pop(id, None) is not None:
            self.running.pop(id, None)
            self.refused.pop(id, None)
            self._check_done()

    @property
    def settled(self) -> bool:
        """Whether every instance has answered for the newest revision."""
        return all(self.running.get(id) == self.revision or id in self.refused for id in self._targets)

    async def wait_settled(self, revision: int) -> None:
        """Wait until `revision` (or a newer one) is delivered and every instance has answered."""
        while self.revision < revision or not self.settled:
            await self._moved.wait()

    # ------------------------------------------------------------------------------------------ one instance

    def _begin(self, id: str) -> None:
        behind = self.running.get(id) != self.revision
        if self.revision and behind and id not in self._pushing and self._tasks is not None:
            self._pushing.add(id)
            self._tasks.start_soon(self._deliver, id, name=f"configure {id}")

    async def _deliver(self, id: str) -> None:
        """Push until this instance has the newest revision, refused it, or is gone."""
        assert self._limiter is not None
        pause = RETRY[0]
        try:
            while (address := self._targets.get(id)) is not None and self.running.get(id) != self.revision:
                revision = self.revision
                async with self._limiter:
                    answered = await self._push(id, address, revision)
                if answered and revision == self.revision:
                    break
                if not answered:
                    await self._clock.sleep(pause)
                    pause = min(RETRY[1], pause * 2)
        finally:
            self._pushing.discard(id)
        self._check_done()

    async def _push(self, id: str, address: str, revision: int) -> bool:
        """One attempt; False when it must be repeated."""
        token = self._credential(id)
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
        try:
            answer = await self._http.request(
                "PUT", address, "/config", body=self._body, headers=headers, timeout=PUSH_TIMEOUT
            )
        except (HttpError, DeadlineExceeded):
            return False  # repeated until the instance is gone; health has its own opinion of it
        if answer.status == 200 or (answer.status == 409 and _has(answer.body, revision)):
            self.running[id] = revision
            if revision == self.revision and self._published_at:
                self._latencies.append(self._clock.now() - self._published_at)
            return True
        if 400 <= answer.status < 500 and answer.status != 429:
            self.refused[id] = answer.body[:500].decode("utf-8", "replace")
            self._record("config.refused", id, {"revision": revision, "status": answer.status, "why": self.refused[id]})
            return True
        return False

    def _check_done(self) -> None:
        moved, self._moved = self._moved, anyio.Event()
        moved.set()
        if not self._published_at or not self.settled:
            return
        spans = sorted(self._latencies)
        data: dict[str, Any] = {"revision": self.revision, "instances": len(spans), "refused": len(self.refused)}
        if spans:
            data |= {"p50_s": _quantile(spans, 0.5), "p99_s": _quantile(spans, 0.99), "last_s": round(spans[-1], 4)}
        self._record("config.delivered", data=data)
        self._published_at = 0.0


def remembered(journal: Journal, fleet: str) -> ConfigRevision | None:
    """The configuration that an earlier manager delivered last."""
    found = journal.last_state(fleet, STATE)
    return None if found is None else ConfigRevision(**found.data)


def _body(revision: ConfigRevision) -> bytes:
    return f'{{"revision":{revision.revision},"document":{revision.text}}}'.encode()


def _has(body: bytes, revision: int) -> bool:
    """Whether a conflict answer says that the agent runs this very revision already."""
    try:
        return bool(json.loads(body).get("revision") == revision)
    except (ValueError, AttributeError):
        return False


def _quantile(ordered: list[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)], 4)
