"""An agent for tests: writes down each document that it is told, and falls sick from a poisonous one."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentfleet.agent import Agent, Task


async def work(task: Task, _agent: Agent) -> object:
    """Give back what it was given."""
    return task.payload


agent = Agent(work)
DIARY = Path(os.environ["DIARIES"]) / os.environ["AGENTFLEET_INSTANCE"]


@agent.on_config
async def note(document: Mapping[str, Any]) -> None:
    """Write it down, and suffer from it, or recover."""
    with DIARY.open("a") as diary:
        diary.write(json.dumps([os.getpid(), document["n"]]) + "\n")
    if document.get("poison"):
        asyncio.get_running_loop().call_later(float(document["poison"]), agent.unhealthy, "poisoned")
    else:
        agent.healthy()


if __name__ == "__main__":
    agent.run()
