"""Runs an image as an engine does that was told `--read-only --tmpfs /tmp --security-opt no-new-privileges`."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from tests.image.build import Image, started
from tests.image.sandbox import Sandbox

SHELLS = ("/usr/bin/bash", "/usr/bin/dash")


class Container:
    """One program of an image, in a read-only root without a shell. Use it as a context manager.

    Args:
        image: What to run.
        arguments: The program's arguments, instead of the image's own.
        env: Further variables.
        volumes: Folder of this machine, by the place where the program may write to it.
        log: Where its output goes.
    """

    def __init__(
        self,
        image: Image,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        volumes: Mapping[str, Path] | None = None,
        log: Path,
    ) -> None:
        self._image = image
        self._env = {"HOME": image.home(), "HOSTNAME": "container", **image.env, **(env or {})}
        self._mounts = dict(volumes or {})
        self._command = started(image, arguments)
        self._log = log
        self._outer: subprocess.Popen[bytes] | None = None

    def _argv(self, program: Sequence[str]) -> list[str]:
        image = self._image
        sandbox = Sandbox(image.root, image.uid, image.gid, image.folder, mounts=self._mounts, masked=SHELLS)
        return sandbox.command(program)

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._outer = subprocess.Popen(
                self._argv(self._command), env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _end(self._process)

    @property
    def _process(self) -> subprocess.Popen[bytes]:
        assert self._outer is not None, "not started"
        return self._outer

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the program itself."""
        for child in psutil.Process(self._process.pid).children():
            child.send_signal(number)

    def wait(self, seconds: float) -> int:
        """Wait until the program has ended; its exit code."""
        return self._process.wait(seconds)

    @property
    def running(self) -> bool:
        """Whether the program has not ended yet."""
        return self._process.poll() is None

    def output(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace")

    def run(self, program: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run another program to its end in a sandbox of the same kind, as `exec` and health checks do."""
        process = subprocess.Popen(
            self._argv(program),
            env=self._env | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            output, errors = process.communicate(timeout=60)
        finally:
            _end(process)
        return subprocess.CompletedProcess(list(program), process.returncode, output, errors)


def _end(outer: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """End what still runs: process 1 of a table of its own takes all others with it."""
    if outer.poll() is None:
        for child in psutil.Process(outer.pid).children():
            child.kill()
        outer.wait(10)


def volume(image: Image, inside: str, outside: Path) -> Path:
    """A fresh volume for one of the image's own: an empty one takes over owner and mode, as engines have it."""
    outside.mkdir()
    shown = image.place(inside).stat()
    os.chown(outside, shown.st_uid, shown.st_gid)
    outside.chmod(shown.st_mode & 0o7777)
    return outside
