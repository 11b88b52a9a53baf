"""The demo's agent: does tasks that take a while, notes each one it has finished, and can fall ill on command.

Version "2.0.0-broken" fails at start, as a bad release does. SIGUSR1 makes it alive but failing: it answers, and says
that it is not well.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

from agentfleet.agent import Agent, Task

LEDGER = "DEMO_LEDGER"
"""Variable that names the file in which finished tasks are noted, one id a line."""


async def work(task: Task, agent: Agent) -> dict[str, Any]:
    """Think for as long as the task says, in steps, then note it as done."""
    steps = 4
    for step in range(steps):
        agent.progress(f"step {step + 1} of {steps}")
        await asyncio.sleep(task.payload["seconds"] / steps)
    note(f"{task.id}\n")
    return {"answer": task.payload["question"] * agent.config.get("factor", 1)}


def note(line: str) -> None:
    """Append to the ledger in one write, so that lines of several workers never mix."""
    descriptor = os.open(os.environ[LEDGER], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def main() -> None:
    """Run until told to stop."""
    if os.environ.get("AGENTFLEET_VERSION", "").endswith("-broken"):
        sys.exit("this release does not start: its prompt file is missing")
    agent = Agent(work)
    signal.signal(signal.SIGUSR1, lambda *_: agent.unhealthy("the provider's key was revoked"))
    agent.run()


if __name__ == "__main__":
    main()
