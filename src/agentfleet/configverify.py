"""Whether a key's revisions are those that were published: each holds the hash of the one before it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from agentfleet.configwatch import PAGE
from agentfleet.errors import ConfigError
from agentfleet.stores.audit import STRAY
from agentfleet.stores.config import ConfigMarks, ConfigRecords, ConfigRevision

Ask = Callable[[Awaitable[Any]], Awaitable[Any]]
"""Waits for an answer, and not for ever."""


async def verify_chain(records: ConfigRecords, key: str, seen: Mapping[str, Any] | None, ask: Ask) -> tuple[int, int]:
    """Check all that is kept of a key.

    Args:
        records: Where it is kept.
        key: Of the documents.
        seen: Number and hash of the newest revision that a journal has seen.
        ask: Waits for what records answer.

    Returns:
        How many revisions were checked, and the number of the newest.

    Raises:
        ConfigError: One does not fit; the message names it.
    """
    marks: ConfigMarks = await ask(records.marks(key))
    checked, before = 0, None
    while page := await ask(records.after(key, 0 if before is None else before.revision, PAGE)):
        for each in page:
            _check_link(key, marks, before, each)
            if seen is not None and seen["revision"] == each.revision and _differs(seen, each):
                raise ConfigError(f"configuration {key!r}: revision {each.revision} is not what the journal saw")
            before, checked = each, checked + 1
    return checked, 0 if before is None else before.revision


async def verify_ends(records: ConfigRecords, key: str, newest: int, ask: Ask) -> None:
    """Check that nothing was cut off behind the newest revision that was found, and nothing put there."""
    marks: ConfigMarks = await ask(records.marks(key))
    if newest < marks.newest and await ask(records.find(key, marks.newest)) is None:
        raise ConfigError(f"configuration {key!r}: revision {marks.newest}, the newest, is not there")
    if marks.stray is not None:
        raise ConfigError(f"configuration {key!r}: revision {marks.stray} was put in by hand: {STRAY}")


def _check_link(key: str, marks: ConfigMarks, before: ConfigRevision | None, each: ConfigRevision) -> None:
    if before is None:
        if marks.dropped is not None and each.previous not in ("", marks.dropped):
            raise ConfigError(
                f"configuration {key!r}: what was published before revision {each.revision} is not there, though "
                "nothing was dropped"
            )
    elif each.previous not in ("", before.hash):
        raise ConfigError(
            f"configuration {key!r}: revision {before.revision} or {each.revision} was altered after it "
            "was published, or one between them was left out: their hashes do not fit"
        )


def _differs(seen: Mapping[str, Any], kept: ConfigRevision) -> bool:
    """Whether a revision is another than the one that was journaled; older journals have no hash."""
    return bool(seen.get("hash", kept.hash) != kept.hash)
