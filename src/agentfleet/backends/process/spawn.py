"""From a record to a running process: command, environment, and the steps in the order that leaves no orphan.

`launch` blocks for a few milliseconds (fork, exec and two small files) and runs in a worker thread as one piece: a
cancelled caller cannot cut it in two.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from dataclasses import replace

from agentfleet.backends.process import output, system
from agentfleet.backends.process.handle import Process
from agentfleet.backends.process.ports import HOST, Ports
from agentfleet.backends.process.records import Record, StateDir
from agentfleet.errors import BackendRefused

_PLACEHOLDER = re.compile(r"\{(version|port)\}")
_EXHAUSTED = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT)


def _own_drain(grace: float) -> float:
    """What the process is told: a little less than it has, so that its last answers are out before it is killed."""
    return grace - min(1.0, grace / 10)


def command_of(record: Record) -> list[str]:
    """The command with its placeholders replaced; "python" and "python3" are the manager's own interpreter."""
    values = {"version": record.template.version, "port": str(record.port)}
    command = [_PLACEHOLDER.sub(lambda match: values[match[1]], word) for word in record.template.command]
    if command[0] in ("python", "python3") and sys.executable:
        command[0] = sys.executable
    return command


def environment_of(record: Record, state: StateDir) -> dict[str, str]:
    """The manager's environment, then the template's, then the instance's own, which always wins.

    What is set for the manager itself stays with it: its settings may hold the password of its database.
    """
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("AGENTFLEET_")},
        **record.template.env,
        "PORT": str(record.port),
        "AGENTFLEET_HOST": HOST,
        "AGENTFLEET_PORT": str(record.port),
        "AGENTFLEET_FLEET": record.fleet,
        "AGENTFLEET_INSTANCE": record.id,
        "AGENTFLEET_SLOT": str(record.slot),
        "AGENTFLEET_REVISION": str(record.revision),
        "AGENTFLEET_VERSION": record.template.version,
        "AGENTFLEET_TOKEN": state.token(record.fleet, record.id),
        "AGENTFLEET_DRAIN": f"{_own_drain(record.template.drain):g}",
        "AGENTFLEET_STATE": state.marker,
        "AGENTFLEET_LAUNCH": record.launch,
    }


def launch(record: Record, state: StateDir, ports: Ports) -> Record:
    """Start the record's process and return the record completed by port, pid and identity.

    The order is the guarantee: the record exists before the output file, and that before the process. A record without
    pid and without output never ran; a process without a completed record carries the marker by which it is found.

    Raises:
        BackendRefused: The command cannot be executed or the machine has no room; no process was left behind, and
            the port is free again. The record and the output are the caller's to remove.
    """
    port = ports.take()
    try:
        record = replace(record, port=port, pid=None, identity=None, exited=False)
        state.write(record)
        pid = _start(record, state)
        try:
            # None only where SIGCHLD is ignored, so that an ended child needs no reaping and is gone at once.
            record = replace(record, pid=pid, identity=system.identity(pid) or "gone")
            state.write(record)
        except OSError:
            _abandon(pid)
            raise
    except (OSError, ValueError) as error:
        ports.release(port)
        raise BackendRefused(_explain(record, error)) from error
    return record


def _start(record: Record, state: StateDir) -> int:
    """Fork and exec; returns the pid of a session leader that is our unreaped child."""
    sink = output.open_for_append(state.output(record.id))
    try:
        process = subprocess.Popen(  # noqa: S603  (running the user's own command is the purpose)
            command_of(record),
            env=environment_of(record, state),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    finally:
        os.close(sink)
    # From here on the process is waited for by pid (see handle.py), by this manager or the next one. Popen has done
    # its part, and must neither reap the process nor warn that it still runs.
    process.returncode = 0
    return process.pid


def _abandon(pid: int) -> None:
    """End a process whose record could not be completed."""
    known = system.identity(pid)
    process = Process.open(pid, known) if known is not None else None
    if process is not None:
        process.kill()
        process.close()
        os.waitpid(pid, 0)  # SIGKILL is on its way: this does not wait for long


def _explain(record: Record, error: OSError | ValueError) -> str:
    command = record.template.command
    if isinstance(error, OSError) and error.errno in _EXHAUSTED:
        return f"this machine has no room for instance {record.id}: {error.strerror} ({errno.errorcode[error.errno]})"
    if isinstance(error, FileNotFoundError):
        fix = f"there is no {command[0]!r} on PATH; install it, or write the program's full path"
    elif isinstance(error, PermissionError):
        fix = f"{command[0]!r} may not be executed; give it mode +x, or name its interpreter first"
    elif isinstance(error, OSError) and error.errno == errno.ENOEXEC:
        fix = f"{command[0]!r} is no program; give it a first line like '#!/bin/sh', or name its interpreter first"
    elif isinstance(error, OSError):
        fix = f"{error.strerror}; correct it"
    else:
        fix = f"{error}; correct it"
    return f"template.command of fleet {record.fleet!r} cannot be executed: {fix}"
