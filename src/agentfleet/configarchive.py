"""Configuration as one file: the newest document of each key, written out and read in again.

text = await dump(store)
for each in await load(other, text, author="ops", reason="the new cluster", dry_run=True):
print(each)
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentfleet.configstore import ConfigStore
from agentfleet.core.documents import Change, write_path
from agentfleet.errors import ConfigInvalid, SpecError
from agentfleet.stores.config import ConfigRevision

FORMAT = "agentfleet-config/1"


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid")
    revision: Annotated[int, Field(ge=1)]
    at: float
    author: str
    reason: str
    digest: str
    document: Any


class _Archive(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: Literal["agentfleet-config/1"]
    documents: dict[str, _Kept]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What reading in did to a key, or would do.

    Attributes:
        key: The key.
        revision: Number of the new revision; None if it holds this document already, or nothing was done yet.
        changes: Differences from the newest revision there was.
    """

    key: str
    revision: int | None
    changes: tuple[Change, ...]


async def dump(store: ConfigStore, keys: Iterable[str] | None = None) -> str:
    """The newest document of each key, or of these, as JSON text; raises `ConfigNotFound`."""
    documents = {}
    for key in sorted(set(await store.keys() if keys is None else keys)):
        newest = await store.get(key)
        told: dict[str, Any] = {"revision": newest.revision, "at": newest.at, "author": newest.author}
        documents[key] = told | {"reason": newest.reason, "digest": newest.digest, "document": newest.document}
    return json.dumps({"format": FORMAT, "documents": documents}, ensure_ascii=False, indent=2) + "\n"


async def load(
    store: ConfigStore, text: str, *, author: str, reason: str, dry_run: bool = False, origin: str = ""
) -> list[Loaded]:
    """Publish each document of an archive that differs from the newest of its key; others are left alone.

    All are validated before the first is published. Who publishes in between is not overwritten.

    Args:
        store: Where to.
        text: What `dump` wrote.
        author: Who reads it in.
        reason: Why.
        dry_run: Publish nothing.
        origin: Where from.

    Raises:
        SpecError: The text is no such archive, or was altered; nothing was published.
        ConfigInvalid: A document fails validation; nothing was published.
        ConfigConflict: Somebody else published one of the keys just now; those after it were not published.
    """
    archive = _read(text)
    plan: list[tuple[str, Any, int, tuple[Change, ...]]] = []
    problems: list[str] = []
    for key, kept in sorted(archive.documents.items()):
        found = await store.dry_run(key, kept.document)
        problems += [f"{key}: {problem}" for problem in found.problems]
        plan.append((key, kept.document, found.against, found.changes))
    if problems:
        raise ConfigInvalid("\n  ".join(["the archive is not valid here, nothing was published:", *problems[:20]]))
    done: list[Loaded] = []
    for key, document, against, changes in plan:
        revision: int | None = None
        if not dry_run and (changes or not against):
            said = await store.put(key, document, author=author, reason=reason, expect=against, origin=origin)
            revision = said.revision
        done.append(Loaded(key, revision, changes))
    return done


def _read(text: str) -> _Archive:
    try:
        archive = _Archive.model_validate_json(text)
    except ValidationError as error:
        lines = [f"{write_path(item['loc'])}: {item['msg']}" for item in error.errors(include_input=False)[:20]]
        raise SpecError("\n  ".join(["text: is no archive of configuration:", *lines])) from error
    for key, kept in archive.documents.items():
        written = json.dumps(kept.document, ensure_ascii=False, separators=(",", ":"))
        if ConfigRevision(key, 1, written, 0.0, "", "").digest != kept.digest:
            raise SpecError(
                f"text: the document of {key!r:.300} is not the one that was written out: its digest differs"
            )
    return archive
