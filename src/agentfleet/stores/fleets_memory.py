"""RECORD: fleets and operations in memory, for tests and for managers that outlive nothing."""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from agentfleet.errors import Conflict, NotFound, NotLeader, OperationRefused
from agentfleet.operations import RESHAPING, Caller, Kind, Operation, Status, reused
from agentfleet.specs import FleetSpec
from agentfleet.stores.fleets import Attendance, FleetRecord, InstanceRow, News, Picture
from agentfleet.stores.following import Bell


class MemoryFleets:
    """A store of fleets for the managers of one process; see `stores.fleets.FleetRecords`."""

    def __init__(self) -> None:
        self._fleets: dict[str, FleetRecord] = {}
        self._instances: dict[str, dict[str, InstanceRow]] = {}
        self._operations: dict[str, Operation] = {}
        self._order: list[tuple[int, str]] = []
        self._keys: dict[tuple[str, str], str] = {}
        self._asked: dict[str, str] = {}
        """The newest operation that asks for another template or size, by fleet."""
        self._epochs: dict[str, int] = {}
        self._changes: dict[str, int] = {}
        """When each fleet or operation changed last, by id."""
        self._gone: dict[str, int] = {}
        self._managers: dict[str, Attendance] = {}
        self._position = 0
        self._bell = Bell()

    async def create(self, record: FleetRecord, operation: Operation) -> Operation:
        """See the port."""
        if (earlier := await self.earlier(operation.by)) is not None:
            return same_request(earlier, operation)
        if any(each.name == record.name for each in self._fleets.values()):
            raise OperationRefused(exists(record.name))
        self._fleets[record.id] = record
        self._instances[record.id] = {}
        self._touch(record.id)
        return self._keep(operation)

    async def submit(
        self,
        operation: Operation,
        *,
        spec: FleetSpec | None = None,
        expect: int | None = None,
        asked: int | None = None,
    ) -> Operation:
        """See the port."""
        if (earlier := await self.earlier(operation.by)) is not None:
            return same_request(earlier, operation)
        record = await self.find(operation.fleet)
        own = (each for each in self._operations.values() if each.fleet == record.id)
        deletes = record.deleting and any(each.kind is Kind.DELETE and each.open for each in own)
        check_submission(record, operation.kind, expect, asked, deletes=deletes)
        deleting = operation.kind is Kind.DELETE
        if spec is not None:
            record = replace(record, spec=spec, generation=record.generation + 1)
        if spec is not None or deleting:
            self._fleets[record.id] = replace(record, deleting=deleting)
            self._touch(record.id)
        return self._keep(operation)

    async def find(self, id: str) -> FleetRecord:
        """See the port."""
        found = self._fleets.get(id) or next((each for each in self._fleets.values() if each.name == id), None)
        if found is None:
            raise NotFound(f"there is no fleet {id!r:.300}")
        asked = self._asked.get(found.id)
        if asked is None:
            return found
        last = self._operations[asked]
        return replace(found, asked=last.seq, pending=last.status is Status.ACCEPTED)

    async def fleets(self, *, after: str = "", limit: int = 1000) -> Sequence[FleetRecord]:
        """See the port."""
        return sorted((each for each in self._fleets.values() if each.name > after), key=lambda each: each.name)[:limit]

    async def earlier(self, by: Caller) -> Operation | None:
        """See the port."""
        found = None if by.key is None else self._keys.get((by.actor, by.key))
        return None if found is None else self._operations[found]

    async def operation(self, id: str) -> Operation:
        """See the port."""
        if id not in self._operations:
            raise NotFound(f"there is no operation {id!r:.300}")
        return self._operations[id]

    async def operations(self, fleet: str, *, before: int | None = None, limit: int = 100) -> Sequence[Operation]:
        """See the port."""
        own = (self._operations[id] for _, id in reversed(self._order))
        return [each for each in own if each.fleet == fleet and (before is None or each.seq < before)][:limit]

    async def advance(self, operation: Operation) -> None:
        """See the port."""
        self._pass(operation.fleet, operation.epoch)
        self._advance(operation)

    async def report(self, pictures: Sequence[Picture], *, at: float) -> Sequence[str]:
        """See the port."""
        left_out = []
        for picture in pictures:
            try:
                self._pass(picture.fleet, picture.epoch)
            except NotLeader:
                left_out.append(picture.fleet)
                continue
            if picture.fleet not in self._fleets:
                left_out.append(picture.fleet)
                continue
            self._take(picture, at)
        return left_out

    async def epoch(self, fleet: str) -> int:
        """See the port."""
        return self._epochs.get(fleet, 0)

    async def instances(
        self, fleet: str, *, after: str = "", limit: int = 1000, where: Mapping[str, str] | None = None
    ) -> Sequence[InstanceRow]:
        """See the port."""
        rows: Mapping[str, InstanceRow] = self._instances.get(fleet, {})
        wanted = (where or {}).items()
        ids = (id for id, row in rows.items() if id > after and all(getattr(row, k) == v for k, v in wanted))
        return [rows[id] for id in sorted(ids)[:limit]]

    async def remove(self, id: str, operation: Operation) -> None:
        """See the port."""
        self._pass(operation.fleet, operation.epoch)
        if self._fleets.pop(id, None) is not None:
            self._instances.pop(id, None)
            self._touch(id)
            self._gone[id] = self._changes.pop(id)
        self._advance(operation)

    async def news(self, after: int) -> News:
        """See the port."""
        new = [id for id, change in self._changes.items() if change > after]
        operations = sorted(
            (each for id in new if (each := self._operations.get(id)) is not None and (after or each.open)),
            key=lambda each: each.seq,
        )
        return News(
            self._position,
            tuple(self._fleets[id] for id in new if id in self._fleets),
            tuple(id for id, change in self._gone.items() if change > after),
            tuple(operations),
        )

    async def changed(self, after: int) -> None:
        """See the port."""
        if self._position <= after:
            await self._bell.wait()

    async def attend(self, identity: str, about: Mapping[str, Any]) -> Mapping[str, Attendance]:
        """See the port."""
        known = self._managers.get(identity)
        self._managers[identity] = Attendance(1 if known is None else known.beats + 1, about)
        return dict(self._managers)

    async def leave(self, identity: str) -> None:
        """See the port."""
        self._managers.pop(identity, None)

    async def ping(self) -> None:
        """See the port."""

    def _advance(self, operation: Operation) -> None:
        if self._operations[operation.id].open:
            self._operations[operation.id] = operation
            self._touch(operation.id)

    def _keep(self, operation: Operation) -> Operation:
        self._touch(operation.id)
        kept = replace(operation, seq=self._position)
        self._operations[kept.id] = kept
        insort(self._order, (kept.seq, kept.id))
        if kept.kind in RESHAPING:
            self._asked[kept.fleet] = kept.id
        if kept.by.key is not None:
            self._keys[kept.by.actor, kept.by.key] = kept.id
        return kept

    def _take(self, picture: Picture, at: float) -> None:
        rows = self._instances[picture.fleet]
        rows |= {row.instance_id: row for row in picture.changed}
        for id in picture.gone:
            rows.pop(id, None)
        if picture.status is not None:
            self._fleets[picture.fleet] = replace(self._fleets[picture.fleet], status=picture.status, status_at=at)

    def _pass(self, name: str, epoch: int) -> None:
        latest = self._epochs.get(name, 0)
        if epoch < latest:
            raise NotLeader(f"{name}: epoch {latest} has begun; what epoch {epoch} has to say is not kept")
        self._epochs[name] = epoch

    def _touch(self, id: str) -> None:
        self._position += 1
        self._changes[id] = self._position
        self._bell.ring()


# ------------------------------------------------------------------------------------------------ for every store


def exists(name: str) -> str:
    """Why a fleet is not made."""
    return f"there is a fleet {name!r} already; choose another name, or delete that one first"


def same_request(kept: Operation, asked: Operation) -> Operation:
    """The operation that was kept under a key, if it is the same request; raises `KeyReused` otherwise."""
    if kept.fingerprint != asked.fingerprint:
        raise reused(asked.by)
    return kept


def check_submission(record: FleetRecord, kind: Kind, expect: int | None, asked: int | None, *, deletes: bool) -> None:
    """Raise unless a fleet takes an operation; see `FleetRecords.submit`. `deletes`: one is open that deletes it."""
    if deletes:
        raise OperationRefused(f"fleet {record.name} is being deleted")
    if record.deleting and kind is not Kind.DELETE:
        raise OperationRefused(
            f"fleet {record.name} is to be deleted, and could not be; its last operation says why: delete it again"
        )
    if expect is not None and record.generation != expect:
        raise Conflict(
            f"fleet {record.name} is at generation {record.generation}, not {expect}: somebody else was first; read it "
            "again, and make your change upon that"
        )
    if asked is not None and record.asked != asked:
        raise Conflict(
            f"fleet {record.name} was deployed, rolled back or scaled by somebody since; read it again, and make your "
            "change upon that"
        )
