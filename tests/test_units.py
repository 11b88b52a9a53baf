"""Quantities in words: what is read is what was written, and nonsense is refused with the right form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic_core import PydanticCustomError

from agentfleet.units import (
    format_cpu,
    format_duration,
    format_memory,
    parse_cpu,
    parse_duration,
    parse_memory,
    parse_share,
    share_of,
    show,
)

PARSERS: list[Callable[[object], Any]] = [parse_cpu, parse_memory, parse_duration, parse_share]


@pytest.mark.parametrize(
    ("text", "cores"), [("250m", 0.25), ("2", 2.0), ("0.5", 0.5), (1, 1.0), (0, 0.0), ("1500m", 1.5), (0.1, 0.1)]
)
def test_cpu(text: object, cores: float) -> None:
    assert parse_cpu(text) == cores


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512Mi", 512 << 20),
        ("2G", 2 * 10**9),
        ("1.5Ki", 1536),
        ("7", 7),
        (10**18, 10**18),
        (1024.0, 1024),
        ("1k", 1000),
    ],
)
def test_memory(text: object, size: int) -> None:
    assert parse_memory(text) == size
    assert type(parse_memory(text)) is int


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("1h30m", 5400), ("250ms", 0.25), ("1.5h", 5400), ("2d", 172800), (7, 7), (0.1, 0.1)],
)
def test_duration(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "share"), [(3, 3), ("10%", "10%"), ("7.50%", "7.5%"), ("0%", "0%"), (10**17 + 1, 10**17 + 1)]
)
def test_share(text: object, share: int | str) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize(("cores", "text"), [(0.25, "250m"), (2.0, "2"), (0.0, "0"), (0.0001, "0.0001"), (1e18, 1e18)])
def test_cpu_in_words(cores: float, text: object) -> None:
    assert format_cpu(cores) == text


@pytest.mark.parametrize(("size", "text"), [(1 << 30, "1Gi"), (1000, "1000"), (0, "0"), (10**18 + 1, 10**18 + 1)])
def test_memory_in_words(size: int, text: object) -> None:
    assert format_memory(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(90.0, "90s"), (3600.0, "1h"), (0.25, "250ms"), (0.0, "0s"), (1e-5, 1e-5)]
)
def test_duration_in_words(seconds: float, text: object) -> None:
    assert format_duration(seconds) == text


@given(st.floats(0, 1e18))
@example(math.nextafter(1e18, 0))
@example(5e-324)
def test_cpu_round_trip(cores: float) -> None:
    assert parse_cpu(format_cpu(cores)) == cores


@given(st.integers(0, 10**18))
@example(10**15 - 1)
@example(10**17 + 1)
@example(2**59)
def test_memory_round_trip(size: int) -> None:
    assert parse_memory(format_memory(size)) == size


@given(st.floats(0, 1e18) | st.integers(0, 10**6).map(float))
@example(0.001)
@example(5e-324)
def test_duration_round_trip(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.integers(0, 10**18) | st.floats(0, 100).map(lambda x: f"{x:.12f}%"))
def test_share_round_trip(share: int | str) -> None:
    once = parse_share(share)
    assert parse_share(once) == once


JUNK: list[Any] = [
    None, True, False, -1, -0.5, math.nan, math.inf, -math.inf, 10**400, -(10**400), 10**5000, "", " ", "1 s", "-1s",
    "1e5", "NaN", "inf", "0x10", "1_0", "٣", "٣s", "1" * 16, "9" * (1 << 20), "x" * (1 << 20), "\ud800", "\0", "1s\n",
    "1.1.1", ".5", "5.", "+1", [], {}, (), b"1", object(), 1j, [[]] * 1000,
]  # fmt: skip


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
def test_nonsense_is_refused_with_the_right_form(parse: Callable[[object], Any], junk: object) -> None:
    with pytest.raises(PydanticCustomError) as caught:
        parse(junk)
    message = caught.value.message()
    assert message.startswith("write ")
    assert len(message) < 250
    assert message.encode()


@pytest.mark.parametrize("parse", PARSERS)
@given(text=st.text(alphabet="0123456789.mskhdKMGi%-eE ٣", max_size=12))
def test_any_text_is_a_value_or_refused(parse: Callable[[object], Any], text: str) -> None:
    try:
        value = parse(text)
    except PydanticCustomError:
        return
    assert parse(value) == value


@pytest.mark.parametrize(
    ("share", "total", "up", "down"),
    [
        (3, 10, 3, 3),
        ("10%", 10, 1, 1),
        ("25%", 10, 3, 2),
        ("7%", 100, 7, 7),
        ("0%", 5, 0, 0),
        ("100%", 7, 7, 7),
        ("1%", 0, 0, 0),
    ],
)
def test_shares_of_a_fleet(share: int | str, total: int, up: int, down: int) -> None:
    assert share_of(share, total, round_up=True) == up
    assert share_of(share, total, round_up=False) == down


@given(percent=st.integers(0, 100), total=st.integers(0, 10**6))
def test_shares_are_exact(percent: int, total: int) -> None:
    assert share_of(f"{percent}%", total, round_up=False) == percent * total // 100
    assert share_of(f"{percent}%", total, round_up=True) == -(-percent * total // 100)


def test_show_is_short_whatever_it_shows() -> None:
    knot: list[Any] = []
    knot.append(knot)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (knot, deep, 10**5000, -(10**5000), "x" * 10**6, {"a": ["b" * 1000] * 1000}, "\ud800"):
        assert 0 < len(show(value).encode()) < 200
