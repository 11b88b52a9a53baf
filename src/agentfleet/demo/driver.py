"""The demo's driver: starts the manager, kills it once, starts it again, shows what happens, and judges it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import anyio.to_thread

from agentfleet.backends.process import ProcessBackend
from agentfleet.demo.manager import JOURNAL, LEDGER_FILE, STATE, spec
from agentfleet.demo.report import measure, missed, promised
from agentfleet.demo.view import View, best_view
from agentfleet.errors import AgentFleetError
from agentfleet.events import Event
from agentfleet.stores.jsonl_journal import JsonlJournal

DEADLINE = 120.0
"""Seconds that the whole demo may take."""


class DemoError(AgentFleetError):
    """The demo did not come to its end; the message says what the manager said last."""


def run_demo(report: Path, *, plain: bool = False) -> int:
    """Play the demo.

    Args:
        report: Where the figures are written, as JSON.
        plain: Print lines even on a terminal.

    Returns:
        0 when every promise was kept, 1 otherwise.
    """
    began = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal must not leave agents behind
        signal.signal(number, _leave)
    with tempfile.TemporaryDirectory(prefix="agentfleet-demo-") as folder:
        place = Path(folder)
        driver = _Driver(place)
        try:
            with best_view(plain=plain) as view:
                anyio.run(driver.play, view)
        finally:
            driver.end()
            anyio.run(_sweep, place)
        with JsonlJournal(place / JOURNAL) as journal:
            events = list(journal.read())
        ledger = (place / LEDGER_FILE).read_text().split()
    figures = measure(events, ledger, driver.killed_at, spec(place).recovery.budget)
    figures["seconds"] = round(time.monotonic() - began, 1)
    figures["missed"] = missed(figures)
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(figures, indent=2) + "\n")
    tasks = figures["tasks"]
    print(f"\n{promised(figures)}\n")  # noqa: T201 - this is the face
    print(  # noqa: T201
        f"{tasks['submitted']} tasks, {tasks['completed']} completed, {tasks['handed_on']} handed on from dead agents; "
        f"at most {figures['instances_peak']} agents; {figures['seconds']} s in all; figures in {report}"
    )
    return 1 if figures["missed"] else 0


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


class _Driver:
    def __init__(self, place: Path) -> None:
        self._place = place
        self._manager: subprocess.Popen[bytes] | None = None
        self._log = place / "manager.log"
        self.killed_at: float | None = None

    async def play(self, view: View) -> None:
        """Follow the journal to its end."""
        self._start()
        try:
            with anyio.fail_after(DEADLINE):
                async with (
                    anyio.create_task_group() as tasks,
                    JsonlJournal.tail(self._place / JOURNAL, period=0.1) as events,
                ):
                    tasks.start_soon(self._watch_manager)
                    async for event in events:
                        view.show(event)
                        if self._is_over(event):
                            break
                    tasks.cancel_scope.cancel()
        except TimeoutError as error:
            raise DemoError(f"the demo did not end within {DEADLINE:g} s; the manager said:\n{self._said()}") from error
        assert self._manager is not None
        with anyio.fail_after(30):
            code = await anyio.to_thread.run_sync(self._manager.wait, abandon_on_cancel=True)
        if code:
            raise DemoError(f"the manager finished and then ended with code {code}; it said:\n{self._said()}")

    def _is_over(self, event: Event) -> bool:
        if event.kind == "demo.kill_me" and self.killed_at is None:
            self.killed_at = time.time()
            os.kill(event.data["pid"], signal.SIGKILL)
            assert self._manager is not None
            self._manager.wait()
            self._start()
        return event.kind == "demo.finished"

    async def _watch_manager(self) -> None:
        """A manager that ends by itself has failed."""
        while True:
            await anyio.sleep(0.2)
            manager = self._manager
            if manager is not None and manager.poll() not in (None, 0, -signal.SIGKILL):
                raise DemoError(f"the manager ended with code {manager.returncode}; it said:\n{self._said()}")

    def _start(self) -> None:
        command = [sys.executable, "-m", "agentfleet.demo.manager", str(self._place)]
        with self._logfile() as log:
            self._manager = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)  # noqa: S603

    @contextmanager
    def _logfile(self) -> Iterator[int]:
        descriptor = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _said(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def end(self) -> None:
        """Leave no manager behind, whatever happened."""
        if self._manager is not None and self._manager.poll() is None:
            self._manager.kill()
            self._manager.wait()


async def _sweep(place: Path) -> None:
    """Leave no agent behind: a backend that opens on the same records finds and ends every one."""
    async with ProcessBackend(state_dir=place / STATE, close_grace=0.0):
        pass
