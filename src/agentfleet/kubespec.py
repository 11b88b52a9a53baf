"""What a fleet is on Kubernetes beyond what it is anywhere: image, references, volumes, placement, security.

Nouns like those of `specs`: frozen, strict, readable and writable as YAML and JSON. Nothing here needs a cluster or a
client for one. Where Kubernetes has a notation of its own that no shorter one replaces (affinity, unusual volumes, the
`raw` escape hatches), a field takes that notation as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from agentfleet.frozen import FrozenDict
from agentfleet.kubewords import (
    Annotations,
    FileName,
    Folder,
    Image,
    Json,
    LabelKey,
    LabelName,
    Labels,
    LabelValue,
    ObjectName,
    Port,
    Quantities,
    ServiceName,
    UserId,
    VariableName,
    Words,
    selector_labels,
)
from agentfleet.specbase import Argument, Listed, Name, Positive, Spec, Text, UrlPath
from agentfleet.units import Duration, Memory, Period, Share

Kind = Literal["ConfigMap", "Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget", "Service"]


def _nothing() -> Mapping[Any, Any]:
    return FrozenDict()


def _exactly_one(model: Spec, *fields: str) -> None:
    if sum(getattr(model, field) is not None for field in fields) != 1:
        raise PydanticCustomError("one", "give exactly one of {fields}", {"fields": ", ".join(fields)})


# ------------------------------------------------------------------------------------------------ parts of a pod


class EnvSource(Spec):
    """Where a variable's value comes from: `secret` or `config_map` with a `key`, or `field`, `resource` or `value`."""

    secret: ObjectName | None = None
    """Name of a Secret."""
    config_map: ObjectName | None = None
    """Name of a ConfigMap."""
    key: FileName | None = None
    """Which of the Secret's or ConfigMap's keys."""
    field: Text | None = None
    """A field of the pod, such as "spec.nodeName"."""
    resource: Text | None = None
    """What the container asked for, such as "limits.memory"."""
    value: Words | None = None
    """Text in which "$(NAME)" is another variable."""
    optional: bool = False
    """Whether the pod starts without it when the Secret or ConfigMap is missing."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        _exactly_one(self, "secret", "config_map", "field", "resource", "value")
        if (self.key is not None) != (self.secret is not None or self.config_map is not None):
            raise PydanticCustomError("key", "'key' goes with 'secret' or 'config_map', and they with it")
        return self


class EnvFrom(Spec):
    """All of a Secret's or a ConfigMap's keys as variables."""

    secret: ObjectName | None = None
    config_map: ObjectName | None = None
    prefix: VariableName | None = None
    """Put before each key."""
    optional: bool = False

    @model_validator(mode="after")
    def _one(self) -> Self:
        _exactly_one(self, "secret", "config_map")
        return self


class EmptyDir(Spec):
    """Scratch space that goes with the pod."""

    size: Memory | None = None
    """A pod that writes more is evicted."""
    in_memory: bool = False
    """Keep it in memory, which counts as the container's."""


class Volume(Spec):
    """Files at a path: from one of `secret`, `config_map`, `claim`, `empty`, `source`."""

    name: LabelName
    path: Folder
    """Where the agent sees them."""
    secret: ObjectName | None = None
    config_map: ObjectName | None = None
    claim: ObjectName | None = None
    """Name of a PersistentVolumeClaim."""
    empty: EmptyDir | None = None
    source: Json | None = None
    """Any other kind, in Kubernetes' notation: {"csi": {…}}."""
    sub_path: Text | None = None
    """Mount only this part of it."""
    read_only: bool | None = None
    """By default true for Secrets and ConfigMaps alone."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        _exactly_one(self, "secret", "config_map", "claim", "empty", "source")
        return self


class Probe(Spec):
    """One of the kubelet's probes. What is left out comes from the health policy's first HTTP or TCP check."""

    path: UrlPath | None = None
    """GET this path; without it and without an HTTP check the port is only connected to."""
    port: Port | None = None
    period: Period | None = None
    timeout: Period | None = None
    failures: Positive | None = None
    successes: Positive | None = None


class PreStop(Spec):
    """What happens before SIGTERM: `sleep` (for load balancers to notice), `command` or `path`."""

    sleep: Period | None = None
    """Seconds to wait. Before Kubernetes 1.30 the image needs a `sleep` program for it."""
    command: Annotated[Listed[Argument], Field(min_length=1)] | None = None
    path: UrlPath | None = None
    """GET this path on the agent's port."""
    allow: Duration = 10.0
    """How long a command or a request may take; the pod's grace period grows by it."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        _exactly_one(self, "sleep", "command", "path")
        return self


class Toleration(Spec):
    """A taint that instances may run in spite of."""

    key: LabelKey | None = None
    """Every taint, if not given."""
    value: LabelValue | None = None
    """Only this value of the taint; otherwise any."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Only this effect; otherwise every one."""
    duration: Duration | None = None
    """With NoExecute: how long an instance may stay once the taint is there."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.key is None and self.value is not None:
            raise PydanticCustomError("toleration", "'value' needs a 'key'")
        if self.duration is not None and self.effect != "NoExecute":
            raise PydanticCustomError("toleration", "'duration' goes with effect 'NoExecute'")
        return self


class Spread(Spec):
    """Spread instances evenly over nodes or zones (a topology spread constraint)."""

    over: LabelKey = "kubernetes.io/hostname"
    """Label of nodes whose values are the places; "topology.kubernetes.io/zone" spreads over zones."""
    max_skew: Positive = 1
    """How many more one place may have than another."""
    strict: bool = False
    """Whether an instance rather waits than breaks this."""


class Security(Spec):
    """The pod's security context. The default keeps Kubernetes' *restricted* Pod Security Standard."""

    profile: Literal["restricted", "none"] = "restricted"
    """"none" leaves everything to the image and the cluster."""
    user: UserId | None = None
    """Numeric user. Needed when the image names its user by a word, which a kubelet cannot tell from root."""
    group: UserId | None = None
    volume_group: UserId | None = None
    """Group that owns the volumes (`fsGroup`)."""
    writable_root: bool = False
    """Whether the agent may write outside its volumes; otherwise it has /tmp."""
    tmp_size: Memory | None = None
    """Limit of /tmp."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.profile == "restricted" and self.user == 0:
            raise PydanticCustomError(
                "security", "user 0 is root, which the restricted profile forbids; use another or profile 'none'"
            )
        return self


# ------------------------------------------------------------------------------------------------ other objects


class ServiceOptions(Spec):
    """The Service in front of a fleet whose template has a port."""

    enabled: bool = True
    name: ServiceName | None = None
    """By default the fleet's name."""
    kind: Literal["ClusterIP", "Headless", "NodePort", "LoadBalancer"] = "ClusterIP"
    port: Port | None = None
    """By default the template's port."""
    annotations: Annotations = Field(default_factory=_nothing)


class DisruptionBudget(Spec):
    """What node drains and other evictions may take away at once."""

    enabled: bool = True
    max_unavailable: Share | None = None
    """By default recovery.max_disrupted."""
    evict_unhealthy: bool = True
    """Whether instances that are not ready may always be evicted (Kubernetes 1.27): they must not block a drain."""


class ConfigFiles(Spec):
    """A ConfigMap with configuration, mounted as files."""

    files: Annotated[Mapping[FileName, Annotated[str, Field(max_length=1_048_576)]], AfterValidator(FrozenDict)] = (
        Field(default_factory=_nothing)
    )
    """Text by file name. The fleet's own configuration document, once there is one, is "config.json"."""
    path: Folder = "/etc/agentfleet"
    """Where the agent sees them; a kubelet takes up to two minutes to show a change."""

    @model_validator(mode="after")
    def _reserved(self) -> Self:
        if "config.json" in self.files:
            raise PydanticCustomError("files", "files: 'config.json' is the fleet's own document; choose another name")
        return self


class MetricSource(Spec):
    """Where the cluster's own autoscaler finds a metric of the scaling policy."""

    name: Text | None = None
    """By default what the scaling policy calls it."""
    labels: Labels = Field(default_factory=_nothing)
    """Only the series with these labels."""
    described: Json | None = None
    """The object that the metric is about: {"apiVersion": …, "kind": …, "name": …}; without one it is external."""


class ClusterAutoscaler(Spec):
    """Leave scaling to a HorizontalPodAutoscaler made from the scaling policy."""

    enabled: bool = False
    name: ObjectName | None = None
    """By default the fleet's name."""
    metrics: Annotated[Mapping[Text, MetricSource], AfterValidator(FrozenDict)] = Field(default_factory=_nothing)
    """For queue and metric targets, by their source's name; those not listed are external metrics of that name."""


# ------------------------------------------------------------------------------------------------ everything


class KubernetesOptions(Spec):
    """How one kind of agent runs on Kubernetes."""

    image: Image
    """Container image; "{version}" is replaced by template.version, so that an upgrade can be a new tag."""
    pull: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When to pull the image; by default the cluster's own rule."""
    pull_secrets: Listed[ObjectName] = ()
    """Secrets to pull it with."""
    command: Listed[Argument] | None = None
    """Instead of template.command; [] runs the image's own entry point. "$(NAME)" is a variable."""
    args: Listed[Argument] = ()
    """Arguments after the command."""
    working_dir: Folder | None = None
    env: Annotated[Mapping[VariableName, EnvSource], AfterValidator(FrozenDict), Field(max_length=10_000)] = Field(
        default_factory=_nothing
    )
    """Variables by reference; plain ones stand in template.env."""
    env_from: Annotated[Listed[EnvFrom], Field(max_length=100)] = ()
    token: EnvSource | None = None
    """The bearer token that agents ask for, as a Secret's key (AGENTFLEET_TOKEN)."""
    describe_instance: bool = True
    """Whether to set the AGENTFLEET_… variables that tell an agent who and where it is."""
    requests: Quantities = Field(default_factory=_nothing)
    """What an instance asks for beside template.cpu and template.memory, such as {"ephemeral-storage": "1Gi"}."""
    limits: Quantities = Field(default_factory=_nothing)
    """What an instance may use at most: {"cpu": "500m", "memory": "1Gi", "nvidia.com/gpu": "1"}."""
    volumes: Annotated[Listed[Volume], Field(max_length=100)] = ()

    readiness: Probe | bool = True
    """Whether it gets traffic; by default as the health policy's first HTTP or TCP check says."""
    liveness: Probe | bool = False
    """Whether the kubelet restarts it. Off: agentfleet's own recovery does that, within its budget."""
    startup: Probe | bool | None = None
    """Holds the other probes off while an instance starts, for health.startup; by default beside a liveness probe."""
    pre_stop: PreStop | None = None

    namespace: Name | None = None
    """Where everything lives; by default what the caller says."""
    component: LabelValue = "agent"
    """Label app.kubernetes.io/component."""
    part_of: LabelValue | None = None
    """Label app.kubernetes.io/part-of; by default the fleet's name."""
    labels: Labels = Field(default_factory=_nothing)
    """Labels on every object and pod."""
    annotations: Annotations = Field(default_factory=_nothing)
    """Annotations on every object."""
    pod_annotations: Annotations = Field(default_factory=_nothing)
    """Annotations on pods; a change rolls them."""
    selector: Annotated[Mapping[LabelKey, LabelValue], AfterValidator(selector_labels), Field(min_length=1)] | None = (
        None
    )
    """Labels by which the Deployment knows its pods, for ever; by default app.kubernetes.io/name and /instance."""

    service_account: ObjectName | None = None
    mount_token: bool = False
    """Whether instances get credentials for the API server."""
    priority_class: ObjectName | None = None
    node_selector: Labels = Field(default_factory=_nothing)
    tolerations: Annotated[Listed[Toleration], Field(max_length=100)] = ()
    spread: Annotated[Listed[Spread], Field(max_length=10)] = ()
    affinity: Json | None = None
    """In Kubernetes' notation."""
    security: Security = Field(default_factory=Security)

    service: ServiceOptions = Field(default_factory=ServiceOptions)
    disruption_budget: DisruptionBudget = Field(default_factory=DisruptionBudget)
    config: ConfigFiles | None = None
    autoscaler: ClusterAutoscaler = Field(default_factory=ClusterAutoscaler)

    raw: Json = Field(default_factory=_nothing)
    """Fields of the pod template that have no word here, merged last: {"spec": {"dnsPolicy": "None"}}."""
    raw_objects: Annotated[Mapping[Kind, Json], AfterValidator(FrozenDict)] = Field(default_factory=_nothing)
    """Likewise for whole objects: {"Service": {"spec": {"sessionAffinity": "ClientIP"}}}."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for field in ("cpu", "memory"):
            if field in self.requests:
                raise PydanticCustomError(
                    "requests", "requests: {field} is template.{field}; set it there", {"field": field}
                )
        for field in ("name", "path"):
            values = [getattr(each, field) for each in self.volumes]
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise PydanticCustomError(
                    "twice", "volumes: two have the {field} '{value}'; change one", {"field": field, "value": twice}
                )
        if self.token is not None and self.token.secret is None:
            raise PydanticCustomError("token", "token: must be a Secret's key: {'secret': …, 'key': …}")
        return self
