"""Fake kubelets of many nodes: pods bound to them become Running and Ready, answer HTTP, crash and end on command.

In this process, `FakeKubelet`; in one of its own, `python -m agentfleet.testing.kube.kubelet --kubeconfig FILE`, which
`KubeletProcess` starts and talks to: a command per line of standard input, an answer per line of standard output,
both JSON. It ends when its input does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio
from anyio.abc import TaskGroup

from agentfleet.errors import DeadlineExceeded
from agentfleet.testing.kube.access import Access
from agentfleet.testing.kube.addresses import Addresses
from agentfleet.testing.kube.apiclient import ApiClient
from agentfleet.testing.kube.behaviour import Rules
from agentfleet.testing.kube.client import STRATEGIC
from agentfleet.testing.kube.faults import NodeFaults
from agentfleet.testing.kube.kubeletoptions import KubeletOptions
from agentfleet.testing.kube.lifecycle import Lifecycle
from agentfleet.testing.kube.nodes import Node, Nodes
from agentfleet.testing.kube.orders import carry_out
from agentfleet.testing.kube.podneeds import missing
from agentfleet.testing.kube.podrun import PodRun, Stage, now
from agentfleet.testing.kube.podview import Pod
from agentfleet.testing.kube.podwatch import PodWatch
from agentfleet.testing.kube.serve import serve

__all__ = ["FakeKubelet", "KubeletOptions"]

_ENDED = frozenset({"Succeeded", "Failed"})


class FakeKubelet(NodeFaults):
    """Nodes that are not real on a control plane that is. An async context manager on asyncio.

    Args:
        access: Whom the API server lets create nodes and write statuses; a `ControlPlane`'s `access`.
        options: How many nodes, and what they are like.
        timeout: Seconds within which all nodes must be registered.
    """

    def __init__(self, access: Access, options: KubeletOptions | None = None, *, timeout: float = 60) -> None:
        self.options = options or KubeletOptions()
        self.rules = Rules(self.options.behaviour)
        self.addresses = Addresses(self.options.addresses)
        self.lifecycle = Lifecycle(self.options.timing, self)
        self.runs: dict[str, PodRun] = {}
        """What runs, by uid."""
        self._views: dict[str, Pod] = {}
        self._deleted: set[str] = set()  # by us, and the watch has not said so yet
        self._timeout = timeout
        self._api = ApiClient(access, connections=self.options.writers + 8)
        self.nodes = Nodes(
            self._make_nodes(),
            self._api,
            lease_period=self.options.lease_period,
            status_period=self.options.status_period,
        )
        self._watch = PodWatch(self._api, seen=self._seen, lost=self._lost)
        self._due: dict[str, None] = {}
        self._work = asyncio.Semaphore(0)
        self._beside: asyncio.Queue[Callable[[], Coroutine[Any, Any, None]]] = asyncio.Queue()
        self._stack = AsyncExitStack()
        self._tasks: TaskGroup | None = None
        self._killed_busy: list[str] = []
        self._problems: deque[str] = deque(maxlen=1000)
        self._counts = {"patches": 0, "deletions": 0, "events": 0}

    def _make_nodes(self) -> list[Node]:
        options = self.options
        return [
            Node(
                name=f"{options.prefix}-{index}",
                host=self.addresses.host(index),
                zone=options.zones[index % len(options.zones)],
                region=options.region,
                capacity=dict(options.capacity),
                labels=dict(options.labels),
            )
            for index in range(options.nodes)
        ]

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.callback(self.addresses.close)
            await stack.enter_async_context(self._api)
            try:
                with anyio.fail_after(self._timeout):
                    await self.nodes.register()
            except TimeoutError as error:
                raise DeadlineExceeded(
                    f"{self.options.nodes} nodes not registered within {self._timeout:g} s: see the API server's log"
                ) from error
            self._tasks = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(self._tasks.cancel_scope.cancel)
            listed = asyncio.Event()
            self._tasks.start_soon(self._watch.run, listed)
            self._tasks.start_soon(self.nodes.keep)
            self._tasks.start_soon(self._correct)
            self._tasks.start_soon(self._run_beside)
            for _ in range(self.options.writers):
                self._tasks.start_soon(self._write)
            try:
                with anyio.fail_after(self._timeout):
                    await listed.wait()
            except TimeoutError as error:
                raise DeadlineExceeded(f"the pods could not be listed within {self._timeout:g} s") from error
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tasks is not None:
            self._tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True), anyio.move_on_after(self.options.leave_within):
            if self.options.remove:
                await self._remove()
        for run in list(self.runs.values()):
            self._forget(run)
        await self._stack.__aexit__(kind, error, trace)

    async def _remove(self) -> None:
        """Delete the nodes, and their pods, which nobody would end now."""
        mine = [pod for pod in self._views.values() if pod.spec.node_name in self.nodes.by_name]
        limit = anyio.CapacityLimiter(self.options.writers)

        async def delete(pod: Pod) -> None:
            async with limit:
                await self._delete(pod)

        await self.nodes.remove()
        async with anyio.create_task_group() as tasks:
            for pod in mine:
                tasks.start_soon(delete, pod)

    # ------------------------------------------------------------------------------------------------ what is seen

    def _seen(self, pod: Pod) -> None:
        node = self.nodes.by_name.get(pod.spec.node_name)
        if node is None or pod.metadata.uid in self._deleted:
            return
        self._views[pod.metadata.uid] = pod
        if not node.gone:
            self.reconcile(pod.metadata.uid)

    def _lost(self, uid: str) -> None:
        self._deleted.discard(uid)
        pod = self._views.pop(uid, None)
        if pod is not None and not self.nodes.by_name[pod.spec.node_name].gone:
            self.reconcile(uid)

    def reconcile(self, uid: str) -> None:
        """Make what runs follow from what is wanted, for one pod of a node that is in touch."""
        view, run = self._views.get(uid), self.runs.get(uid)
        if view is None:
            if run is not None:
                self.lifecycle.kill(run)
                self._forget(run)
            return
        deleted = view.metadata.deletion_timestamp is not None
        if run is None:
            if view.status.phase in _ENDED and not deleted:
                return
            run = self._adopt(view)
            if not deleted:
                self.lifecycle.begin(run)
        gates = run.view.gates_open
        run.view = view
        if deleted:
            grace = view.metadata.deletion_grace_period_seconds or 0
            self.lifecycle.stop(run, grace)
        elif gates != view.gates_open:
            self.changed(run)

    def _adopt(self, view: Pod) -> PodRun:
        node = self.nodes.by_name[view.spec.node_name]
        lead, behaviour = self.rules.choose([each.image for each in view.spec.containers])
        run = PodRun(view, node.name, node.host, self.addresses.take(), lead=lead, behaviour=behaviour)
        self.runs[view.metadata.uid] = run
        return run

    def _forget(self, run: PodRun) -> None:
        if self.runs.pop(run.view.metadata.uid, None) is not None:
            self.lifecycle.kill(run)
            self.addresses.give_back(run.address)

    def resume(self, node: Node) -> None:
        """A node is in touch again: bring all its pods up to date, in both directions."""
        for uid in [*(uid for uid, run in self.runs.items() if run.node == node.name)]:
            self.reconcile(uid)
            if (run := self.runs.get(uid)) is not None:
                run.sent = None  # the control plane has written its own opinion meanwhile
                self.changed(run)
        for uid, view in list(self._views.items()):
            if view.spec.node_name == node.name and uid not in self.runs:
                self.reconcile(uid)

    # ------------------------------------------------------------------------------------------------ Listener

    def changed(self, run: PodRun) -> None:
        """Report a pod's status soon; once, if it changes again before."""
        uid = run.view.metadata.uid
        if uid not in self._due and uid in self.runs:
            self._due[uid] = None
            self._work.release()

    def warned(self, run: PodRun, reason: str, message: str) -> None:
        """Write a Warning event, as a kubelet would."""
        if self.options.events:
            self._beside.put_nowait(partial(self._write_event, run, reason, message))

    def lost_work(self, run: PodRun) -> None:
        """Note a pod that was ended with work in flight."""
        self._killed_busy.append(run.name)

    def look_up(self, run: PodRun) -> None:
        """Ask what of that is missing that a pod's variables come from."""
        self._beside.put_nowait(partial(self._look_up, run, run.turn))

    async def _look_up(self, run: PodRun, turn: int) -> None:
        node = self.nodes.by_name[run.node]
        while node.gone and turn == run.turn:  # noqa: ASYNC110 - it cannot ask either, and its return has no event
            await asyncio.sleep(self.options.timing.restart)
        self.lifecycle.looked_up(run, turn, await missing(self._api, run.view))

    async def _run_beside(self) -> None:
        """Start what timers have asked for: a timer runs outside of any task, where a task group starts nothing."""
        async with anyio.create_task_group() as tasks:
            while True:
                tasks.start_soon(await self._beside.get())

    # ------------------------------------------------------------------------------------------------ writing

    async def _write(self) -> None:
        while True:
            await self._work.acquire()
            uid = next(iter(self._due))
            del self._due[uid]
            run = self.runs.get(uid)
            if run is None or self.nodes.by_name[run.node].gone:
                continue
            if run.stage is Stage.STOPPED:
                self._deleted.add(uid)
                if await self._delete(run.view):
                    self._forget(run)
            else:
                await self._report(run)

    async def _report(self, run: PodRun) -> None:
        status = run.status()
        if status == run.sent:
            return
        self._counts["patches"] += 1
        body = {"metadata": {"uid": run.view.metadata.uid}, "status": status}
        answered, said = await self._api.send("PATCH", f"{run.view.path}/status", body, kind=STRATEGIC)
        if answered == 200:
            run.sent = status
        elif answered not in {404, 409}:  # those: it is gone, or another has its name; the watch will tell
            self._problems.append(f"{run.name}: its status was refused with {answered}: {said[:500]!r}")

    async def _delete(self, pod: Pod) -> bool:
        self._counts["deletions"] += 1
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod.metadata.uid}}
        answered, said = await self._api.send("DELETE", pod.path, body)
        if answered in {200, 202, 404, 409}:
            return True
        self._problems.append(f"{pod.name}: its deletion was refused with {answered}: {said[:500]!r}")
        return False

    async def _write_event(self, run: PodRun, reason: str, message: str) -> None:
        if self.nodes.by_name[run.node].gone:
            return
        self._counts["events"] += 1
        meta = run.view.metadata
        event = {
            "metadata": {"name": f"{meta.name}.{time.time_ns():x}", "namespace": meta.namespace},
            "involvedObject": {
                "kind": "Pod",
                "apiVersion": "v1",
                "namespace": meta.namespace,
                "name": meta.name,
                "uid": meta.uid,
            },
            "reason": reason,
            "message": message,
            "type": "Warning",
            "count": 1,
            "firstTimestamp": now(),
            "lastTimestamp": now(),
            "source": {"component": "kubelet", "host": run.node},
        }
        await self._api.send("POST", f"/api/v1/namespaces/{meta.namespace}/events", event)

    async def _correct(self) -> None:
        """Put our word back where somebody else has reported a pod's readiness, as a kubelet does every 10 s."""
        while True:
            await asyncio.sleep(self.options.sync_period)
            for run in self.runs.values():
                if run.sent is not None and run.view.ready != (run.ready and run.view.gates_open):
                    run.sent = None
                    self.changed(run)

    # ------------------------------------------------------------------------------------------------ commands

    async def _do(self, command: str, arguments: Mapping[str, Any]) -> Any:
        if command == "killed_busy":
            return list(self._killed_busy)
        if command == "problems":
            return list(self._problems)
        if command == "cost":
            return {**self._counts, "lists": self._watch.lists, "cpu_seconds": time.process_time()}
        return await carry_out(self, command, json.loads(json.dumps(arguments)))


def main() -> None:
    """Run fake kubelets until standard input ends, and obey what comes there."""
    parser = argparse.ArgumentParser(prog="python -m agentfleet.testing.kube.kubelet", description=main.__doc__)
    parser.add_argument("--kubeconfig", type=Path, required=True, help="whom to connect to, and as whom")
    parser.add_argument("--context", help="the context in it; its current one unless given")
    parser.add_argument("--nodes", type=int, help="how many nodes")
    parser.add_argument("--options", default="{}", help="further fields of KubeletOptions, as JSON")
    told = parser.parse_args()
    fields = json.loads(told.options) | ({} if told.nodes is None else {"nodes": told.nodes})
    asyncio.run(_serve(Access.read(told.kubeconfig, told.context), KubeletOptions.from_fields(fields)))


async def _serve(access: Access, options: KubeletOptions) -> None:
    async with FakeKubelet(access, options) as kubelet:
        await serve(kubelet._do)


if __name__ == "__main__":
    main()
