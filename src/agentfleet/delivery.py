"""Configuration that agents fetch: who subscribes is sent each revision as soon as it is assigned, encoded once.

::

    async with anyio.create_task_group() as tasks:
        delivery = ConfigDelivery(store, "researchers", acks)
        await tasks.start(delivery.run)
        async with delivery.subscribed("researchers-0-1f", running=6) as stream:
            async for frame in stream:      # server-sent events, ready to be written
                ...

Any manager may deliver, whether it leads the fleet or not, for all it needs to know is in the stores: which revision
is assigned to whom (`configassign`), and where to put what agents say that they run (`configacks`). It knows no
transport; `server.config` carries its frames over HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import anyio
from anyio import TASK_STATUS_IGNORED
from anyio.abc import TaskStatus

from agentfleet.clock import Clock, SystemClock
from agentfleet.configacks import AckBook
from agentfleet.configassign import Assignment, Assignments, parcel
from agentfleet.configstore import ConfigStore
from agentfleet.configwords import told_of
from agentfleet.errors import ConfigError, ConfigNotFound, DeadlineExceeded, OperationRefused
from agentfleet.stores.acks import ConfigAck, ConfigAcks
from agentfleet.stores.config import ConfigRevision

log = logging.getLogger(__name__)

BEAT = 5.0
"""Seconds between two signs of life on a stream; a client takes three missing ones for its end."""
RETURN_RATE = 250.0
"""Clients a second that may come back at the same time; how long each waits at most is told to it."""
_SHORTEST, _LONGEST = 1.0, 30.0
_STUCK = 30.0
"""Seconds after which a client that takes nothing is given up."""
_RETRY = 2.0


@dataclass(frozen=True, slots=True)
class Parcel:
    """A revision as it goes out."""

    revision: int
    body: bytes
    """JSON: `{"revision": 7, "document": {...}}`."""
    frame: bytes
    """The same as one server-sent event, whose id is the revision."""

    @property
    def etag(self) -> str:
        """What tells it from another."""
        return f'"{self.revision}"'

    @classmethod
    def of(cls, revision: ConfigRevision) -> Parcel:
        """Encode a revision."""
        body = parcel(revision)  # compact JSON has no line breaks: one "data" line holds it
        return cls(revision.revision, body, b"id: %d\nevent: config\ndata: %b\n\n" % (revision.revision, body))


class ConfigStream:
    """One subscriber's frames. An async iterator; it ends when its instance subscribes anew, or the delivery ends."""

    def __init__(self, delivery: ConfigDelivery, instance: str, passed: int, greeting: bytes) -> None:
        self._delivery = delivery
        self.instance = instance
        self._sent = passed
        self._greeting = greeting
        self._beats = self._over = self._waits = False
        self._wake = anyio.Event()
        self.scope = anyio.CancelScope()
        """What the one who serves it runs in, so that it can be cut off."""
        self.turn = 0
        """In which tenth of a beat's time it shows that it lives."""
        self.push: Callable[[bytes], bool] | None = None
        """Writes a frame at once, if that is possible without waiting, and says whether it has; set by the transport.
        A thousand frames written in one go take half the time of a thousand tasks that are woken to write one each."""
        self.beats_missed = 0
        """How often the stream was to show that it lives while its last frame was still being written."""

    def __aiter__(self) -> ConfigStream:
        return self

    async def __anext__(self) -> bytes:
        """The next frame; of several revisions the newest alone."""
        self.beats_missed = 0
        while not self._over:
            frame, self._greeting = self._greeting + self._next(), b""
            if not frame and self._beats:
                frame = b":\n\n"
            self._beats = False
            if frame:
                return frame
            if self._wake.is_set():
                self._wake = anyio.Event()
            self._waits = True
            try:
                await self._wake.wait()
            finally:
                self._waits = False
        raise StopAsyncIteration

    def _next(self) -> bytes:
        """The frame of what is assigned, if that is newer than what was sent."""
        parcel = self._delivery.parcel(self.instance)
        if parcel is None or parcel.revision <= self._sent:
            return b""
        self._sent = parcel.revision
        return parcel.frame

    def offer(self) -> None:
        """Send what is newly assigned, if anything is."""
        if self.push is None or not self._waits:
            self._wake.set()
            return
        sent = self._sent
        frame = self._next()
        if frame and not self.push(frame):
            self._sent = sent  # its own task waits until the client takes it
            self._wake.set()

    def beat(self) -> None:
        """Have it show that it lives; one whose client takes nothing for long is cut off."""
        if not self._waits:
            self.beats_missed += 1
            if self.beats_missed * BEAT > _STUCK:
                self.cut()
        self._beats = True
        self._wake.set()

    def end(self) -> None:
        """End it, when what is being written is written."""
        self._over = True
        self._wake.set()

    def cut(self) -> None:
        """End it at once."""
        self.end()
        self.scope.cancel()


class ConfigDelivery:
    """Delivers one key's configuration to whoever asks for it.

    Args:
        store: Where revisions and rollouts are kept.
        key: Of the documents: the fleet's name.
        acks: Where it is kept who runs what.
        clock: Times it.
        limit: Streams at one time.
    """

    def __init__(
        self, store: ConfigStore, key: str, acks: ConfigAcks, *, clock: Clock | None = None, limit: int = 20_000
    ) -> None:
        self.clock: Clock = clock if clock is not None else SystemClock()
        self.book = AckBook(acks, key, clock=self.clock)
        """What instances have said."""
        self._store, self._key, self._limit = store, key, limit
        self._assigned: Assignment | None = None
        self._newest = 0
        self._parcels: dict[int, Parcel] = {}
        self._streams: dict[str, ConfigStream] = {}
        self._opened = 0
        self._known = anyio.Event()
        self._running = False
        self.failing: str | None = None
        """Why the store cannot be followed just now; what is known is delivered all the same."""

    def __len__(self) -> int:
        """How many streams there are."""
        return len(self._streams)

    @property
    def ready(self) -> bool:
        """Whether it knows what is assigned."""
        return self._running and self._assigned is not None

    async def run(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Deliver until cancelled. Started when it takes subscribers; the store may be out of reach then."""
        self._running = True
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.book.run, name=f"acknowledgements {self._key}")
                tasks.start_soon(self._beat, name=f"beats {self._key}")
                task_status.started()
                await self._follow()
        finally:
            self._running = False
            for stream in tuple(self._streams.values()):
                stream.end()

    async def _follow(self) -> None:
        assignments = Assignments(self._store, self._key)
        while True:
            try:
                self._assign(await anext(assignments))
            except (ConfigError, DeadlineExceeded) as error:
                log.warning("configuration %s cannot be followed: %s", self._key, error)
                self.failing = told_of(error)["message"]
                await self.clock.sleep(_RETRY)

    def _assign(self, assigned: Assignment) -> None:
        before, self._assigned, self.failing = self._assigned, assigned, None
        self._newest = max(self._newest, 0, *(each.revision for each in assigned.revisions))
        known = self._parcels
        self._parcels = {
            each.revision: known.get(each.revision) or Parcel.of(each) for each in assigned.revisions
        }  # encoded once, however many are sent it
        for stream in self._woken(before, assigned):
            stream.offer()
        self._known.set()

    def _woken(self, before: Assignment | None, now: Assignment) -> list[ConfigStream]:
        """The streams whose instance may have been assigned something else."""
        if before is None or before.everyone != now.everyone:
            return list(self._streams.values())
        changed = now.members - before.members
        return [stream for id, stream in self._streams.items() if id in changed]

    async def _beat(self) -> None:
        """Show each stream in turn that it lives, a few at a time, and cut off those that take nothing."""
        turn = 0
        while True:
            await self.clock.sleep(BEAT / 10)
            turn = (turn + 1) % 10
            for stream in tuple(self._streams.values()):
                if stream.turn == turn:
                    stream.beat()

    # ------------------------------------------------------------------------------------------ who asks

    def parcel(self, instance: str) -> Parcel | None:
        """What an instance is to have; None if there is nothing, or it is not known yet."""
        revision = None if self._assigned is None else self._assigned.of(instance)
        return None if revision is None else self._parcels[revision.revision]

    async def fetch(self, instance: str, *, timeout: float) -> Parcel | None:
        """What an instance is to have; None if there is nothing.

        Raises:
            DeadlineExceeded: It is not known within `timeout` seconds.
        """
        with anyio.move_on_after(timeout):
            await self._known.wait()
            return self.parcel(instance)
        raise DeadlineExceeded(f"configuration {self._key}: {self.failing or 'the store has not answered yet'}")

    def hear(self, ack: ConfigAck) -> None:
        """Take note of what an instance says that it runs or refuses."""
        self.book.hear(ack)

    def note(self, instance: str, running: int, refused: int | None = None, *, seen: int = 0, via: str) -> int:
        """Take note of what an instance that asks says of itself; why it has refused something was told before.

        Args:
            instance: Its id.
            running: The revision that it runs; 0 is none.
            refused: The newest that it has refused since, 0 is none; None where it does not say so here.
            seen: The newest that it has read. Who has read more than he says that he runs, and says nothing of
                refusals, may say the same at each return: then what he has acknowledged since stands.
            via: "stream" or "poll".

        Returns:
            The newest revision that need not be sent to it.
        """
        known = self.book.known.get(instance)
        if known is not None and refused is None and running < seen and running <= known.revision:
            running, refused = known.revision, known.refused
        ack = ConfigAck(instance, running, refused if refused is not None and refused > running else 0, via=via)
        if known is not None and (known.revision, known.refused) == (ack.revision, ack.refused):
            ack = replace(ack, why=known.why)
        self.hear(ack)
        return max(ack.answered, seen)

    async def exists(self, revision: int) -> bool:
        """Whether there is a revision of this number, or was one: none is made up. True where nobody can tell."""
        if revision > self._newest:
            try:
                with anyio.fail_after(_RETRY):
                    self._newest = max(self._newest, (await self._store.get(self._key)).revision)
            except ConfigNotFound:
                return False
            except (ConfigError, DeadlineExceeded, TimeoutError):
                return True
        return revision <= self._newest

    @asynccontextmanager
    async def subscribed(
        self, instance: str, *, running: int = 0, refused: int | None = None, seen: int = 0
    ) -> AsyncIterator[ConfigStream]:
        """A stream for one instance; it takes the place of an earlier one of the same instance.

        Args:
            instance: Its id.
            running: The revision that it runs; 0 is none.
            refused: As in `note`.
            seen: The newest revision that it has read; nothing up to it is sent.

        Raises:
            OperationRefused: There are too many streams, or the delivery does not run.
        """
        if not self._running:
            raise OperationRefused("configuration is not delivered here now; ask again")
        if len(self._streams) >= self._limit and instance not in self._streams:
            raise OperationRefused(f"{self._limit} streams are open already; ask another manager")
        passed = self.note(instance, running, refused, seen=seen, via="stream")
        stream = ConfigStream(self, instance, passed, b"retry: %d\n\n" % round(self.spread * 1000))
        earlier = self._streams.pop(instance, None)
        if earlier is not None:
            earlier.cut()
        self._streams[instance] = stream
        self._opened += 1
        stream.turn = self._opened % 10
        try:
            with stream.scope:
                yield stream
        finally:
            if self._streams.get(instance) is stream:
                del self._streams[instance]

    @property
    def spread(self) -> float:
        """Seconds over which clients are to spread their return, so that no more than `RETURN_RATE` come in each."""
        return min(_LONGEST, max(_SHORTEST, len(self._streams) / RETURN_RATE))
