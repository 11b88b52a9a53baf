"""What an agent tells of itself: /status as data, /metrics as Prometheus text written by hand.

Every field has one writing thread, or is one float that any thread may replace whole, so nothing here needs a lock.
"""

from __future__ import annotations

import os
import re
import time

_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]{0,127}", re.ASCII)
_GAUGES = 256
BEAT = 0.5
"""Seconds between the beats by which a busy event loop shows that it turns."""


class Vitals:
    """Signs of life: progress, the event loop's lag, health as the agent judges it itself, its own gauges."""

    __slots__ = ("_beat_due", "_lag", "_progress_at", "gauges", "started_at", "step", "unhealthy")

    def __init__(self) -> None:
        self._progress_at = time.monotonic()
        self.started_at = time.time()
        self.step: str | None = None
        self.unhealthy: str | None = None
        self._beat_due: float | None = None
        self._lag = 0.0
        self.gauges: dict[str, float] = {}

    def progress(self, step: str | None = None) -> None:
        """Something was achieved just now."""
        self._progress_at = time.monotonic()
        if step is not None:
            self.step = step[:500]

    @property
    def since_progress(self) -> float:
        """Seconds since the last progress."""
        return max(0.0, time.monotonic() - self._progress_at)

    def expect_beat(self) -> None:
        """A beat of the user's loop is due in `BEAT` seconds."""
        self._beat_due = time.monotonic() + BEAT

    def beat(self) -> None:
        """The beat came; how late is the lag."""
        if self._beat_due is not None:
            self._lag = max(0.0, time.monotonic() - self._beat_due)

    def rest(self) -> None:
        """Nothing runs, so no beats are expected."""
        self._beat_due = None
        self._lag = 0.0

    @property
    def loop_lag(self) -> float:
        """Seconds by which the user's event loop is behind: of the last beat, or of the one overdue now."""
        due = self._beat_due
        return self._lag if due is None else max(self._lag, time.monotonic() - due)

    def gauge(self, name: str, value: float) -> None:
        """Publish a number of the agent's own.

        Raises:
            ValueError: The name is none that Prometheus takes, or there are too many.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name[:80]!r} is no metric name: use letters, digits and '_', not starting with a digit")
        if name not in self.gauges and len(self.gauges) >= _GAUGES:
            raise ValueError(f"an agent may publish {_GAUGES} gauges; {name!r} would be one more")
        self.gauges[name] = float(value)


def cpu_seconds() -> float:
    """Processor time of this process, user and system."""
    return time.process_time()


def resident_bytes() -> int:
    """Memory of this process now; on systems without /proc the most it ever was."""
    try:
        with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123  importing pathlib costs more than all of this
            pages = statm.read().split()[1]
    except OSError:
        import resource  # noqa: PLC0415  only where there is no /proc

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def exposition(samples: list[tuple[str, str, str, float]], version: str | None) -> bytes:
    """Prometheus' text format 0.0.4 of (name, type, help, value) samples."""
    lines: list[str] = []
    for name, kind, text, value in samples:
        lines += (f"# HELP {name} {text}", f"# TYPE {name} {kind}", f"{name} {_number(value)}")
    if version is not None:
        label = version.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        lines += (
            "# HELP agentfleet_agent_info The version that runs, as a label.",
            "# TYPE agentfleet_agent_info gauge",
            f'agentfleet_agent_info{{version="{label}"}} 1',
        )
    return ("\n".join(lines) + "\n").encode("utf-8", "replace")


def _number(value: float) -> str:
    text = repr(float(value))
    return {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}.get(text, text)
