"""Watch streams cut anywhere, and events in any order: laws that need no server."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentfleet.backends.kubernetes import PODS, Changed, Pod, Removed
from agentfleet.backends.kubernetes.informer_cache import ObjectCache, key_of
from agentfleet.backends.kubernetes.informer_queue import Unread
from agentfleet.backends.kubernetes.objects import Meta
from agentfleet.backends.kubernetes.watching import (
    Added,
    Bookmark,
    Deleted,
    Failed,
    LineSplitter,
    Modified,
    event_reader,
)
from agentfleet.errors import BackendUnavailable


def pod(name: str, uid: str, version: int) -> Pod:
    return Pod(metadata=Meta(uid=uid, name=name, namespace="n", resource_version=str(version)))


@given(lines=st.lists(st.binary().filter(lambda line: b"\n" not in line)), cuts=st.lists(st.integers(0, 400)))
def test_lines_are_the_same_however_they_are_cut(lines: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(line + b"\n" for line in lines)
    places = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    splitter = LineSplitter()
    found: list[bytes] = []
    for begin, end in pairwise(places):
        found += splitter.lines(stream[begin:end])
    assert found == [line for line in lines if line]
    assert not splitter.unfinished


@given(st.binary(max_size=200))
def test_what_is_no_event_is_an_error_and_nothing_else(line: bytes) -> None:
    with pytest.raises(BackendUnavailable):
        event_reader(PODS)(b"<" + line)


def test_a_huge_line_is_put_together_in_linear_time() -> None:
    meta = {"name": "big", "uid": "u", "resourceVersion": "7"}
    line = json.dumps({"type": "ADDED", "object": {"metadata": meta, "data": "x" * 8_000_000}}).encode()
    splitter = LineSplitter()
    found: list[bytes] = []
    for begin in range(0, len(line), 1024):
        found += splitter.lines(line[begin : begin + 1024])
    assert not found
    assert splitter.unfinished
    (whole,) = splitter.lines(b"\n")
    event = event_reader(PODS)(whole)
    assert isinstance(event, Added)
    assert event.object.metadata.name == "big"


def test_each_kind_of_event_is_read() -> None:
    read = event_reader(PODS)
    thing = {"metadata": {"name": "a", "uid": "u", "resourceVersion": "7", "creationTimestamp": None}, "new": [1]}
    for word, kind in (("ADDED", Added), ("MODIFIED", Modified), ("DELETED", Deleted), ("BOOKMARK", Bookmark)):
        assert isinstance(read(json.dumps({"type": word, "object": thing}).encode()), kind)
        assert isinstance(read(json.dumps({"object": thing, "type": word}).encode()), kind)
    failed = read(b'{"type":"ERROR","object":{"kind":"Status","code":410,"reason":"Expired"}}')
    assert isinstance(failed, Failed)
    assert failed.object.code == 410


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, Pod]]:
    """What happened, in the order in which it happened: versions rise, uids are new after each removal."""
    there: dict[str, str] = {}
    events: list[tuple[str, Pod]] = []
    for version in range(1, draw(st.integers(1, 30))):
        name = draw(st.sampled_from("abc"))
        if name not in there:
            there[name] = f"{name}{version}"
            events.append(("ADDED", pod(name, there[name], version)))
        elif draw(st.booleans()):
            events.append(("MODIFIED", pod(name, there[name], version)))
        else:
            events.append(("DELETED", pod(name, there.pop(name), version)))
    return events


def truth(events: list[tuple[str, Pod]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for kind, each in events:
        if kind == "DELETED":
            found.pop(key_of(each.metadata), None)
        else:
            found[key_of(each.metadata)] = each.metadata.resource_version
    return found


def apply(cache: ObjectCache[Pod], kind: str, each: Pod) -> Any:
    return cache.remove(each) if kind == "DELETED" else cache.put(each)


@given(data=st.data(), events=histories())
def test_repeated_and_late_events_change_nothing(data: st.DataObject, events: list[tuple[str, Pod]]) -> None:
    """Every event comes at least once; some come again later, some again at once, in any order."""
    order = list(range(len(events)))
    again = data.draw(st.lists(st.sampled_from(order), max_size=10)) if order else []
    cache: ObjectCache[Pod] = ObjectCache()
    for number in order:
        apply(cache, *events[number])
        for late in [each for each in again if each <= number]:
            apply(cache, *events[late])
    assert {key: each.metadata.resource_version for key, each in cache.objects.items()} == truth(events)


@given(data=st.data(), events=histories())
def test_events_out_of_order_lead_to_the_same_end(data: st.DataObject, events: list[tuple[str, Pod]]) -> None:
    """Any order leads to the truth, as long as each object's creation is not behind its own successor's."""
    shuffled = data.draw(st.permutations(events))
    cache: ObjectCache[Pod] = ObjectCache()
    for kind, each in shuffled:
        apply(cache, kind, each)
    assert {key: each.metadata.resource_version for key, each in cache.objects.items()} == truth(events)
    assert cache.version == max((int(each.metadata.resource_version) for _, each in events), default=0)


@given(data=st.data(), events=histories())
def test_what_is_told_adds_up_to_what_there_is(data: st.DataObject, events: list[tuple[str, Pod]]) -> None:
    """A reader that reads now and then, and keeps its own copy, has the same copy."""
    cache: ObjectCache[Pod] = ObjectCache()
    unread: Unread[Pod] = Unread()
    mine: dict[str, Pod] = {}
    reads = data.draw(st.lists(st.booleans(), min_size=len(events), max_size=len(events)))

    def read() -> None:
        for change in list(unread._changes.values()):
            uid = change.object.metadata.uid
            if isinstance(change, Removed):
                mine.pop(uid, None)
            else:
                assert isinstance(change, Changed)
                assert change.before is mine.get(uid)
                mine[uid] = change.object
        unread.forget()

    for (kind, each), now in zip(events, reads, strict=True):
        unread.add(apply(cache, kind, each))
        if now:
            read()
    read()
    assert sorted(mine) == sorted(each.metadata.uid for each in cache.objects.values())


def test_a_namesake_is_another_object() -> None:
    cache: ObjectCache[Pod] = ObjectCache()
    old, new = pod("a", "u1", 5), pod("a", "u2", 9)
    cache.put(old)
    assert cache.put(new) == (Removed(old), Changed(new, None))
    assert cache.remove(pod("a", "u1", 8)) == ()  # its predecessor's late end
    assert cache.put(pod("a", "u1", 7)) == ()
    assert cache.objects["n/a"] is new


def test_a_list_is_the_truth_also_with_lower_versions() -> None:
    """A store that was restored from a backup counts from an earlier number on."""
    cache: ObjectCache[Pod] = ObjectCache()
    before, restored = pod("a", "a1", 50), pod("a", "a1", 30)
    cache.put(before)
    cache.put(pod("b", "b1", 60))
    assert cache.put(restored, listed=True) == (Changed(restored, before),)
    assert [change.object.metadata.name for change in cache.keep({"n/a"}, "31")] == ["b"]
    assert cache.version == 31
    assert cache.put(pod("a", "a1", 32))
