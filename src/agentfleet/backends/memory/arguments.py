"""What may be given to a simulated cluster: a wrong value is refused by its name, with what to write in its place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import TypeGuard

from agentfleet.errors import SpecError
from agentfleet.instances import Node
from agentfleet.units import show

Range = tuple[float, float]
"""Least and most seconds."""


def seconds(name: str, value: object) -> float:
    """A finite time span, zero allowed."""
    if not _is_seconds(value):
        raise SpecError(f"{name}: write seconds like 2.5, not {show(value)}")
    return float(value)


def seconds_or_none(name: str, value: object) -> float | None:
    """A finite time span, or None for never."""
    return None if value is None else seconds(name, value)


def span(name: str, value: object) -> Range:
    """Least and most seconds; a single number is both."""
    least, most = value if isinstance(value, tuple | list) and len(value) == 2 else (value, value)
    if not (_is_seconds(least) and _is_seconds(most) and least <= most):
        raise SpecError(f"{name}: write seconds like 2.5, or (least, most) like (0.5, 2.0), not {show(value)}")
    return float(least), float(most)


def whole(name: str, value: object, *, least: float = -math.inf) -> int:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SpecError(f"{name}: write a whole number{'' if least < 0 else f' from {least} on'}, not {show(value)}")
    return value


def flag(name: str, value: object) -> bool:
    """True or False, and not something that only counts as one of them."""
    if not isinstance(value, bool):
        raise SpecError(f"{name}: write True or False, not {show(value)}")
    return value


def machines(value: int | Iterable[Node]) -> list[Node]:
    """Nodes with names of their own: those given, or as many as asked for, over three zones."""
    if isinstance(value, int):
        count = whole("nodes", value, least=0)
        return [Node(f"node-{n + 1}", zone=f"zone-{'abc'[n % 3]}") for n in range(count)]
    nodes = list(value)
    for name, times in Counter(node.name for node in nodes).items():
        if times > 1:
            raise SpecError(f"nodes: {times} are named {show(name)}; give each a name of its own")
    return nodes


def _is_seconds(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
