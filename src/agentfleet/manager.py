"""FleetManager: many fleets, what is wanted of them kept in one store, shared by as many managers as there are.

::

    async with FleetManager(records, backend=backend, journal=journal, leases=leases) as manager:
        operation = await manager.create(spec)
        await manager.finished(operation.id, timeout="2m")

Any manager takes any request: it is durable when it is accepted, and the manager that leads the fleet carries it out.
Each fleet has a lease of its own, so managers share the fleets, and take each other's over with all that was known.
"""

from __future__ import annotations

import logging
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

import anyio

from agentfleet import carrying
from agentfleet.autoscaler import MetricSource
from agentfleet.clock import Clock, SystemClock
from agentfleet.configstatus import ConfigStatus, config_status
from agentfleet.configstore import ConfigStore
from agentfleet.core.leadership import LeasePolicy
from agentfleet.core.sharing import SharingPolicy
from agentfleet.deliveries import Deliveries
from agentfleet.delivery import ConfigDelivery
from agentfleet.engines import AnyEngine, Engines
from agentfleet.errors import DeadlineExceeded, NotFound, OperationRefused, SpecError
from agentfleet.fleet import Fleet
from agentfleet.loops import end_loops
from agentfleet.managed import RETRY
from agentfleet.operations import ARGUMENTS, Apply, Caller, Create, Deploy, Kind, Operation, Scale
from agentfleet.overseer import ManagerHealth, Overseer
from agentfleet.specs import AgentTemplate, FleetSpec
from agentfleet.stores.acks import ConfigAcks, MemoryAcks
from agentfleet.stores.fleets import Attendance, FleetRecord, FleetRecords, InstanceRow, UnreadFleet
from agentfleet.stores.journal import Journal
from agentfleet.stores.leases import LeaseStore
from agentfleet.telemetry import Telemetry
from agentfleet.waiting import Timeout, period_of, timeout_of

log = logging.getLogger(__name__)


class FleetManager:
    """Manages the fleets of a store. Use it as an async context manager; the fleets outlive it.

    Args:
        records: Where fleets and operations are kept.
        backend: The engine that the instances live in, or a function that makes the one of a namespace.
        journal: Where every fleet's events are; with several managers one that they share.
        config: Where configuration is published, under the fleets' names; one in memory when omitted.
        acks: Where it is kept which configuration each instance runs; in memory when omitted.
        leases: Where the fleets' leases are kept, or a function that makes the store of a namespace. None: this manager
            is alone.
        identity: How the other managers see this one; the host's name when omitted.
        lease_policy: How fast leases change hands.
        metrics: Sources for metric targets by name, as in `Fleet`.
        clock: Where the time comes from.
        telemetry: Prometheus metrics of all fleets and of the manager itself.
        period: Time between two notes of how the fleets stand, in seconds or like "1s".
        sharing: When this manager hands fleets over to another, so that all have a share.
        about: What it tells the others of itself, such as its address; JSON-ready.

    Raises:
        SpecError: An argument is not usable.
    """

    def __init__(
        self,
        records: FleetRecords,
        *,
        backend: AnyEngine | Callable[[str], AnyEngine],
        journal: Journal,
        config: ConfigStore | None = None,
        acks: ConfigAcks | None = None,
        leases: LeaseStore | Callable[[str], LeaseStore] | None = None,
        identity: str | None = None,
        lease_policy: LeasePolicy | None = None,
        metrics: Mapping[str, MetricSource] | None = None,
        clock: Clock | None = None,
        telemetry: Telemetry | None = None,
        period: float | str = 1.0,
        sharing: SharingPolicy | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        if not callable(backend) and not hasattr(backend, "watch"):
            raise SpecError(
                f"backend must be a backend, or a function that makes one of a namespace, not {backend!r:.80}"
            )
        self.records = records
        self.journal = journal
        self.clock: Clock = SystemClock() if clock is None else clock
        self.telemetry = Telemetry() if telemetry is None else telemetry
        self.identity = f"{socket.gethostname()}-{uuid.uuid4().hex[:6]}" if identity is None else identity
        self.config = ConfigStore(journal=journal, clock=self.clock) if config is None else config
        self.acks: ConfigAcks = MemoryAcks() if acks is None else acks
        self._engines = Engines(backend if callable(backend) else lambda _: backend, telemetry=self.telemetry)
        self._leases = leases
        self._lease_policy = lease_policy
        self._metrics = metrics
        self._loops = Overseer(
            records,
            self._make,
            identity=self.identity,
            about=dict(about or {}),
            clock=self.clock,
            telemetry=self.telemetry,
            period=period_of(period, "period"),
            sharing=None if leases is None else sharing or SharingPolicy(),
        )
        self._deliveries = Deliveries(
            self.config, self.acks, clock=self.clock, known=lambda name: self._loops.known(name) is not None
        )
        self._stack = AsyncExitStack()
        self._opened = False

    # ------------------------------------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        """Open every fleet of the store.

        Raises:
            OperationRefused: It is open already.
            BackendUnavailable: The store cannot be reached.
        """
        if self._opened:
            raise OperationRefused("a FleetManager opens only once; make a new one on the same store")
        self._opened = True
        async with AsyncExitStack() as stack:
            outer = anyio.create_task_group()
            await outer.__aenter__()
            stack.push_async_exit(partial(end_loops, outer))
            await outer.start(self._engines.run)
            await outer.start(self._deliveries.run)
            await stack.enter_async_context(self._loops)  # left first: fleets are closed before their engines
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Close every fleet, hand over what this manager leads, and close the engines."""
        return await self._stack.__aexit__(kind, error, trace)

    async def _make(self, record: FleetRecord) -> Fleet:
        leases = self._leases(record.namespace) if callable(self._leases) else self._leases
        return Fleet(
            record.spec,
            backend=await self._engines.of(record.namespace),
            journal=self.journal,
            clock=self.clock,
            metrics=self._metrics,
            config=self.config,
            acks=self.acks,
            telemetry=self.telemetry,
            leases=leases,
            identity=self.identity,
            lease_policy=self._lease_policy,
        )

    # ------------------------------------------------------------------------------------------ reading

    def health(self) -> ManagerHealth:
        """How this manager is."""
        return self._loops.health()

    @property
    def peers(self) -> Mapping[str, Attendance]:
        """The managers of the store, as last seen, this one included; those that were killed stay for an hour."""
        return self._loops.peers

    async def get(self, id: str) -> FleetRecord:
        """A fleet, by its id or its name; raises `NotFound`, or `RecordUnreadable` for one of a newer version."""
        return await self.records.find(id)

    async def fleets(self, *, after: str = "", limit: int = 1000) -> Sequence[FleetRecord | UnreadFleet]:
        """Up to `limit` fleets whose names follow `after`, by name, each as its leader last said that it stands."""
        return await self.records.fleets(after=after, limit=limit)

    async def instances(
        self,
        id: str,
        *,
        after: str = "",
        limit: int = 1000,
        status: str | None = None,
        node: str | None = None,
        version: str | None = None,
    ) -> Sequence[InstanceRow]:
        """Up to `limit` of a fleet's instances whose ids follow `after`, by id; raises `NotFound`.

        Args:
            id: Of the fleet, or its name.
            after: Id of an instance.
            limit: At most so many.
            status: Only those in this condition.
            node: Only those on this node.
            version: Only those of this version.
        """
        record = await self.records.find(id)
        wanted = {"status": status, "node_name": node, "version": version}
        where = {name: value for name, value in wanted.items() if value is not None}
        return await self.records.instances(record.id, after=after, limit=limit, where=where)

    async def instance(self, id: str, instance: str) -> InstanceRow:
        """One of a fleet's instances, as it was last seen; raises `NotFound`."""
        record = await self.records.find(id)
        found = await self.records.instances(record.id, limit=1, where={"instance_id": instance})
        if not found:
            raise NotFound(f"fleet {record.name} has no instance {instance!r:.300}")
        return found[0]

    def fleet(self, id: str) -> Fleet | None:
        """The open fleet in this manager, which may or may not lead it, by its id; None while it is not open."""
        managed = self._loops.managed.get(id)
        return None if managed is None else managed.fleet

    def known(self, id: str) -> FleetRecord | UnreadFleet | None:
        """A fleet by its id or name, as this manager knows it, without asking the store; None if it knows none."""
        return self._loops.known(id)

    async def delivery(self, name: str) -> ConfigDelivery:
        """What delivers the configuration of a fleet to agents that fetch it, by this manager, whoever leads.

        Raises:
            OperationRefused: The manager is not open.
        """
        return await self._deliveries.of(name)

    async def config_status(self, id: str) -> ConfigStatus:
        """What configuration is out, which revision each instance runs, and how far a rollout in rings has come.

        Raises:
            NotFound: There is no such fleet.
            ConfigError, DeadlineExceeded: A store cannot be asked, or did not answer in time.
        """
        record = await self.records.find(id)
        _, acks = await self.acks.after(record.name, 0)
        return await config_status(self.config, record.name, acks)

    async def operation(self, id: str) -> Operation:
        """How far an operation has come; raises `NotFound`."""
        return await self.records.operation(id)

    async def operations(self, id: str, *, before: int | None = None, limit: int = 100) -> Sequence[Operation]:
        """Up to `limit` operations of a fleet, newest first; raises `NotFound`."""
        record = await self.records.find(id)
        return await self.records.operations(record.id, before=before, limit=limit)

    async def finished(self, id: str, *, timeout: Timeout = None) -> Operation:
        """Wait until an operation has ended, whoever carries it out; it may have failed.

        Args:
            id: Of the operation.
            timeout: How long to wait, in seconds or like "30s"; None waits for as long as it takes.

        Raises:
            NotFound: There is no such operation.
            DeadlineExceeded: `timeout` is over; the operation goes on.
        """
        seconds = timeout_of(timeout)
        with anyio.move_on_after(seconds):
            while True:
                moved = self._loops.moved
                operation = await self.records.operation(id)
                if not operation.open:
                    return operation
                with anyio.move_on_after(RETRY[1]):
                    await moved.wait()
        raise DeadlineExceeded(f"operation {id} has not ended within {seconds:g} s; it goes on")

    # ------------------------------------------------------------------------------------------ asking

    async def earlier(self, by: Caller | None) -> Operation | None:
        """What this caller has asked for under the same key before, as far as it is kept; None without a key."""
        return None if by is None or by.key is None else await self.records.earlier(by)

    async def create(self, spec: FleetSpec, *, namespace: str = "default", by: Caller | None = None) -> Operation:
        """Have a new fleet made and brought up; returns when that is sure to happen.

        Args:
            spec: What is wanted.
            namespace: Where the fleet lives; on Kubernetes the namespace, in which this manager needs its rights.
            by: Who asks.

        Raises:
            SpecError: An argument is not usable. Nothing was changed, as below.
            OperationRefused: There is a fleet of this name, or the caller's key was used for something else.
            BackendUnavailable: The store cannot be reached; `DeadlineExceeded`: it did not answer in time, and whether
                the fleet will be made is unknown. The same call with the same key is safe.
        """
        by = Caller() if by is None else by
        if not isinstance(spec, FleetSpec):
            raise SpecError(f"spec must be a FleetSpec, not {type(spec).__name__}")
        arguments = Create(spec=spec, namespace=namespace)
        now, id = self.clock.now(), str(uuid.uuid4())
        record = FleetRecord(id, spec.name, namespace, spec, now, by.actor)
        return await self.records.create(record, _operation(record, Kind.CREATE, arguments.to_dict(), by, now))

    async def apply(
        self,
        id: str,
        spec: FleetSpec,
        *,
        expect: int | None = None,
        asked: int | None = None,
        by: Caller | None = None,
    ) -> Operation:
        """Have a fleet be as another spec says; returns when that is sure to happen.

        Args:
            id: The fleet's id or name.
            spec: What is wanted from now on; of the same name.
            expect: The generation that the change is based on; None takes any.
            asked: `FleetRecord.asked` of the state that the change is based on; None takes any.
            by: Who asks.

        Raises:
            NotFound: There is no such fleet. Nothing was changed, as below.
            Conflict: Its generation is not `expect`, or another template or size was asked for since.
            SpecError, OperationRefused, BackendUnavailable, DeadlineExceeded: As `create`.
        """
        if not isinstance(spec, FleetSpec):
            raise SpecError(f"spec must be a FleetSpec, not {type(spec).__name__}")
        arguments = Apply(spec=spec).to_dict()
        if (earlier := await self.earlier(by)) is not None:
            return earlier.same(id, Kind.APPLY, arguments)
        record = await self.records.find(id)
        if spec.name != record.name:
            raise SpecError(f"name: a fleet keeps its name, {record.name}; delete it and create {spec.name}")
        by = Caller() if by is None else by
        operation = _operation(record, Kind.APPLY, arguments, by, self.clock.now())
        return await self.records.submit(operation, spec=spec, expect=expect, asked=asked)

    async def request(
        self,
        id: str,
        kind: Kind,
        arguments: Mapping[str, Any] | None = None,
        *,
        expect: int | None = None,
        asked: int | None = None,
        by: Caller | None = None,
    ) -> Operation:
        """Ask for an operation on a fleet; returns when it is sure to be taken up.

        Args:
            id: The fleet's id or name.
            kind: What is asked for; `create` and `apply` have methods of their own.
            arguments: As `operations.ARGUMENTS` has them for the kind.
            expect: As in `apply`.
            asked: As in `apply`.
            by: Who asks.

        Raises:
            NotFound: There is no such fleet. Nothing was changed, as below.
            Conflict: As `apply`.
            SpecError: The arguments are not usable; the message names the field.
            OperationRefused, BackendUnavailable, DeadlineExceeded: As `create`.
        """
        if kind in (Kind.CREATE, Kind.APPLY):
            raise SpecError(f"kind: use the method {kind} for that")
        given = ARGUMENTS[kind].parse(dict(arguments or {}), source=f"the request to {kind}")
        if (earlier := await self.earlier(by)) is not None:  # the fleet may be another by now, or gone
            return earlier.same(id, kind, given.to_dict())
        record = await self.records.find(id)
        if isinstance(given, Scale):
            record.spec.check_size(given.replicas)
        elif isinstance(given, Deploy):
            _check_changes(record.wanted.template, given)
        by = Caller() if by is None else by
        operation = _operation(record, kind, given.to_dict(), by, self.clock.now())
        return await self.records.submit(operation, expect=expect, asked=asked)


def _check_changes(template: AgentTemplate, deploy: Deploy) -> None:
    if deploy.version is None and not deploy.changes:
        raise SpecError("version: name the new version, or something else of the template that changes")
    carrying.changed(template, deploy)


def _operation(record: FleetRecord, kind: Kind, arguments: Mapping[str, Any], by: Caller, now: float) -> Operation:
    return Operation(str(uuid.uuid4()), record.id, record.name, kind, arguments, by, now)
