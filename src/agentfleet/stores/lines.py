"""RECORD: one event as one line of JSON, written quickly; `Event.from_json` reads it back."""

from __future__ import annotations

import json
from typing import Any

from agentfleet.errors import JournalError
from agentfleet.events import Event

STATE = "state."
"""Kinds that start with this are kept for ever, one per fleet and kind."""

# Encoders kept ready: json.dumps with options builds one anew for each call, which costs more than the encoding.
_ENCODE = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_ENCODE_ASCII = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True).encode


def encode(event: Event, seq: int) -> bytes:
    """`event` as a line with the number `seq`, its newline included.

    Raises:
        JournalError: The event holds something that JSON cannot write.
    """
    record: dict[str, Any] = {"seq": seq, "at": event.at, "fleet": event.fleet, "kind": event.kind}
    if event.instance is not None:
        record["instance"] = event.instance
    try:
        if event.data:
            record["data"] = dict(event.data)
        if event.reasons:
            record["reasons"] = [dict(reason) for reason in event.reasons]
        if event.epoch:
            record["epoch"] = event.epoch
        return _to_bytes(record)
    except (ValueError, TypeError, RecursionError) as error:
        raise JournalError(
            f"event {event.kind!r} of fleet {event.fleet!r} cannot be written as JSON ({error}); it was not recorded"
        ) from error


def numbered(event: Event, seq: int) -> Event:
    """`event` with its `seq`; spelled out because `dataclasses.replace` takes twice as long."""
    return Event(event.at, event.fleet, event.kind, event.instance, event.data, event.reasons, seq, event.epoch)


def deposed(event: Event, latest: int) -> str:
    """Why an event of an earlier epoch is refused."""
    return (
        f"{event.fleet}: epoch {latest} has begun, so {event.kind!r} of epoch {event.epoch} was not recorded; leave it "
        "to the manager that leads now"
    )


def _to_bytes(record: dict[str, Any]) -> bytes:
    try:
        return (_ENCODE(record) + "\n").encode()
    except UnicodeEncodeError:
        # Half a surrogate pair, as a sick agent may report in its status: escaped it is legal JSON. An agent's
        # garbage must not stop the record.
        return (_ENCODE_ASCII(record) + "\n").encode()
