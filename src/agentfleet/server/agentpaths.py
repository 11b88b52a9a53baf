"""What agents ask, for the OpenAPI document: `config.ConfigApp` stands on ASGI alone, no framework tells of it."""

from __future__ import annotations

from typing import Any

from agentfleet.rest.base import MEDIA_TYPE, STREAM_TYPE

_NUMBER = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
_NAME = {"type": "string", "minLength": 1, "maxLength": 253}
_CLUSTER = {
    "name": "id",
    "in": "path",
    "required": True,
    "schema": _NAME,
    "description": "A cluster's id, or its name.",
}
_ASKED = [
    _CLUSTER,
    {"name": "instance", "in": "query", "required": True, "schema": _NAME, "description": "Printable characters."},
    {
        "name": "running",
        "in": "query",
        "required": False,
        "schema": _NUMBER,
        "description": "The revision that it runs; 0 is none.",
    },
    {
        "name": "refused",
        "in": "query",
        "required": False,
        "schema": _NUMBER,
        "description": "The newest revision that it has refused since; 0 is none. Left out where it was acknowledged.",
    },
]
_REVISION = {
    "type": "object",
    "properties": {"revision": _NUMBER, "document": {"type": "object"}},
    "required": ["revision", "document"],
}
_ACK = {
    "type": "object",
    "properties": {
        "instance": _NAME,
        "revision": _NUMBER | {"description": "The revision that it runs; 0 is none."},
        "refused": _NUMBER | {"description": "The newest revision that it has refused since; 0 is none."},
        "why": {"type": "string", "description": "Why it refused that."},
        "via": {"type": "string", "enum": ["stream", "poll"]},
    },
    "required": ["instance"],
    "additionalProperties": False,
}
TAG = {"name": "agents", "description": "What agents ask for themselves: their configuration."}
AGENT_PATHS: dict[str, dict[str, dict[str, Any]]] = {
    "/api/v1/clusters/{id}/config": {
        "get": {
            "operationId": "fetch_config",
            "summary": "An agent's configuration",
            "description": "The revision that is assigned to an instance. With `running` it says something of the "
            "instance: that needs the scope agent or operate.",
            "parameters": _ASKED,
            "responses": {"200": {"description": "It", "content": {MEDIA_TYPE: {"schema": _REVISION}}}},
        }
    },
    "/api/v1/clusters/{id}/config/stream": {
        "get": {
            "operationId": "stream_config",
            "summary": "An agent's configuration, as it changes",
            "description": "Server-sent events: each revision that is assigned to an instance, by its number. "
            "Takes the place of an earlier stream of the instance. Needs the scope agent or operate.",
            "parameters": _ASKED,
            "responses": {"200": {"description": "Server-sent events", "content": {STREAM_TYPE: {}}}},
        }
    },
    "/api/v1/clusters/{id}/config/acks": {
        "post": {
            "operationId": "acknowledge_config",
            "summary": "What an agent makes of its configuration",
            "description": "Which revision an instance runs, and which it has refused. Needs the scope agent or "
            "operate.",
            "parameters": [_CLUSTER],
            "requestBody": {"required": True, "content": {MEDIA_TYPE: {"schema": _ACK}}},
            "responses": {"204": {"description": "It is known"}},
        }
    },
}
