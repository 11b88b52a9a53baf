"""RECORD: the port to where configuration documents are kept, and what one kept revision looks like."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class ConfigRevision:
    """One published document. It never changes: the document is kept as text, and each `document` is a fresh copy."""

    key: str
    revision: int
    """From 1, rising with each publication of the key, never used twice."""
    text: str
    """The document as compact JSON; ready to be sent."""
    at: float
    """When it was published, in seconds since the epoch."""
    author: str
    reason: str
    restores: int | None = None
    """The revision whose content this one brings back, if it is a rollback."""

    @property
    def document(self) -> Any:
        """The document as plain data, yours to change."""
        return json.loads(self.text)

    @property
    def digest(self) -> str:
        """SHA-256 of the text, in hex: equal documents have equal digests."""
        return hashlib.sha256(self.text.encode()).hexdigest()


class ConfigRecords(Protocol):
    """Where revisions are kept. One conformance suite (`tests/stores`) runs against every implementation.

    Every method may raise `ConfigError` when the place cannot be reached.
    """

    async def append(self, revision: ConfigRevision, *, expect: int) -> None:
        """Keep a revision, all or nothing, if `expect` is the newest revision of its key (0: there is none).

        Raises:
            ConfigConflict: Another revision is the newest; nothing was kept.
        """
        ...

    async def newest(self, key: str) -> ConfigRevision | None:
        """The newest revision of a key; None if there is none."""
        ...

    async def find(self, key: str, revision: int) -> ConfigRevision | None:
        """One revision; None if it never was, or is kept no longer."""
        ...

    async def after(self, key: str, revision: int, limit: int) -> Sequence[ConfigRevision]:
        """Up to `limit` kept revisions greater than `revision`, oldest first."""
        ...

    async def keys(self) -> Sequence[str]:
        """Every key that has a revision, sorted."""
        ...

    async def changed(self, key: str, revision: int) -> None:
        """Wait until the newest revision of a key is greater than `revision`. May return early, never late."""
        ...
