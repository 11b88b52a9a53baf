"""A HorizontalPodAutoscaler from the scaling policy, for whoever prefers the cluster's own autoscaler.

agentfleet's own decision equals the HPA's (`core.scaling`), so a policy means the same here. What an HPA cannot say
is said in the rendering's notes, or refused where it would turn the policy's meaning around.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal
from typing import Any

from agentfleet.backends.kubernetes import naming
from agentfleet.backends.kubernetes.merge import thaw
from agentfleet.backends.kubernetes.rendering import Manifest, Rendering, present
from agentfleet.kubespec import MetricSource
from agentfleet.specs import (
    CpuTarget,
    MemoryTarget,
    MetricTarget,
    QueueTarget,
    ScalingBehavior,
    ScalingPolicy,
    ScalingRule,
    Target,
)

_MOST = Decimal(2**63 - 1) / 1000
"""An HPA computes in thousandths of 64 bits."""
_CONTROLLER = {"period": 15.0, "cpu_initialization": 300.0, "readiness_delay": 30.0}
"""What only flags of the controller manager set, with their defaults."""


def autoscaler_name(rendering: Rendering) -> str:
    """The HorizontalPodAutoscaler's name."""
    return rendering.options.autoscaler.name or rendering.spec.name


def autoscaler(rendering: Rendering) -> Manifest:
    """The HorizontalPodAutoscaler of a fleet; raises `SpecError` where the fleet has no scaling policy for it."""
    policy = rendering.spec.scaling
    if policy is None:
        rendering.wrong("scaling", "is not set, so there is nothing to scale by; set it, or leave the autoscaler out")
    return {
        "apiVersion": f"autoscaling/{rendering.api.autoscaling}",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": autoscaler_name(rendering), "labels": naming.labels_of(rendering.spec)},
        "spec": present(
            scaleTargetRef={"apiVersion": "apps/v1", "kind": "Deployment", "name": rendering.spec.name},
            minReplicas=_least(rendering, policy),
            maxReplicas=policy.max_replicas,
            metrics=[_metric(rendering, n, target) for n, target in enumerate(policy.targets)],
            behavior=_behavior(rendering, policy),
        ),
    }


def _least(rendering: Rendering, policy: ScalingPolicy) -> int:
    if policy.min_replicas > 0:
        return policy.min_replicas
    if not rendering.api.scale_to_zero:
        rendering.wrong(
            "scaling.min_replicas",
            "is 0, which an HPA does only with the cluster's gate HPAScaleToZero; set 1, or let agentfleet scale",
        )
    if all(isinstance(target, CpuTarget | MemoryTarget) for target in policy.targets):
        rendering.wrong(
            "scaling.min_replicas", "is 0, but nothing here can wake a fleet of 0; set 1, or scale on a queue"
        )
    return 0


# ------------------------------------------------------------------------------------------------ metrics


def _metric(rendering: Rendering, index: int, target: Target) -> dict[str, Any]:
    place = f"scaling.targets.{index}"
    if isinstance(target, CpuTarget | MemoryTarget):
        goal = {"type": "Utilization", "averageUtilization": target.utilization}
        return {"type": "Resource", "resource": {"name": target.kind, "target": goal}}
    if isinstance(target, QueueTarget):
        return _wide(rendering, target.source, _average(rendering, f"{place}.length", target.length))
    return _custom(rendering, place, target)


def _custom(rendering: Rendering, place: str, target: MetricTarget) -> dict[str, Any]:
    if target.per_instance is not None:
        source = _source(rendering, target.metric)
        if source.described is not None:
            rendering.wrong(
                f"template.kubernetes.autoscaler.metrics.{target.metric}",
                "a metric of each instance is about its pods; leave 'described' out",
            )
        goal = _average(rendering, f"{place}.per_instance", target.per_instance)
        return {"type": "Pods", "pods": {"metric": _identifier(rendering, target.metric, source), "target": goal}}
    if target.average is not None:
        return _wide(rendering, target.metric, _average(rendering, f"{place}.average", target.average))
    assert target.value is not None, "the spec demands exactly one"
    goal = {"type": "Value", "value": _quantity(rendering, f"{place}.value", target.value)}
    return _wide(rendering, target.metric, goal)


def _wide(rendering: Rendering, name: str, goal: dict[str, Any]) -> dict[str, Any]:
    """A metric of the fleet as a whole: about an object, or from outside the cluster."""
    source = _source(rendering, name)
    metric = _identifier(rendering, name, source)
    if source.described is None:
        return {"type": "External", "external": {"metric": metric, "target": goal}}
    described = thaw(source.described)
    if not {"kind", "name"} <= described.keys():
        rendering.wrong(
            f"template.kubernetes.autoscaler.metrics.{name}.described",
            "must name an object: 'kind' and 'name' at least",
        )
    return {"type": "Object", "object": {"describedObject": described, "metric": metric, "target": goal}}


def _source(rendering: Rendering, name: str) -> MetricSource:
    return rendering.options.autoscaler.metrics.get(name) or MetricSource()


def _identifier(rendering: Rendering, name: str, source: MetricSource) -> dict[str, Any]:
    called = source.name or name
    if "/" in called or "%" in called or called in (".", ".."):  # apimachinery's IsValidPathSegmentName
        rendering.wrong(
            f"template.kubernetes.autoscaler.metrics.{name}.name",
            f"a metric's name becomes part of a path, so {called[:80]!r} cannot be one; name the cluster's metric here",
        )
    return present(name=called, selector={"matchLabels": dict(source.labels)} if source.labels else None)


def _average(rendering: Rendering, place: str, value: float) -> dict[str, Any]:
    return {"type": "AverageValue", "averageValue": _quantity(rendering, place, value)}


def _quantity(rendering: Rendering, place: str, value: float) -> str:
    """A number as `resource.Quantity` writes it; thousandths at least, because an HPA computes with those."""
    exact = Decimal(repr(float(value)))
    if exact > _MOST:
        rendering.wrong(place, f"{value:g} is more than an HPA can count ({_MOST:.3g}); choose a larger unit")
    milli = int((exact * 1000).to_integral_value(ROUND_CEILING))
    if milli != exact * 1000:
        rendering.note(f"{place}: an HPA counts thousandths: {value:g} becomes {milli / 1000:g}.")
    for unit in ("m", "", "k", "M", "G", "T"):  # the largest that is exact: the form that the server gives back
        if milli % 1000:
            return f"{milli}{unit}"
        milli //= 1000
    return f"{milli}P"


# ------------------------------------------------------------------------------------------------ behaviour


def _behavior(rendering: Rendering, policy: ScalingPolicy) -> dict[str, Any] | None:
    for field, default in _CONTROLLER.items():
        value = getattr(policy, field)
        if value != default:
            rendering.note(
                f"scaling.{field}: only a flag of the cluster's controller manager sets this; "
                f"an HPA goes by its {default:g} s, not by {value:g} s."
            )
    if not policy.legacy_limits:
        return {
            "scaleUp": _direction(rendering, "scaling.up", policy.up),
            "scaleDown": _direction(rendering, "scaling.down", policy.down),
        }
    if policy.down.stabilization != 300:
        rendering.note(
            "scaling.down.stabilization: without a behaviour block only a flag of the controller manager sets this; "
            f"an HPA goes by its 300 s, not by {policy.down.stabilization:g} s."
        )
    for direction, behavior in (("up", policy.up), ("down", policy.down)):
        if behavior.tolerance != 0.1:
            rendering.note(
                f"scaling.{direction}.tolerance: without a behaviour block an HPA goes by the cluster's own, "
                f"which is 0.1 unless a flag says otherwise, not by {behavior.tolerance:g}."
            )
    return None


def _direction(rendering: Rendering, place: str, behavior: ScalingBehavior) -> dict[str, Any]:
    found: dict[str, Any] = {
        "stabilizationWindowSeconds": rendering.seconds(behavior.stabilization, f"{place}.stabilization"),
        "selectPolicy": behavior.select.capitalize(),
        "policies": [_rule(rendering, f"{place}.rules.{n}", rule) for n, rule in enumerate(behavior.rules)],
    }
    if behavior.tolerance != 0.1:
        if rendering.api.tolerance:
            found["tolerance"] = _tolerance(behavior.tolerance)
        else:
            rendering.note(
                f"{place}.tolerance: needs Kubernetes 1.35; this cluster goes by its own, "
                f"which is 0.1 unless a flag says otherwise, not by {behavior.tolerance:g}."
            )
    return found


def _tolerance(value: float) -> str:
    """A share as a quantity, down to a millionth."""
    for unit, scale in (("", 1), ("m", 1000)):
        scaled = Decimal(repr(value)) * scale
        if scaled == scaled.to_integral_value():
            return f"{int(scaled)}{unit}"
    return f"{math.ceil(Decimal(repr(value)) * 1_000_000)}u"


def _rule(rendering: Rendering, place: str, rule: ScalingRule) -> dict[str, Any]:
    kind, value = ("Pods", rule.count) if rule.count is not None else ("Percent", rule.percent)
    return {
        "type": kind,
        "value": value,
        "periodSeconds": rendering.seconds(rule.period, f"{place}.period", least=1),
    }
