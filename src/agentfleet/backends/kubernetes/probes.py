"""The kubelet's probes, taken from the health policy.

agentfleet judges health itself, with its own probes. The kubelet's readiness probe decides who gets a Service's
traffic; its liveness probe restarts without any budget, so it is off unless asked for.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from agentfleet.backends.kubernetes.rendering import Rendering
from agentfleet.kubespec import Probe
from agentfleet.specs import HttpCheck, TcpCheck

_Kind = Literal["readiness", "liveness", "startup"]


def probes(rendering: Rendering) -> dict[str, Any]:
    """The container's `readinessProbe`, `livenessProbe` and `startupProbe`, as far as there are any."""
    options = rendering.options
    startup: Probe | bool | None = options.startup
    if startup is None:  # asks what the liveness probe asks
        liveness = options.liveness
        startup = liveness.replace(failures=None) if isinstance(liveness, Probe) else liveness
        if rendering.spec.health.startup == 0:
            startup = False
    wanted: tuple[tuple[_Kind, Probe | bool], ...] = (
        ("readiness", options.readiness),
        ("liveness", options.liveness),
        ("startup", startup),
    )
    made = {f"{kind}Probe": _probe(rendering, kind, choice) for kind, choice in wanted}
    return {name: probe for name, probe in made.items() if probe is not None}


def _probe(rendering: Rendering, kind: _Kind, choice: Probe | bool) -> dict[str, Any] | None:
    if choice is False:
        return None
    index, check = _check(rendering)
    field = f"template.kubernetes.{kind}"
    if choice is True:
        if check is None:
            if kind == "readiness":
                return None  # nothing to ask: ready when it runs
            rendering.wrong(field, "health.checks holds no HTTP or TCP check to take it from; add one, or write it out")
        choice = Probe()
    period = choice.period or (check.period if check else 10.0)
    timeout = choice.timeout or (check.deadline if check and choice.period is None else min(period, 5.0))
    told = f"health.checks.{index}"
    failures = choice.failures or (check.failures if check else 3)
    if kind == "startup" and choice.failures is None:
        failures = max(1, math.ceil(rendering.spec.health.startup / max(1, math.ceil(period))))
    successes = choice.successes or (check.successes if check and kind == "readiness" else 1)
    if kind != "readiness" and successes != 1:
        rendering.wrong(f"{field}.successes", "must be 1; only readiness may ask for more")
    return {
        **_question(rendering, kind, choice, check),
        "periodSeconds": rendering.seconds(period, f"{field if choice.period else told}.period", least=1),
        "timeoutSeconds": rendering.seconds(timeout, f"{field if choice.timeout else told}.timeout", least=1),
        "failureThreshold": failures,
        "successThreshold": successes,
    }


def _check(rendering: Rendering) -> tuple[int, HttpCheck | TcpCheck | None]:
    """The first check that a kubelet can make too."""
    for index, check in enumerate(rendering.spec.health.checks):
        if isinstance(check, HttpCheck | TcpCheck):
            return index, check
    return 0, None


def _question(rendering: Rendering, kind: _Kind, probe: Probe, check: HttpCheck | TcpCheck | None) -> dict[str, Any]:
    port = probe.port or rendering.port(f"the {kind} probe")
    path = probe.path or (check.path if isinstance(check, HttpCheck) else None)
    if path is None:
        return {"tcpSocket": {"port": port}}
    return {"httpGet": {"path": path, "port": port, "scheme": "HTTP"}}
