"""Who runs which configuration: heard here, written in batches, and read from what other managers have heard."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

import anyio

from agentfleet.clock import Clock
from agentfleet.errors import ConfigError, DeadlineExceeded
from agentfleet.stores.acks import ConfigAck, ConfigAcks

PERIOD = 0.25
"""Seconds between two writes, and between two reads, at least."""
TIMEOUT = 10.0
"""Seconds that the place where acknowledgements are kept may take to answer."""
_RETRY = 2.0
_WORDS = 1000
"""Characters that are kept of why a revision was refused."""

Heard = Callable[[ConfigAck], None]


class AckBook:
    """The last word of each instance about its configuration.

    However many instances speak, the place where it is kept sees at most four writes a second; what could not be
    written is written later, and the last word of an instance goes before its earlier ones.

    Args:
        acks: Where it is kept.
        key: Of the configuration.
        clock: Dates and times it.
    """

    def __init__(self, acks: ConfigAcks, key: str, *, clock: Clock) -> None:
        self._acks, self._key, self._clock = acks, key, clock
        self._known: dict[str, ConfigAck] = {}
        self._pending: dict[str, ConfigAck] = {}
        self._writing: dict[str, ConfigAck] = {}
        self._gone: dict[str, None] = {}
        self._batch = 0
        self._dirty = anyio.Event()
        self._listeners: list[Heard] = []
        self.failing = False
        """Whether the last attempt to write or read has failed."""
        self.synced = anyio.Event()
        """Set when what others have heard has been read."""

    @property
    def known(self) -> Mapping[str, ConfigAck]:
        """What each instance has said last."""
        return self._known

    def listen(self, heard: Heard) -> None:
        """Have `heard` called with each new word, wherever it was heard."""
        self._listeners.append(heard)

    def hear(self, ack: ConfigAck) -> None:
        """Take note of what an instance has just said here; written only if it is something new."""
        ack = replace(ack, at=self._clock.now(), why=readable(ack.why))
        if ack.says(self._known.get(ack.instance)):
            self._pending[ack.instance] = ack
            self._gone.pop(ack.instance, None)
            self._dirty.set()
        self._take(ack)

    def forget(self, instance: str) -> None:
        """The instance is no more."""
        self._pending.pop(instance, None)
        if self._known.pop(instance, None) is not None:
            self._gone[instance] = None
            self._dirty.set()

    async def run(self) -> None:
        """Write and read until cancelled; what is left then is written, if that takes no longer than a second."""
        self._batch = 0
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._read)
            try:
                while True:
                    await self._dirty.wait()
                    if await self._try(self._flush):
                        await self._clock.sleep(PERIOD)
            finally:
                with anyio.move_on_after(1.0, shield=True):
                    await self._try(self._flush, rest=0.0)

    async def _flush(self) -> None:
        if not self._pending and not self._gone:
            return
        self._writing, gone = self._pending, self._gone
        self._pending, self._gone, self._dirty = {}, {}, anyio.Event()
        written = False
        try:
            await self._acks.write(self._key, list(self._writing.values()), list(gone))
            written = True
        finally:
            if not written:  # what was heard meanwhile is newer: who speaks is not gone, and who is gone says nothing
                kept = {name: ack for name, ack in self._writing.items() if name not in self._gone}
                self._gone |= {name: None for name in gone if name not in self._pending}
                self._pending = kept | self._pending
                self._dirty.set()
            self._writing = {}

    async def _read(self) -> None:
        while True:
            if await self._try(self._refresh):
                self.synced.set()
                await self._clock.sleep(PERIOD)
                await self._try(lambda: self._acks.changed(self._key, self._batch), timeout=None)

    async def _refresh(self) -> None:
        self._batch, found = await self._acks.after(self._key, self._batch)
        for ack in found:
            own = ack.instance in self._pending or ack.instance in self._writing  # newer than what was read
            if not own and ack.says(self._known.get(ack.instance)):
                self._take(ack)

    async def _try(
        self, call: Callable[[], Awaitable[None]], *, timeout: float | None = TIMEOUT, rest: float = _RETRY
    ) -> bool:
        """Whether it worked; if not, after a rest."""
        try:
            with anyio.fail_after(timeout):
                await call()
        except (ConfigError, DeadlineExceeded, TimeoutError):
            self.failing = True
            await self._clock.sleep(rest)
            return False
        self.failing = False
        return True

    def _take(self, ack: ConfigAck) -> None:
        self._known[ack.instance] = ack
        for heard in self._listeners:
            heard(ack)


def readable(words: str) -> str:
    """What an agent has said, short and without what no database takes."""
    short = words[:_WORDS].encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in short)
