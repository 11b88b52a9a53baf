"""Which nodes count as lost: the one that is silent, soon; none because everything is slow."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentfleet.backends.kubernetes.heartbeats import Heartbeats

NODES = [f"n{number}" for number in range(20)]
PERIOD, GRACE = 10.0, 16.0


def live(
    beats: Heartbeats, seconds: float, *, since: float = 0.0, comes: Callable[[str, float], float | None]
) -> dict[str, float]:
    """Let nodes send their heartbeats in turn; `comes` says when one sent at a moment arrives, None if never.

    Returns:
        When each node was called lost for the first time.
    """
    first: dict[str, float] = {}
    due: list[tuple[float, str]] = []
    for round_ in range(int(seconds / PERIOD)):
        for number, node in enumerate(NODES):
            sent = since + round_ * PERIOD + number * PERIOD / len(NODES)
            arrives = comes(node, sent)
            if arrives is not None:
                due.append((arrives, node))
    due.sort()
    for tick in range(int(seconds)):
        now = since + tick
        while due and due[0][0] <= now:
            at, node = due.pop(0)
            beats.beat(node, at)
        for node in beats.lost(now):
            first.setdefault(node, now)
    for at, node in due:
        beats.beat(node, at)
    return first


def beating() -> Heartbeats:
    beats = Heartbeats(GRACE)
    beats.listed(set(NODES), 0.0)
    assert not live(beats, 60, comes=lambda _, sent: sent)
    return beats


def test_a_node_that_dies_is_known_after_the_grace() -> None:
    lost = live(beating(), 60, since=60, comes=lambda node, sent: None if node == "n7" and sent > 70 else sent)
    assert lost.keys() == {"n7"}
    assert 16 <= lost["n7"] - 63.5 < 18  # its last heartbeat came at 63.5


def test_a_zone_that_dies_is_known_before_the_control_plane_says_so() -> None:
    zone = {"n0", "n3", "n6", "n9", "n12"}
    lost = live(beating(), 60, since=60, comes=lambda node, sent: None if node in zone and sent > 70 else sent)
    assert lost.keys() == zone
    assert max(lost.values()) - 70 < 26


def test_heartbeats_that_are_late_everywhere_cost_no_node() -> None:
    """For 12 s nothing gets through, then all comes at once: so it is when a machine has too much to do."""

    def comes(_: str, sent: float) -> float:
        return max(sent, 92.0) if 80 <= sent < 92 else sent

    assert not live(beating(), 100, since=60, comes=comes)


def test_nodes_that_come_back_one_after_the_other_after_an_outage_are_not_lost() -> None:
    """For 36 s nobody can send; then each does at its next turn, within ten seconds: but for one, which is dead."""

    def comes(node: str, sent: float) -> float | None:
        return None if 80 <= sent < 116 or (node == "n7" and sent >= 80) else sent

    lost = live(beating(), 120, since=60, comes=comes)
    assert lost.keys() == {"n7"}
    assert 116 < lost["n7"] < 116 + 2 * GRACE


def test_heartbeats_that_come_slower_everywhere_cost_no_node() -> None:
    """Each is later than the one before, up to 20 s instead of 10."""

    def comes(node: str, sent: float) -> float | None:
        if sent < 100:
            return sent
        return None if int((sent - 100) / PERIOD) % 2 == 0 else sent + NODES.index(node) % 3

    lost = live(beating(), 120, since=60, comes=comes)
    assert not lost


def test_of_a_majority_that_seems_lost_nothing_is_said() -> None:
    alive = {"n1", "n2", "n3"}
    assert not live(beating(), 100, since=60, comes=lambda node, sent: sent if node in alive or sent < 80 else None)


def test_two_nodes_that_stay_dead_do_not_lengthen_the_grace_of_the_others() -> None:
    beats = beating()
    dead = {"n1", "n2"}
    assert live(beats, 60, since=60, comes=lambda node, sent: None if node in dead else sent).keys() == dead
    lost = live(beats, 60, since=120, comes=lambda node, sent: None if node in dead | {"n7"} else sent)
    assert lost["n7"] - 113.5 < 18


def test_a_node_that_comes_back_is_not_lost() -> None:
    beats = beating()
    assert live(beats, 40, since=60, comes=lambda node, sent: None if node == "n7" else sent).keys() == {"n7"}
    live(beats, 20, since=100, comes=lambda _, sent: sent)
    assert not beats.lost(120.0)
    beats.gone("n7")
    assert not beats.lost(121.0)


def one_dies(phases: list[float], *, seed: int = 0, dies: float = 200.0) -> dict[str, float]:
    """Nodes with heartbeats at these moments of each period, and 4 % later each time, as kubelets send them.

    Returns:
        When each was called lost, in seconds after its last heartbeat; the first dies.
    """
    rng = random.Random(seed)
    sent: list[tuple[float, str]] = []
    for number, phase in enumerate(phases):
        at = phase
        while at < (dies if number == 0 else dies + 60):
            sent.append((at, f"n{number}"))
            at += PERIOD * (1 + 0.04 * rng.random())
    beats = Heartbeats(GRACE)
    beats.listed({node for _, node in sent}, 0.0)
    last: dict[str, float] = {}
    lost: dict[str, float] = {}
    due = sorted(sent, reverse=True)
    for tick in range(int(dies) + 60):
        while due and due[-1][0] <= tick:
            at, node = due.pop()
            beats.beat(node, at)
            last[node] = at
        for node in beats.lost(float(tick)):
            lost.setdefault(node, tick - last[node])
    return lost


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 20])
def test_a_node_that_dies_is_known_however_few_there_are(count: int) -> None:
    """Evenly spaced, as nodes that were started one after the other."""
    lost = one_dies([number * PERIOD / count for number in range(count)])
    assert lost.keys() == {"n0"}
    assert GRACE < lost["n0"] < 20 + 2 * (count == 2)  # a first pause of 10 s instead of 5 is doubted


@given(phases=st.lists(st.floats(0, 9.9), min_size=2, max_size=12), seed=st.integers(0, 99))
def test_a_node_that_dies_is_known_whenever_the_others_send(phases: list[float], seed: int) -> None:
    """Kubelets that were started together send within the same second of ten."""
    lost = one_dies(phases, seed=seed)
    assert lost.keys() == {"n0"}
    assert GRACE < lost["n0"] < GRACE + PERIOD


def test_of_a_single_node_nothing_is_said() -> None:
    """Nobody's heartbeat comes then, which says as much about our sight as about the node."""
    assert one_dies([3.0]) == {}
