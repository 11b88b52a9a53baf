"""The commands of `NodeFaults`, carried out on a `FakeKubelet`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from agentfleet.errors import InstanceGone, SpecError
from agentfleet.testing.kube.behaviour import Behaviour
from agentfleet.testing.kube.faults import PodSeen
from agentfleet.testing.kube.podrun import PodRun, Stage

if TYPE_CHECKING:
    from agentfleet.testing.kube.kubelet import FakeKubelet
    from agentfleet.testing.kube.nodes import Node


async def carry_out(kubelet: FakeKubelet, command: str, told: Mapping[str, Any]) -> Any:
    """Carry out one command.

    Raises:
        InstanceGone: No such pod or node.
        SpecError: No such command.
    """
    match command:
        case "pods":
            return [asdict(_describe(run)) for run in kubelet.runs.values()]
        case "image":
            _image(kubelet, told["pattern"], told["behaviour"])
        case "node_gone":
            _leave(kubelet, _node(kubelet, told["node"]), answering=told["answering"])
        case "node_back":
            node = _node(kubelet, told["node"])
            _return(kubelet, node)
            await kubelet.nodes.register_one(node)
        case _:
            act = _TO_PODS.get(command)
            if act is None:
                raise SpecError(f"fake nodes know no command {command!r}; they know {', '.join(sorted(_TO_PODS))}")
            for run in _runs(kubelet, told["pods"]):
                act(kubelet, run, told)
    return None


def _runs(kubelet: FakeKubelet, names: list[str]) -> list[PodRun]:
    by_name = {run.name: run for run in kubelet.runs.values()}
    if missing := [name for name in names if name not in by_name]:
        raise InstanceGone(
            f"no node here runs {', '.join(missing[:5])}: pods are named namespace/name, "
            "and must be bound to a fake node"
        )
    return [by_name[name] for name in names]


def _node(kubelet: FakeKubelet, name: str) -> Node:
    node = kubelet.nodes.by_name.get(name)
    if node is None:
        raise InstanceGone(f"there is no fake node {name!r}: there are {', '.join(kubelet.nodes.by_name)}")
    return node


def _describe(run: PodRun) -> PodSeen:
    return PodSeen(
        name=run.name,
        uid=run.view.metadata.uid,
        node=run.node,
        address=run.address,
        ports=tuple(sorted(run.ports)),
        stage=run.stage.value,
        ready=run.ready,
        restarts=run.restarts,
        in_flight=run.vitals.in_flight,
        image=run.view.spec.containers[run.lead].image,
    )


def _image(kubelet: FakeKubelet, pattern: str, told: Mapping[str, Any] | None) -> None:
    kubelet.rules.set(pattern, None if told is None else Behaviour(**told))
    for run in kubelet.runs.values():
        if run.stage in {Stage.PULL_FAILED, Stage.PULL_BACKOFF}:
            run.lead, run.behaviour = kubelet.rules.choose([each.image for each in run.view.spec.containers])
            if run.behaviour.pull is not None:
                kubelet.lifecycle.begin(run)


def _leave(kubelet: FakeKubelet, node: Node, *, answering: bool) -> None:
    node.gone = True
    for run in kubelet.runs.values():
        if run.node == node.name and not answering:
            run.vitals.silent = True


def _return(kubelet: FakeKubelet, node: Node) -> None:
    node.gone = False
    for run in kubelet.runs.values():
        if run.node == node.name:
            run.vitals.silent = False
    kubelet.resume(node)


def _crash(kubelet: FakeKubelet, run: PodRun, told: Mapping[str, Any]) -> None:
    kubelet.lifecycle.crash(run, told["exit_code"], told["reason"])


def _crash_loop(kubelet: FakeKubelet, run: PodRun, told: Mapping[str, Any]) -> None:
    run.behaviour = replace(run.behaviour, crash=told["after"], exit_code=told["exit_code"])
    kubelet.lifecycle.crash(run, told["exit_code"], run.behaviour.reason)


def _unready(kubelet: FakeKubelet, run: PodRun, _: Mapping[str, Any]) -> None:
    run.decreed = run.vitals.ready = False
    kubelet.changed(run)


def _sick(_: FakeKubelet, run: PodRun, __: Mapping[str, Any]) -> None:
    run.vitals.healthy = False


def _hang(_: FakeKubelet, run: PodRun, __: Mapping[str, Any]) -> None:
    run.vitals.silent = True


def _busy(_: FakeKubelet, run: PodRun, told: Mapping[str, Any]) -> None:
    run.vitals.busy = told["in_flight"]
    run.vitals.changed()


def _heal(kubelet: FakeKubelet, run: PodRun, _: Mapping[str, Any]) -> None:
    run.decreed = None
    run.vitals.healthy, run.vitals.silent, run.vitals.busy = True, False, 0
    run.vitals.ready = run.app_ready
    if run.behaviour.crash is not None:
        run.behaviour = replace(run.behaviour, crash=None)
        kubelet.lifecycle.pardon(run)
    run.vitals.changed()
    kubelet.changed(run)


_TO_PODS: Mapping[str, Callable[[FakeKubelet, PodRun, Mapping[str, Any]], None]] = {
    "crash": _crash,
    "crash_loop": _crash_loop,
    "unready": _unready,
    "sick": _sick,
    "hang": _hang,
    "busy": _busy,
    "heal": _heal,
}
