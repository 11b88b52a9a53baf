"""What writers are given, so that only who leads writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Fence(Protocol):
    """What stands before every write to the outside: it lets through who leads, for as long as it leads."""

    @property
    def epoch(self) -> int:
        """The number to write with, greater than any earlier leader's."""
        ...

    def ensure(self) -> int:
        """The epoch; raises `NotLeader` if nothing may be done in it now."""
        ...

    def deadline(self, timeout: float, *, least: float = 0.1) -> float:
        """The deadline in seconds to send a write with; raises `NotLeader` if it must not be sent.

        Args:
            timeout: The deadline that it would have without a leader.
            least: Seconds that the write needs at least; what cannot have so many is not sent.
        """
        ...

    def writing(self, timeout: float, *, least: float = 0.1) -> AbstractContextManager[float]:
        """Likewise around the write itself, which is cut off at the deadline."""
        ...


class NoFence:
    """For a manager that is alone by construction: lets everything through, in epoch 0."""

    epoch = 0

    def ensure(self) -> int:
        """Always 0."""
        return 0

    def deadline(self, timeout: float, *, least: float = 0.1) -> float:  # noqa: ARG002
        """`timeout` as it is."""
        return timeout

    @contextmanager
    def writing(self, timeout: float, *, least: float = 0.1) -> Iterator[float]:  # noqa: ARG002
        """Nothing but the block."""
        yield timeout
