"""Send tasks to a fleet: least loaded first, handed on when an instance dies, never lost, run twice only if need be."""

from agentfleet.dispatch.dispatcher import Dispatcher
from agentfleet.dispatch.job import Result, Submission
from agentfleet.dispatch.ports import Endpoints, Requests, Target

__all__ = ["Dispatcher", "Endpoints", "Requests", "Result", "Submission", "Target"]
