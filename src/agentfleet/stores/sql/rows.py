"""Fleets and operations as rows, and back. What a newer version has written this one may not be able to read."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC
from functools import lru_cache
from typing import Any

from agentfleet.errors import RecordUnreadable, SpecError
from agentfleet.operations import Caller, Kind, Operation, Status
from agentfleet.specs import FleetSpec
from agentfleet.stores.fleets import FleetRecord, UnreadFleet

log = logging.getLogger(__name__)


@lru_cache(maxsize=4096)
def _spec(text: str) -> FleetSpec:
    """A spec is frozen, and read far more often than it changes."""
    return FleetSpec.from_json(text)


def record_of(row: Any) -> FleetRecord:
    """A fleet; raises `RecordUnreadable`."""
    try:
        spec = _spec(row.spec)
    except SpecError as error:
        raise RecordUnreadable(_newer(f"fleet {row.name}", error)) from error
    return FleetRecord(spec=spec, **_seen(row))


def record_or_why(row: Any) -> FleetRecord | UnreadFleet:
    """A fleet, or what can be read of it."""
    try:
        return record_of(row)
    except RecordUnreadable as error:
        return UnreadFleet(**_seen(row), trouble=str(error))


def _seen(row: Any) -> dict[str, Any]:
    made = row.created_at if row.created_at.tzinfo is not None else row.created_at.replace(tzinfo=UTC)
    return {
        "id": str(row.id),
        "name": row.name,
        "namespace": row.namespace,
        "created_at": made.timestamp(),
        "created_by": row.created_by,
        "generation": row.generation,
        "deleting": row.deleting,
        "status": {} if row.status is None else json.loads(row.status),
        "status_at": row.status_at,
    }


def row_of(operation: Operation) -> dict[str, Any]:
    """What is kept of an operation."""
    return {
        "id": uuid.UUID(operation.id),
        "seq": operation.seq,
        "fleet": uuid.UUID(operation.fleet),
        "name": operation.name,
        "kind": str(operation.kind),
        "arguments": json.dumps(operation.arguments),
        "actor": operation.by.actor,
        "origin": operation.by.origin,
        "key": operation.by.key,
        "created_at": operation.created_at,
        "status": str(operation.status),
        "started_at": operation.started_at,
        "finished_at": operation.finished_at,
        "outcome": json.dumps(operation.outcome),
        "epoch": operation.epoch,
    }


def operation_of(row: Any) -> Operation:
    """An operation; raises `RecordUnreadable`."""
    try:
        kind, status = Kind(row.kind), Status(row.status)
    except ValueError as error:
        raise RecordUnreadable(_newer(f"operation {row.id} of fleet {row.name}", error)) from error
    return Operation(
        id=str(row.id),
        fleet=str(row.fleet),
        name=row.name,
        kind=kind,
        arguments=json.loads(row.arguments),
        by=Caller(row.actor, row.origin, row.key),
        created_at=row.created_at,
        seq=row.seq,
        status=status,
        started_at=row.started_at,
        finished_at=row.finished_at,
        outcome=json.loads(row.outcome),
        epoch=row.epoch,
    )


def readable(rows: Iterable[Any], *, level: int = logging.DEBUG) -> Iterator[Operation]:
    """The operations that this version knows; the others are left to a newer one, and logged at this level."""
    for row in rows:
        try:
            yield operation_of(row)
        except RecordUnreadable as error:
            log.log(level, "%s; it is left to one that can", error)


def _newer(what: str, error: Exception) -> str:
    return f"{what} cannot be read by this version, it was written by a newer one; upgrade this manager: {error!s:.500}"
