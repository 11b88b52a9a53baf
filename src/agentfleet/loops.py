"""How a group of loops is ended, and what is told of the one that has ended the others."""

from __future__ import annotations

from types import TracebackType

import anyio
from anyio.abc import TaskGroup


async def end_loops(
    tasks: TaskGroup, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> bool | None:
    """Cancel the loops and wait for their end; the body's own error stays as it is, not in a group."""
    tasks.cancel_scope.cancel()
    if isinstance(error, anyio.get_cancelled_exc_class()):  # perhaps by the group, because one of its tasks failed
        try:
            return await tasks.__aexit__(kind, error, trace)
        except BaseException as raised:
            if raised is error:  # one that is raised again here would become its own context in an exit stack, and
                return False  # contextlib would follow that for ever; it goes on by itself
            raise
    await tasks.__aexit__(None, None, None)
    return None


def only_error(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """The one error that a group holds, however deep; None if it holds several."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        if len(error.exceptions) != 1:
            return None
        error = error.exceptions[0]
    return error
