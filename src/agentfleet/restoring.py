"""What a manager takes up from its predecessor: everything that the journal remembers of a fleet."""

from __future__ import annotations

from agentfleet import isolation
from agentfleet.configuring import Configuring
from agentfleet.core.recovery import RecoveryMemory
from agentfleet.desk import Desk
from agentfleet.disruptions import InFlight
from agentfleet.recovery import Recovery
from agentfleet.state import FleetState
from agentfleet.stores.journal import Journal
from agentfleet.turn import Turn

_RECOVERY, _DISRUPTION = "state.recovery.", "state.disruption."


def restore(journal: Journal, desk: Desk, turn: Turn, configuring: Configuring, now: float) -> int:
    """Take up the fleet's state before anything is seen of it.

    Returns:
        Position of the journal at the opening.
    """
    name = desk.spec.name
    state = journal.last_state(name, "state.fleet")
    data = {} if state is None else {"revision": state.data["target"], "replicas": state.data["replicas"]}
    first: int = desk.record("manager.started", data=data).seq
    if state is None:
        return first
    desk.rng.seed(f"{desk.rng.random()}/{first}")  # the same seed, but never the same ids again
    restored = FleetState.from_dict(dict(state.data))
    progress = journal.last_state(name, "state.progress")
    if progress is not None and progress.seq > state.seq:
        restored = restored.with_progress(progress.data)
    turn.restore(restored.taken_over(now))
    apart = journal.last_state(name, isolation.STATE)
    if apart is not None:
        turn.isolations.restore(apart.data)
    configuring.restore(journal, name)
    return first


def restore_slots(journal: Journal, desk: Desk, turn: Turn, recovery: Recovery) -> None:
    """When the instances are seen: what was tried in each slot, and which are out of service by our own doing."""
    if desk.state is None:
        return
    slots = {member.instance.slot for member in desk.view.members.values()}
    book: list[InFlight] = []
    tried = journal.last_states(desk.spec.name, _RECOVERY)  # a query for each slot of a thousand takes seconds
    disrupted = journal.last_states(desk.spec.name, _DISRUPTION)
    # an empty place has its history, too; the surge of a rollout may have put it beyond the wanted size
    for slot in sorted(slots.union(range(2 * desk.state.desired))):
        found = tried.get(f"{_RECOVERY}{slot}")
        memory = RecoveryMemory() if found is None else RecoveryMemory.from_dict(dict(found.data))
        if memory != RecoveryMemory():
            recovery.restore(slot, memory)
            turn.sizing.vacate(slot)
        entry = disrupted.get(f"{_DISRUPTION}{slot}")
        if entry is not None and entry.data:
            book.append(InFlight.from_dict(slot, entry.data))
    desk.disruptions.restore(book)
