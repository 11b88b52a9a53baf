"""An agent that does what its task says: run as a process by the tests."""

# ruff: noqa: ASYNC110, ASYNC230, ASYNC240, ASYNC251  it polls files on purpose: they are how a test talks to it

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from agentfleet.agent import Agent, Task


async def work(task: Task, agent: Agent) -> Any:
    payload = task.payload
    log = os.environ.get("RUN_LOG")
    if log:
        with Path(log).open("a") as file:
            file.write(f"{task.id} {task.attempt} {os.getpid()}\n")
    match payload:
        case {"wait": path}:
            while not Path(path).exists():
                await asyncio.sleep(0.01)
        case {"block": path}:
            while not Path(path).exists():
                time.sleep(0.01)  # blocking the event loop is what is tested
        case {"die": code}:
            os._exit(code)
        case {"fail": cause}:
            agent.fail(cause)
    return {"did": task.id, "pid": os.getpid()}


if __name__ == "__main__":
    Agent(work, concurrency=int(os.environ.get("CONCURRENCY", "1"))).run()
