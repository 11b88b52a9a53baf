"""Sends requests and reads the metadata of what they made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from agentfleet.backends.kubernetes import naming
from agentfleet.backends.kubernetes.apply import Request
from agentfleet.backends.kubernetes.connection import MERGE_PATCH, Requests
from agentfleet.backends.kubernetes.objects import Meta
from agentfleet.backends.kubernetes.resources import decode, version_of


class _Written(msgspec.Struct):
    """The answer to a write, or to the reading of one object."""

    metadata: Meta


async def send(to: Requests, request: Request) -> bytes:
    """The answer to a request. Raises like `Connection.request`."""
    return await to.request(
        request.method,
        request.path,
        query=request.query,
        body=request.body or None,
        content_type=request.content_type or "application/json",
    )


async def merge(to: Requests, path: str, patch: Mapping[str, Any]) -> bytes:
    """The answer to a merge patch (RFC 7386). Raises like `Connection.request`."""
    return await to.request(
        "PATCH",
        path,
        query={"fieldManager": naming.MANAGER},
        body=json.dumps(patch).encode(),
        content_type=MERGE_PATCH,
    )


def metadata_in(answer: bytes) -> Meta:
    """The metadata of the object in an answer."""
    return decode(msgspec.json.Decoder(_Written).decode, answer, "the answer to a write").metadata


def version_in(answer: bytes) -> int:
    """The resource version of the object in an answer."""
    return version_of(metadata_in(answer)) or 0
