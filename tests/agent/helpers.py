"""Shared by the tests of the agent's side: a blocking client, and agents as real processes."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEADLINE = 30.0
SCRIPT = Path(__file__).with_name("workshop.py")


@dataclass
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    address: str, method: str, path: str, data: object = None, *, token: str | None = None, **headers: str
) -> Reply:
    """One request on a connection of its own."""
    host, port = address.rsplit(":", 1)
    connection = http.client.HTTPConnection(host, int(port), timeout=DEADLINE)
    try:
        body = None if data is None else data if isinstance(data, bytes) else json.dumps(data).encode()
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for a condition of another process or thread, with a deadline."""
    end = time.monotonic() + DEADLINE
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"not in {DEADLINE} s: {what}"
        time.sleep(0.01)


class Later:
    """A call in a thread, to be joined with its result."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self._result = call()
        except BaseException as error:  # noqa: BLE001  raised again where it is joined
            self._error = error

    def result(self) -> Any:
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive(), "the call did not return"
        if self._error is not None:
            raise self._error
        return self._result


class AgentProcess:
    """An agent run as a process of its own."""

    def __init__(self, script: Path, **env: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            env={"PATH": os.environ["PATH"], "AGENTFLEET_PORT": "0"} | env,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.lines: list[str] = []
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._listening.wait(DEADLINE), "the agent does not listen"
        first = next((line for line in self.lines if "listening on" in line), None)
        assert first is not None, f"the agent ended: {self.lines}"
        self.address = first.rsplit(" ", 1)[1].strip()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if "listening on" in line:
                self._listening.set()
        self._listening.set()

    def ask(self, method: str, path: str, data: object = None, **more: Any) -> Reply:
        return ask(self.address, method, path, data, **more)

    def task(self, id: str, payload: object, **more: object) -> Reply:
        return self.ask("POST", "/tasks", {"id": id, "payload": payload, **more})

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.ask("GET", "/status").json
        return status

    def wait(self) -> int:
        code = self.process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        return code

    @property
    def stderr(self) -> str:
        return "".join(self.lines)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextmanager
def running(script: Path = SCRIPT, **env: str) -> Iterator[AgentProcess]:
    agent = AgentProcess(script, **env)
    try:
        yield agent
    finally:
        agent.close()
