"""What an informer counts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["InformerMetrics"]


@dataclass(slots=True)
class InformerMetrics:
    """What an informer has done since it was started."""

    lists: int = 0
    """Lists begun; the first and every relist."""
    relists: int = 0
    """Of these, all but the first."""
    pages: int = 0
    """Pages read."""
    watches: int = 0
    """Watches that began."""
    reconnects: int = 0
    """Of these, all but the first after a list."""
    expired: int = 0
    """Times that history was compacted away (410)."""
    events: int = 0
    """Events read, repeated ones included, bookmarks not."""
    bookmarks: int = 0
    """Bookmarks read."""
    failures: int = 0
    """Lists and watches that ended in an error."""
