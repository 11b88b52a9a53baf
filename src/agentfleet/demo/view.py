"""What the demo shows while it runs: a live picture in a terminal, plain lines elsewhere. Both only read events."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from agentfleet.events import Event

COLORS = {
    "idle": "green",
    "busy": "bright_cyan",
    "fresh": "bright_green",
    "starting": "yellow",
    "pending": "bright_black",
    "unknown": "white",
    "sick": "bright_red",
    "dead": "red",
    "draining": "magenta",
}
BARS = "▁▂▃▄▅▆▇█"
QUIET = frozenset(
    {
        "config.published",
        "demo.done",
        "demo.pulse",
        "governor.admitted",
        "governor.held",
        "instance.created",
        "instance.ready",
        "instance.removed",
        "instance.removing",
        "instance.started",
        "scaling.decision",
    }
)


def sentence(event: Event) -> str | None:
    """One line about an event; None when it is not worth one."""
    kind, data = event.kind, event.data
    if kind in QUIET or kind.startswith(("state.", "task.")):
        return None
    why = "; ".join(str(reason.get("text", "")) for reason in event.reasons)
    told: dict[str, Callable[[], str]] = {
        "demo.step": lambda: f"── {data['step']}",
        "demo.hurt": lambda: f"{event.instance} is {data['what']} (by the demo)",
        "demo.spike": lambda: f"the spike begins: it keeps {data['instances']} agents busy",
        "demo.followed": lambda: f"capacity has followed: {data['instances']} agents are healthy",
        "demo.kill_me": lambda: f"kill -9 of the manager (pid {data['pid']})",
        "demo.manager": lambda: f"a manager is at work; {data['open_tasks']} tasks are open",
        "fleet.scaled": lambda: f"{data['from']} → {data['to']} agents, by {data['by']}",
        "instance.exited": lambda: f"{event.instance} has exited ({_exit(data.get('exit_code'))})",
        "instance.unhealthy": lambda: f"{event.instance} is unhealthy",
        "instance.recovered": lambda: f"{event.instance} is well again after {data['seconds']:.1f} s",
        "recovery.restart": lambda: f"{event.instance} is restarted",
        "rollout.started": lambda: f"version {data.get('version')} is rolled out",
        "rollout.rolled_back": lambda: f"back from revision {data['from']} to {data['to']}",
        "demo.rolled_back": lambda: "the user is told that the release has failed",
        "config.delivered": lambda: f"revision {data['revision']} reached {data['instances']} agents",
        "rollout.completed": lambda: f"version {data['version']} is on all agents after {data['seconds']:.1f} s",
    }
    text = told[kind]() if kind in told else f"{kind} {_words(data)}"
    return f"{text}  [{why}]" if why else text


def _exit(code: object) -> str:
    return (
        "code unknown" if code is None else f"signal {-code}" if isinstance(code, int) and code < 0 else f"code {code}"
    )


def _words(data: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in data.items() if not isinstance(value, dict | list))


class View(Protocol):
    """Shows events as they come."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...
    def show(self, event: Event) -> None:
        """Take in one event."""
        ...


class Lines:
    """One line per event that is worth one."""

    def __init__(self) -> None:
        self._began: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        sys.stdout.flush()

    def show(self, event: Event) -> None:
        """Print it."""
        self._began = self._began or event.at
        text = sentence(event)
        if text is not None:
            print(f"{event.at - self._began:7.1f} s  {text}", flush=True)  # noqa: T201 - this is the face


class Picture:
    """A live picture: the agents, the queue, and what happened last."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=8)
        self._began: float | None = None
        self._pulse: Mapping[str, Any] = {"status": {}, "depth": 0, "instances": {}}
        self._depths: deque[int] = deque(maxlen=60)
        self._said: deque[str] = deque(maxlen=14)
        self._at = 0.0

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.__exit__(None, None, None)

    def show(self, event: Event) -> None:
        """Take it into the picture."""
        self._began = self._began or event.at
        self._at = event.at - self._began
        if event.kind == "demo.pulse":
            self._pulse = event.data
            self._depths.append(event.data["depth"])
        text = sentence(event)
        if text is not None:
            self._said.append(f"{self._at:6.1f} s  {text}")
        self._live.update(self._draw())

    def _draw(self) -> Panel:
        status = self._pulse["status"]
        head = Text(
            f"{self._at:5.1f} s   version {status.get('version')}   {status.get('good', 0)} of "
            f"{status.get('desired', 0)} healthy   {status.get('busy', 0)} busy   queue {self._pulse['depth']}   "
        )
        most = max(self._depths, default=0) or 1
        head.append("".join(BARS[min(7, depth * 7 // most)] for depth in self._depths), style="cyan")
        slots = sorted((int(id.split("-")[1]), condition) for id, condition in self._pulse["instances"].items())
        agents = [Text(f"■ {slot:>2} {condition}", style=COLORS.get(condition, "white")) for slot, condition in slots]
        said = [Text(line, no_wrap=True, overflow="ellipsis") for line in self._said]
        return Panel(Group(head, Text(), Columns(agents, width=14), Text(), *said), title="agentfleet demo")


def best_view(*, plain: bool) -> View:
    """A picture where there is a terminal to draw on, else lines."""
    console = Console()
    return Picture(console) if console.is_terminal and not plain else Lines()
