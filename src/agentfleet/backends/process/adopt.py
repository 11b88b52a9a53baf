"""What an earlier manager left: which records still have a process, and which processes have no record.

Both functions block (a pass over the machine's processes); the backend calls them in a worker thread.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, replace

from agentfleet.backends.process import system
from agentfleet.backends.process.handle import Process
from agentfleet.backends.process.records import Record, StateDir


@dataclass(frozen=True, slots=True)
class Marked:
    """A process that carries the state directory's marker: one of ours, or a descendant of one."""

    pid: int
    identity: str
    leads: bool
    """Whether it leads a session, as every instance's own process does."""
    instance: str
    launch: str

    def kill(self) -> None:
        """Kill exactly this process, and the group it leads if it leads one."""
        process = Process.open(self.pid, self.identity)
        if process is None:
            return
        if self.leads:
            process.kill()
        else:
            process.kill_alone()
        process.close()


@dataclass(frozen=True, slots=True)
class Found:
    """A record, brought up to date, and its process if that still exists."""

    record: Record
    process: Process | None


def marked(marker: str, known_sessions: Container[int] = ()) -> list[Marked]:
    """All processes that carry `marker`, except those in a session that is known anyway."""
    result = []
    for info in system.scan():
        if info.session in known_sessions or info.state == "Z":
            continue
        environment = system.environment(info.pid)
        if environment.get("AGENTFLEET_STATE") == marker:
            result.append(
                Marked(
                    pid=info.pid,
                    identity=info.identity,
                    leads=info.pid == info.session,
                    instance=environment.get("AGENTFLEET_INSTANCE", ""),
                    launch=environment.get("AGENTFLEET_LAUNCH", ""),
                )
            )
    return result


def recover(state: StateDir) -> list[Found]:
    """Match records with processes, finish what a killed manager had begun, and end what nobody answers for.

    Raises:
        BackendRefused: See `StateDir.load`.
        OSError: The directory cannot be read or written.
    """
    processes = marked(state.marker)
    by_launch = {(one.instance, one.launch): one for one in processes if one.leads}
    result = []
    for record in list(state.load()):
        found = _match(record, by_launch.get((record.id, record.launch)))
        if found.process is None and _finished(found.record, state):
            state.remove(record.id)
            continue
        if found.record != record:
            state.write(found.record)
        result.append(found)
    running = {found.record.id: found.record.launch for found in result if found.process is not None}
    end_strays(processes, lambda one: running.get(one.instance) == one.launch)
    return result


def end_strays(processes: Iterable[Marked], belongs: Callable[[Marked], bool]) -> int:
    """Kill those that belong to no instance any more; returns how many."""
    strays = [one for one in processes if not belongs(one)]
    for one in strays:
        one.kill()
    return len(strays)


def _match(record: Record, one: Marked | None) -> Found:
    """Find the record's process: by pid and identity, or by the marker if the pid was never written."""
    if record.exited:
        return Found(record, None)
    if record.pid is None and one is not None:
        record = replace(record, pid=one.pid, identity=one.identity)
    if record.pid is not None and record.identity is not None:
        process = Process.open(record.pid, record.identity)
        if process is not None and not process.collect():
            return Found(record, process)
        if process is not None:  # it has ended, and only now is reaped
            process.close()
            return Found(replace(record, exited=True, exit_code=process.code), None)
    return Found(replace(record, exited=True, exit_code=None), None)


def _finished(record: Record, state: StateDir) -> bool:
    """Whether nothing is left to report: a stop was under way, or the process was never even about to start."""
    never_ran = record.pid is None and record.restarts == 0 and not state.output(record.id).exists()
    return record.stop_by is not None or never_ran
