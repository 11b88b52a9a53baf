"""A minimal agent: echoes its payload. Try it.

::

    AGENTFLEET_PORT=8080 python examples/echo_agent.py &
    curl -d '{"id": "t1", "payload": "hello"}' localhost:8080/tasks
    curl localhost:8080/status
    kill %1
"""

from agentfleet.agent import Agent, Task


async def work(task: Task, agent: Agent) -> object:
    """Do nothing, and say so."""
    agent.progress("echoing")
    return task.payload


if __name__ == "__main__":
    Agent(work).run()
