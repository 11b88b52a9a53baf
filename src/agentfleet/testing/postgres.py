"""A real PostgreSQL for tests: on loopback, in a folder of its own, ended by its process id.

::

    with Postgres() as server:
        url = server.database()

Its programs come from Debian's `postgresql` package, or from the PATH. It refuses to run as root, so that root runs it
as the user "postgres", or "nobody".
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from agentfleet.errors import AgentFleetError

_NEEDED = "postgres", "initdb", "createdb", "pg_isready"
_OWNERS = "postgres", "nobody"


class PostgresMissing(AgentFleetError):
    """There is no PostgreSQL on this machine; the message says how to get it."""


def programs() -> Path:
    """Where PostgreSQL's programs are, the newest version first; raises `PostgresMissing`."""
    found = shutil.which("postgres")
    places = [] if found is None else [Path(found).parent, Path(found).resolve().parent]
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_version, reverse=True)
    for folder in places:
        if all((folder / each).exists() for each in _NEEDED):
            return folder
    raise PostgresMissing(f"no PostgreSQL here ({', '.join(_NEEDED)}): install Debian's package 'postgresql'")


def _version(folder: Path) -> float:
    try:
        return float(folder.parent.name)
    except ValueError:
        return 0.0


class Postgres:
    """One server. Use it as a context manager.

    Args:
        fsync: Whether commits survive the loss of power, which tests do not cause.
        start_timeout: Seconds until it must answer.

    Raises:
        PostgresMissing: Its programs are not on this machine.
    """

    def __init__(self, *, fsync: bool = False, start_timeout: float = 30.0) -> None:
        self._programs = programs()
        self._fsync = fsync
        self._start_timeout = start_timeout
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._made = 0
        self.port = 0

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="agentfleet-postgres-"))
        try:
            owner = self._owner()
            if owner is not None:
                os.chown(self._folder, *owner)
            data = self._folder / "data"
            self._run(["initdb", "-D", str(data), "-U", "agentfleet", "-A", "trust", "-E", "UTF8", "--no-locale", "-N"])
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def start(self) -> None:
        """Start the server, again if it was killed; it keeps its port."""
        assert self._folder is not None, "entered"
        self.port = self.port or _free_port()
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "fsync": "on" if self._fsync else "off",
            "max_connections": 200,
        }
        arguments = [f"-c{name}={value}" for name, value in settings.items()]
        log = (self._folder / "log").open("ab")
        with log:
            self._process = subprocess.Popen(  # noqa: S603 - a program of this machine
                [*_bound(), self._programs / "postgres", "-D", self._folder / "data", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **self._as_owner(),
            )
        self._wait()

    @property
    def pid(self) -> int:
        """Process id of the server; its own processes end with it."""
        assert self._process is not None, "started"
        return self._process.pid

    def kill(self) -> None:
        """End it at once, as a crash does."""
        assert self._process is not None, "started"
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(30)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block in which nothing of it runs, as when its disk stalls: connections stay, and nobody answers."""
        server = psutil.Process(self.pid)
        held = [server]
        server.suspend()  # first, so that it makes no more processes
        try:
            for each in server.children():
                with suppress(psutil.NoSuchProcess):
                    each.suspend()
                    held.append(each)
            yield
        finally:
            for each in held:
                with suppress(psutil.NoSuchProcess):
                    each.resume()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT)  # "fast": clients are cut off
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def url(self, name: str = "postgres") -> str:
        """Address of one of its databases."""
        return f"postgresql://agentfleet@127.0.0.1:{self.port}/{name}"

    def database(self, *, like: str | None = None) -> str:
        """Address of a fresh database: an empty one, or a copy of another that nobody uses now."""
        self._made += 1
        name = f"test_{self._made}"
        template = "template1" if like is None else like.rsplit("/", 1)[1]
        self._run(["createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "agentfleet", "-T", template, name])
        return self.url(name)

    def _wait(self) -> None:
        deadline = time.monotonic() + self._start_timeout
        check = ["pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run([self._programs / check[0], *check[1:]], check=False).returncode:  # noqa: S603
            assert self._process is not None
            assert self._folder is not None
            if self._process.poll() is not None or time.monotonic() > deadline:
                told = (self._folder / "log").read_text(errors="replace")[-2000:]
                raise AgentFleetError(f"PostgreSQL did not start:\n{told}")
            time.sleep(0.05)

    def _run(self, command: Sequence[str]) -> None:
        done = subprocess.run(  # noqa: S603 - a program of this machine
            [self._programs / command[0], *command[1:]], check=False, capture_output=True, text=True, **self._as_owner()
        )
        if done.returncode:
            raise AgentFleetError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-2000:]}")

    def _owner(self) -> tuple[int, int] | None:
        """Who runs it in place of root; None for whoever we are."""
        if os.geteuid() != 0:
            return None
        known = {each.pw_name: each for each in pwd.getpwall()}
        found = next((known[name] for name in _OWNERS if name in known), None)
        if found is None:
            raise PostgresMissing(f"PostgreSQL does not run as root, and there is no user {' or '.join(_OWNERS)}")
        return found.pw_uid, found.pw_gid

    def _as_owner(self) -> dict[str, Any]:
        owner = self._owner()
        return {"cwd": "/"} if owner is None else {"cwd": "/", "user": owner[0], "group": owner[1], "extra_groups": []}


def _bound() -> list[str]:
    """What has the kernel end a server whose starter dies, also by SIGKILL; nothing where there is no such program."""
    found = shutil.which("setpriv")
    return [] if found is None else [found, "--pdeathsig", "KILL"]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
