"""The state directory: who owns it, what was asked for, and which process answers to it.

::

    <state_dir>/            0700
      lock                  flock'ed by the one manager that owns the directory; holds its pid
      key                   0600; 32 random bytes from which tokens and the marker are derived
      instances/<name>.json one record an instance, replaced atomically
      output/<name>.log     what the instance wrote

A record is written before its process is started, without a pid, and again after, with the pid and the process's
identity. So a manager may be killed between any two instructions and the next one still finds every process: by its
record, or by the marker that all of them carry in their environment. Nothing is fsynced: a power cut ends the
processes too. All functions block; call them in a worker thread.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from agentfleet.backends.process import system
from agentfleet.errors import BackendRefused, SpecError
from agentfleet.specs import AgentTemplate

_log = logging.getLogger("agentfleet.backends.process")
_PLAIN = re.compile(r"[a-z0-9][a-z0-9._-]{0,150}", re.ASCII)
_FORMAT = 1
_LOCK_WAIT = 1.0  # seconds for the last traces of a dead manager to go


@dataclass(frozen=True, slots=True)
class Record:
    """What must be known to find an instance again. Times are seconds since the epoch."""

    id: str
    fleet: str
    slot: int
    revision: int
    template: AgentTemplate
    created_at: float
    launch: str
    """Names one start of the process; the process finds it in AGENTFLEET_LAUNCH."""
    port: int | None = None
    pid: int | None = None
    """None while no process is known to answer to this launch."""
    identity: str | None = None
    started_at: float | None = None
    restarts: int = 0
    exited: bool = False
    """The end of this launch was seen."""
    exit_code: int | None = None
    stop_by: float | None = None
    """Set when a stop was accepted: whoever owns the directory kills the process then."""


def default_state_dir() -> Path:
    """`$XDG_STATE_HOME/agentfleet/process`, by default `~/.local/state/agentfleet/process`."""
    base = os.environ.get("XDG_STATE_HOME", "")
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "state"
    return root / "agentfleet" / "process"


class StateDir:
    """An opened, locked state directory. Close it to let another manager have it.

    Args:
        path: Created with mode 0700 if missing; made 0700 if it is wider.

    Raises:
        BackendRefused: Another manager owns it, or it cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = -1
        try:
            for folder in (path, path / "instances", path / "output"):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.stat().st_mode & 0o077:
                path.chmod(0o700)
            self._lock = _lock(path / "lock")
            self._key = _key(path / "key")
        except OSError as error:
            self.close()
            raise BackendRefused(
                f"state_dir {path} cannot be used: {error.strerror}; give ProcessBackend(state_dir=...) a "
                "directory that this user may write"
            ) from error
        self.marker = hmac.new(self._key, b"marker", hashlib.sha256).hexdigest()[:24]
        """What every process of this directory carries in AGENTFLEET_STATE."""

    def close(self) -> None:
        """Give up the ownership."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def token(self, fleet: str, id: str) -> str:
        """The instance's bearer token: the same for every manager that owns this directory, in turn."""
        return hmac.new(self._key, f"token\0{fleet}\0{id}".encode(), hashlib.sha256).hexdigest()

    def output(self, id: str) -> Path:
        """Where the instance's output goes."""
        return self.path / "output" / f"{_name(id)}.log"

    def write(self, record: Record) -> None:
        """Store a record, replacing the one before in one step; raises `OSError`."""
        values = {field.name: getattr(record, field.name) for field in fields(record)}
        data: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        data |= {"format": _FORMAT, "template": record.template.to_dict()}
        _replace(self._record(record.id), json.dumps(data, ensure_ascii=False).encode(errors="surrogatepass"))

    def remove(self, id: str) -> None:
        """Forget an instance: its output, then its record. Already forgotten is fine; raises `OSError` otherwise."""
        self.output(id).unlink(missing_ok=True)
        self._record(id).unlink(missing_ok=True)

    def load(self) -> Iterator[Record]:
        """Every record there is. One that cannot be read is set aside as `<name>.json.bad` and logged.

        Raises:
            BackendRefused: A later version of agentfleet wrote here.
        """
        templates: dict[str, AgentTemplate] = {}
        for path in sorted((self.path / "instances").iterdir()):
            if path.suffix == ".new":
                path.unlink()  # cut off before it replaced the record
            elif path.suffix == ".json":
                try:
                    yield _parse(path.read_bytes(), templates)
                except (SpecError, ValueError, TypeError, KeyError) as error:
                    _log.error("%s is no record (%s); it is set aside and its process, if any, ended", path, error)
                    path.rename(path.with_suffix(".json.bad"))

    def _record(self, id: str) -> Path:
        return self.path / "instances" / f"{_name(id)}.json"


def _name(id: str) -> str:
    """A file name for any id: the id itself where that is safe, else a digest ("=" keeps the two kinds apart)."""
    if _PLAIN.fullmatch(id):
        return id
    return "=" + hashlib.sha256(id.encode(errors="surrogatepass")).hexdigest()


def _parse(raw: bytes, templates: dict[str, AgentTemplate]) -> Record:
    data = json.loads(raw)
    if not isinstance(data, dict):
        raise TypeError("it holds no object")
    if data.pop("format") != _FORMAT:
        raise BackendRefused(
            "state_dir was written by another version of agentfleet; use that one, or another directory"
        )
    text = json.dumps(data["template"], sort_keys=True)
    if text not in templates:  # a thousand instances of one fleet share one template
        templates[text] = AgentTemplate.parse(data["template"], source="the record")
    return Record(**data | {"template": templates[text]})


def _replace(path: Path, content: bytes) -> None:
    fresh = path.with_name(path.name + ".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def _key(path: Path) -> bytes:
    if not path.exists():
        _replace(path, secrets.token_bytes(32))
    return path.read_bytes()


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _LOCK_WAIT
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            if _lives(holder) or time.monotonic() > deadline:
                os.close(descriptor)
                raise BackendRefused(
                    f"state_dir {path.parent} belongs to the manager with pid {holder or 'unknown'}; stop that one, "
                    "or give ProcessBackend(state_dir=...) another directory"
                ) from None
        # A child that a killed manager had forked, but that is not its new program yet, still shares the lock.
        time.sleep(0.01)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def _lives(holder: str) -> bool:
    info = system.look(int(holder)) if holder.isdigit() else None
    return info is not None and info.state != "Z"
