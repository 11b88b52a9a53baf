"""Clusters: what is asked of them. A *cluster* is a fleet, in the words of the API that this one continues."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, RootModel, Tag, field_validator
from pydantic_core import PydanticCustomError

from agentfleet.errors import SpecError
from agentfleet.operations import Deploy, Rollback, Scale
from agentfleet.specbase import Count, Listed, Name, Positive, Spec
from agentfleet.specs import (
    AgentTemplate,
    CpuTarget,
    FleetSpec,
    HealthPolicy,
    HeartbeatCheck,
    HttpCheck,
    MemoryTarget,
    RecoveryPolicy,
    RolloutPolicy,
    ScalingPolicy,
    TcpCheck,
)

NAME = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
"""A cluster's id or name."""
AT_ONCE = ConfigDict(defer_build=False)
"""Of models that are bodies: FastAPI builds what it does with a model when a route is made."""
RemoteCheck = Annotated[HttpCheck | TcpCheck | HeartbeatCheck, Field(discriminator="kind")]
"""The checks that may be asked for from afar: one that names a function to import would run it."""


class RemoteHealth(HealthPolicy):
    """How health is judged. Without checks an instance is as healthy as its backend says."""

    checks: Annotated[Listed[RemoteCheck], Field(max_length=16)] = ()


class RemoteSpec(FleetSpec):
    """A cluster in full: one kind of agent, how many, and how they are kept well."""

    health: RemoteHealth = Field(default_factory=RemoteHealth)

    @field_validator("name")
    @classmethod
    def _no_id(cls, name: str) -> str:
        return _checked_name(name)

    def to_spec(self) -> FleetSpec:
        """The same as the library's own noun."""
        return FleetSpec.parse(self.to_dict())


class ClusterFromSpec(Spec):
    """A cluster, by its full spec."""

    namespace: Name | None = None
    """Where it lives; the server's own by default."""
    spec: RemoteSpec

    @property
    def cluster_name(self) -> str:
        """Its name."""
        return self.spec.name

    def to_spec(self, template: AgentTemplate | None = None) -> FleetSpec:
        """What is asked for."""
        del template
        return self.spec.to_spec()


class ClusterConfig(Spec):
    """A cluster, in few words. Where a policy is given in full, it goes before the words for a part of it."""

    cluster_name: Name
    namespace: Name | None = None
    """Where it lives; the server's own by default."""
    min_replicas: Count = 1
    max_replicas: Positive = 10
    target_cpu_percent: Positive = 70
    """Used where the template asks for CPU."""
    target_memory_percent: Positive = 80
    """Used where the template asks for memory."""
    health_check_config: RemoteHealth | None = None
    template: AgentTemplate | None = None
    """What to run; the server's own by default, if it has one."""
    replicas: Count | None = None
    """How many at first; `min_replicas` by default."""
    scaling: ScalingPolicy | None = None
    """Instead of `min_replicas`, `max_replicas` and the targets."""
    health: RemoteHealth | None = None
    """Instead of `health_check_config`."""
    recovery: RecoveryPolicy | None = None
    rollout: RolloutPolicy | None = None

    @field_validator("cluster_name")
    @classmethod
    def _no_id(cls, name: str) -> str:
        return _checked_name(name)

    def to_spec(self, template: AgentTemplate | None = None) -> FleetSpec:
        """What is asked for.

        Args:
            template: Used where none is given.

        Raises:
            SpecError: It does not fit together; the message names the field.
        """
        template = template if self.template is None else self.template
        if template is None:
            raise SpecError("template: say what to run, for example {'command': ['python', '-m', 'my_agent']}")
        scaling = self.scaling if self.scaling is not None else self._scaling(template)
        fallback = 1 if scaling is None else scaling.min_replicas
        parts: dict[str, Any] = {
            "name": self.cluster_name,
            "template": template.to_dict(),
            "replicas": fallback if self.replicas is None else self.replicas,
        }
        policies = {
            "scaling": scaling,
            "health": self.health if self.health is not None else self.health_check_config,
            "recovery": self.recovery,
            "rollout": self.rollout,
        }
        given = {name: policy.to_dict() for name, policy in policies.items() if policy is not None}
        return FleetSpec.parse(parts | given, source="the cluster")

    def _scaling(self, template: AgentTemplate) -> ScalingPolicy | None:
        """What the few words say; None where they say nothing, and there is nothing to scale on."""
        words, given = ("min_replicas", "max_replicas"), self.model_fields_set
        if self.min_replicas > self.max_replicas:
            raise SpecError(
                f"min_replicas: {self.min_replicas} is more than max_replicas ({self.max_replicas}); lower one or "
                "raise the other"
            )
        for field, needed in (("target_cpu_percent", "cpu"), ("target_memory_percent", "memory")):
            if field in given and not getattr(template, needed):
                raise SpecError(f"{field}: it is a share of template.{needed}, which is not set; set that, too")
        targets: list[CpuTarget | MemoryTarget] = []
        if template.cpu:
            targets.append(CpuTarget(utilization=self.target_cpu_percent))
        if template.memory:
            targets.append(MemoryTarget(utilization=self.target_memory_percent))
        if not targets:
            bounded = next((word for word in words if word in given), None)
            if bounded is not None and self.min_replicas != self.max_replicas:
                raise SpecError(
                    f"{bounded}: there is nothing to scale on between them; set template.cpu or template.memory, or "
                    "give a whole policy in scaling"
                )
            return None
        return ScalingPolicy(min_replicas=self.min_replicas, max_replicas=self.max_replicas, targets=targets)


def _checked_name(name: str) -> str:
    """A name that cannot be taken for an id."""
    if len(name.replace("-", "")) == 32 and not set(name) - set("0123456789abcdef-"):
        raise PydanticCustomError("name", "looks like an id; give it a letter beyond f, or another length")
    return name


def _form(value: Any) -> str:
    if isinstance(value, dict):
        return "spec" if "spec" in value else "words"
    return "spec" if isinstance(value, ClusterFromSpec) else "words"


class ClusterRequest(
    RootModel[
        Annotated[
            Annotated[ClusterConfig, Tag("words")] | Annotated[ClusterFromSpec, Tag("spec")], Discriminator(_form)
        ]
    ]
):
    """A cluster, in either form; which one it is, `spec` says."""

    model_config = AT_ONCE


FORMS = ("words", "spec")
"""What the two forms are called in the places of validation errors."""


class ScaleRequest(Scale):
    """The size asked for."""

    model_config = AT_ONCE


class DeployRequest(Deploy):
    """What changes of the template; at least one thing."""

    model_config = AT_ONCE


class RollbackRequest(Rollback):
    """Where to."""

    model_config = AT_ONCE


class IsolateRequest(Spec):
    """How an instance is set apart for examination."""

    model_config = AT_ONCE

    reason: Annotated[str, Field(min_length=1, max_length=1000, pattern=r"\S")]
    keep: Annotated[float, Field(gt=0, le=31_536_000)] | None = 3600.0
    """Seconds that it stays; null is until it is released."""


class ReplaceRequest(Spec):
    """How an instance is replaced."""

    model_config = AT_ONCE

    elsewhere: bool = False
    """Whether the new one should run on another node."""


Doing = Literal[
    "creating",
    "scaling",
    "deploying",
    "rolling_back",
    "updating",
    "pausing",
    "resuming",
    "stopping",
    "starting",
    "deleting",
    "restarting",
    "replacing",
    "isolating",
    "releasing",
]
"""What is being done once a request was accepted."""


def parse_request(data: object) -> ClusterConfig | ClusterFromSpec:
    """A cluster in either form, from plain data; raises `SpecError`."""
    model: type[ClusterConfig | ClusterFromSpec] = ClusterFromSpec if _form(data) == "spec" else ClusterConfig
    return model.parse(data, source="the cluster")


__all__ = [
    "FORMS",
    "NAME",
    "ClusterConfig",
    "ClusterFromSpec",
    "ClusterRequest",
    "DeployRequest",
    "Doing",
    "IsolateRequest",
    "RemoteHealth",
    "RemoteSpec",
    "ReplaceRequest",
    "RollbackRequest",
    "ScaleRequest",
    "parse_request",
]
