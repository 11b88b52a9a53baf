"""Kubernetes objects, slim: of each kind only the fields that are used here, decoded straight from the server's JSON.

Field names are Kubernetes' own in snake case; what a server leaves out has its zero value. Adding a field is one line.
Your own kinds are a struct like these with a `metadata: Meta`, and a `resources.Resource` that says where they live.
"""

from __future__ import annotations

import datetime as dt
from typing import Literal, Protocol

import msgspec

__all__ = [
    "Annotations",
    "Condition",
    "Container",
    "ContainerState",
    "ContainerStatus",
    "Deployment",
    "KubeObject",
    "Lease",
    "Meta",
    "Node",
    "Owner",
    "Pod",
    "PodMetrics",
    "ReplicaSet",
    "Slim",
    "is_true",
]

Time = dt.datetime


class Slim(msgspec.Struct, frozen=True, gc=False, rename="camel", repr_omit_defaults=True):
    """Base of everything decoded. Immutable; a tree, so the garbage collector need not look at it."""


class Owner(Slim, frozen=True):
    """What an object belongs to."""

    uid: str
    kind: str = ""
    name: str = ""
    controller: bool = False


class Annotations(Slim, frozen=True):
    """The annotations that we read; the others can be large (a whole manifest in one) and are not kept."""

    deletion_cost: str | None = msgspec.field(default=None, name="controller.kubernetes.io/pod-deletion-cost")
    revision: str | None = msgspec.field(default=None, name="deployment.kubernetes.io/revision")
    change_cause: str | None = msgspec.field(default=None, name="kubernetes.io/change-cause")
    state: str | None = msgspec.field(default=None, name="agentfleet.io/state")
    replicas: str | None = msgspec.field(default=None, name="agentfleet.io/replicas")
    epoch: str | None = msgspec.field(default=None, name="agentfleet.io/epoch")
    isolated_since: str | None = msgspec.field(default=None, name="agentfleet.io/isolated-since")
    isolated_until: str | None = msgspec.field(default=None, name="agentfleet.io/isolated-until")
    isolated_reason: str | None = msgspec.field(default=None, name="agentfleet.io/isolated-reason")
    stands_in_for: str | None = msgspec.field(default=None, name="agentfleet.io/stands-in-for")
    stands_in_uid: str | None = msgspec.field(default=None, name="agentfleet.io/stands-in-uid")


class Meta(Slim, frozen=True):
    """What every object has."""

    uid: str = ""
    name: str = ""
    namespace: str = ""
    resource_version: str = ""
    generation: int = 0
    labels: dict[str, str] = {}
    annotations: Annotations | None = None
    owner_references: tuple[Owner, ...] = ()
    creation_timestamp: Time | None = None
    deletion_timestamp: Time | None = None

    @property
    def controller(self) -> Owner | None:
        """The controller that the object belongs to."""
        return next((owner for owner in self.owner_references if owner.controller), None)


class KubeObject(Protocol):
    """Any slim object."""

    @property
    def metadata(self) -> Meta:
        """Who it is."""
        ...


class Condition(Slim, frozen=True):
    """One statement about an object."""

    type: str
    status: Literal["True", "False", "Unknown"] = "Unknown"
    reason: str = ""
    message: str = ""
    last_transition_time: Time | None = None


class Requests(Slim, frozen=True):
    """What a container asks for, as written."""

    cpu: str = ""
    memory: str = ""


class ContainerResources(Slim, frozen=True):
    """A container's resources."""

    requests: Requests | None = None


class Port(Slim, frozen=True):
    """A port that a container listens on."""

    container_port: int
    name: str = ""


class Container(Slim, frozen=True):
    """A container as it is wanted."""

    name: str
    ports: tuple[Port, ...] = ()
    image: str = ""
    resources: ContainerResources | None = None


class Waiting(Slim, frozen=True):
    """A container that is not started yet."""

    reason: str = ""
    message: str = ""


class Running(Slim, frozen=True):
    """A container at work."""

    started_at: Time | None = None


class Terminated(Slim, frozen=True):
    """A container that has ended."""

    exit_code: int = 0
    reason: str = ""
    signal: int = 0
    finished_at: Time | None = None


class ContainerState(Slim, frozen=True):
    """One of the three; none of them means not known yet."""

    waiting: Waiting | None = None
    running: Running | None = None
    terminated: Terminated | None = None


class ContainerStatus(Slim, frozen=True):
    """A container as it is."""

    name: str
    ready: bool = False
    restart_count: int = 0
    state: ContainerState | None = None
    last_state: ContainerState | None = None


class PodSpec(Slim, frozen=True):
    """What is wanted of a pod."""

    node_name: str = ""
    containers: tuple[Container, ...] = ()
    termination_grace_period_seconds: int | None = None


class PodStatus(Slim, frozen=True):
    """What is known of a pod."""

    phase: str = ""
    reason: str = ""
    message: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")
    start_time: Time | None = None
    conditions: tuple[Condition, ...] = ()
    container_statuses: tuple[ContainerStatus, ...] = ()
    init_container_statuses: tuple[ContainerStatus, ...] = ()


class Pod(Slim, frozen=True):
    """A pod."""

    metadata: Meta
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    @property
    def ready(self) -> bool:
        """Whether it says of itself that it is ready to serve."""
        return is_true(self.status.conditions, "Ready")

    @property
    def restarts(self) -> int:
        """Restarts of all its containers."""
        return sum(each.restart_count for each in self.status.container_statuses)


class Taint(Slim, frozen=True):
    """Why pods stay away from a node."""

    key: str
    effect: str = ""


class NodeSpec(Slim, frozen=True):
    """What is wanted of a node."""

    unschedulable: bool = False
    taints: tuple[Taint, ...] = ()


class NodeStatus(Slim, frozen=True):
    """What is known of a node."""

    conditions: tuple[Condition, ...] = ()
    allocatable: dict[str, str] = {}


class Node(Slim, frozen=True):
    """A node."""

    metadata: Meta
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()

    @property
    def ready(self) -> bool:
        """Whether its kubelet says so, and says so still."""
        return is_true(self.status.conditions, "Ready")

    @property
    def zone(self) -> str | None:
        """The failure zone it is in; None where nobody has said."""
        labels = self.metadata.labels
        return labels.get("topology.kubernetes.io/zone") or labels.get("failure-domain.beta.kubernetes.io/zone")


class LeaseSpec(Slim, frozen=True):
    """Who holds a lease."""

    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    acquire_time: Time | None = None
    renew_time: Time | None = None
    lease_transitions: int | None = None


class Lease(Slim, frozen=True):
    """A lease: a node's heartbeat, or an election."""

    metadata: Meta
    spec: LeaseSpec = LeaseSpec()


class ReplicasSpec(Slim, frozen=True):
    """How many pods are wanted."""

    replicas: int | None = None
    paused: bool = False
    min_ready_seconds: int = 0


class ReplicasStatus(Slim, frozen=True):
    """How many pods there are."""

    replicas: int = 0
    ready_replicas: int = 0
    available_replicas: int = 0
    updated_replicas: int = 0
    unavailable_replicas: int = 0
    observed_generation: int = 0
    conditions: tuple[Condition, ...] = ()


class ReplicaSet(Slim, frozen=True):
    """One revision of a Deployment."""

    metadata: Meta
    spec: ReplicasSpec = ReplicasSpec()
    status: ReplicasStatus = ReplicasStatus()


class Owns(Slim, frozen=True):
    """That fields are somebody's; which ones within is not kept."""


class OwnedSpec(Slim, frozen=True):
    """Fields of a spec that are somebody's."""

    template: Owns | None = msgspec.field(default=None, name="f:template")


class OwnedFields(Slim, frozen=True):
    """Fields of an object that are somebody's."""

    spec: OwnedSpec = msgspec.field(default=OwnedSpec(), name="f:spec")


class ManagedField(Slim, frozen=True):
    """Who wrote some of an object's fields, and when last."""

    manager: str = ""
    subresource: str = ""
    time: Time | None = None
    fields: OwnedFields = msgspec.field(default=OwnedFields(), name="fieldsV1")


class DeploymentMeta(Meta, frozen=True):
    """Who it is, and who wrote it."""

    managed_fields: tuple[ManagedField, ...] = ()


class TemplateMeta(Slim, frozen=True):
    """The labels that pods get."""

    labels: dict[str, str] = {}


class PodTemplate(Slim, frozen=True):
    """What pods are made from."""

    metadata: TemplateMeta = TemplateMeta()


class Selector(Slim, frozen=True):
    """By which labels pods are known; agentfleet's own Deployments use nothing else."""

    match_labels: dict[str, str] = {}


class DeploymentSpec(Slim, frozen=True):
    """How many pods of which template are wanted."""

    replicas: int | None = None
    selector: Selector = Selector()
    paused: bool = False
    template: PodTemplate = PodTemplate()


class Deployment(Slim, frozen=True):
    """A Deployment."""

    metadata: DeploymentMeta
    spec: DeploymentSpec = DeploymentSpec()
    status: ReplicasStatus = ReplicasStatus()


class ContainerMetrics(Slim, frozen=True):
    """What one container uses, as quantities."""

    name: str
    usage: Requests = Requests()


class PodMetrics(Slim, frozen=True):
    """What one pod uses (metrics.k8s.io). Listed, never watched."""

    metadata: Meta
    timestamp: Time | None = None
    window: str = ""
    containers: tuple[ContainerMetrics, ...] = ()


def is_true(conditions: tuple[Condition, ...], type: str) -> bool:
    """Whether a condition holds."""
    return any(each.type == type and each.status == "True" for each in conditions)
