"""DECIDE: whether a value is a plain JSON document, where it is wrong, and in what two documents differ."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

_PLAIN = re.compile(r"[\w-]+", re.ASCII)
_MOST = 20
WHOLE = "(the whole)"
"""Where something is that no part of a document has alone."""

Place = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a document: where, and what to do."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between two documents. `before` and `after` are None where there is nothing."""

    path: str
    kind: Literal["added", "removed", "changed"]
    before: Any = None
    after: Any = None


def write_path(place: Sequence[str | int]) -> str:
    """Where something is in a document: "tools.0.name"; keys that are no plain words are quoted."""
    parts = (str(p) if isinstance(p, int) or _PLAIN.fullmatch(p) else json.dumps(p) for p in map(_short, place))
    return ".".join(parts) or WHOLE


def _short(part: str | int) -> str | int:
    return part if isinstance(part, int) else part[:80]


def check(document: object, *, max_bytes: int, max_depth: int) -> tuple[str, tuple[Problem, ...]]:
    """The document as compact JSON text, or what keeps it from being plain JSON (then the text is empty).

    Plain JSON is: dictionaries with string keys, lists (or tuples), strings, finite numbers, true, false and null.
    """
    walk = _Walk(max_bytes, max_depth)
    problems: list[Problem] = []
    for problem in walk.visit(document, ()):
        problems.append(problem)
        if len(problems) == _MOST:
            break
    if walk.left < 0:  # the walk stopped there: what is left must not be written, however the budget ran out
        where = write_path(walk.at[:8])
        problems.append(Problem(WHOLE, f"is more than {max_bytes} bytes of JSON; it gets too large at {where}"))
    if problems:
        return "", tuple(problems)
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    size = len(text.encode())
    if size > max_bytes:
        told = f"is {size} bytes of JSON; keep it within {max_bytes}; the largest part is {_largest(document)}"
        return "", (Problem(WHOLE, told),)
    return text, ()


def _largest(document: Any) -> str:
    """Which part of a plain document takes most."""
    parts = (
        document.items() if isinstance(document, dict) else enumerate(document if isinstance(document, list) else ())
    )
    sizes = {key: len(json.dumps(part, ensure_ascii=False)) for key, part in parts}
    return write_path((max(sizes, key=lambda key: sizes[key]),)) if sizes else "the text itself"


class _Walk:
    """One pass over a document. It stops early where its size shows, so that no input makes it long."""

    def __init__(self, max_bytes: int, max_depth: int) -> None:
        self.max_bytes, self.max_depth = max_bytes, max_depth
        self.left = max_bytes
        self.at: Place = ()
        """Where it is; once it has ended, where it has."""

    def visit(self, value: object, place: Place) -> Iterator[Problem]:
        # each value takes a byte of text at least, so one list repeated many times over cannot keep us long
        self.left -= 1
        self.at = place
        if self.left < 0 or value is None or isinstance(value, bool):
            return
        elif isinstance(value, dict | list | tuple):
            yield from self.inside(value, place)
        else:
            message = self.scalar(value)
            if message:
                yield Problem(write_path(place), message)

    def inside(self, value: dict[Any, Any] | list[Any] | tuple[Any, ...], place: Place) -> Iterator[Problem]:
        if len(place) >= self.max_depth:
            yield Problem(write_path(place[:8]) + "…", f"is nested more than {self.max_depth} deep; flatten it")
            return
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            if isinstance(value, dict) and (not isinstance(key, str) or self.scalar(key)):
                yield Problem(write_path(place), f"key {repr(key)[:80]} is not a string of Unicode text; use one")
            else:
                yield from self.visit(item, (*place, key))
            if self.left < 0:
                return

    def scalar(self, value: object) -> str | None:
        if isinstance(value, str):
            self.left -= len(value)
            try:
                value.encode()
            except UnicodeEncodeError:
                return "is not Unicode text (half of a surrogate pair); remove it"
            return None
        if isinstance(value, int):
            return None if -(2**63) <= value < 2**63 else "does not fit 64 bits; write it as a string"
        if isinstance(value, float):
            return None if value - value == 0 else "is not a finite number; JSON has none such, use null or a string"
        return f"is a {type(value).__name__}, which JSON does not have; use a dictionary, list, string, number or null"


def diff(before: Any, after: Any) -> tuple[Change, ...]:
    """What must change in `before` to make it `after`; lists are compared place by place."""
    return tuple(_diff(before, after, ()))


def _diff(before: Any, after: Any, place: Place) -> Iterator[Change]:
    if isinstance(before, dict) and isinstance(after, dict):
        yield from _diff_keys(before, after, place)
    elif isinstance(before, list) and isinstance(after, list):
        yield from _diff_keys(dict(enumerate(before)), dict(enumerate(after)), place)
    elif before != after or isinstance(before, bool) != isinstance(after, bool):  # to Python, True is 1
        yield Change(write_path(place), "changed", before, after)


def _diff_keys(before: dict[Any, Any], after: dict[Any, Any], place: Place) -> Iterator[Change]:
    for key in before | after:
        here = (*place, key)
        if key not in after:
            yield Change(write_path(here), "removed", before=before[key])
        elif key not in before:
            yield Change(write_path(here), "added", after=after[key])
        else:
            yield from _diff(before[key], after[key], here)
