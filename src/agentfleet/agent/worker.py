"""The boundary to the user's code: call it, and turn whatever it does into an outcome."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from agentfleet.agent.api import encode
from agentfleet.agent.ledger import Outcome
from agentfleet.agent.task import Task, TaskFailed

_ERROR_LIMIT = 2_000
_log = logging.getLogger("agentfleet.agent")


class Worker:
    """Runs the user's function on tasks: a coroutine function in the event loop, any other in a thread per task.

    Args:
        call: The user's function, its agent already bound.
        max_result: Largest answer in bytes.
    """

    def __init__(self, call: Callable[[Task], Any], *, is_async: bool, max_result: int) -> None:
        self._call = call
        self._is_async = is_async
        self._max_result = max_result
        self.ending = False
        """Set when the agent ends: from here a cancelled task has no outcome, because it was given up."""

    async def run(self, task: Task) -> Outcome:
        """The outcome of one task. Raises only CancelledError, and what is meant to end the process."""
        try:
            answer = self._call(task) if self._is_async else await _in_thread(self._call, task)
            result = await answer if inspect.isawaitable(answer) else answer
        except asyncio.CancelledError:
            if self.ending:
                raise
            return failure(task, "cancelled", "the task's own code cancelled it")
        except Exception as error:  # noqa: BLE001  the user's code may raise anything; it becomes the task's outcome
            return self._failed(task, error)
        return self._succeeded(task, result)

    def _failed(self, task: Task, error: BaseException) -> Outcome:
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]  # a task group wraps even a single error
        if isinstance(error, TaskFailed):
            return failure(task, error.cause, str(error))
        _log.warning("task %s failed", task.id, exc_info=error)
        kind = type(error)
        cause = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        return failure(task, cause, traceback.format_exception_only(error)[-1].strip())

    def _succeeded(self, task: Task, result: object) -> Outcome:
        try:
            body = encode({"id": task.id, "ok": True, "attempt": task.attempt, "result": result})
        except (TypeError, ValueError, RecursionError) as error:
            return failure(task, "result-not-json", f"the result cannot be written as JSON: {error}")
        if len(body) > self._max_result:
            return failure(
                task, "result-too-large", f"the result has {len(body)} bytes; at most {self._max_result} are sent"
            )
        return Outcome(ok=True, body=body)


def failure(task: Task, cause: str, error: str) -> Outcome:
    """The outcome of a task that failed."""
    cause, error = cause[:_ERROR_LIMIT], error[:_ERROR_LIMIT]
    body = encode({"id": task.id, "ok": False, "attempt": task.attempt, "cause": cause, "error": error})
    return Outcome(ok=False, body=body, cause=cause)


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it makes a coroutine, also when it is an object with an async `__call__`."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


async def _in_thread(call: Callable[[Task], Any], task: Task) -> Any:
    """Run in a daemon thread of its own: an executor's threads would keep the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[tuple[BaseException | None, Any]] = loop.create_future()
    context = contextvars.copy_context()

    def finish(error: BaseException | None, result: Any) -> None:
        if not done.done():
            done.set_result((error, result))

    def body() -> None:
        error: BaseException | None = None
        result = None
        try:
            result = context.run(call, task)
        except BaseException as raised:  # noqa: BLE001  carried over to the event loop, and raised there
            error = raised
        try:
            loop.call_soon_threadsafe(finish, error, result)
        except RuntimeError:
            _log.warning("task %s ended after its agent had", task.id, exc_info=error)

    threading.Thread(target=body, name=f"agentfleet-task-{task.id[:40]}", daemon=True).start()
    error, result = await done
    if error is not None:
        _raise(error)
    return result


def _raise(error: BaseException) -> NoReturn:
    try:
        raise error
    finally:
        del error  # its traceback refers to this frame, and the frame to it
