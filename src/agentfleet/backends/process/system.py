"""What the operating system says of its processes: who one is, whether it is frozen, what all of them use.

Linux is read straight from /proc (one small file a process); other systems go through psutil, which is imported only
there. Nothing in this module acts on a process, and nothing here touches the event loop: all of it is called from
worker threads or is a single cheap read.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LINUX = sys.platform == "linux" and Path("/proc/self/stat").exists()
_TICK = 1 / os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """One process as it was when it was looked at."""

    pid: int
    session: int
    """Pid of the leader of its session; an instance's process leads one."""
    state: str
    """One letter, as in /proc: T is stopped, Z is a zombie."""
    identity: str
    """Tells this process from a later one with the same pid."""
    cpu: float
    """CPU seconds of the process and of its children that ended."""
    memory: int
    """Bytes resident."""
    age: float
    """Seconds since it started."""


def identity(pid: int) -> str | None:
    """A text that no other process with this pid ever has, on this machine or after a reboot; None if there is none."""
    info = look(pid)
    return None if info is None else info.identity


def frozen(pid: int) -> bool:
    """Whether the process is stopped (SIGSTOP, a debugger) and so cannot react to any signal but SIGKILL."""
    info = look(pid)
    return info is not None and info.state in "Tt"


def look(pid: int) -> ProcessInfo | None:
    """The process with this pid, a zombie included; None if there is none."""
    return _look_linux(pid) if LINUX else _look_psutil(pid)


def scan() -> Iterator[ProcessInfo]:
    """Every process of the machine that may be looked at; those that end meanwhile are left out. Blocks."""
    if LINUX:
        names = os.listdir("/proc")  # noqa: PTH208  (a Path for each of thousands of names costs more than the reads)
        pids = [int(name) for name in names if name.isdigit()]
    else:
        import psutil  # noqa: PLC0415  (10 ms that Linux never pays)

        pids = psutil.pids()
    for pid in pids:
        info = look(pid)
        if info is not None:
            yield info


def environment(pid: int) -> dict[str, str]:
    """The environment that the process was started with; empty when it has ended or may not be read."""
    if not LINUX:
        import psutil  # noqa: PLC0415

        try:
            return psutil.Process(pid).environ()
        except (psutil.Error, OSError):
            return {}  # gone, or another user's: either way no process of ours
    text = os.fsdecode(_read(f"/proc/{pid}/environ") or b"")
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)


def _read(path: str) -> bytes | None:
    """A whole /proc file; None when the process is gone or belongs to someone else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        chunks = []
        while chunk := os.read(descriptor, 65536):
            chunks.append(chunk)
        return b"".join(chunks)
    except OSError:  # ESRCH: it ended between the open and the read
        return None
    finally:
        os.close(descriptor)


@functools.cache
def _boot() -> str:
    """Which boot of the machine this is: pids and start ticks begin anew with each."""
    return (_read("/proc/sys/kernel/random/boot_id") or b"?").decode().strip()


def _look_linux(pid: int) -> ProcessInfo | None:
    raw = _read(f"/proc/{pid}/stat")
    if not raw:
        return None
    # The second field is the program's name in parentheses and may hold anything, parentheses included.
    fields = raw[raw.rindex(b")") + 2 :].split()
    start = int(fields[19])
    return ProcessInfo(
        pid=pid,
        session=int(fields[3]),
        state=fields[0].decode(),
        identity=f"{_boot()}:{start}",
        cpu=sum(map(int, fields[11:15])) * _TICK,
        memory=int(fields[21]) * _PAGE,
        age=_uptime() - start * _TICK,
    )


def _uptime() -> float:
    clock: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # absent from other systems' type stubs
    return time.clock_gettime(clock)


def _look_psutil(pid: int) -> ProcessInfo | None:
    import psutil  # noqa: PLC0415

    letters = {psutil.STATUS_STOPPED: "T", psutil.STATUS_TRACING_STOP: "t", psutil.STATUS_ZOMBIE: "Z"}
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            started = process.create_time()
            state = letters.get(process.status(), "S")
            if state == "Z":  # nothing more can be asked of a zombie on some systems
                return ProcessInfo(pid, 0, state, repr(started), 0.0, 0, 0.0)
            times = process.cpu_times()
            return ProcessInfo(
                pid=pid,
                session=os.getsid(pid),
                state=state,
                identity=repr(started),
                cpu=times.user + times.system + times.children_user + times.children_system,
                memory=process.memory_info().rss,
                age=max(0.0, time.time() - started),
            )
    except (psutil.Error, OSError):
        return None  # gone, or another user's
