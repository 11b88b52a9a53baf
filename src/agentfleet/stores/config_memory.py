"""RECORD: configuration documents in memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from agentfleet.errors import ConfigConflict, NotLeader, SpecError
from agentfleet.stores.config import ConfigMarks, ConfigRevision, RolloutRecord
from agentfleet.stores.following import Bell


class MemoryConfig:
    """Revisions in memory: the newest `keep` of each key.

    Args:
        keep: Revisions kept of each key, from 1.
        revisions: What is kept from the start, such as what a journal remembers; per key in rising order.
        rollouts: Likewise how far rollouts have come.

    Raises:
        SpecError: `keep` is less than 1.
    """

    __slots__ = ("_bells", "_keep", "_kept", "_rollouts")

    def __init__(
        self, *, keep: int = 1000, revisions: Iterable[ConfigRevision] = (), rollouts: Iterable[RolloutRecord] = ()
    ) -> None:
        if keep < 1:
            raise SpecError(f"keep: must be at least 1 revision; got {keep}")
        self._keep = keep
        self._kept: dict[str, list[ConfigRevision]] = {}
        self._bells: dict[str, Bell] = {}
        self._rollouts = {record.key: record for record in rollouts}
        for revision in revisions:
            self._kept.setdefault(revision.key, []).append(revision)

    async def append(self, revision: ConfigRevision, *, expect: int) -> None:
        """Keep a revision if `expect` is the newest; raises `ConfigConflict` otherwise."""
        self._check(revision, expect)
        self._add(revision)

    async def newest(self, key: str) -> ConfigRevision | None:
        """The newest revision of a key."""
        kept = self._kept.get(key)
        return kept[-1] if kept else None

    async def find(self, key: str, revision: int) -> ConfigRevision | None:
        """One revision, None if it is not kept."""
        found = self._after(key, revision - 1, 1)
        return found[0] if found and found[0].revision == revision else None

    async def after(self, key: str, revision: int, limit: int) -> Sequence[ConfigRevision]:
        """Up to `limit` revisions greater than `revision`, oldest first."""
        return self._after(key, revision, limit)

    async def marks(self, key: str) -> ConfigMarks:
        """The number of the newest; nobody but this process could put another one in."""
        kept = self._kept.get(key)
        return ConfigMarks(kept[-1].revision if kept else 0)

    async def requested(self, key: str, request: str) -> ConfigRevision | None:
        """The revision that a request has published, None if it is not kept."""
        return next((each for each in reversed(self._kept.get(key, [])) if each.request == request), None)

    async def keys(self) -> Sequence[str]:
        """Every key that has a revision, sorted."""
        return sorted(self._kept)

    async def changed(self, key: str, revision: int, version: int | None = None) -> None:
        """Wait until the newest revision is greater than `revision`, or the rollout's version than `version`."""
        kept, record = self._kept.get(key), self._rollouts.get(key)
        newer = bool(kept and kept[-1].revision > revision)
        moved = version is not None and record is not None and record.version > version
        if not newer and not moved:
            await self._bells.setdefault(key, Bell()).wait()

    async def rollout(self, key: str) -> RolloutRecord | None:
        """How far the newest rollout of a key has come."""
        return self._rollouts.get(key)

    async def advance(self, record: RolloutRecord, *, expect: int) -> None:
        """Write how far a rollout has come; raises `ConfigConflict` unless `expect` is the version before."""
        self._check_record(record, expect)
        self._set(record)

    def _check(self, revision: ConfigRevision, expect: int) -> None:
        kept = self._kept.get(revision.key, [])
        newest = kept[-1].revision if kept else 0
        if newest != expect:
            raise ConfigConflict(
                f"{revision.key!r} is at revision {newest}, not {expect}: another writer was first; "
                "read the newest revision, merge your change into it, and publish again"
            )

    def _add(self, revision: ConfigRevision) -> None:
        """Keep a revision, if it is newer than all that are kept."""
        kept = self._kept.get(revision.key, [])
        if kept and kept[-1].revision >= revision.revision:
            return
        self._kept[revision.key] = [*kept[-(self._keep - 1) :], revision] if self._keep > 1 else [revision]
        self._ring(revision.key)

    def _check_record(self, record: RolloutRecord, expect: int) -> None:
        before = self._rollouts.get(record.key)
        version, epoch = (0, 0) if before is None else (before.version, before.epoch)
        if record.epoch < epoch:
            raise NotLeader(f"{record.key!r}: a leader of epoch {epoch} has written; this is {record.epoch}")
        if version != expect:
            raise ConfigConflict(f"the rollout of {record.key!r} is at version {version}, not {expect}")

    def _set(self, record: RolloutRecord) -> None:
        self._rollouts[record.key] = record
        self._ring(record.key)

    def _ring(self, key: str) -> None:
        if key in self._bells:
            self._bells.pop(key).ring()

    def _after(self, key: str, revision: int, limit: int) -> list[ConfigRevision]:
        kept = self._kept.get(key, [])
        start = bisect_right(kept, revision, key=lambda item: item.revision)
        return kept[start : start + limit]
