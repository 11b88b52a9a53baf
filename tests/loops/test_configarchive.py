"""Configuration out and in again: what was written comes back, and what is wrong changes nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentfleet import ConfigConflict, ConfigInvalid, ConfigNotFound, ConfigStore, MemoryJournal, SpecError
from agentfleet.configarchive import dump, load

pytestmark = pytest.mark.anyio
WHY: dict[str, Any] = {"author": "ann", "reason": "because"}


async def filled() -> ConfigStore:
    store = ConfigStore()
    for number in range(3):
        await store.put("a", {"n": number, "snow": "☃"}, **WHY)
    await store.put("b", {"key": {"$secret": "one"}}, **WHY)
    return store


async def test_what_was_written_out_comes_back_and_is_not_published_twice() -> None:
    text = await dump(await filled())
    other = ConfigStore()
    told = await load(other, text, dry_run=True, **WHY)
    assert [(each.key, each.revision, bool(each.changes)) for each in told] == [("a", None, True), ("b", None, True)]
    assert await other.keys() == []
    assert [each.revision for each in await load(other, text, origin="a file", **WHY)] == [1, 1]
    assert (await other.get("a")).document == {"n": 2, "snow": "☃"}
    assert (await other.get("a")).origin == "a file"
    assert [each.revision for each in await load(other, text, **WHY)] == [None, None]
    assert json.loads(await dump(other, ["b"]))["documents"].keys() == {"b"}
    with pytest.raises(ConfigNotFound):
        await dump(other, ["c"])


async def test_one_bad_document_keeps_all_from_being_published() -> None:
    text = await dump(await filled())
    other = ConfigStore()
    other.register("b", validators=[lambda _: "no such thing"])
    with pytest.raises(ConfigInvalid, match=r"b: .*no such thing"):
        await load(other, text, **WHY)
    assert await other.keys() == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"n": 2', '"n": 3', "its digest differs"),
        ("agentfleet-config/1", "agentfleet-config/9", "format"),
        ('"revision": 3', '"revision": "x"', r"documents\.a\.revision"),
        ("{", "", "no archive"),
    ],
)
async def test_an_archive_that_is_none_is_refused_by_name(old: str, new: str, message: str) -> None:
    text = (await dump(await filled())).replace(old, new, 1)
    other = ConfigStore()
    with pytest.raises(SpecError, match=message):
        await load(other, text, **WHY)
    assert await other.keys() == []


async def test_who_publishes_in_between_is_not_overwritten() -> None:
    """`b` is published by somebody else after it was looked at, while `a` is being published."""
    text = await dump(await filled())
    other, calls = ConfigStore(), 0

    async def meddle(document: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first was the validation of all
            await other.put("b", {"mine": True}, **WHY)

    other.register("a", validators=[meddle])
    with pytest.raises(ConfigConflict):
        await load(other, text, **WHY)
    assert (await other.get("b")).document == {"mine": True}
    assert (await other.get("a")).document == {"n": 2, "snow": "☃"}


async def test_a_secret_is_refused_by_the_store_and_told_nowhere() -> None:
    journal = MemoryJournal()
    store = ConfigStore(journal=journal)
    with pytest.raises(ConfigInvalid, match=r"provider\.api_key: looks like a secret") as raised:
        await store.put("a", {"provider": {"api_key": "sk-12345"}}, **WHY)
    assert "sk-12345" not in str(raised.value)
    assert not [each for each in journal.read() if "sk-12345" in each.to_json()]
    store.register("a", plain_secrets=True)
    assert (await store.put("a", {"provider": {"api_key": "sk-12345"}}, **WHY)).revision == 1
