"""Writes of a leader, refused when a later one has written: each fleet's highest epoch is a row that writes go through.

A lease alone is no fence: its holder may sleep through its end, and write then. Here the database decides, within the
transaction of the write itself (Kleppmann, "How to do distributed locking", 2016: the store checks the token).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Select, Table, select

from agentfleet.stores.sql.schema import FENCES

Insert = Callable[[Table], Any]
"""The dialect's `insert`, which can update what exists."""


def pass_fence(insert: Insert, fleet: str, epoch: int) -> Any:
    """A statement that returns the epoch where it is not behind, and nothing where it is. Locks the row."""
    said = insert(FENCES).values(fleet=fleet, epoch=epoch)
    new = {"epoch": said.excluded.epoch}
    passes = FENCES.c.epoch <= said.excluded.epoch
    return said.on_conflict_do_update(index_elements=["fleet"], set_=new, where=passes).returning(FENCES.c.epoch)


def latest_epoch(fleet: str) -> Select[Any]:
    """The epoch that is ahead."""
    return select(FENCES.c.epoch).where(FENCES.c.fleet == fleet)
