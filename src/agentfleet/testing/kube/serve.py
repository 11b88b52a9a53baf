"""Commands over standard input and output: the side that obeys."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from agentfleet.errors import AgentFleetError

_LINE = 16 << 20


async def serve(do: Callable[[str, Mapping[str, Any]], Awaitable[Any]]) -> None:
    """Say that all is ready, then obey one command a line, until the input ends."""
    reader = asyncio.StreamReader(limit=_LINE)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer
    )
    try:
        _say({"ready": True})
        while line := await reader.readline():
            asked = json.loads(line)
            try:
                _say({"answer": await do(asked["command"], asked["arguments"])})
            except AgentFleetError as error:
                _say({"error": str(error), "kind": type(error).__name__})
    finally:
        transport.close()


def _say(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
