"""Bearer tokens: those of the store, and those of a file that an operator mounts.

Nothing here keeps or tells a token: what is remembered of one is its SHA-256.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import anyio

from agentfleet.clock import Clock
from agentfleet.errors import BackendUnavailable, DeadlineExceeded, SpecError
from agentfleet.server.principals import Principal, greatest
from agentfleet.stores.tokens import (
    Scope,
    TokenRecord,
    TokenStore,
    check_name,
    fleets_of,
    is_secret_of,
    scopes_of,
    split,
)

log = logging.getLogger(__name__)

_FRESH = 5.0
"""Seconds for which what the store said of a token is believed: so soon a revoked one ends."""
_MOST = 10_000
_NOTE = 60.0
"""Seconds between two notes that a token was used."""
_LOOK = 1.0
"""Seconds between two looks at the file."""
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)
_PLAIN = re.compile(r"[!-~]{32,512}", re.ASCII)


class StoredTokens:
    """Tokens that `agentfleet token create` has made.

    Args:
        store: Where they are.
        clock: Tells whether they have expired.
    """

    def __init__(self, store: TokenStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._known: OrderedDict[str, tuple[TokenRecord | None, float]] = OrderedDict()
        self._noted: dict[str, float] = {}

    async def principal(self, token: str) -> Principal | None:
        """See `Source`."""
        parts = split(token)
        if parts is None:
            return None
        id, secret = parts
        record = await self._find(id)
        now = self._clock.now()
        if not is_secret_of(record, secret) or record is None or not record.holds(now):
            return None
        await self._note(record, now)
        return Principal(
            f"token/{record.name}",
            record.id,
            greatest(record.scopes),
            frozenset(record.fleets),
            record.expires_at,
            agent=Scope.AGENT in record.scopes,
        )

    def remembers(self, token: str) -> bool:
        """See `Remembering`."""
        id, secret = split(token) or ("", "")
        record, _ = self._known.get(id, (None, 0.0))
        return record is not None and is_secret_of(record, secret)

    async def _find(self, id: str) -> TokenRecord | None:
        now = anyio.current_time()
        known = self._known.get(id)
        if known is not None and now - known[1] < _FRESH:
            return known[0]
        record = await self._store.find(id)
        self._known[id] = (record, now)
        self._known.move_to_end(id)
        if len(self._known) > _MOST:
            self._known.popitem(last=False)
        return record

    async def _note(self, record: TokenRecord, now: float) -> None:
        """Note now and then that it was used; nobody waits long for that, or fails by it."""
        if now - max(record.used_at or 0.0, self._noted.get(record.id, 0.0)) < _NOTE:
            return
        self._noted[record.id] = now
        try:
            with anyio.move_on_after(1.0):
                await self._store.used({record.id: now})
        except (BackendUnavailable, DeadlineExceeded) as error:
            log.warning("it could not be noted that token %s was used: %s", record.id, error)


@dataclass(frozen=True, slots=True)
class _Line:
    name: str
    scopes: tuple[Scope, ...]
    fleets: tuple[str, ...]


class FileTokens:
    """Tokens in a file, such as a mounted secret; read again when it changes.

    Each line is `name scope[,scope] fleet[,fleet] token`, where the token is written plainly (32 characters or more) or
    as `sha256:` and 64 hex digits; `*` is every fleet, and `#` begins a comment.

    Args:
        path: Of the file.

    Raises:
        SpecError: It cannot be read, or a line is wrong. Later, when it is read again, what was read before stays.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        self._seen = self._stamp()
        self._looked_at = float("-inf")
        self._lines = read_lines(self._path)

    def __len__(self) -> int:
        return len(self._lines)

    async def principal(self, token: str) -> Principal | None:
        """See `Source`."""
        self._look()
        digest = hashlib.sha256(token.encode()).hexdigest()
        for kept, line in self._lines.items():
            if hmac.compare_digest(kept, digest):
                return Principal(
                    f"file/{line.name}",
                    f"file:{line.name}",
                    greatest(line.scopes),
                    frozenset(line.fleets),
                    agent=Scope.AGENT in line.scopes,
                )
        return None

    def remembers(self, token: str) -> bool:
        """See `Remembering`: what the file says is at hand."""
        del token
        return True

    def _look(self) -> None:
        now = anyio.current_time()
        if now - self._looked_at < _LOOK:
            return
        self._looked_at = now
        stamp = self._stamp()
        if stamp == self._seen:
            return
        try:
            self._lines = read_lines(self._path)
        except SpecError as error:
            log.warning("the tokens cannot be read again, the old ones stay in use: %s", error)
            return
        self._seen = stamp
        log.info("read %d tokens from %s", len(self._lines), self._path)

    def _stamp(self) -> tuple[int, int, int] | None:
        """What changes with the file, through the links that Kubernetes mounts it by."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def read_lines(path: Path) -> Mapping[str, _Line]:
    """The tokens of a file, by their SHA-256; raises `SpecError` that names the line, and never a token."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"token file {path}: cannot be read: {error}") from error
    found: dict[str, _Line] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#", 1)[0].split() if line.lstrip().startswith("#") else line.split()
        if not words:
            continue
        try:
            digest, read = _read(words)
        except SpecError as error:
            raise SpecError(f"token file {path}, line {number}: {error}") from error
        if digest in found or any(each.name == read.name for each in found.values()):
            raise SpecError(f"token file {path}, line {number}: the name or the token stands there twice")
        found[digest] = read
    return found


def _read(words: Iterable[str]) -> tuple[str, _Line]:
    parts = list(words)
    if len(parts) != 4:
        raise SpecError("write 'name scope[,scope] fleet[,fleet] token'")
    name, scopes, fleets, token = parts
    if (digest := _DIGEST.fullmatch(token)) is not None:
        kept = digest[1]
    elif _PLAIN.fullmatch(token):
        kept = hashlib.sha256(token.encode()).hexdigest()
    else:
        raise SpecError("token: 32 to 512 printable characters, or 'sha256:' and 64 hex digits")
    return kept, _Line(check_name(name), scopes_of(scopes.split(",")), fleets_of(fleets.split(",")))
