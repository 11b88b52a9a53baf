"""Watch streams: from pieces of bytes, cut anywhere, to events.

A line is decoded in one step into a tagged union of slim structs. Lines have no limit but memory. An answer that is no
watch (a balancer's HTML page with status 200, a body cut off in the middle of a line) is an error, never an event.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from agentfleet.backends.kubernetes.errors import Status
from agentfleet.backends.kubernetes.objects import KubeObject, Meta, Slim
from agentfleet.backends.kubernetes.resources import Resource
from agentfleet.errors import BackendUnavailable

__all__ = ["Added", "Bookmark", "Deleted", "Failed", "LineSplitter", "Modified", "WatchEvent", "event_reader"]

ObjectT = TypeVar("ObjectT", bound=KubeObject)


class Added(Slim, Generic[ObjectT], frozen=True, tag="ADDED", tag_field="type"):
    """An object is there, or matches the selector now."""

    object: ObjectT


class Modified(Slim, Generic[ObjectT], frozen=True, tag="MODIFIED", tag_field="type"):
    """An object has changed."""

    object: ObjectT


class Deleted(Slim, Generic[ObjectT], frozen=True, tag="DELETED", tag_field="type"):
    """An object is gone, or does not match the selector any more; this is its last state."""

    object: ObjectT


class _Marker(Slim, frozen=True):
    metadata: Meta


class Bookmark(Slim, frozen=True, tag="BOOKMARK", tag_field="type"):
    """Everything up to this resource version has been sent."""

    object: _Marker


class Failed(Slim, frozen=True, tag="ERROR", tag_field="type"):
    """The watch has ended; the Status says why."""

    object: Status


WatchEvent = Added[ObjectT] | Modified[ObjectT] | Deleted[ObjectT] | Bookmark | Failed


def event_reader(resource: Resource[ObjectT]) -> Callable[[bytes], WatchEvent[ObjectT]]:
    """A decoder of one line of a watch on this resource.

    It raises `BackendUnavailable` for a line that is no event.
    """
    of: Any = resource.type
    read = msgspec.json.Decoder(Added[of] | Modified[of] | Deleted[of] | Bookmark | Failed).decode
    path = resource.path()

    def read_event(line: bytes) -> WatchEvent[ObjectT]:
        try:
            event: WatchEvent[ObjectT] = read(line)
        except msgspec.DecodeError as error:
            begin = line[:120].decode(errors="replace")
            raise BackendUnavailable(f"watch {path}: a line that is no event ({error}): {begin!r}") from error
        return event

    return read_event


class LineSplitter:
    """Puts lines together from pieces. The work is linear in the bytes, however small the pieces and long the lines."""

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    @property
    def unfinished(self) -> bool:
        """Whether the last piece ended within a line."""
        return bool(self._parts)

    def lines(self, piece: bytes) -> list[bytes]:
        """The lines that this piece completes, without their ends; empty ones are left out."""
        first, *rest = piece.split(b"\n")
        if not rest:
            if first:
                self._parts.append(first)
            return []
        if self._parts:
            first = b"".join((*self._parts, first))
            self._parts.clear()
        last = rest.pop()
        if last:
            self._parts.append(last)
        return [line for line in (first, *rest) if line]
