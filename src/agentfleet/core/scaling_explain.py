"""Why the scaling decision is what it is: its reasons in words and numbers, and the table that notebooks show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from agentfleet.core.reason import Number, Reason
from agentfleet.core.scaling_behavior import Limit
from agentfleet.core.scaling_proposals import Estimate, Step
from agentfleet.specs import ScalingPolicy


@dataclass(frozen=True, slots=True)
class Outline:
    """The numbers of a decision, without how they came about."""

    current: int
    desired: int
    raw: int | None
    stabilized: int | None
    limit: Limit


def explain(
    policy: ScalingPolicy,
    outline: Outline,
    *,
    driver: str | None,
    estimate: Estimate | None,
    failures: Sequence[tuple[str, str]],
) -> tuple[Reason, ...]:
    """The reasons of one decision, most decisive first."""
    reasons = []
    if outline.limit is not Limit.NONE and outline.limit is not Limit.STABILIZATION:
        reasons.append(_limit(policy, outline, len(failures)))
    if outline.stabilized is not None and outline.raw is not None and outline.stabilized != outline.raw:
        reasons.append(_stabilization(policy, outline.current, outline.raw, outline.stabilized))
    if estimate is not None and driver is not None:
        reasons.append(_target(driver, estimate, outline.current))
    for name, why in failures:
        reasons.append(Reason("scaling.metric_failed", f"{name}: {why}"))
    return tuple(reasons)


def _limit(policy: ScalingPolicy, outline: Outline, failed: int) -> Reason:
    limit, current, desired, asked = outline.limit, outline.current, outline.desired, outline.stabilized
    numbers: dict[str, Number] = {"current": current, "desired": desired}
    if asked is not None:
        numbers["asked"] = asked
    match limit:
        case Limit.PAUSED:
            text = "Somebody set the fleet to zero instances: it stays there until somebody sets another size."
        case Limit.METRICS if outline.raw is None:
            text = f"No metric could be read: the fleet stays at {current}."
            numbers["failed"] = failed
        case Limit.METRICS:
            text = (
                f"The metrics that could be read ask for {outline.raw}, but {failed} could not be read: "
                f"the fleet stays at {current}, since missing data never shrinks it."
            )
            numbers |= {"failed": failed, "asked": outline.raw or 0}
        case Limit.MAX:
            text = f"At most {policy.max_replicas} instances are allowed."
            numbers["max"] = policy.max_replicas
        case Limit.MIN:
            text = f"At least {policy.min_replicas} instances are required."
            numbers["min"] = policy.min_replicas
        case _:
            word = "grow" if limit is Limit.RATE_UP else "shrink"
            text = f"The fleet may {word} only to {desired} now; {asked} are asked for."
    return Reason(f"scaling.{limit.value}", text, numbers)


def _stabilization(policy: ScalingPolicy, current: int, raw: int, stabilized: int) -> Reason:
    up = stabilized < raw
    window = (policy.up if up else policy.down).stabilization
    word = "less" if up else "more"
    text = f"{raw} are asked for now, but {word} was within the last {window:g} s: {stabilized} for the time being."
    return Reason(
        "scaling.stabilization", text, {"current": current, "asked": raw, "stable": stabilized, "window_s": window}
    )


def _target(name: str, estimate: Estimate, current: int) -> Reason:
    numbers: dict[str, Number] = {"asked": estimate.replicas, "measured": estimate.usage}
    percent = ""
    if math.isfinite(estimate.ratio):
        numbers["ratio"] = estimate.ratio
        percent = f" at {estimate.ratio * 100:.0f} % of its target"
    match estimate.step:
        case Step.TOLERANCE:
            return Reason("scaling.tolerance", f"{name} is{percent}, close enough to leave {current} alone.", numbers)
        case Step.DOUBT:
            text = f"{name} is{percent}, but instances without a usable sample could turn that around."
            return Reason("scaling.doubt", text, numbers)
        case _:
            text = f"{name} is{percent} and asks for {estimate.replicas} instances."
            return Reason("scaling.target", text, numbers)


def table(title: str, rows: Iterable[tuple[str, str]], reasons: Sequence[Reason]) -> str:
    """HTML for notebooks; everything that comes from outside is escaped."""
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in rows)
    why = "".join(f"<tr><td>{escape(r.code)}</td><td>{escape(r.text)}</td></tr>" for r in reasons)
    return f"<table><caption>{escape(title)}</caption>{body}{why}</table>"
