"""A dictionary that never changes, so that a frozen spec is frozen all the way down."""

from __future__ import annotations

from typing import Any, NoReturn


class FrozenDict(dict[str, str]):
    """Words by word, read-only and hashable. It is a `dict`, so that everything that writes dictionaries writes it."""

    __slots__ = ()

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise TypeError("a spec is frozen; make a changed copy with replace()")

    __setitem__ = __delitem__ = __ior__ = _refuse
    update = setdefault = pop = popitem = clear = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, str]]]:
        return FrozenDict, (dict(self),)  # copies and pickles are built at once, not item by item
