"""FleetView: whatever happens, its counts, sums, slots and orders are those of a model recomputed from scratch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from agentfleet.instances import AgentStatus, HealthState, Instance, Isolation, Phase, Usage
from agentfleet.testing import strategies
from agentfleet.view import EXPENDABLE, GOOD, SERVING, Condition, Counts, FleetView

IDS = [f"a{number}" for number in range(8)]
HEALTHY = (HealthState.HEALTHY, HealthState.SUSPECT)
PLACELESS = (None, Condition.DRAINING, Condition.ISOLATED)


def instance(id: str, slot: int = 0, revision: int = 1, phase: Phase = Phase.RUNNING, **more: object) -> Instance:
    made = Instance(id, "fleet", slot, revision, "1", phase, created_at=0.0, started_at=0.0, ready=True)
    return replace(made, **more)  # type: ignore[arg-type]


def check_view(view: FleetView) -> None:
    """The invariants that any view keeps by itself, whatever was done to it."""
    members = list(view.members.values())
    placed = [member for member in members if member.condition not in PLACELESS]
    tally = Counter((member.instance.revision, member.condition) for member in placed)
    revisions = sorted({member.instance.revision for member in placed})
    assert view.revisions == tuple(revisions)
    for revision in revisions:
        assert view.counts(revision) == Counts(*(tally[revision, condition] for condition in EXPENDABLE))
    assert view.total_counts() == sum((view.counts(revision) for revision in revisions), Counts())
    assert view.total_counts().total == len(placed)
    assert len(view) == len(members)
    assert view.draining + len(view.isolated) == len(members) - len(placed)
    assert set(view.isolated) == {m.instance.id for m in members if m.condition is Condition.ISOLATED}
    assert view.in_flight == sum(member.in_flight for member in members)
    assert view.queued == sum(member.queued for member in members)
    assert sorted(m.instance.id for m in view.serving()) == sorted(
        m.instance.id for m in members if m.condition in SERVING
    )

    # slots: each one that is filled has one holder, who is in it; the free ones are offered lowest first
    filled = {member.instance.slot for member in placed}
    for slot in filled:
        holder = view.holder(slot)
        assert holder is not None
        assert holder.instance.slot == slot
        assert holder in placed
    offered = view.next_slots(5)
    free = [slot for slot in range(len(filled) + max(filled, default=0) + 6) if slot not in filled]
    assert offered == free[:5]
    assert view.next_slots(5) == offered, "looking at free slots takes none"
    assert all(view.holder(slot) is None for slot in offered)


@dataclass
class Known:
    """What the naive model remembers of one instance."""

    instance: Instance
    health: HealthState = HealthState.UNKNOWN
    healthy_since: float | None = None
    load: tuple[int, int] = (0, 0)
    leaving: bool = False
    ripe: bool = False
    condition: Condition | None = None
    came: int = 0
    """When it took its present condition, as a running number."""
    arrived: int = 0
    """When it took its place."""


class ViewMachine(RuleBasedStateMachine):
    """The view and a naive model live through the same events."""

    @initialize(min_ready=st.sampled_from([0.0, 0.7, 10.0]))
    def start(self, min_ready: float) -> None:
        self.min_ready = min_ready
        self.calls: list[str] = []
        self.expected_calls: list[str] = []
        self.view = FleetView(min_ready=min_ready, on_serving=self.calls.append)
        self.known: dict[str, Known] = {}
        self.now = 0.0
        self.clock = 0

    # ---- the naive model

    def _condition(self, known: Known) -> Condition:
        phase = known.instance.phase
        if known.leaving or phase is Phase.DRAINING:
            return Condition.DRAINING
        if known.instance.isolated is not None:
            return Condition.ISOLATED
        if phase in (Phase.EXITED, Phase.LOST) or known.health is HealthState.DEAD:
            return Condition.DEAD
        if phase is Phase.PENDING:
            return Condition.PENDING
        if known.health is HealthState.UNHEALTHY:
            return Condition.SICK
        if known.healthy_since is None or not known.instance.ready:
            return Condition.UNKNOWN if known.health is HealthState.UNKNOWN else Condition.STARTING
        if self.min_ready and not known.ripe:
            return Condition.FRESH
        return Condition.BUSY if known.load[0] else Condition.IDLE

    def _update(self, known: Known) -> None:
        before, after = known.condition, self._condition(known)
        known.ripe = after in (Condition.IDLE, Condition.BUSY)
        if before is after:
            return
        self.clock += 1
        known.condition, known.came = after, self.clock
        if before in PLACELESS:
            known.arrived = self.clock
        if (before in SERVING) != (after in SERVING) or after is Condition.ISOLATED:
            self.expected_calls.append(known.instance.id)

    # ---- events

    @rule(
        id=st.sampled_from(IDS),
        slot=st.integers(0, 6),
        revision=st.integers(1, 3),
        phase=st.sampled_from(Phase),
        ready=st.booleans(),
        same_place=st.booleans(),
    )
    def put(self, *, id: str, slot: int, revision: int, phase: Phase, ready: bool, same_place: bool) -> None:
        """The backend shows an instance: a new one, one that changed, now and then one with other labels."""
        known = self.known.get(id)
        if known is not None and same_place:
            slot, revision = known.instance.slot, known.instance.revision
        started = 0.0 if known is None else known.instance.started_at
        seen = instance(id, slot, revision, phase, ready=ready, started_at=started)
        if known is None:
            known = self.known[id] = Known(seen)
        elif (known.instance.slot, known.instance.revision) != (slot, revision):
            if known.condition in SERVING:
                self.expected_calls.append(id)
            known.condition, known.ripe = None, False
        known.instance = seen
        self.view.put(seen)
        self._update(known)

    @rule(id=st.sampled_from(IDS), apart=st.booleans())
    def isolate_or_return(self, id: str, apart: bool) -> None:
        known = self.known.get(id)
        if known is not None:
            known.instance = replace(known.instance, isolated=Isolation(0.0, "why") if apart else None)
            self.view.put(known.instance)
            self._update(known)

    @rule(id=st.sampled_from(IDS), process=st.floats(0, 9))
    def restart(self, id: str, process: float) -> None:
        """Another process in the same place: health and load of the last one are void."""
        known = self.known.get(id)
        if known is None:
            return
        if known.instance.started_at != process:
            known.healthy_since, known.load = None, (0, 0)
        known.instance = replace(known.instance, started_at=process)
        self.view.put(known.instance)
        self._update(known)

    @rule(id=st.sampled_from(IDS))
    def remove(self, id: str) -> None:
        known = self.known.pop(id, None)
        assert (self.view.remove(id) is None) is (known is None)
        if known is not None and known.condition in SERVING:
            self.expected_calls.append(id)

    @rule(id=st.sampled_from(IDS), leaving=st.booleans())
    def drain_or_keep(self, id: str, leaving: bool) -> None:
        if leaving:
            self.view.drain(id)
        else:
            self.view.keep(id)
        known = self.known.get(id)
        if known is not None:
            known.leaving = leaving
            self._update(known)

    @rule(id=st.sampled_from(IDS), health=st.sampled_from([*HealthState, *HEALTHY]))
    def judge(self, id: str, health: HealthState) -> None:
        changed = self.view.judge(id, health, self.now)
        known = self.known.get(id)
        if known is None:
            assert not changed
            return
        if health not in HEALTHY:
            known.healthy_since = None
        elif known.healthy_since is None:
            known.healthy_since = self.now
        known.health = health
        before = known.condition
        self._update(known)
        assert changed is (before is not known.condition)

    @rule(id=st.sampled_from(IDS), in_flight=st.integers(0, 2), queued=st.integers(0, 3))
    def report(self, id: str, in_flight: int, queued: int) -> None:
        self.view.report(id, AgentStatus(in_flight=in_flight, queue_length=queued))
        known = self.known.get(id)
        if known is not None:
            known.load = (in_flight, queued)
            self._update(known)

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.7, 5.0, 10.0]))
    def ripen(self, seconds: float) -> None:
        """Time passes; whoever has been healthy for min_ready counts as available, not a moment later."""
        self.now += seconds
        due = self.view.ripen(self.now)
        ripe: list[tuple[float, str]] = []
        waiting: list[float] = []
        for id, known in self.known.items():
            if known.condition is Condition.FRESH:
                assert known.healthy_since is not None
                at = known.healthy_since + self.min_ready
                if at <= self.now:
                    ripe.append((known.healthy_since, id))
                else:
                    waiting.append(at)
        for _, id in sorted(ripe):
            self.known[id].ripe = True
            self._update(self.known[id])
        assert due is None or due > self.now
        assert not waiting or (due is not None and due <= min(waiting))

    # ---- what must always be true

    @invariant()
    def the_view_is_whole(self) -> None:
        if hasattr(self, "view"):
            check_view(self.view)

    @invariant()
    def the_view_is_the_model(self) -> None:
        if not hasattr(self, "view"):
            return
        assert set(self.view.members) == set(self.known)
        for id, known in self.known.items():
            member = self.view.members[id]
            assert member.condition is known.condition
            assert (member.in_flight, member.queued) == known.load
            assert member.healthy_since == known.healthy_since
        assert self.calls == self.expected_calls

    @invariant()
    def the_last_to_come_holds_the_slot(self) -> None:
        placed = [known for known in getattr(self, "known", {}).values() if known.condition not in PLACELESS]
        for slot in {known.instance.slot for known in placed}:
            last = max((known for known in placed if known.instance.slot == slot), key=lambda known: known.arrived)
            holder = self.view.holder(slot)
            assert holder is not None
            assert holder.instance.id == last.instance.id

    @invariant()
    def the_expendable_come_in_order(self) -> None:
        if not hasattr(self, "view"):
            return
        for revisions in ((1,), (3, 1), (1, 2, 3)):
            for only in (EXPENDABLE, (Condition.IDLE, Condition.SICK)):
                wanted = [
                    known.instance.id
                    for condition in only
                    for revision in revisions
                    for known in sorted(self.known.values(), key=lambda known: -known.came)
                    if known.condition is condition and known.instance.revision == revision
                ]
                assert [m.instance.id for m in self.view.expendable(revisions, only=only)] == wanted


ViewMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestViewMachine = ViewMachine.TestCase


# ---------------------------------------------------------------------------------------------- counts


@given(st.lists(st.integers(0, 100), min_size=16, max_size=16))
def test_counts_add_up(numbers: list[int]) -> None:
    """Sums are by condition; total, good and available are sums of the right ones."""
    left, right = Counts(*numbers[:8]), Counts(*numbers[8:])
    both = left + right
    for condition in EXPENDABLE:
        assert getattr(both, condition) == getattr(left, condition) + getattr(right, condition)
    assert left.total == sum(numbers[:8])
    assert left.good == sum(getattr(left, condition) for condition in GOOD)
    assert left.available == left.idle + left.busy


# ---------------------------------------------------------------------------------------------- one by one


def fresh_view(*ids: str, min_ready: float = 0.0, now: float = 0.0) -> FleetView:
    view = FleetView(min_ready=min_ready)
    for slot, id in enumerate(ids):
        view.put(instance(id, slot))
        view.judge(id, HealthState.HEALTHY, now)
    return view


def test_a_restart_voids_what_the_last_process_proved() -> None:
    """After a restart in place an instance is not available until it is judged healthy again."""
    view = fresh_view("a")
    view.report("a", AgentStatus(in_flight=3, queue_length=2))
    view.put(instance("a", started_at=5.0))
    assert view.counts(1) == Counts(starting=1)
    assert (view.in_flight, view.queued) == (0, 0)


def test_only_the_backend_makes_a_created_instance_seen() -> None:
    """Our own create speaks for an instance until its backend does, and never takes that back."""
    view = FleetView()
    assert not view.put(instance("a", phase=Phase.PENDING), seen=False).seen
    assert view.put(instance("a")).seen
    assert view.put(instance("a"), seen=False).seen


def test_usage_is_kept() -> None:
    """What was measured is read back; an unknown instance's measurement is dropped."""
    view = fresh_view("a")
    view.measure("a", Usage(1.0, 0.5, 1024))
    view.measure("gone", Usage(1.0, 0.5, 1024))
    assert (view.members["a"].cpu, view.members["a"].memory) == (0.5, 1024)


def test_events_of_unknown_instances_change_nothing() -> None:
    """Late answers about an instance that is gone are dropped."""
    view = fresh_view("a")
    assert not view.judge("gone", HealthState.HEALTHY, 0.0)
    view.report("gone", AgentStatus(in_flight=3))
    view.drain("gone")
    view.keep("gone")
    assert view.remove("gone") is None
    check_view(view)
    assert "a" in view
    assert "gone" not in view


def test_a_slot_is_not_free_while_somebody_is_in_it() -> None:
    """Two live instances in one slot, as when a lost node comes back: one leaves, and the other has the slot."""
    view = fresh_view("old")
    view.put(instance("new", 0))
    view.judge("old", HealthState.UNHEALTHY, 1.0)
    holder = view.holder(0)
    assert holder is not None
    assert holder.instance.id == "new", "being judged takes nobody's slot"
    view.remove("new")
    assert view.next_slots(1) == [1]
    view.remove("old")
    assert view.next_slots(1) == [0]


def test_a_relabelled_instance_moves() -> None:
    """Somebody edits the labels of a live instance: it is counted where it is now, and its old slot is free."""
    view = fresh_view("a", "b")
    view.put(instance("a", slot=5, revision=2))
    assert view.counts(1).total == view.counts(2).total == 1
    assert view.next_slots(2) == [0, 2]
    check_view(view)


def test_late_readiness_does_not_wait_for_others() -> None:
    """One that was healthy for long and becomes ready late is available at once, whoever else is still fresh."""
    view = FleetView(min_ready=30.0)
    view.put(instance("late", 0, ready=False))
    view.judge("late", HealthState.HEALTHY, 0.0)
    view.put(instance("fresh", 1))
    view.judge("fresh", HealthState.HEALTHY, 99.0)
    view.put(instance("late", 0))
    assert view.ripen(100.0) == 129.0
    assert view.counts(1) == Counts(fresh=1, idle=1)


@given(usage=strategies.usages())
def test_what_an_instance_uses_is_taken_over(usage: Usage) -> None:
    view = fresh_view("a", "b")
    view.measure("a", usage)
    view.measure("gone", usage)
    assert (view.members["a"].cpu, view.members["a"].memory) == (usage.cpu, usage.memory)
    assert (view.members["b"].cpu, view.members["b"].memory) == (None, None)


def test_replacing_for_ever_takes_no_memory() -> None:
    """The list of free slots is bounded by the slots, not by how often they were filled."""
    view = FleetView()
    for number in range(1000):
        view.put(instance(str(number), slot=number % 3))
        view.remove(str(number))
    assert len(view._slots._free) <= 3


@pytest.mark.parametrize("count", [20_000])
def test_many_free_slots_are_found_in_order(count: int) -> None:
    """After a large scale-down the slots are offered again, lowest first, without looking at each for each."""
    view = FleetView()
    for slot in range(count):
        view.put(instance(str(slot), slot))
    for slot in range(count):
        view.remove(str(slot))
    assert view.next_slots(count + 1) == list(range(count + 1))


def test_serving_is_in_a_stable_order() -> None:
    """Work is offered by condition, then by age: the same in every process."""
    view = fresh_view("idle", "busy")
    view.report("busy", AgentStatus(in_flight=1))
    view.put(instance("unknown", 2))
    assert [member.instance.id for member in view.serving()] == ["unknown", "idle", "busy"]
