"""ConfigStore: configuration documents by key, in revisions that never change; validated, audited, watched.

::

    store = ConfigStore()
    store.register("researchers", schema=ResearcherConfig)
    first = await store.put("researchers", {"model": "small"}, author="ann", reason="first version", expect=0)
    async for revision in store.watch("researchers"):
        push(revision.text)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import anyio
import anyio.lowlevel
from pydantic import BaseModel

from agentfleet.clock import Clock, SystemClock
from agentfleet.configchecks import Checks, Schema, Validator
from agentfleet.core.documents import Change, Problem, check, diff
from agentfleet.errors import (
    ConfigConflict,
    ConfigError,
    ConfigInvalid,
    ConfigNotFound,
    DeadlineExceeded,
    SpecError,
)
from agentfleet.events import Event
from agentfleet.stores.config import ConfigRecords, ConfigRevision
from agentfleet.stores.config_memory import MemoryConfig
from agentfleet.stores.journal import Journal
from agentfleet.units import show
from agentfleet.waiting import seconds_of

_PAGE = 64
_TRIES = 100
_MOST = 20
_STATE = "state.config_store"  # "state.config" is what was delivered to a fleet
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a publication would do.

    Attributes:
        problems: Why it would be refused; empty if it would not.
        changes: Differences from the revision that is the newest now (all added if there is none).
        against: Number of that revision; 0 if there is none.
    """

    problems: tuple[Problem, ...]
    changes: tuple[Change, ...]
    against: int

    @property
    def ok(self) -> bool:
        """Whether the document would be published."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class _Audit:
    author: str
    reason: str
    restores: int | None = None


class ConfigStore:
    """Configuration documents: validated before they are stored, never changed after, followed without a gap.

    A revision number is never used twice, and the newest revision never silently goes back: if the records behind the
    store lose revisions that this store (or its journal) has seen, as after a restore from an old backup, reads raise
    `ConfigError` until someone publishes what shall hold, under a number above all seen.

    Args:
        records: Where revisions are kept; in memory when omitted.
        journal: Where "config.published" and "config.rejected" are recorded, with paths and messages, never values.
        clock: Dates the revisions.
        max_bytes: Largest document, in bytes of JSON.
        max_depth: Deepest nesting of a document.
        timeout: Time that the records, or an asynchronous validator, may take to answer, in seconds or like "10s".
    """

    def __init__(
        self,
        records: ConfigRecords | None = None,
        *,
        journal: Journal | None = None,
        clock: Clock | None = None,
        max_bytes: int = 1 << 20,
        max_depth: int = 64,
        timeout: float | str = 10.0,
    ) -> None:
        self._records: ConfigRecords = records if records is not None else MemoryConfig()
        self._journal = journal
        self._clock: Clock = clock if clock is not None else SystemClock()
        self._max_bytes, self._max_depth, self._timeout = max_bytes, max_depth, seconds_of(timeout, "timeout")
        self._checks: dict[str, Checks] = {}
        self._seen: dict[str, int] = {}

    def register(self, key: str, *, schema: Schema | None = None, validators: Iterable[Validator] = ()) -> None:
        """Say what documents of `key` must satisfy from now on; replaces what was registered before.

        Args:
            key: The documents' key, such as a fleet's name.
            schema: A pydantic model class, or a JSON schema.
            validators: Functions that take the document and return what is wrong (None, a string, or several), or
                raise ValueError. They may be async.

        Raises:
            SpecError: The key or the schema is no such thing.
            MissingExtra: A JSON schema is given and `agentfleet[jsonschema]` is not installed.
        """
        _check_words(key=key)
        self._checks[key] = Checks(schema, validators)

    async def put(
        self, key: str, document: object, *, author: str, reason: str, expect: int | None = None
    ) -> ConfigRevision:
        """Publish a document as the newest revision of `key`.

        Args:
            key: Such as a fleet's name; up to 253 printable characters.
            document: Plain JSON values, or a pydantic model.
            author: Who publishes it.
            reason: Why.
            expect: The revision that this one is based on (0: there is none yet); None publishes whatever came before.

        Raises:
            ConfigInvalid: It fails validation; each line names a field and the fix. Nothing was stored.
            ConfigConflict: `expect` is not the newest revision. Nothing was stored.
            SpecError: Key, author, reason or `expect` are not usable. Nothing was stored.
            DeadlineExceeded: The records did not answer in time; whether it was stored is unknown.
            JournalError: It was stored, but could not be journaled.
        """
        _check_words(key=key, author=author, reason=reason)
        if expect is not None:
            _check_number("expect", expect)
        return await self._publish(key, document, _Audit(author, reason), expect)

    async def rollback(
        self, key: str, revision: int, *, author: str, reason: str, expect: int | None = None
    ) -> ConfigRevision:
        """Publish the content of an earlier revision again, under a new number.

        The content must satisfy what is registered now. Raises like `put`, and `ConfigNotFound`.
        """
        _check_words(key=key, author=author, reason=reason)
        _check_number("revision", revision)
        if expect is not None:
            _check_number("expect", expect)
        old = await self.get(key, revision)
        return await self._publish(key, old.document, _Audit(author, reason, revision), expect)

    async def dry_run(self, key: str, document: object, *, expect: int | None = None) -> DryRun:
        """Validate and compare without storing or journaling anything."""
        _check_words(key=key)
        if expect is not None:
            _check_number("expect", expect)
        text, found = await self._examine(key, document)
        newest = await self._newest(key)
        against = newest.revision if newest is not None else 0
        if expect is not None and expect != against:
            found.append(Problem("(the whole)", f"is based on revision {expect}, but the newest is {against}"))
        if not text:
            return DryRun(tuple(found), (), against)
        old = newest.document if newest is not None else {}
        return DryRun(tuple(found), diff(old, ConfigRevision(key, 0, text, 0.0, "", "").document), against)

    async def get(self, key: str, revision: int | None = None) -> ConfigRevision:
        """One revision; the newest when no number is given.

        Raises:
            ConfigNotFound: There is no such document or revision, or it is kept no longer.
            ConfigError: The records have gone back behind a revision that was seen before.
            SpecError: `revision` is no number.
        """
        if revision is None:
            newest = await self._newest(key)
            if newest is None:
                raise ConfigNotFound(f"there is no configuration {key!r:.300}; publish one with put")
            if newest.revision < self._floor(key):
                raise ConfigError(self._regressed(key, newest.revision))
            return newest
        _check_number("revision", revision)
        found = await self._ask(self._records.find(key, revision))
        if found is None:
            raise ConfigNotFound(f"configuration {key!r:.300} has no revision {revision}; see history({key!r:.300})")
        return found

    async def history(self, key: str, *, after: int = 0, limit: int = 100) -> Sequence[ConfigRevision]:
        """Up to `limit` kept revisions greater than `after`, oldest first; empty for an unknown key."""
        return await self._ask(self._records.after(key, after, limit))

    async def keys(self) -> Sequence[str]:
        """Every key that has a document, sorted."""
        return await self._ask(self._records.keys())

    async def diff(self, key: str, a: int, b: int) -> tuple[Change, ...]:
        """What changed from revision `a` to revision `b`; raises `ConfigNotFound`."""
        before, after = await self.get(key, a), await self.get(key, b)
        return diff(before.document, after.document)

    def watch(self, key: str, *, after: int = 0) -> ConfigWatch:
        """Every revision greater than `after`, in order, none left out or repeated; then each new one. See there."""
        _check_number("after", after)
        return ConfigWatch(self, key, after)

    async def _publish(self, key: str, document: object, why: _Audit, expect: int | None) -> ConfigRevision:
        text, found = await self._examine(key, document)
        data: dict[str, Any] = {"author": why.author, "reason": why.reason, "restores": why.restores}
        if found:
            error = ConfigInvalid(
                "\n  ".join([f"configuration {key!r} is not valid, nothing was stored:", *map(str, found)])
            )
            self._record(key, "config.rejected", data | {"error": str(error)[:4000], "conflict": False})
            raise error
        try:
            stored, before = await self._store(key, text, why, expect)
        except ConfigConflict as conflict:
            self._record(key, "config.rejected", data | {"error": str(conflict)[:4000], "conflict": True})
            raise
        self._saw(key, stored.revision)
        changes = diff(before.document if before is not None else {}, stored.document)
        changed = [change.path for change in changes[:_MOST]]
        found_now = {"revision": stored.revision, "digest": stored.digest}
        self._record(key, "config.published", data | found_now | {"changed": changed})
        self._record(key, _STATE, found_now)
        return stored

    async def _store(
        self, key: str, text: str, why: _Audit, expect: int | None
    ) -> tuple[ConfigRevision, ConfigRevision | None]:
        """Store under the next number; without `expect`, again when another writer was first."""
        for attempt in range(_TRIES):
            before = await self._newest(key)
            newest = before.revision if before is not None else 0
            # `expect` too: if it arrived only just after `newest` was read, it must not be used twice
            number = max(newest, expect or 0, self._floor(key)) + 1
            revision = ConfigRevision(key, number, text, self._clock.now(), why.author, why.reason, why.restores)
            try:
                await self._ask(self._records.append(revision, expect=newest if expect is None else expect))
            except ConfigConflict:
                if expect is not None or attempt == _TRIES - 1:
                    raise
            else:
                return revision, before
        raise AssertionError("the last attempt returns or raises")

    async def _examine(self, key: str, document: object) -> tuple[str, list[Problem]]:
        """The document as text, and what is wrong with it."""
        if isinstance(document, BaseModel):
            try:
                document = document.model_dump(mode="json")
            except ValueError as error:
                return "", [Problem("(the whole)", f"the model cannot be written as JSON: {str(error)[:300]}")]
        text, bad = check(document, max_bytes=self._max_bytes, max_depth=self._max_depth)
        checks = self._checks.get(key)
        if bad or checks is None:
            return text, list(bad)
        return text, (await self._ask(checks.problems(text)))[:_MOST]

    async def _newest(self, key: str) -> ConfigRevision | None:
        newest = await self._ask(self._records.newest(key))
        if newest is not None:
            self._saw(key, newest.revision)
        return newest

    def _floor(self, key: str) -> int:
        """The greatest revision number ever seen of a key, also by earlier stores on the same journal."""
        if key not in self._seen:
            last = self._journal.last_state(key, _STATE) if self._journal is not None else None
            self._seen[key] = int(last.data["revision"]) if last is not None else 0
        return self._seen[key]

    def _saw(self, key: str, revision: int) -> None:
        self._seen[key] = max(self._floor(key), revision)

    def _regressed(self, key: str, newest: int) -> str:
        return (
            f"configuration {key!r} went back from revision {self._floor(key)} to {newest}: were its records restored "
            "from an old backup? Keep what runs now, and publish what shall hold; its number will be above all seen"
        )

    def _record(self, key: str, kind: str, data: dict[str, Any]) -> None:
        if self._journal is not None:
            self._journal.append(Event(self._clock.now(), key, kind, data=data))

    async def _ask(self, answer: Awaitable[_T]) -> _T:
        try:
            with anyio.fail_after(self._timeout):
                return await answer
        except TimeoutError as error:
            raise DeadlineExceeded(f"the configuration store did not answer within {self._timeout:g} s") from error


class ConfigWatch:
    """An async iterator over the revisions of one key. It holds no resource; dropping it is as good as closing it.

    However slow its reader, it gets each kept revision once and in order; it holds at most one page of them.
    Cancelling a wait loses nothing. One task at a time.
    """

    __slots__ = ("_key", "_page", "_position", "_stopped", "_store", "_told")

    def __init__(self, store: ConfigStore, key: str, after: int) -> None:
        self._store, self._key, self._position = store, key, after
        self._page: deque[ConfigRevision] = deque()
        self._stopped = False
        self._told = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ConfigRevision:
        """The next revision.

        Raises:
            ConfigError: The records went back, or dropped revisions that this reader has not read. Raised once for
                each such event; iterating on waits for the next revision above the last one read.
        """
        while not self._stopped:
            if self._page:
                revision = self._page.popleft()
                self._position = revision.revision
                return revision
            await anyio.lowlevel.checkpoint()
            await self._turn_page()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the iteration."""
        self._stopped = True
        self._page.clear()

    async def _turn_page(self) -> None:
        store, key, position = self._store, self._key, self._position
        records = store._records
        page = await store._ask(records.after(key, position, _PAGE))
        if page:
            store._saw(key, page[-1].revision)
            missing = position and page[0].revision > position + 1 and not self._told
            if missing and await store._ask(records.find(key, position)) is None:
                self._told = True
                raise ConfigError(
                    f"this reader of {key!r} fell behind: revisions {position + 1} to {page[0].revision - 1} are kept "
                    "no longer; read faster, or keep more"
                )
            self._told = False
            self._page.extend(page)
            return
        newest = await store._newest(key)
        number = newest.revision if newest is not None else 0
        if number < position and not self._told:
            self._told = True
            store._saw(key, position)
            raise ConfigError(store._regressed(key, number))
        await records.changed(key, position)


def _check_words(**words: object) -> None:
    """Raise SpecError unless each word is text that people can read, and not too long."""
    for name, word in words.items():
        most = 4096 if name == "reason" else 253
        if not isinstance(word, str) or not _is_readable(word, most, breaks=name == "reason"):
            raise SpecError(f"{name}: must be printable text of 1 to {most} characters; got {show(word)}")


def _is_readable(word: str, most: int, *, breaks: bool) -> bool:
    return bool(word.strip()) and len(word) <= most and all(c.isprintable() or (c == "\n" and breaks) for c in word)


def _check_number(name: str, number: object) -> None:
    """Raise SpecError unless it can be the number of a revision."""
    if type(number) is not int:
        raise SpecError(f"{name}: must be the number of a revision, a whole number; got {show(number)}")
