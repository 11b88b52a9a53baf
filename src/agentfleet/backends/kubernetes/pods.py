"""Pods and Deployments as fleets see them: pure functions from Kubernetes' words to ours."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from dataclasses import dataclass, replace

from agentfleet.backends.base import AUTOSCALER, Edit, Ordered
from agentfleet.backends.kubernetes import naming
from agentfleet.backends.kubernetes.objects import Annotations, Condition, ContainerStatus, Deployment, Pod, PodMetrics
from agentfleet.backends.kubernetes.objects import Node as KubeNode
from agentfleet.backends.kubernetes.resources import version_of
from agentfleet.instances import NO_SLOT, Instance, Isolation, Node, Phase, Usage
from agentfleet.units import parse_cpu, parse_memory

_HOPELESS = ("CrashLoopBackOff",)
"""Why a container waits that has run and has ended; all other reasons are those of one that was never started."""
_ON_ITS_WAY = ("", "ContainerCreating", "PodInitializing")
"""Why a container waits that will soon be started."""
_CLUSTER = frozenset(("kube-controller-manager", "kube-scheduler", "kubelet"))
"""Writers that only keep what others have told them."""


SOMEBODY = "somebody else"
"""Who wrote what the server does not say the writer of."""


@dataclass(frozen=True, slots=True)
class Written:
    """What we told a Deployment, and the resource version that this made."""

    ordered: Ordered
    version: int
    autoscaled: tuple[int, int] | None = None
    """The least and the most to which the cluster's autoscaler may set the size; None: the size is ours."""


def instance_of(pod: Pod, fleet: str, *, lost: bool = False) -> Instance:
    """One pod as an instance.

    Args:
        pod: The pod.
        fleet: Name of the fleet.
        lost: Whether its node cannot be reached.
    """
    status = _agent(pod.status.container_statuses)
    running = status.state.running if status is not None and status.state is not None else None
    ready_at = next((each.last_transition_time for each in pod.status.conditions if each.type == "Ready"), None)
    labels = pod.metadata.labels
    return Instance(
        id=pod.metadata.name,
        fleet=fleet,
        slot=NO_SLOT,
        revision=_number(labels.get(naming.REVISION)) or 0,
        version=labels.get("app.kubernetes.io/version", ""),
        phase=Phase.LOST if lost and pod.spec.node_name else _phase(pod, status),
        created_at=_seconds(pod.metadata.creation_timestamp) or 0.0,
        started_at=_seconds(running.started_at) if running is not None else None,
        ready=pod.ready,
        ready_at=_seconds(ready_at) if pod.ready else None,
        node=pod.spec.node_name or None,
        address=_address(pod),
        restarts=status.restart_count if status is not None else 0,
        exit_code=_exit_code(status),
        isolated=_isolation(pod),
        trouble=None if pod.ready else _trouble(pod, status),
        stands_in_for=_stands_in_for(pod),
    )


def node_of(node: KubeNode, *, lost: bool = False) -> Node:
    """One node as a machine that instances run on."""
    return Node(
        node.metadata.name, ready=node.ready and not lost, schedulable=not node.spec.unschedulable, zone=node.zone
    )


def usage_of(metrics: PodMetrics) -> Usage | None:
    """What a pod uses, all its containers together; None where it does not say when."""
    if metrics.timestamp is None:
        return None
    cpu = sum(parse_cpu(one.usage.cpu or "0") for one in metrics.containers)
    memory = sum(parse_memory(one.usage.memory or "0") for one in metrics.containers)
    window = metrics.window.rstrip("s")
    seconds = float(window or 0) if window.replace(".", "").isdigit() else 0.0
    return Usage(metrics.timestamp.timestamp(), cpu, int(memory), seconds)


def ordered_of(deployment: Deployment | None, ours: Written | None = None) -> Ordered:
    """What a Deployment has been told to keep, and by whom if it was not us.

    Args:
        deployment: The Deployment; None when there is none.
        ours: What we told it last, if we did since we began. Servers before 1.22 do not say who has used the scale
            subresource: what differs from our own last word, and is newer, was said by somebody else.
    """
    if deployment is None or deployment.metadata.deletion_timestamp is not None:
        return Ordered(0, absent=True)
    spec = deployment.spec
    writer = _last_writer(deployment)
    seen = Ordered(
        replicas=1 if spec.replicas is None else spec.replicas,
        revision=_number(spec.template.metadata.labels.get(naming.REVISION)),
        paused=spec.paused,
        edit=_edit(deployment),
        trouble=next((each.message for each in deployment.status.conditions if _fails(each)), None),
    )
    if ours is None:
        return replace(seen, by=None if writer in (naming.MANAGER, None) else writer)
    version = version_of(deployment.metadata) or 0
    if version < ours.version:
        return replace(seen, edit=None)
    if replace(seen, edit=None) == ours.ordered:
        return seen
    if _is_autoscaled(seen, ours):
        return replace(seen, by=AUTOSCALER if writer in (naming.MANAGER, None) else writer)
    if version == ours.version:
        return seen
    return replace(seen, by=SOMEBODY if writer in (naming.MANAGER, None) else writer)


def _is_autoscaled(seen: Ordered, ours: Written) -> bool:
    """Whether a size may be the autoscaler's word: one that it may set, on a fleet that is not stopped."""
    if ours.autoscaled is None or not ours.ordered.replicas:
        return False
    least, most = ours.autoscaled
    return least <= seen.replicas <= most and replace(seen, replicas=ours.ordered.replicas, edit=None) == ours.ordered


def _edit(deployment: Deployment) -> Edit | None:
    """Who has written into the pod template after our last apply of it; the server keeps whole seconds.

    A field that is applied again is its applier's alone, so an edit that we have overwritten is not found any more.
    """
    wrote = [
        (each.time, each.manager)
        for each in deployment.metadata.managed_fields
        if each.fields.spec.template is not None and each.time is not None and each.manager not in _CLUSTER
    ]
    ours = [time for time, manager in wrote if manager == naming.MANAGER]
    if not ours:
        return None
    edits = [(time, manager) for time, manager in wrote if manager != naming.MANAGER and time > max(ours)]
    return Edit(max(edits)[1], max(edits)[0].timestamp()) if edits else None


def _last_writer(deployment: Deployment) -> str | None:
    """Who wrote the object's wishes last; the server keeps the time of each writer's last change."""
    wrote = [
        each
        for each in deployment.metadata.managed_fields
        if each.subresource != "status"
        and each.time is not None
        and (each.manager not in _CLUSTER or each.subresource == "scale")
    ]
    if not wrote:
        return None
    newest = max(each.time for each in wrote if each.time is not None)
    latest = [each.manager for each in wrote if each.time == newest]
    if naming.MANAGER in latest:  # times are whole seconds
        return naming.MANAGER
    return AUTOSCALER if latest[-1] in _CLUSTER else latest[-1]  # of the cluster only autoscalers use scale


def _fails(condition: Condition) -> bool:
    """Whether a condition of a Deployment says that its pods are refused, as by a quota or a missing account."""
    return condition.type == "ReplicaFailure" and condition.status == "True"


def _trouble(pod: Pod, status: ContainerStatus | None) -> str | None:
    """Why a pod does not start: no node takes it, or a container waits for what it cannot have."""
    for each in pod.status.conditions:
        if each.type == "PodScheduled" and each.status == "False":
            return f"{each.reason}: {each.message}"
    waiting = status.state.waiting if status is not None and status.state is not None else None
    if waiting is None or waiting.reason in _ON_ITS_WAY or waiting.reason in _HOPELESS:
        return None
    return f"{waiting.reason}: {waiting.message}" if waiting.message else waiting.reason


def _agent(statuses: Iterable[ContainerStatus]) -> ContainerStatus | None:
    """The container that runs the agent: the one of that name, or else the first."""
    found = list(statuses)
    return next((each for each in found if each.name == naming.CONTAINER), found[0] if found else None)


def _isolation(pod: Pod) -> Isolation | None:
    """Since when and why a pod is isolated; a person who sets the label alone has said no more."""
    if pod.metadata.labels.get(naming.ISOLATED) != "true":
        return None
    notes = pod.metadata.annotations or Annotations()
    since = _moment(notes.isolated_since) or _seconds(pod.metadata.creation_timestamp) or 0.0
    return Isolation(since, notes.isolated_reason or "", _moment(notes.isolated_until))


def _stands_in_for(pod: Pod) -> str | None:
    """Whose place a pod waits for; "" where it does not say, None where it waits for none."""
    if pod.metadata.labels.get(naming.STAND_IN) != "true":
        return None
    return (pod.metadata.annotations or Annotations()).stands_in_for or ""


def _moment(text: str | None) -> float | None:
    """A time as it is written in an annotation; None where it is none."""
    try:
        return None if text is None else dt.datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _phase(pod: Pod, status: ContainerStatus | None) -> Phase:
    if pod.metadata.deletion_timestamp is not None:
        return Phase.DRAINING
    if pod.status.phase in ("Failed", "Succeeded"):
        return Phase.EXITED
    state = status.state if status is not None else None
    if state is None or pod.status.phase != "Running":
        return Phase.PENDING
    if state.terminated is not None or (state.waiting is not None and state.waiting.reason in _HOPELESS):
        return Phase.EXITED
    return Phase.RUNNING if state.running is not None else Phase.PENDING


def _exit_code(status: ContainerStatus | None) -> int | None:
    if status is None:
        return None
    for state in (status.state, status.last_state):
        if state is not None and state.terminated is not None:
            return state.terminated.exit_code
    return None


def _address(pod: Pod) -> str | None:
    if not pod.status.pod_ip:
        return None
    containers = pod.spec.containers
    agent = next((each for each in containers if each.name == naming.CONTAINER), containers[0] if containers else None)
    port = agent.ports[0].container_port if agent is not None and agent.ports else None
    host = f"[{pod.status.pod_ip}]" if ":" in pod.status.pod_ip else pod.status.pod_ip
    return None if port is None else f"{host}:{port}"


def _seconds(time: dt.datetime | None) -> float | None:
    return None if time is None else time.timestamp()


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
