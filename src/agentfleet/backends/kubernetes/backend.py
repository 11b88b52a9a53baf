"""Fleets on Kubernetes: each a Deployment, with the objects beside it, in one namespace.

The Deployment controller keeps size and revision; this module says what should be, acts on single pods with the uid
that was decided on, and tells what is seen. It decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from agentfleet.backends.base import Observation, Ordered, Workload
from agentfleet.backends.kubernetes import apply as requests
from agentfleet.backends.kubernetes import naming
from agentfleet.backends.kubernetes.announcer import Announced, Announcer
from agentfleet.backends.kubernetes.apiversions import ApiVersions
from agentfleet.backends.kubernetes.connection import Connection, Requests
from agentfleet.backends.kubernetes.deploying import deploy
from agentfleet.backends.kubernetes.guard import Guard
from agentfleet.backends.kubernetes.handover import hand_over
from agentfleet.backends.kubernetes.informer import Informer
from agentfleet.backends.kubernetes.manifests import Configuration, config_document, render
from agentfleet.backends.kubernetes.marking import FIRST_WITH_COST, mark_expendable, remove_and_shrink
from agentfleet.backends.kubernetes.measures import MEASURES, samples
from agentfleet.backends.kubernetes.notices import Regarding, regarding
from agentfleet.backends.kubernetes.podactions import PodActions
from agentfleet.backends.kubernetes.pods import Written, usage_of
from agentfleet.backends.kubernetes.removal import delete_listed
from agentfleet.backends.kubernetes.resources import DEPLOYMENTS, POD_METRICS, PODS, decode, version_of
from agentfleet.backends.kubernetes.sending import merge, metadata_in, send, version_in
from agentfleet.backends.kubernetes.sharing import Shared
from agentfleet.backends.kubernetes.sight import Sight
from agentfleet.backends.kubernetes.standing import Standing, check_size, standing
from agentfleet.core.fence import Fence
from agentfleet.errors import BackendUnavailable
from agentfleet.events import Event
from agentfleet.instances import Usage
from agentfleet.measures import Metric, Sample
from agentfleet.specs import AgentTemplate, FleetSpec


@dataclass(frozen=True, slots=True)
class _Said:
    """What a Deployment was told last, but for its size."""

    spec: FleetSpec
    revision: int
    template: AgentTemplate
    paused: bool
    resting: int | None


class KubernetesBackend(PodActions):
    """Keeps fleets as Deployments. Use it as an async context manager; fleets outlive it.

    Several fleets may use one. The task that opened it must close it: enter it around fleets that run in their own.

    Args:
        connection: How the API server is asked; found as kubectl does when omitted, and then closed with the backend.
        namespace: Where the fleets live; by default that of the connection.
        node_grace: Seconds without a heartbeat after which a node counts as lost.
    """

    def __init__(
        self, connection: Connection | None = None, *, namespace: str | None = None, node_grace: float = 16.0
    ) -> None:
        self._given = connection
        self._connection = connection
        self._namespace = namespace
        self._node_grace = node_grace
        self._sight: Sight | None = None
        self._informers: Mapping[str, Informer[Any]] = {}
        """Also when it is closed: what they have counted is read last then."""
        self._api: ApiVersions | None = None
        self._said: dict[str, _Said] = {}
        self._guards: dict[str, Guard] = {}
        self._configurations: dict[str, Configuration] = {}
        self._announcer: Announcer | None = None
        self._stack = AsyncExitStack()
        self._shared = Shared(self._open, self._close)

    async def __aenter__(self) -> Self:
        await self._shared.enter()
        return self

    async def _open(self) -> None:
        async with AsyncExitStack() as stack:
            if self._given is None:
                self._connection = await stack.enter_async_context(Connection.find())
            connection = self._asked
            self._namespace = self._namespace or await connection.namespace()
            sight = Sight(connection, self._namespace, node_grace=self._node_grace)
            sight.listen(self._informers)  # so that a server that does not answer even now is known to be silent
            self._informers = sight.informers
            version = json.loads(await connection.request("GET", "/version"))
            self._api = ApiVersions.discovered(version, json.loads(await connection.request("GET", "/apis")))
            await stack.enter_async_context(sight)
            self._announcer = await stack.enter_async_context(Announcer(connection, self._regarding))
            self._sight, self._stack = sight, stack.pop_all()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._shared.leave()

    async def _close(self) -> None:
        try:
            await self._stack.aclose()
        finally:
            self._sight = None

    @property
    def _asked(self) -> Connection:
        if self._connection is None:
            raise BackendUnavailable("the backend is not open; use it inside 'async with backend:'")
        return self._connection

    @property
    def _seen(self) -> Sight:
        if self._sight is None:
            raise BackendUnavailable("the backend is not open; use it inside 'async with backend:'")
        return self._sight

    @property
    def informers(self) -> Mapping[str, Informer[Any]]:
        """What is watched, by name ("pods", "deployments", "nodes", "leases"): for their `metrics` and `staleness`."""
        return self._seen.informers

    def fenced(self, fleet: str, fence: Fence) -> None:
        """From now on a fleet is written to in this term; what was said in earlier ones is forgotten."""
        self._guards[fleet] = Guard(self._asked, self._seen.namespace, fleet, fence, pod=self._seen.pod)
        self._forget(fleet)

    def _forget(self, fleet: str) -> None:
        for known in (self._said, self._configurations):
            known.pop(fleet, None)
        self._seen.wrote(fleet, None)

    def _to(self, fleet: str) -> Requests:
        return self._guards.get(fleet) or self._asked

    async def _lead(self, fleet: str) -> None:
        if fleet in self._guards:
            await self._guards[fleet].check()

    @property
    def _minor(self) -> int:
        assert self._api is not None, "open"
        return self._api.minor

    def watch(self, fleet: str) -> AsyncIterator[Observation]:
        """Observe one fleet. See `Engine.watch`."""
        return self._seen.watch(fleet).run()

    # ------------------------------------------------------------------------------------------ telling others

    def announce(self, event: Event) -> None:
        """Show what a fleet does as a Kubernetes Event on its pod or Deployment. Best effort; returns at once."""
        if self._announcer is not None and self._sight is not None:
            self._announcer.announce(event)

    @property
    def announced(self) -> Announced:
        """What became of the Kubernetes Events that were to be written."""
        return Announced() if self._announcer is None else self._announcer.announced

    @property
    def measures(self) -> Mapping[str, Metric]:
        """The metrics that this backend has. See `Measured`."""
        return MEASURES

    def samples(self) -> Iterable[Sample]:
        """How well the cluster is seen, what was asked of it, and what became of its Events. See `Measured`."""
        return samples(self._connection, self._informers, self._announcer)

    def _regarding(self, fleet: str, instance: str | None) -> Regarding | None:
        if instance is None:
            deployment = self._seen.deployment(fleet)
            return None if deployment is None else regarding("Deployment", deployment.metadata)
        pod = self._pod(fleet, instance)
        return None if pod is None else regarding("Pod", pod.metadata)

    # ------------------------------------------------------------------------------------------ the whole fleet

    async def apply(self, workload: Workload) -> None:
        """Have the fleet be so.

        When it gets smaller, those who are to go are chosen before, unless nothing tells them apart; the size alone is
        changed by the scale subresource, anything else by server-side apply of all objects.

        Raises:
            SpecError: The fleet cannot be said in Kubernetes' words.
            Outdated: It is not about the size, and would undo the one that somebody else has just set.
            BackendError: As `Connection.request`.
        """
        said = _Said(workload.spec, workload.revision, workload.template, workload.paused, workload.resting)
        fleet, ordered = workload.fleet, Ordered(workload.replicas, workload.revision, workload.paused)
        configuration = self._configurations.get(fleet)
        with self._seen.writing(fleet):
            now = await standing(self._to(fleet), self._seen.namespace, fleet)
            check_size(workload, now)
            if self._seen.is_gone(fleet) and now is None:
                await self._delete_all(fleet, but="Deployment")  # by our hand, so that it is gone for certain
                self._said.pop(fleet, None)
            news = self._said.get(fleet) != said
            if news:
                self._said.pop(fleet, None)
            if workload.replicas and workload.expendable and not workload.indifferent:  # of none, none is chosen
                await self._choose(workload)
            if self.keeps_size(workload.spec):
                await self._say_autoscaled(workload, ordered, now, news=news)
            else:
                version = await (self._say(workload, now) if news else self._scale(fleet, workload.replicas))
                self._seen.wrote(fleet, Written(ordered, version))
            self._said[fleet] = said
        if self._configurations.get(fleet) is not configuration:  # it has come while there was no Deployment yet
            await self._say_configuration(workload.spec)

    async def configure(self, spec: FleetSpec, revision: int, document: Any) -> None:
        """Keep a configuration document in the ConfigMap, where the spec asks for one; with the Deployment at first.

        Raises:
            SpecError: A ConfigMap cannot hold it.
            BackendError: As `Connection.request`.
        """
        configuration = Configuration(revision, document)
        if spec.template.kubernetes is None or not config_document(spec, configuration, namespace=self._seen.namespace):
            return
        self._configurations[spec.name] = configuration
        if spec.name in self._said or self._seen.deployment(spec.name) is not None:
            await self._say_configuration(spec)

    async def _say_configuration(self, spec: FleetSpec) -> None:
        configuration = self._configurations.get(spec.name)
        if configuration is None:
            return
        about = self._regarding(spec.name, None)
        owner = None if about is None else about.uid
        manifest = config_document(spec, configuration, namespace=self._seen.namespace, owner=owner)
        if manifest is not None:
            await send(self._to(spec.name), requests.apply(manifest, manager=naming.CONFIG_MANAGER))

    def keeps_size(self, spec: FleetSpec) -> bool:
        """Whether the cluster's own autoscaler scales this fleet."""
        options = spec.template.kubernetes
        return options is not None and options.autoscaler.enabled

    async def _say_autoscaled(
        self, workload: Workload, ordered: Ordered, present: Standing | None, *, news: bool
    ) -> None:
        """Apply all but the size, which is given at first, at a stop and at a start; in between it is not ours."""
        fleet, namespace, policy, version = workload.fleet, self._seen.namespace, workload.spec.scaling, None
        if news:
            if present is not None and present.applied:
                await hand_over(self._to(fleet), namespace, fleet, present.replicas)
            version = await self._say(workload, present, autoscaled=True)
        if present is None or bool(present.replicas) != bool(workload.replicas):
            version = await self._scale(fleet, workload.replicas)
        if version is not None:
            bounds = (0, 0) if policy is None else (policy.min_replicas, policy.max_replicas)
            self._seen.wrote(fleet, Written(ordered, version, bounds))

    async def _say(self, workload: Workload, now: Standing | None, *, autoscaled: bool = False) -> int:
        """Apply all objects; returns the resource version of the Deployment."""
        spec = workload.spec.replace(template=workload.template)
        manifests = render(
            spec,
            self._api,
            namespace=self._namespace,
            replicas=workload.replicas,
            paused=workload.paused,
            revision=workload.revision,
            owner=None if now is None else now.uid,  # what names one that is gone goes, too
            annotations=None if workload.resting is None else {naming.REPLICAS: str(workload.resting)},
            hpa=autoscaled,
            sized=not autoscaled,
        )
        if not autoscaled:
            assert self._api is not None, "open"
            found = requests.kept_collections(self._api, self._seen.namespace, workload.fleet)
            await delete_listed(self._to(spec.name), found["HorizontalPodAutoscaler"])  # of an earlier spec
        await self._say_configuration(spec)
        version = 0
        for manifest in manifests.objects:
            if manifest["kind"] != "Deployment":
                await send(self._to(spec.name), requests.apply(manifest))
                continue
            made = metadata_in(await deploy(self._to(spec.name), manifest, workload, now, back=self._seen.unseen))
            version = version_of(made) or 0
            if self._announcer is not None:
                self._announcer.appeared(spec.name, regarding("Deployment", made))
        return version

    async def _scale(self, fleet: str, replicas: int) -> int:
        path = DEPLOYMENTS.path(self._namespace, fleet, "scale")
        return version_in(await merge(self._to(fleet), path, {"spec": {"replicas": replicas}}))

    async def _choose(self, workload: Workload) -> None:
        """Have those go first who are to go."""
        fleet, found = workload.fleet, [self._seen.pod(name) for name in workload.expendable]
        pods = [pod for pod in found if pod is not None and pod.metadata.deletion_timestamp is None]
        if self._minor >= FIRST_WITH_COST:
            all_pods = self._seen.pods.cache.values()
            others = [pod for pod in all_pods if pod.metadata.labels.get(naming.FLEET) == fleet]
            await mark_expendable(self._to(fleet), self._seen.pods, pods, others=others)
            return
        before = self._seen.last_ordered(fleet)
        if before is None:
            return

        async def scale(size: int) -> None:
            self._seen.wrote(fleet, Written(replace(before, replicas=size), await self._scale(fleet, size)))

        seen, to = self._seen.pods, workload.replicas
        await remove_and_shrink(self._to(workload.fleet), seen, pods, before.replicas, to=to, scale=scale)

    async def delete(self, fleet: str) -> None:
        """Delete every object of the fleet, and its configuration; the pods go with their Deployment."""
        self._forget(fleet)
        await self._delete_all(fleet)
        if self._announcer is not None:
            self._announcer.deleted(fleet)

    async def _delete_all(self, fleet: str, *, but: str | None = None) -> None:
        """Delete what belongs to a fleet, but for one kind: a Deployment of its name may be another's by now."""
        assert self._api is not None, "open"
        for kind, listing in requests.kept_collections(self._api, self._seen.namespace, fleet).items():
            if kind != but:
                await delete_listed(self._to(fleet), listing)

    # ------------------------------------------------------------------------------------------ reading

    async def usage(self, fleet: str) -> Mapping[str, Usage]:
        """What the pods use, by metrics.k8s.io; raises `InstanceGone` where the cluster has no metrics server."""
        query = {"labelSelector": f"{naming.FLEET}={fleet}"}
        body = await self._asked.request("GET", POD_METRICS.path(self._namespace), query=query)
        page = decode(POD_METRICS.read_page, body, "pod metrics")
        return {each.metadata.name: used for each in page.items or () if (used := usage_of(each)) is not None}

    async def logs(self, fleet: str, id: str, *, lines: int = 100) -> Sequence[str]:
        """The last lines of a pod; raises `InstanceGone` when there is no such pod."""
        self._found(fleet, id)
        path = PODS.path(self._namespace, id, "log")
        body = await self._asked.request("GET", path, query={"tailLines": lines, "container": naming.CONTAINER})
        return body.decode(errors="replace").splitlines()

    def credential(self, fleet: str, id: str) -> str | None:
        """Pods are asked without one."""
        del fleet, id
        return None
