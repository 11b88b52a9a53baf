"""Live configuration on the agent's side: revisions only go up, and a rejected document changes nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any


class Configuration:
    """The newest accepted document. Changed in the user's loop only; read from anywhere."""

    __slots__ = ("_now", "callback")

    def __init__(self) -> None:
        # one tuple, replaced whole, so that no reader ever pairs a revision with another one's document
        self._now: tuple[int, Mapping[str, Any]] = (0, MappingProxyType({}))
        self.callback: Callable[[Mapping[str, Any]], Any] | None = None

    @property
    def revision(self) -> int:
        """Revision of the document in force, 0 before the first."""
        return self._now[0]

    @property
    def document(self) -> Mapping[str, Any]:
        """The document in force, read-only."""
        return self._now[1]

    async def accept(self, revision: int, document: Mapping[str, Any]) -> None:
        """Ask the agent's callback, and put the document in force unless it raises."""
        proposed = MappingProxyType(dict(document))
        if self.callback is not None:
            answer = self.callback(proposed)
            if inspect.isawaitable(answer):
                await answer
        self._now = (revision, proposed)
