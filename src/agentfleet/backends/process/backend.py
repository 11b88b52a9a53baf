"""`ProcessBackend`: the contract of `backends.base` kept with real processes; see the class for what it promises."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import anyio
import anyio.abc
import anyio.to_thread

from agentfleet.backends.base import Creation
from agentfleet.backends.process import output
from agentfleet.backends.process.adopt import Found, recover
from agentfleet.backends.process.house import House
from agentfleet.backends.process.keeper import Keeper, new_launch
from agentfleet.backends.process.ports import DEFAULT, Ports
from agentfleet.backends.process.records import Record, StateDir, default_state_dir
from agentfleet.backends.process.watching import Watcher
from agentfleet.clock import Clock, SystemClock
from agentfleet.errors import BackendRefused, BackendUnavailable, Conflict, InstanceGone
from agentfleet.instances import Usage
from agentfleet.openfiles import raise_file_limit

_log = logging.getLogger("agentfleet.backends.process")
_LEAVE_PATIENCE = 15.0  # seconds beyond the longest grace until leaving gives up on unkillable processes


class ProcessBackend:
    """Runs each instance as a process of this machine.

    The process leads a session of its own, answers on a free loopback port of its own, and finds in its environment:
    PORT, AGENTFLEET_HOST, AGENTFLEET_PORT, AGENTFLEET_FLEET, AGENTFLEET_INSTANCE, AGENTFLEET_SLOT,
    AGENTFLEET_REVISION, AGENTFLEET_VERSION, AGENTFLEET_TOKEN (its bearer token) and AGENTFLEET_DRAIN (seconds), besides
    the manager's own environment, but for what begins with AGENTFLEET_, and the template's. "python" and "python3" as
    the program are the manager's own interpreter. `template.cpu` and `template.memory` are not enforced.

    **No orphans.** Every instance is recorded before it is started. A manager that was killed at any instant is
    followed by one that finds the same processes again (same pids, ports and tokens), reports as EXITED what has ended
    meanwhile, and goes on with stops that were under way. When an instance's process ends, what is left of its process
    group is killed at once; descendants that left the group but kept the instance's environment, soon after.

    **Output** (stdout and stderr) goes to a file per instance, cut to its newest half when it outgrows `max_output`.

    **Side effect**: the soft limit of open files is raised towards the hard limit, for this program and what it starts.

    Args:
        state_dir: Where records, output and the key of the tokens are; one manager at a time owns it. By default
            `$XDG_STATE_HOME/agentfleet/process`, else `~/.local/state/agentfleet/process`.
        on_close: "stop" ends all instances when `async with` is left; "keep" leaves them for a later manager.
        close_grace: Seconds that instances get to drain at "stop", or their template's `drain` if that is shorter.
        ports: Which loopback ports to give out.
        clock: Dates for instances and measurements. Processes live in real time, whatever it says.
        max_output: Bytes of output kept per instance.
        node: Name of this machine in `Instance.node`; its host name by default.

    Raises:
        BackendRefused: On entering: another manager owns `state_dir`, or it cannot be used.
    """

    def __init__(
        self,
        *,
        state_dir: Path | str | None = None,
        on_close: Literal["stop", "keep"] = "stop",
        close_grace: float = 10.0,
        ports: range = DEFAULT,
        clock: Clock | None = None,
        max_output: int = 2**20,
        node: str | None = None,
    ) -> None:
        if max_output < 1024:
            raise ValueError("max_output: at least 1024 bytes")
        if on_close not in ("stop", "keep"):
            raise ValueError('on_close: "stop" or "keep"')
        Ports(ports)  # what is wrong with the range is said here, not on entering
        self._ports = ports
        self._path = Path(state_dir) if state_dir is not None else default_state_dir()
        self._stops = on_close == "stop"
        self._grace = close_grace
        self._clock = clock or SystemClock()
        self._node = node or socket.gethostname() or "local"
        self._max_output = max_output
        self._house: House | None = None
        self._users = 0
        self._outer: anyio.abc.TaskGroup
        self._tasks: anyio.abc.TaskGroup | None = None

    # ------------------------------------------------------------------------------------------------ coming and going

    async def __aenter__(self) -> Self:
        """Own the state directory and take over the instances in it."""
        self._users += 1
        if self._users > 1:  # by whoever manages several fleets: who opens it first closes it last
            return self
        try:
            await self._open()
        except BaseException:
            self._users -= 1
            raise
        return self

    async def _open(self) -> None:
        raise_file_limit()
        # Shielded, so that an acquired lock cannot get lost between the thread and this task.
        with anyio.CancelScope(shield=True):
            state, found = await anyio.to_thread.run_sync(_take_over, self._path)
        used = Ports(self._ports)
        used.begin_at(int(state.marker, 16))
        self._house = House(state, used, self._clock, self._node)
        self._outer = anyio.create_task_group()
        await self._outer.__aenter__()
        with anyio.CancelScope(shield=True):
            self._tasks = await self._outer.start(self._serve, self._house, found)

    async def _serve(
        self, house: House, found: Sequence[Found], *, task_status: anyio.abc.TaskStatus[anyio.abc.TaskGroup]
    ) -> None:
        """Run the keepers, out of reach of whatever cancels the body: they are needed to stop the instances."""
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as tasks:
                for one in found:
                    self._adopt(one, house, tasks)
                tasks.start_soon(house.keep_trimmed, self._max_output)
                tasks.start_soon(house.keep_swept)
                task_status.started(tasks)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Stop or leave the instances, end every watch, and give up the state directory.

        Raises:
            BackendUnavailable: A process could not be ended (and nothing else went wrong); its record is kept.
        """
        self._users -= 1
        if self._users:
            return None
        house, tasks = self._house, self._tasks
        assert house is not None
        assert tasks is not None
        self._tasks = None  # from now on every action is refused
        left: list[str] = []
        swallowed = False
        try:
            if self._stops and not tasks.cancel_scope.cancel_called:  # else a keeper failed, and with it all of them
                left = await self._stop_all(house)
        finally:
            tasks.cancel_scope.cancel()
            self._outer.cancel_scope.cancel()
            try:
                # A cancellation may be the group's own, so it must see it; any other error it would only wrap.
                if isinstance(error, anyio.get_cancelled_exc_class()):
                    swallowed = bool(await self._outer.__aexit__(kind, error, trace))
                else:
                    await self._outer.__aexit__(None, None, None)
            finally:
                self._house = None
                house.end_watches()
                house.state.close()
        if left and error is None:
            raise BackendUnavailable(
                f"these instances could not be ended: {', '.join(left)}; their processes hang in the kernel. "
                "Their records are kept: the next manager of the state_dir tries again"
            )
        return swallowed

    def _adopt(self, found: Found, house: House, tasks: anyio.abc.TaskGroup) -> None:
        record = found.record
        if record.port is not None:
            house.ports.hold(record.port)
        keeper = Keeper(house, record, found.process)
        if record.stop_by is not None:
            keeper.stop(record.stop_by - self._clock.now())
        house.keepers[record.id] = keeper
        tasks.start_soon(keeper.run)

    async def _stop_all(self, house: House) -> list[str]:
        """Stop everything, all at once; returns the ids of those that would not end."""
        longest = 0.0
        for keeper in house.keepers.values():
            grace = min(self._grace, keeper.record.template.drain)
            longest = max(longest, grace)
            keeper.stop(grace)
        with anyio.move_on_after(longest + _LEAVE_PATIENCE, shield=True):
            await house.emptied()
        with anyio.move_on_after(_LEAVE_PATIENCE, shield=True) as sweep:
            await house.sweep_all()
        if sweep.cancelled_caught:
            _log.error("descendants of instances are left: they do not end after SIGKILL")
        return sorted(house.keepers)

    # ------------------------------------------------------------------------------------------------ the contract

    def watch(self, fleet: str) -> Watcher:
        """Observe one fleet: a snapshot, then every change. See `backends.base`.

        Raises:
            BackendUnavailable: The backend is not open.
        """
        return self._opened()[0].watch(fleet)

    async def create(self, creation: Creation) -> None:
        """Start one instance; returns when its process runs. Does nothing if the id exists.

        Cancelled, it leaves either a whole instance or nothing. `avoid_nodes` means nothing here: there is one node.

        Raises:
            BackendRefused: The command cannot be executed, no port is free, or the machine has no room; nothing is
                left behind.
            BackendUnavailable: The backend is not open.
        """
        house, tasks = self._opened()
        keeper = house.keepers.get(creation.id)
        if keeper is None:
            keeper = Keeper(
                house,
                Record(
                    id=creation.id,
                    fleet=creation.fleet,
                    slot=creation.slot,
                    revision=creation.revision,
                    template=creation.template,
                    created_at=self._clock.now(),
                    launch=new_launch(),
                ),
            )
            house.keepers[creation.id] = keeper
            house.changed(keeper)
            tasks.start_soon(keeper.run)
        elif keeper.instance.fleet != creation.fleet:
            raise BackendRefused(f"the id {creation.id!r} is taken by fleet {keeper.instance.fleet!r}; choose another")
        await keeper.settled.wait()
        if keeper.refusal is not None:
            raise BackendRefused(keeper.refusal)
        if self._house is not house and keeper.record.pid is None:
            raise BackendUnavailable(f"the backend was closed before instance {creation.id} was started")

    async def stop(self, fleet: str, id: str, *, grace: float) -> None:
        """Drain for up to `grace` seconds, then kill the whole process group and remove the instance.

        A repeated stop can only hasten the end. A frozen process (SIGSTOP) is killed at once: it cannot drain, and
        waking it would let it finish work that has long been given to another.

        Raises:
            BackendUnavailable: The backend is not open.
        """
        keeper = self._opened()[0].keepers.get(id)
        if keeper is not None and keeper.instance.fleet == fleet:
            keeper.stop(grace)
        await anyio.lowlevel.checkpoint()

    async def restart(self, fleet: str, id: str, *, grace: float) -> None:
        """End the process like `stop` and start it again, on another port. A restart under way is not repeated.

        A command that cannot be executed any more shows as EXITED with code 126, and why in the instance's output.

        Raises:
            InstanceGone: There is no such instance.
            Conflict: It is being stopped.
            BackendUnavailable: The backend is not open.
        """
        keeper = self._get(fleet, id)
        if keeper.stopping:
            raise Conflict(f"instance {id} is being stopped; create another instead")
        keeper.restart(grace)
        await anyio.lowlevel.checkpoint()

    async def usage(self, fleet: str) -> Mapping[str, Usage]:
        """CPU and resident memory of each running instance, children included, since the last call.

        The first measurement covers the process's whole life; calls within half a second repeat the CPU figure. What
        children share with each other counts once for each.
        """
        try:
            return await self._opened()[0].measure(fleet)
        except OSError as error:  # no descriptor is free, for one
            raise BackendUnavailable(f"usage cannot be measured now: {error}") from error

    async def logs(self, fleet: str, id: str, *, lines: int = 100) -> Sequence[str]:
        """The last lines the instance wrote (stdout and stderr as they came), oldest first, also from before a restart.

        Raises:
            InstanceGone: There is no such instance.
            BackendUnavailable: The backend is not open, or its file cannot be read.
        """
        house = self._opened()[0]
        self._get(fleet, id)
        path = house.state.output(id)
        try:
            return await anyio.to_thread.run_sync(output.tail, path, lines, self._max_output, limiter=house.files)
        except OSError as error:
            raise BackendUnavailable(f"the output of instance {id} cannot be read: {error}") from error

    def credential(self, fleet: str, id: str) -> str:
        """The bearer token in the instance's AGENTFLEET_TOKEN: the same after restarts and for later managers.

        Raises:
            BackendUnavailable: The backend is not open.
        """
        return self._opened()[0].state.token(fleet, id)

    # ------------------------------------------------------------------------------------------------ inside

    def _opened(self) -> tuple[House, anyio.abc.TaskGroup]:
        if self._house is None or self._tasks is None:
            raise BackendUnavailable("this ProcessBackend is not open; use it inside `async with ProcessBackend(...)`")
        return self._house, self._tasks

    def _get(self, fleet: str, id: str) -> Keeper:
        keeper = self._opened()[0].keepers.get(id)
        if keeper is None or keeper.instance.fleet != fleet:
            raise InstanceGone(f"there is no instance {id!r} in fleet {fleet!r}")
        return keeper


def _take_over(path: Path) -> tuple[StateDir, list[Found]]:
    state = StateDir(path)
    try:
        return state, recover(state)
    except OSError as error:
        state.close()
        raise BackendRefused(f"state_dir {path} cannot be used: {error}") from error
    except BackendRefused:
        state.close()
        raise
