"""What an agent imports: three lines turn a function into an agent that a fleet can watch, feed, drain and configure.

::

    from agentfleet.agent import Agent

    async def work(task, agent):      # task.id, task.payload (any JSON value), task.attempt
        agent.progress("thinking")
        return {"answer": 42}

    Agent(work).run()

Standard library only, and a light import, because agents are started by the thousand.
"""

from agentfleet.agent.agent import Agent
from agentfleet.agent.settings import Settings
from agentfleet.agent.task import Task, TaskFailed

__all__ = ["Agent", "Settings", "Task", "TaskFailed"]
