"""Rows that somebody has put where a chain will go: moved out of its way, and kept as evidence."""

from __future__ import annotations

import logging
from typing import Any

from sqlalchemy import ColumnElement, func, select, true, update
from sqlalchemy.ext.asyncio import AsyncConnection

log = logging.getLogger(__name__)


async def set_aside(
    connection: AsyncConnection, place: Any, stray: ColumnElement[bool], chain: ColumnElement[bool] | None = None
) -> None:
    """Within a transaction that holds a chain's head: give rows beyond the head places before the first.

    Without that whoever can insert one row could keep all others from writing: its place is the next one's.

    Args:
        connection: Of the transaction.
        place: The column that numbers the chain, from 1.
        stray: Which rows are beyond the head.
        chain: Which rows are of this chain, if the table holds several.
    """
    mine = true() if chain is None else chain
    found = list((await connection.execute(select(place).where(mine, stray).order_by(place))).scalars())
    if not found:
        return
    lowest = (await connection.execute(select(func.min(place)).where(mine))).scalar() or 0
    for number, each in enumerate(found, start=1):
        free = min(lowest, 0) - number
        await connection.execute(update(place.table).where(mine, place == each).values({place: free}))
        log.error("%s: row %s was put in by hand, before its time; it is %s now", place.table.name, each, free)
