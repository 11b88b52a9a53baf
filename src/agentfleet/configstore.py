"""ConfigStore: configuration documents by key, in revisions that never change; validated, audited, watched.

::

    store = ConfigStore()
    store.register("researchers", schema=ResearcherConfig)
    first = await store.put("researchers", {"model": "small"}, author="ann", reason="first version", expect=0)
    async for revision in store.watch("researchers"):
        push(revision.text)
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Sequence
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
from pydantic import BaseModel

from agentfleet.clock import Clock, SystemClock
from agentfleet.configchecks import Checks, Schema, Validator
from agentfleet.configpublish import Done, DryRun, Publication
from agentfleet.configspec import ConfigRollout
from agentfleet.configverify import verify_chain, verify_ends
from agentfleet.configwatch import ConfigWatch
from agentfleet.configwords import check_audit, check_number, check_request, check_words
from agentfleet.core.configrollout import ConfigPhase
from agentfleet.core.documents import Change, Problem, check, diff
from agentfleet.errors import (
    ConfigConflict,
    ConfigError,
    ConfigInvalid,
    ConfigNotFound,
    DeadlineExceeded,
    KeyReused,
    OperationRefused,
    SpecError,
)
from agentfleet.events import Event
from agentfleet.stores.config import ConfigRecords, ConfigRevision, RolloutRecord
from agentfleet.stores.config_memory import MemoryConfig
from agentfleet.stores.journal import Journal
from agentfleet.units import show
from agentfleet.waiting import seconds_of

_TRIES = 100
_MOST = 20
_STATE = "state.config_store"  # "state.config" is what was delivered to a fleet
_T = TypeVar("_T")


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
        self._others = Checks()
        self._seen: dict[str, int] = {}

    def register(
        self,
        key: str,
        *,
        schema: Schema | None = None,
        validators: Iterable[Validator] = (),
        plain_secrets: bool = False,
    ) -> None:
        """Say what documents of `key` must satisfy from now on; replaces what was registered before.

        Args:
            key: The documents' key, such as a fleet's name.
            schema: A pydantic model class, or a JSON schema.
            validators: Functions that take the document and return what is wrong (None, a string, several, or a
                dictionary of each field's path and what is wrong with it), or raise ValueError. They may be async.
            plain_secrets: Whether fields that look like secrets may hold text; see `core.secrets`.

        Raises:
            SpecError: The key or the schema is no such thing, or the schema refers to what it does not contain.
            MissingExtra: A JSON schema is given and `agentfleet[jsonschema]` is not installed.
        """
        check_words(key=key)
        self._checks[key] = Checks(schema, validators, plain_secrets=plain_secrets)

    def register_others(self, schema: Schema) -> None:
        """Say what documents of all keys must satisfy for which nothing is registered. Raises like `register`."""
        self._others = Checks(schema)

    async def put(
        self,
        key: str,
        document: object,
        *,
        author: str,
        reason: str,
        expect: int | None = None,
        origin: str = "",
        rollout: ConfigRollout | None = None,
        request: str = "",
    ) -> ConfigRevision:
        """Publish a document as the newest revision of `key`.

        Args:
            key: Such as a fleet's name; up to 253 printable characters.
            document: Plain JSON values, or a pydantic model.
            author: Who publishes it.
            reason: Why.
            expect: The revision that this one is based on (0: there is none yet); None publishes whatever came before.
            origin: Where from, such as the address of a client.
            rollout: How it reaches the fleet in steps; None is to all at once, and ends a rollout that is under way.
            request: Up to 64 characters that tell this request from all others; where it was done already, the revision
                that it has published is returned. Remembered as long as that is kept. Empty: it is done each time.

        Raises:
            ConfigInvalid: It fails validation; each line names a field and the fix. Nothing was stored.
            ConfigConflict: `expect` is not the newest revision. Nothing was stored.
            SpecError: Key, author, reason, `expect` or `rollout` are not usable. Nothing was stored.
            OperationRefused: With `rollout`: another is not over, or there is nothing to go back to.
            KeyReused: `request` has published something else.
            DeadlineExceeded: The records did not answer in time; whether it was stored is unknown.
            JournalError: It was stored, but could not be journaled.
        """
        check_audit(key, author, reason, origin)
        if expect is not None:
            check_number("expect", expect)
        if rollout is not None and not isinstance(rollout, ConfigRollout):
            raise SpecError(f"rollout: must be a ConfigRollout, not {show(rollout)}")
        check_request(request)
        why = Publication(author, reason, origin, rollout=rollout, request=request)
        return await self._publish(key, document, why, expect)

    async def rollback(
        self,
        key: str,
        revision: int,
        *,
        author: str,
        reason: str,
        expect: int | None = None,
        origin: str = "",
        request: str = "",
    ) -> ConfigRevision:
        """Publish the content of an earlier revision again, under a new number.

        The content must satisfy what is registered now. Raises like `put`, and `ConfigNotFound`.
        """
        check_audit(key, author, reason, origin)
        check_number("revision", revision)
        if expect is not None:
            check_number("expect", expect)
        check_request(request)
        why = Publication(author, reason, origin, revision, request=request)
        done = await self._requested(key, None, why)
        if done is not None:  # even if what it brought back is kept no longer
            return done
        old = await self.get(key, revision)
        return await self._publish(key, old.document, why, expect)

    async def dry_run(self, key: str, document: object, *, expect: int | None = None) -> DryRun:
        """Validate and compare without storing or journaling anything."""
        check_words(key=key)
        if expect is not None:
            check_number("expect", expect)
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
        check_number("revision", revision)
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

    async def verify(self, key: str) -> int:
        """Check that no kept revision was altered, left out, put in or cut off since it was published.

        Each revision holds the hash of the one before; the journal, if there is one, that of the newest it has seen.
        Who may write all of these can make another history that fits; see docs/security.md.

        Returns:
            How many revisions were checked.

        Raises:
            ConfigError: One does not fit; the message names it.
        """
        last = self._journal.last_state(key, _STATE) if self._journal is not None else None
        checked, newest = await verify_chain(self._records, key, None if last is None else last.data, self._ask)
        if newest < self._floor(key):
            raise ConfigError(self._regressed(key, newest))
        await verify_ends(self._records, key, newest, self._ask)
        return checked

    async def rollout(self, key: str) -> RolloutRecord | None:
        """How far the newest rollout in steps has come; None if there never was one."""
        return await self._ask(self._records.rollout(key))

    async def advance(self, record: RolloutRecord, *, expect: int) -> None:
        """Write how far a rollout has come; for the fleet's leader. Raises as `ConfigRecords.advance`."""
        await self._ask(self._records.advance(record, expect=expect))

    async def changed(self, key: str, revision: int, version: int | None = None) -> None:
        """Wait as `ConfigRecords.changed`; may return early, never late."""
        await self._records.changed(key, revision, version)

    def watch(self, key: str, *, after: int = 0) -> ConfigWatch:
        """Every revision greater than `after`, in order, none left out or repeated; then each new one. See there."""
        check_number("after", after)
        return ConfigWatch(self, key, after)

    async def _publish(self, key: str, document: object, why: Publication, expect: int | None) -> ConfigRevision:
        text, found = await self._examine(key, document)
        if (done := await self._requested(key, text, why)) is not None:
            return done
        data = why.told()
        if found:
            error = ConfigInvalid(
                "\n  ".join([f"configuration {key!r} is not valid, nothing was stored:", *map(str, found)])
            )
            self._record(key, "config.rejected", data | {"error": str(error)[:4000], "conflict": False})
            raise error
        try:
            stored, before = await self._store(key, text, why, expect)
        except Done as already:
            return already.revision
        except ConfigConflict as conflict:
            if (twice := await self._requested(key, text, why)) is not None:  # it came twice at the same time
                return twice
            self._record(key, "config.rejected", data | {"error": str(conflict)[:4000], "conflict": True})
            raise
        self._saw(key, stored.revision)
        changes = diff(before.document if before is not None else {}, stored.document)
        changed = [change.path for change in changes[:_MOST]]
        found_now = {"revision": stored.revision, "digest": stored.digest, "hash": stored.hash}
        self._record(key, "config.published", data | found_now | {"changed": changed})
        self._record(key, _STATE, found_now)
        return stored

    async def _store(
        self, key: str, text: str, why: Publication, expect: int | None
    ) -> tuple[ConfigRevision, ConfigRevision | None]:
        """Store under the next number; without `expect`, again when another writer was first."""
        for attempt in range(_TRIES):
            before = await self._newest(key)
            newest = before.revision if before is not None else 0
            if (done := await self._requested(key, text, why)) is not None:  # since the last look, but not since this
                raise Done(done)
            if expect not in (None, newest):  # also where it lands just now: what is built here is built upon `before`
                raise ConfigConflict(
                    f"{key!r} is at revision {newest}, not {expect}: another writer was first; "
                    "read the newest revision, merge your change into it, and publish again"
                )
            number = max(newest, self._floor(key)) + 1
            said = (key, number, text, self._clock.now(), why.author, why.reason, why.restores, why.origin)
            base = 0 if why.rollout is None else await self._base(key, before)
            revision = ConfigRevision(*said, "" if before is None else before.hash, why.steps, base, why.request)
            try:
                await self._ask(self._records.append(revision, expect=newest))
            except ConfigConflict:
                if expect is not None or attempt == _TRIES - 1:
                    raise
            else:
                return revision, before
        raise AssertionError("the last attempt returns or raises")

    async def _requested(self, key: str, text: str | None, why: Publication) -> ConfigRevision | None:
        """What this very request has published before; raises `KeyReused` if that was another one."""
        if not why.request:
            return None
        found = await self._ask(self._records.requested(key, why.request))
        if found is None:
            return None
        if not why.fits(found) or text not in (None, found.text):
            raise KeyReused(
                f"configuration {key!r:.300}: this request has published revision {found.revision}, another one"
            )
        return found

    async def _base(self, key: str, before: ConfigRevision | None) -> int:
        """The revision that a rollout in steps may start from: one that is for all."""
        if before is None:
            raise OperationRefused(
                f"configuration {key!r:.300}: there is no revision yet that a rollout could go back to; publish the "
                "first one without rollout"
            )
        record = await self.rollout(key) if before.rollout else None
        proved = record is not None and (record.revision, record.phase) == (before.revision, ConfigPhase.COMPLETE)
        if before.rollout and not proved:
            raise OperationRefused(
                f"configuration {key!r:.300}: revision {before.revision} is being rolled out and has not reached all; "
                f"wait for it, go back with rollback({before.base}), or publish without rollout, to all at once"
            )
        return before.revision

    async def _examine(self, key: str, document: object) -> tuple[str, list[Problem]]:
        """The document as text, and what is wrong with it."""
        if isinstance(document, BaseModel):
            try:
                document = document.model_dump(mode="json")
            except ValueError as error:
                return "", [Problem("(the whole)", f"the model cannot be written as JSON: {str(error)[:300]}")]
        text, bad = check(document, max_bytes=self._max_bytes, max_depth=self._max_depth)
        if bad:
            return text, list(bad)
        return text, (await self._ask(self._checks.get(key, self._others).problems(text)))[:_MOST]

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
