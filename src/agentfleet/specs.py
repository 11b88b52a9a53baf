"""What a user asks for: frozen, strict pydantic models that write themselves in words.

Every model here round-trips through YAML and JSON, publishes a JSON schema, and rejects nonsense with the field's
name and the fix. Nothing in this module acts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_serializer, model_validator
from pydantic_core import PydanticCustomError

from agentfleet.errors import SpecError
from agentfleet.frozen import FrozenDict
from agentfleet.kubespec import KubernetesOptions
from agentfleet.specbase import Argument, Count, Listed, Metric, Name, Positive, Ratio, Spec, Text, UrlPath
from agentfleet.units import Cpu, Duration, Memory, Period, Share, share_of, show

# ------------------------------------------------------------------------------------------------ the agent


class AgentTemplate(Spec):
    """One agent: what to run and what it needs."""

    command: Annotated[Listed[Argument], Field(min_length=1, max_length=256)]
    """Program and arguments. "{version}" and "{port}" are replaced by the instance's own."""
    version: Text = "1"
    """What `fleet.upgrade(version=...)` changes; the agent finds it in AGENTFLEET_VERSION."""
    env: Annotated[
        Mapping[Text, Annotated[str, Field(max_length=131_072)]], AfterValidator(FrozenDict), Field(max_length=10_000)
    ] = Field(default_factory=FrozenDict)
    """Environment variables added to the instance's own."""
    cpu: Cpu | None = None
    """Cores asked for, the 100 % of a CPU target."""
    memory: Memory | None = None
    """Bytes asked for, the 100 % of a memory target."""
    port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    """Where the agent answers HTTP. An embedded backend gives each instance a free port of its own instead, in PORT."""
    drain: Duration = 30.0
    """How long an instance may finish its work after SIGTERM before it is killed."""
    kubernetes: KubernetesOptions | None = None
    """What only Kubernetes needs to know: image, references, placement, security."""

    @model_validator(mode="after")
    def _check_env(self) -> Self:
        for name, value in self.env.items():
            if "=" in name or "\0" in value:
                raise PydanticCustomError(
                    "env", "env: '{name}' is no variable: names hold no '=', values no NUL", {"name": name[:80]}
                )
        return self


# ------------------------------------------------------------------------------------------------ scaling


class CpuTarget(Spec):
    """Keep the average CPU use at a share of what instances asked for."""

    kind: Literal["cpu"] = "cpu"
    utilization: Positive
    """Percent of the requested CPU."""


class MemoryTarget(Spec):
    """Keep the average memory use at a share of what instances asked for."""

    kind: Literal["memory"] = "memory"
    utilization: Positive
    """Percent of the requested memory."""


class QueueTarget(Spec):
    """Keep the number of waiting and running tasks per instance."""

    kind: Literal["queue"] = "queue"
    length: Metric
    """Tasks per instance."""
    source: Text = "queue"
    """Name of the metric source that counts the tasks of the whole fleet."""


class MetricTarget(Spec):
    """Keep any metric at a value.

    `average` divides a fleet-wide metric by the number of instances (HPA's AverageValue), `per_instance` averages one
    sample per instance (HPA's Pods metric), `value` compares the metric as it is (HPA's Value).
    """

    kind: Literal["metric"] = "metric"
    metric: Text
    """Name of the metric source."""
    average: Metric | None = None
    per_instance: Metric | None = None
    value: Metric | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(x is not None for x in (self.average, self.per_instance, self.value)) != 1:
            raise PydanticCustomError("target", "give exactly one of 'average', 'per_instance' and 'value'")
        return self


Target = Annotated[CpuTarget | MemoryTarget | QueueTarget | MetricTarget, Field(discriminator="kind")]


class ScalingRule(Spec):
    """At most this much change within a period: `count` instances or `percent` of the fleet."""

    count: Positive | None = None
    percent: Positive | None = None
    period: Annotated[Period, Field(le=1800)] = 15.0

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.count is None) == (self.percent is None):
            raise PydanticCustomError("rule", "give exactly one of 'count' and 'percent'")
        return self


class ScalingBehavior(Spec):
    """How fast one direction may go (HPA's `behavior.scaleUp` / `behavior.scaleDown`)."""

    stabilization: Annotated[Duration, Field(le=3600)]
    """Window over which the more cautious of the past proposals wins."""
    select: Literal["max", "min", "disabled"] = "max"
    """Which rule wins: the largest change, the smallest, or no change at all in this direction."""
    rules: Annotated[Listed[ScalingRule], Field(min_length=1, max_length=16)]
    tolerance: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 0.1
    """Deviation from the target that is ignored; 0.1 is 10 %."""


def _up() -> ScalingBehavior:
    return ScalingBehavior(stabilization=0, rules=(ScalingRule(count=4), ScalingRule(percent=100)))


def _down() -> ScalingBehavior:
    return ScalingBehavior(stabilization=300, rules=(ScalingRule(percent=100),))


def _targets() -> tuple[Target, ...]:
    return (CpuTarget(utilization=80),)


class ScalingPolicy(Spec):
    """When to add and remove instances. The defaults are those of Kubernetes' HorizontalPodAutoscaler."""

    min_replicas: Count = 1
    max_replicas: Positive
    targets: Annotated[Listed[Target], Field(min_length=1, max_length=32)] = Field(default_factory=_targets)
    """What to keep to; the target that asks for most wins. By default CPU at 80 % of what instances asked for."""
    period: Period = 15.0
    """Time between decisions."""
    up: ScalingBehavior = Field(default_factory=_up)
    down: ScalingBehavior = Field(default_factory=_down)
    cpu_initialization: Duration = 300.0
    """Age below which an instance's CPU sample counts only if taken wholly after it became ready."""
    readiness_delay: Duration = 30.0
    """Readiness changes up to this age count as part of starting."""
    legacy_limits: bool = False
    """Limit like an HPA that has no `behavior` block: at most twice the size (or 4) a turn upwards, the bounds, and
    `down.stabilization`. Of `up` and `down` only the tolerances and that window are then used."""

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise PydanticCustomError(
                "min_max",
                "min_replicas ({low}) is more than max_replicas ({high}); lower one or raise the other",
                {"low": self.min_replicas, "high": self.max_replicas},
            )
        return self


# ------------------------------------------------------------------------------------------------ health


class _Check(Spec):
    period: Period = 10.0
    """Time between probes of one instance."""
    timeout: Period | None = None
    """A slower answer is a failure; by default the period, at most 5 s."""
    failures: Positive = 3
    """Consecutive failures that make an instance unhealthy."""
    successes: Positive = 1
    """Consecutive successes that make it healthy again."""

    @property
    def deadline(self) -> float:
        """Seconds after which a probe has failed."""
        return float(self.timeout if self.timeout is not None else min(self.period, 5.0))


class HttpCheck(_Check):
    """Healthy when GET answers 200 to 399."""

    kind: Literal["http"] = "http"
    path: UrlPath = "/health"
    """Path on the instance's own address. "/status" also tells what the agent is doing."""


class TcpCheck(_Check):
    """Healthy when the instance's port accepts a connection."""

    kind: Literal["tcp"] = "tcp"


class CustomCheck(_Check):
    """Healthy when your function says so.

    The function takes an `Instance` and returns (or awaits) True or False; an exception is a failed probe.
    """

    kind: Literal["custom"] = "custom"
    call: Callable[..., Any] | Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$", max_length=512)]
    """The function, or where to import it from: "package.module:function"."""

    @field_serializer("call")
    def _write_call(self, call: Callable[..., Awaitable[bool] | bool] | str) -> str:
        if isinstance(call, str):
            return call
        name = f"{getattr(call, '__module__', '?')}:{getattr(call, '__qualname__', '<unnamed>')}"
        if "<" in name:
            raise ValueError(
                f"call: {name} cannot be imported by name; define it at the top of a module to write this spec"
            )
        return name


class HeartbeatCheck(Spec):
    """Healthy while heartbeats arrive; suspicion grows with silence (phi-accrual, Hayashibara et al. 2004)."""

    kind: Literal["heartbeat"] = "heartbeat"
    interval: Period = 1.0
    """Expected time between beats, until enough were seen to know better."""
    phi: Annotated[float, Field(gt=0, le=300, allow_inf_nan=False)] = 10.0
    """Suspicion at which the instance is unhealthy; 10 is one false alarm in 10^10 by the fitted distribution."""
    min_silence: Duration = 3.0
    """Silence shorter than this never makes an instance unhealthy, whatever phi says."""


Check = Annotated[HttpCheck | TcpCheck | CustomCheck | HeartbeatCheck, Field(discriminator="kind")]


class HealthPolicy(Spec):
    """How health is judged. Without checks an instance is as healthy as its backend says."""

    checks: Annotated[Listed[Check], Field(max_length=16)] = ()
    startup: Duration = 60.0
    """Grace: before its first success, failures count against an instance only when it is older than this."""
    stuck_after: Period | None = None
    """A busy agent that reports no progress for this long is unhealthy; needs a check of "/status"."""
    flap_window: Duration = 300.0
    """Time over which changes between healthy and unhealthy are counted; zero turns damping off."""
    flap_limit: Positive = 6
    """Changes within the window at which an instance counts as flapping: it stays unhealthy until it is calm."""


# ------------------------------------------------------------------------------------------------ recovery and rollout


class Backoff(Spec):
    """Exponential waiting: `initial`, then `factor` times more for each attempt, never above `limit`."""

    initial: Duration = 1.0
    factor: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)] = 2.0
    limit: Duration = 300.0

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.initial > self.limit:
            raise PydanticCustomError("backoff", "initial is more than limit; lower one or raise the other")
        return self

    def delay(self, attempt: int) -> float:
        """Seconds to wait before attempt number `attempt` (0 is the first: no wait)."""
        if attempt <= 0:
            return 0.0
        if self.factor == 1.0 or self.initial == 0:
            return float(min(self.initial, self.limit))
        # beyond 2000 doublings every float is at its limit; the bound keeps ** from overflowing
        try:
            return float(min(self.initial * self.factor ** min(attempt - 1, 2000), self.limit))
        except OverflowError:
            return float(self.limit)


class RecoveryPolicy(Spec):
    """What to do about sick instances, and how much may be disrupted at once, by whatever cause.

    The ladder is climbed one failed attempt at a time: restart, replace, replace elsewhere, roll back, ask a human.
    """

    max_disrupted: Share = "10%"
    """Instances that agentfleet may have out of service by its own doing at any instant; at least 1 unless 0."""
    freeze_below: Ratio = 0.5
    """Healthy share below which disruption stops: so many sick at once have one cause, and it is not they."""
    cooldown: Duration = 30.0
    """After a freeze, and between two actions on one instance, at least this long."""
    restarts: Count = 2
    """Attempts to restart in place before replacing."""
    replacements: Count = 2
    """Attempts to replace before replacing on another node."""
    elsewhere: Count = 1
    """Attempts on another node before rolling back."""
    rollback: bool = True
    """Whether a revision whose instances stay sick is rolled back to the last good one."""
    grace: Duration = 5.0
    """How long a sick instance may finish its work before it is killed; never more than template.drain."""
    backoff: Backoff = Field(default_factory=Backoff)
    """Waiting between attempts on one instance."""
    settle: Period = 60.0
    """An attempt has failed when the instance is not healthy after this long."""
    reset_after: Duration = 600.0
    """Healthy for this long, and its earlier failures are forgotten."""

    def budget(self, replicas: int) -> int:
        """How many of `replicas` may be disrupted at once."""
        if self.max_disrupted in (0, "0%"):
            return 0
        return max(1, share_of(self.max_disrupted, replicas, round_up=False))


class RolloutPolicy(Spec):
    """How a new revision replaces the old one (a Deployment's rolling update)."""

    max_surge: Share = "25%"
    """Instances above the wanted number while rolling; a share rounds up."""
    max_unavailable: Share = "25%"
    """Instances below the wanted number while rolling; a share rounds down."""
    min_ready: Duration = 0.0
    """A new instance counts once it has been ready for this long."""
    progress_deadline: Period = 600.0
    """No progress for this long, and the rollout has failed."""
    max_failed: Positive = 3
    """Times that new instances may turn sick or exit before the rollout has failed (a tenth, if more)."""
    auto_rollback: bool = True
    """Whether a failed rollout returns to the last good revision by itself."""
    keep_revisions: Annotated[int, Field(ge=1, le=1000)] = 10
    """Old revisions kept for a rollback."""

    @model_validator(mode="after")
    def _moves(self) -> Self:
        if self.max_surge in (0, "0%") and self.max_unavailable in (0, "0%"):
            raise PydanticCustomError(
                "rollout", "max_surge and max_unavailable are both 0, so nothing could move; raise one of them"
            )
        if self.progress_deadline <= self.min_ready:
            raise PydanticCustomError("rollout", "progress_deadline must be longer than min_ready")
        return self


class FleetSpec(Spec):
    """A fleet: one kind of agent, how many, and how they are kept well."""

    name: Name
    template: AgentTemplate
    replicas: Count = 1
    scaling: ScalingPolicy | None = None
    health: HealthPolicy = Field(default_factory=HealthPolicy)
    recovery: RecoveryPolicy = Field(default_factory=RecoveryPolicy)
    rollout: RolloutPolicy = Field(default_factory=RolloutPolicy)

    def check_size(self, replicas: object) -> int:
        """A size that an operator may ask for.

        Raises:
            SpecError: Not a whole number, negative, or outside the scaling policy's bounds.
        """
        if type(replicas) is not int or not 0 <= replicas <= 1_000_000:  # True is an int, and no size
            raise SpecError(f"replicas must be a whole number from 0 to 1,000,000, not {show(replicas)}")
        policy = self.scaling
        if policy is not None and not policy.min_replicas <= replicas <= policy.max_replicas:
            raise SpecError(
                f"replicas ({replicas}) is outside scaling.min_replicas..max_replicas "
                f"({policy.min_replicas}..{policy.max_replicas}): the autoscaler would undo it; change the policy"
            )
        return replicas

    @model_validator(mode="after")
    def _fits(self) -> Self:
        scaling = self.scaling
        if scaling is not None and not scaling.min_replicas <= self.replicas <= scaling.max_replicas:
            raise PydanticCustomError(
                "replicas",
                "replicas ({replicas}) is outside scaling.min_replicas..max_replicas ({low}..{high})",
                {"replicas": self.replicas, "low": scaling.min_replicas, "high": scaling.max_replicas},
            )
        if scaling is not None:
            for target in scaling.targets:
                resource = target.kind
                if resource in ("cpu", "memory") and not getattr(self.template, resource):
                    raise PydanticCustomError(
                        "request",
                        "scaling on {resource} is a share of template.{resource}, which is not set; set it",
                        {"resource": resource},
                    )
        return self
