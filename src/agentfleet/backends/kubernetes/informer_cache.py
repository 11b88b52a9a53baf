"""What an informer knows, and how lists and watch events change it. Pure: no waiting, no clock.

Three rules keep it true whatever order things come in: of one object (one uid) only newer resource versions count; what
was removed does not come back by a late event; and an object with the name of another, but its own uid, is another
object. A list is the truth: it is read from the store itself, so it counts even where its versions are lower (a
restored store).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from msgspec.structs import force_setattr

from agentfleet.backends.kubernetes.objects import KubeObject, Meta
from agentfleet.backends.kubernetes.resources import version_of

__all__ = ["Changed", "ObjectCache", "Removed", "Snapshot", "key_of"]

ObjectT = TypeVar("ObjectT", bound=KubeObject)

_COMMON = 4096
"""Label values and owners of which one copy is shared."""
_GRAVES = 4096
"""Removed objects that are remembered, so that a late event does not bring them back."""


@dataclass(frozen=True, slots=True)
class Snapshot(Generic[ObjectT]):
    """Everything that exists. The first event of each iteration, and only that."""

    objects: tuple[ObjectT, ...]


@dataclass(frozen=True, slots=True)
class Changed(Generic[ObjectT]):
    """An object is new or different now."""

    object: ObjectT
    before: ObjectT | None
    """As it was told before; None for a new one."""


@dataclass(frozen=True, slots=True)
class Removed(Generic[ObjectT]):
    """An object does not exist any more, or does not match the selectors."""

    object: ObjectT
    """Its last state that is known."""


def key_of(metadata: Meta) -> str:
    """The key of an object: "namespace/name", or its name alone where there are no namespaces."""
    return f"{metadata.namespace}/{metadata.name}" if metadata.namespace else metadata.name


class ObjectCache(Generic[ObjectT]):
    """The objects of one kind and selection, by key."""

    def __init__(self) -> None:
        self._objects: dict[str, ObjectT] = {}
        self._graves: dict[str, int] = {}
        self._common: dict[Any, Any] = {}
        self.objects: Mapping[str, ObjectT] = MappingProxyType(self._objects)
        """What exists, live, read-only."""
        self.version = 0
        """The newest resource version seen, as a number; everything up to it is in here."""
        self.dropped = 0
        """Events that were no news: repeated, late, or about an object's predecessor."""

    def reached(self, resource_version: str) -> None:
        """The server says that everything up to here has been sent."""
        if resource_version.isdecimal():
            self.version = max(self.version, int(resource_version))

    def put(self, object: ObjectT, *, listed: bool = False) -> Sequence[Changed[ObjectT] | Removed[ObjectT]]:
        """An object is there.

        Args:
            object: As the server shows it.
            listed: It comes from a list, which is the truth whatever was known before.

        Returns:
            What that changes, in order; nothing if it is no news.
        """
        meta = object.metadata
        key, version = key_of(meta), version_of(meta)
        known = self._objects.get(key)
        if not listed and not self._is_news(meta, version, known):
            self.dropped += 1
            return ()
        self._graves.pop(meta.uid, None)
        self._share(meta)
        if version is not None and version > self.version and not listed:  # a page is not the whole list yet
            self.version = version
        if known is None:
            self._objects[key] = object
            return (Changed(object, None),)
        if known.metadata.uid != meta.uid:
            self._bury(known.metadata, version)
            self._objects[key] = object
            return (Removed(known), Changed(object, None))
        if known.metadata.resource_version == meta.resource_version:  # listed again, unchanged: keep the older one
            return ()
        self._objects[key] = object
        return (Changed(object, known),)

    def remove(self, object: ObjectT) -> Sequence[Removed[ObjectT]]:
        """An object is gone; `object` is its last state. Returns what that changes."""
        meta = object.metadata
        version = version_of(meta)
        key = key_of(meta)
        known = self._objects.get(key)
        if version is not None:
            self.version = max(self.version, version)
        if known is None or known.metadata.uid != meta.uid:
            self._bury(meta, version)
            self.dropped += 1
            return ()
        if _older(version, version_of(known.metadata)):  # it matched the selector again since
            self.dropped += 1
            return ()
        self._bury(meta, version)
        del self._objects[key]
        return (Removed(object),)

    def keep(self, keys: set[str], resource_version: str) -> Sequence[Removed[ObjectT]]:
        """A list is complete: whatever it did not name is gone.

        Args:
            keys: What it named.
            resource_version: The list's own; the cache is now exactly as new as that.
        """
        version = int(resource_version) if resource_version.isdecimal() else 0
        self.version = version
        removed = []
        for key in self._objects.keys() - keys:
            known = self._objects.pop(key)
            self._bury(known.metadata, version)
            removed.append(Removed(known))
        return removed

    def _share(self, meta: Meta) -> None:
        """Keep what a thousand pods of one owner have in common once, not a thousand times."""
        common = self._common
        if len(common) > _COMMON:
            common.clear()
        labels = meta.labels
        for name, value in labels.items():
            labels[name] = common.setdefault(value, value)
        owners = meta.owner_references
        if owners:
            force_setattr(meta, "owner_references", common.setdefault(owners, owners))

    def _is_news(self, meta: Meta, version: int | None, known: ObjectT | None) -> bool:
        if version is None:  # a server whose versions are no numbers: believe the order in which they come
            return True
        before = version_of(known.metadata) if known is not None else None
        return version > max(before or 0, self._graves.get(meta.uid, 0))

    def _bury(self, meta: Meta, version: int | None) -> None:
        known = version_of(meta)
        if version is None and known is None:
            return
        self._graves.pop(meta.uid, None)  # to the end of the queue
        self._graves[meta.uid] = max(version or 0, known or 0)
        if len(self._graves) > _GRAVES:
            del self._graves[next(iter(self._graves))]


def _older(version: int | None, than: int | None) -> bool:
    return version is not None and than is not None and version < than
