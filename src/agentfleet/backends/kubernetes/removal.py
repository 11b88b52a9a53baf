"""Deletes what a listing finds, each object by its uid, so that nothing that has taken its name since is hit."""

from __future__ import annotations

import json

import msgspec

from agentfleet.backends.kubernetes import apply as requests
from agentfleet.backends.kubernetes.connection import Requests
from agentfleet.backends.kubernetes.resources import decode
from agentfleet.errors import InstanceGone


class _Meta(msgspec.Struct):
    name: str
    uid: str


class _Object(msgspec.Struct):
    metadata: _Meta


class _Objects(msgspec.Struct):
    items: list[_Object] = []


_READ = msgspec.json.Decoder(_Objects).decode


async def delete_listed(connection: Requests, listing: requests.Request) -> None:
    """Delete all that a listing finds, and what they own. Raises like `Connection.request`."""
    body = await connection.request(listing.method, listing.path, query=listing.query)
    for each in decode(_READ, body, f"list {listing.path}").items:
        options = {"propagationPolicy": "Background", "preconditions": {"uid": each.metadata.uid}}
        path = f"{listing.path}/{each.metadata.name}"
        try:
            await connection.request("DELETE", path, body=json.dumps(options).encode())
        except InstanceGone:
            continue
