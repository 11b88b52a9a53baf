"""One running process and the only safe ways to wait for it, signal it and reap it.

A pid alone is no name: it is used again. Where the kernel has pidfds the handle holds one, and every wait and every
signal goes to exactly the process (and process group) it was opened for, also when that process is not our child.
Elsewhere the process's start time is compared before each signal, and its end is found by polling.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
from typing import Self

import anyio

from agentfleet.backends.process import system

_log = logging.getLogger("agentfleet.backends.process")
_PIDFD_SIGNAL_PROCESS_GROUP = 4  # Linux 6.9: the whole group, found through the pidfd and so never a stranger's
_POLL = 0.05  # seconds between looks where the kernel cannot wake us


class Process:
    """A process that leads its own session. Close it to give its file descriptor back.

    Attributes:
        pid: Also the id of its session and process group.
        identity: See `system.identity`.
        ended: Whether `wait` has seen its end.
        code: Its exit code after that: negative is the signal that killed it, None is unknown (not our child).
    """

    __slots__ = ("_descriptor", "code", "ended", "identity", "pid")

    def __init__(self, pid: int, identity: str, descriptor: int | None) -> None:
        self.pid = pid
        self.identity = identity
        self.ended = False
        self.code: int | None = None
        self._descriptor = descriptor

    @classmethod
    def open(cls, pid: int, identity: str) -> Self | None:
        """Take hold of a process; None if it is gone, or if its pid now belongs to another."""
        descriptor = _pidfd(pid)
        if system.identity(pid) == identity:  # compared after the pidfd is held, so it cannot change any more
            return cls(pid, identity, descriptor)
        if descriptor is not None:
            os.close(descriptor)
        return None

    async def wait(self) -> None:
        """Return when the process has ended; then its code is known, it is reaped, and its group is killed too.

        Killing what is left of the group before reaping is what makes it safe: until then the pid cannot be reused.
        """
        while not self.collect():
            if self._descriptor is not None and not self._at_end():
                await anyio.wait_readable(self._descriptor)
            else:  # nothing wakes us; or a tracer sees the end before we may reap
                await anyio.sleep(_POLL)

    def collect(self) -> bool:
        """Whether the process has ended; if so, everything that `wait` promises has been done."""
        if not self.ended and self._at_end():
            self.kill()
            self.ended = self._reap()
        return self.ended

    def terminate(self) -> None:
        """Ask the process, and only it, to finish (SIGTERM). Nothing happens if it has ended."""
        try:
            if self._descriptor is not None:
                signal.pidfd_send_signal(self._descriptor, signal.SIGTERM)
            elif self._alive():
                os.kill(self.pid, signal.SIGTERM)
        except ProcessLookupError:
            return  # it has ended, which is what was wanted

    def kill(self) -> None:
        """Kill the process and its whole group (SIGKILL). Nothing happens to what has already ended."""
        try:
            if self._descriptor is None or not _kill_group(self._descriptor):
                self._kill_by_number()
        except ProcessLookupError:
            return
        except PermissionError:
            # macOS says EPERM for a group of zombies; a member that changed its user would say so too.
            _log.debug("process group %d: not permitted to kill what is left of it", self.pid)

    def kill_alone(self) -> None:
        """Kill the process (SIGKILL) and leave its group alone: for one that leads none."""
        try:
            if self._descriptor is not None:
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
            elif self._alive():
                os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def frozen(self) -> bool:
        """Whether it is stopped (SIGSTOP) and so cannot drain."""
        return system.frozen(self.pid)

    def close(self) -> None:
        """Give the file descriptor back. The process is left alone."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _at_end(self) -> bool:
        if self._descriptor is None:
            return not self._alive()
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(0))

    def _alive(self) -> bool:
        info = system.look(self.pid)
        return info is not None and info.identity == self.identity and info.state != "Z"

    def _kill_by_number(self) -> None:
        # While no stranger has this pid, the group's number is ours or nobody's: the kernel gives out no pid that
        # still names a group.
        if system.identity(self.pid) in (self.identity, None):
            os.killpg(self.pid, signal.SIGKILL)

    def _reap(self) -> bool:
        """Collect the exit code if the process is our child. False if it is, but has not quite ended yet."""
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            return True  # an earlier manager's child: init reaps it, and only init learns the code
        if pid == 0:
            return False
        self.code = os.waitstatus_to_exitcode(status)
        return True


def _pidfd(pid: int) -> int | None:
    """A pidfd, or None where there are none, none is left, or the process is gone."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            _log.warning("no file descriptor left to watch process %d; it is polled instead", pid)
        return None


def _kill_group(descriptor: int) -> bool:
    """SIGKILL to the group that the pidfd's process leads; False where the kernel cannot do that."""
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL, None, _PIDFD_SIGNAL_PROCESS_GROUP)
    except OSError as error:
        if error.errno == errno.EINVAL:  # before Linux 6.9
            return False
        raise
    return True
