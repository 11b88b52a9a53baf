"""ConfigStore: nothing invalid stored, nothing stored changed, no revision lost, repeated, reordered or going back."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from agentfleet.configspec import ConfigRollout
from agentfleet.configstore import ConfigStore
from agentfleet.core.documents import check, diff, write_path
from agentfleet.errors import (
    ConfigConflict,
    ConfigError,
    ConfigInvalid,
    ConfigNotFound,
    DeadlineExceeded,
    MissingExtra,
    SpecError,
)
from agentfleet.stores.config import ConfigRecords, ConfigRevision
from agentfleet.stores.config_memory import MemoryConfig
from agentfleet.stores.memory_journal import MemoryJournal

pytestmark = pytest.mark.anyio
WHY: dict[str, Any] = {"author": "ann", "reason": "because"}


class Tool(BaseModel):
    """Part of a document."""

    name: str
    limit: Annotated[int, Field(ge=1)] = 1


class Prompt(BaseModel):
    """A document."""

    model_config = ConfigDict(extra="forbid")
    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    tools: tuple[Tool, ...] = ()


GOOD: dict[str, Any] = {"model": "small", "tools": [{"name": "search", "limit": 3}]}
SCHEMA = {
    "type": "object",
    "required": ["model"],
    "additionalProperties": False,
    "properties": {
        "model": {"enum": ["small", "large"]},
        "temperature": {"type": "number", "maximum": 2},
        "tools": {"type": "array", "items": {"type": "object", "properties": {"limit": {"type": "integer"}}}},
    },
}


# ------------------------------------------------------------------------------------------------ publishing


async def test_put_get_history() -> None:
    store = ConfigStore()
    first = await store.put("a", GOOD, expect=0, **WHY)
    second = await store.put("a", GOOD | {"model": "large"}, author="bob", reason="more\nroom", expect=1)
    assert (first.revision, second.revision, second.author, second.reason) == (1, 2, "bob", "more\nroom")
    assert first.at <= second.at
    assert first.digest != second.digest
    assert await store.get("a") == second
    assert (await store.get("a", 1)).document == GOOD
    assert await store.history("a") == [first, second]
    assert await store.history("a", after=1) == [second]
    assert await store.history("b") == []
    assert await store.keys() == ["a"]


async def test_what_is_not_there() -> None:
    store = ConfigStore()
    with pytest.raises(ConfigNotFound, match="no configuration 'a'"):
        await store.get("a")
    await store.put("a", GOOD, **WHY)
    for revision in (0, 2, -1):
        with pytest.raises(ConfigNotFound, match=f"no revision {revision}"):
            await store.get("a", revision)
        with pytest.raises(ConfigNotFound):
            await store.rollback("a", revision, **WHY)
        with pytest.raises(ConfigNotFound):
            await store.diff("a", 1, revision)


async def test_nothing_stored_changes_with_what_went_in_or_came_out() -> None:
    store = ConfigStore()
    document = {"model": "small", "tools": [{"name": "search"}]}
    stored = await store.put("a", document, **WHY)
    document["tools"][0]["name"] = "rm"  # type: ignore[index]
    stored.document["tools"].append("x")
    (await store.get("a")).document.clear()
    assert (await store.get("a")).document == {"model": "small", "tools": [{"name": "search"}]}
    with pytest.raises(AttributeError):
        stored.text = "{}"  # type: ignore[misc]


async def test_compare_and_set_tells_the_loser() -> None:
    journal = MemoryJournal()
    store = ConfigStore(journal=journal)
    await store.put("a", {"n": 0}, **WHY)
    outcomes: list[object] = []

    async def write(number: int) -> None:
        try:
            outcomes.append(await store.put("a", {"n": number}, expect=1, **WHY))
        except ConfigConflict as error:
            outcomes.append(str(error))

    async with anyio.create_task_group() as group:
        for number in range(10):
            group.start_soon(write, number)
    losers = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert len(losers) == 9
    assert all("'a' is at revision 2, not 1" in loser for loser in losers)
    assert len(await store.history("a")) == 2
    assert [e.data["conflict"] for e in journal.read() if e.kind == "config.rejected"] == [True] * 9


class OvertakenRecords(MemoryConfig):
    """Where somebody else publishes just after the newest revision was read."""

    other: Callable[[], Awaitable[object]] | None = None

    async def newest(self, key: str) -> ConfigRevision | None:
        found = await super().newest(key)
        other, self.other = self.other, None
        if other is not None:
            await other()
        return found


@pytest.mark.parametrize("expect", [1, 2, 3])
async def test_a_revision_that_lands_amid_a_put_is_never_built_around(expect: int) -> None:
    """Whatever is expected, what is stored holds the hash of the revision before it."""
    records, journal = OvertakenRecords(), MemoryJournal()
    store = ConfigStore(records, journal=journal)
    await store.put("a", {"n": 1}, **WHY)
    records.other = lambda: store.put("a", {"n": 2}, expect=1, **WHY)
    with pytest.raises(ConfigConflict, match=f"not {expect}"):
        await store.put("a", {"n": 3}, expect=expect, **WHY)
    assert await store.verify("a") == 2
    stored = await store.put("a", {"n": 3, "more": True}, expect=2, **WHY)
    assert (stored.revision, stored.previous) == (3, (await store.get("a", 2)).hash)
    assert await store.verify("a") == 3


@pytest.mark.parametrize("expect", [None, 2])
async def test_a_revision_that_lands_amid_a_put_is_what_a_rollout_goes_back_to(expect: int | None) -> None:
    records = OvertakenRecords()
    store = ConfigStore(records)
    await store.put("a", {"n": 1}, **WHY)
    records.other = lambda: store.put("a", {"n": 2}, **WHY)
    rings = ConfigRollout()
    try:
        stored = await store.put("a", {"n": 3}, expect=expect, rollout=rings, **WHY)
    except ConfigConflict:
        stored = await store.put("a", {"n": 3}, expect=expect, rollout=rings, **WHY)
    assert (stored.revision, stored.base) == (3, 2)
    assert await store.verify("a") == 3


async def test_unconditional_writers_all_get_through() -> None:
    store = ConfigStore(YieldingRecords())

    async def write(number: int) -> None:
        await store.put("a", {"n": number}, **WHY)

    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(write, number)
    history = await store.history("a")
    assert [r.revision for r in history] == list(range(1, 21))
    assert sorted(r.document["n"] for r in history) == list(range(20))


class YieldingRecords(MemoryConfig):
    """Lets other writers in between a read and a write, as a database does."""

    async def append(self, revision: ConfigRevision, *, expect: int) -> None:
        await anyio.lowlevel.checkpoint()
        await super().append(revision, expect=expect)


async def test_rollback_is_a_new_revision_and_must_satisfy_what_holds_now() -> None:
    store = ConfigStore()
    await store.put("a", {"model": "small"}, **WHY)
    await store.put("a", {"model": "large"}, **WHY)
    with pytest.raises(ConfigConflict):
        await store.rollback("a", 1, expect=1, **WHY)
    back = await store.rollback("a", 1, author="cy", reason="large is slow", expect=2)
    assert (back.revision, back.restores, back.document, back.author) == (3, 1, {"model": "small"}, "cy")
    store.register("a", validators=[lambda document: "no small models" if document["model"] == "small" else None])
    with pytest.raises(ConfigInvalid, match="no small models"):
        await store.rollback("a", 1, **WHY)
    assert (await store.get("a")).revision == 3


async def test_events_tell_who_what_and_why_but_no_values() -> None:
    journal = MemoryJournal()
    store = ConfigStore(journal=journal)
    store.register("a", schema=SCHEMA | {"properties": {"key": {"type": "integer"}}, "required": []})
    await store.put("a", {"key": 271828}, **WHY)
    with pytest.raises(ConfigInvalid):
        await store.put("a", {"key": "s3cret"}, **WHY)
    published, state, rejected = journal.read()
    assert (published.fleet, published.kind, state.kind, rejected.kind) == (
        "a",
        "config.published",
        "state.config_store",
        "config.rejected",
    )
    assert published.data["author"] == rejected.data["author"] == "ann"
    assert published.data["changed"] == ["key"]
    assert "key: must be of type" in rejected.data["error"]
    assert "s3cret" not in rejected.to_json()
    assert "271828" not in published.to_json()


# ------------------------------------------------------------------------------------------------ validation


@pytest.mark.parametrize(
    ("schema", "change", "names"),
    [
        (Prompt, {"temperature": 3}, r"temperature: Input should be less than or equal to 2"),
        (Prompt, {"temprature": 1}, r"temprature: Extra inputs"),
        (Prompt, {"tools": [{"name": "x"}, {"limit": 0}]}, r"tools\.1\.name: Field required\n  tools\.1\.limit: "),
        (SCHEMA, {"temperature": 3}, r"temperature: must be at most 2"),
        (SCHEMA, {"model": "huge"}, r'model: must be one of \["small", "large"\]'),
        (SCHEMA, {"tools": [{}, {"limit": "x"}]}, r'tools\.1\.limit: must be of type "integer"'),
        (SCHEMA, {"temprature": 1}, r"\(the whole\): .*'temprature' was unexpected"),
    ],
)
async def test_a_rejected_document_names_its_fields_and_changes_nothing(schema: Any, change: Any, names: str) -> None:
    store = ConfigStore()
    store.register("a", schema=schema)
    first = await store.put("a", GOOD, **WHY)
    with pytest.raises(ConfigInvalid, match=names):
        await store.put("a", GOOD | change, **WHY)
    assert await store.history("a") == [first]
    await store.put("other", GOOD | change, **WHY)  # only this key has a schema


async def test_models_are_documents_too() -> None:
    store = ConfigStore()
    store.register("a", schema=Prompt)
    stored = await store.put("a", Prompt(model="small", tools=(Tool(name="x"),)), **WHY)
    assert stored.document == {"model": "small", "temperature": 1.0, "tools": [{"name": "x", "limit": 1}]}

    class Odd(BaseModel):
        value: Any

    with pytest.raises(ConfigInvalid, match="the model cannot be written as JSON"):
        await store.put("b", Odd(value=object()), **WHY)


async def test_validators_of_every_form() -> None:
    async def slow(document: Any) -> list[str]:
        await anyio.lowlevel.checkpoint()
        return ["too dear", "too slow"] if document["n"] == 3 else []

    def strict(document: Any) -> None:
        if document["n"] == 4:
            raise ValueError("four is not allowed")
        document.clear()  # its own copy

    store = ConfigStore()
    store.register("a", validators=[strict, lambda d: "one is too few" if d["n"] == 1 else None, slow])
    for number, message in [(1, "one is too few"), (3, "too dear\n.*too slow"), (4, "four is not allowed")]:
        with pytest.raises(ConfigInvalid, match=message):
            await store.put("a", {"n": number}, **WHY)
    assert (await store.put("a", {"n": 2}, **WHY)).document == {"n": 2}
    with pytest.raises(KeyError):  # a bug in a validator is shown as it is, and nothing is stored
        await store.put("a", {}, **WHY)
    assert len(await store.history("a")) == 1


async def test_a_validator_that_hangs_is_given_up() -> None:
    async def hang(document: Any) -> None:
        await anyio.sleep_forever()

    store = ConfigStore(timeout=0.01)
    store.register("a", validators=[hang])
    with pytest.raises(DeadlineExceeded, match=r"0\.01 s"):
        await store.put("a", {}, **WHY)
    assert await store.keys() == []


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, {"properties": 3}, {"x": float("nan")}, {1: {2}}, int, "text"]
)
async def test_bad_schemas_are_refused(schema: Any) -> None:
    with pytest.raises(SpecError, match="schema"):
        ConfigStore().register("a", schema=schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "http://169.254.169.254/schema.json"},
        {"$defs": {"a": {"properties": {"x": {"$ref": "#/$defs/missing"}}}}},
        {"$schema": "http://json-schema.org/draft-07/schema#", "items": {"$ref": "#/definitions/missing"}},
        {"$id": "urn:example:a", "anyOf": [{"$id": "urn:example:b", "$ref": "#/$defs/missing"}], "$defs": {}},
        {"$ref": "#missing"},
    ],
)
def test_a_reference_that_leads_nowhere_is_found_at_once_and_fetched_from_nowhere(schema: Any) -> None:
    store = ConfigStore()
    with pytest.raises(SpecError, match=r"refers to .*(169\.254|missing).* inline it"):
        store.register("a", schema=schema)


async def test_references_are_followed_where_they_stand() -> None:
    store = ConfigStore()
    tree = {
        "$id": "urn:example:tree",
        "$defs": {"node": {"$id": "node", "$defs": {"n": {"maximum": 1}}, "items": {"$ref": "#/$defs/n"}}},
        "properties": {"top": {"$ref": "node"}, "meta": {"$ref": "https://json-schema.org/draft/2020-12/schema"}},
        "const": {"$ref": "#/nowhere", "top": [1], "meta": {}},
    }
    store.register("a", schema=tree)
    await store.put("a", tree["const"], **WHY)
    with pytest.raises(ConfigInvalid, match="top"):
        await store.put("a", {"$ref": "#/nowhere", "top": [2], "meta": {}}, **WHY)


async def test_a_dynamic_reference_that_leads_nowhere_is_an_error_of_the_schema() -> None:
    store = ConfigStore()
    store.register("a", schema={"$dynamicRef": "#missing"})
    with pytest.raises(ConfigError, match=r"refers to .*missing.* inline it"):
        await store.put("a", {}, **WHY)


async def test_changing_a_schema_after_registration_changes_nothing() -> None:
    schema = {"properties": {"n": {"maximum": 1}}}
    store = ConfigStore()
    store.register("a", schema=schema)
    schema["properties"]["n"]["maximum"] = 10
    with pytest.raises(ConfigInvalid):
        await store.put("a", {"n": 5}, **WHY)


async def test_json_schema_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(MissingExtra, match=r"agentfleet\[jsonschema\]"):
        ConfigStore().register("a", schema={})
    ConfigStore().register("a", schema=Prompt)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def laughs() -> Any:
    value: Any = ["ha"] * 10
    for _ in range(50):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"a": {"b": [float("nan")]}}, r"a\.b\.0: is not a finite number"),
        ({"a": float("-inf")}, r"a: is not a finite number"),
        ({"a": 10**5000}, "a: does not fit 64 bits"),
        ({"a": {1, 2}}, "a: is a set"),
        ({"a": b"x"}, "a: is a bytes"),
        ({"a b": object()}, '"a b": is a object'),
        ({1: 2}, "key 1 is not a string"),
        ({"\ud800": 2}, "key '.ud800' is not a string"),
        ({"a": "\ud800"}, "a: is not Unicode text"),
        (nested(70), "nested more than 64 deep"),
        (nested(100_000), "nested more than 64 deep"),
        (laughs(), "more than 1048576 bytes"),
        ({"a": "x" * (1 << 20)}, "bytes"),
        ({"a": "☃" * 400_000}, "is 1200008 bytes of JSON"),
        (["\0" * 300_000], "is 1800004 bytes"),
        (object(), r"\(the whole\): is a object"),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value[:20],
)
async def test_only_plain_json_of_bounded_size(document: Any, message: str) -> None:
    store = ConfigStore()
    with pytest.raises(ConfigInvalid, match=message) as caught:
        await store.put("a", document, **WHY)
    assert len(str(caught.value)) < 10_000
    assert (await store.dry_run("a", document)).problems
    assert await store.keys() == []


@pytest.mark.parametrize("words", [{"author": ""}, {"author": " "}, {"reason": "x" * 5000}, {"author": "a\nb"}])
async def test_who_and_why_are_asked_for(words: dict[str, str]) -> None:
    store = ConfigStore()
    with pytest.raises(SpecError, match=next(iter(words))):
        await store.put("a", {}, **(WHY | words))
    for key in ("", "a\0", "x" * 300):
        with pytest.raises(SpecError, match="key"):
            await store.put(key, {}, **WHY)
        with pytest.raises(SpecError, match="key"):
            store.register(key)
    assert await store.keys() == []


@pytest.mark.parametrize("wrong", [None, 7, b"ann", ["ann"], True], ids=repr)
@pytest.mark.parametrize("field", ["author", "reason"])
async def test_who_and_why_must_be_text(field: str, wrong: Any) -> None:
    """What is no text at all is refused by name, like text that nobody can read, and nothing is stored."""
    journal = MemoryJournal()
    store = ConfigStore(journal=journal)
    with pytest.raises(SpecError, match=f"{field}: must be printable text"):
        await store.put("a", {}, **(WHY | {field: wrong}))
    assert await store.keys() == []
    assert not journal.read()


@pytest.mark.parametrize("wrong", [None, 7, ["a"]], ids=repr)
async def test_a_key_must_be_text(wrong: Any) -> None:
    store = ConfigStore()
    with pytest.raises(SpecError, match="key: must be printable text"):
        await store.put(wrong, {}, **WHY)
    with pytest.raises(SpecError, match="key: must be printable text"):
        store.register(wrong)
    assert await store.keys() == []


@pytest.mark.parametrize("wrong", ["1", 1.0, True, [1]], ids=repr)
async def test_numbers_of_revisions_must_be_numbers(wrong: Any) -> None:
    store = ConfigStore()
    await store.put("a", {"x": 1}, **WHY)
    for attempt in (
        lambda: store.put("a", {}, **WHY, expect=wrong),
        lambda: store.rollback("a", 1, **WHY, expect=wrong),
        lambda: store.dry_run("a", {}, expect=wrong),
    ):
        with pytest.raises(SpecError, match="expect: must be the number of a revision"):
            await attempt()
    for attempt in (lambda: store.rollback("a", wrong, **WHY), lambda: store.get("a", wrong)):
        with pytest.raises(SpecError, match="revision: must be the number of a revision"):
            await attempt()
    with pytest.raises(SpecError, match="revision"):
        await store.rollback("a", None, **WHY)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="after"):
        store.watch("a", after=wrong)
    assert (await store.get("a")).revision == 1


async def test_dry_run_shows_and_stores_nothing() -> None:
    journal = MemoryJournal()
    store = ConfigStore(journal=journal)
    store.register("a", schema=Prompt)
    assert [c.path for c in (await store.dry_run("a", GOOD)).changes] == ["model", "tools"]
    await store.put("a", GOOD, **WHY)
    before = journal.read()
    tried = await store.dry_run("a", {"model": "large", "temperature": 9}, expect=7)
    assert not tried.ok
    assert [p.path for p in tried.problems] == ["temperature", "(the whole)"]
    assert [(c.path, c.kind) for c in tried.changes] == [
        ("model", "changed"),
        ("tools", "removed"),
        ("temperature", "added"),
    ]
    assert tried.against == 1
    assert (await store.dry_run("a", GOOD)).ok
    assert journal.read() == before
    assert len(await store.history("a")) == 1


# ------------------------------------------------------------------------------------------------ differences


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


@given(document=JSON)
def test_plain_json_is_accepted_and_comes_back(document: Any) -> None:
    text, problems = check(document, max_bytes=1 << 20, max_depth=64)
    assert problems == ()
    back = ConfigRevision("a", 1, text, 0.0, "x", "y")
    assert back.document == document
    assert diff(document, back.document) == ()


@given(before=JSON, after=JSON)
def test_a_difference_is_empty_only_between_equals(before: Any, after: Any) -> None:
    changes = diff(before, after)
    if before != after:
        assert changes
    flipped = {"added": "removed", "removed": "added", "changed": "changed"}
    back = {(c.path, flipped[c.kind]) for c in diff(after, before)}
    assert {(c.path, str(c.kind)) for c in changes} == back


async def test_differences_by_path() -> None:
    store = ConfigStore()
    await store.put("a", {"x": 1, "y": {"a.b": [1, 2]}, "z": True}, **WHY)
    await store.put("a", {"x": 1.0, "y": {"a.b": [1, 3, 4]}, "z": 1, "n": None}, **WHY)
    found = {c.path: (c.kind, c.before, c.after) for c in await store.diff("a", 1, 2)}
    assert found == {
        'y."a.b".1': ("changed", 2, 3),
        'y."a.b".2': ("added", None, 4),
        "z": ("changed", True, 1),
        "n": ("added", None, None),
    }
    assert write_path(()) == "(the whole)"


# ------------------------------------------------------------------------------------------------ watching


async def collect(store: ConfigStore, key: str, count: int, after: int = 0) -> list[int]:
    watch = store.watch(key, after=after)
    with anyio.fail_after(20):
        return [(await watch.__anext__()).revision for _ in range(count)]


async def test_watchers_get_every_revision_in_order_however_late_and_slow() -> None:
    store = ConfigStore()
    got: dict[str, list[int]] = {}

    async def watcher(name: str, after: int, pauses: int) -> None:
        watch = store.watch("a", after=after)
        seen = got.setdefault(name, [])
        while not seen or seen[-1] < 300:
            seen.append((await watch.__anext__()).revision)
            for _ in range(pauses):
                await anyio.lowlevel.checkpoint()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(watcher, "early", 0, 0)
            group.start_soon(watcher, "slow", 0, 7)
            for number in range(300):
                if number == 150:
                    group.start_soon(watcher, "late", 100, 1)
                await store.put("a", {"n": number}, **WHY)
                await store.put("b", {"n": number}, **WHY)
    assert got == {"early": list(range(1, 301)), "slow": list(range(1, 301)), "late": list(range(101, 301))}


async def test_a_thousand_watchers_reconnect_at_once() -> None:
    store = ConfigStore()
    for number in range(5):
        await store.put("a", {"n": number}, **WHY)
    done: list[list[int]] = []

    async def reconnect(after: int) -> None:
        done.append(await collect(store, "a", 6 - after, after))

    async with anyio.create_task_group() as group:
        for number in range(1000):
            group.start_soon(reconnect, number % 6)
        await anyio.wait_all_tasks_blocked()
        await store.put("a", {}, **WHY)
    assert len(done) == 1000
    assert all(seen == list(range(seen[0], 7)) for seen in done)


async def test_a_cancelled_watch_loses_nothing() -> None:
    store = ConfigStore()
    watch = store.watch("a")
    for number in range(1, 4):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await watch.__anext__()
        await store.put("a", {}, **WHY)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await watch.__anext__()
        with anyio.fail_after(20):
            assert (await watch.__anext__()).revision == number
    await watch.aclose()
    with pytest.raises(StopAsyncIteration):
        await watch.__anext__()


async def test_a_watcher_overtaken_by_trimming_is_told_once() -> None:
    store = ConfigStore(MemoryConfig(keep=3))
    watch = store.watch("a")
    await store.put("a", {}, **WHY)
    assert (await watch.__anext__()).revision == 1
    for _ in range(9):
        await store.put("a", {}, **WHY)
    with pytest.raises(ConfigError, match="revisions 2 to 7 are kept no longer"):
        await watch.__anext__()
    assert [(await watch.__anext__()).revision for _ in range(3)] == [8, 9, 10]
    with pytest.raises(ConfigNotFound):
        await store.get("a", 7)
    with pytest.raises(SpecError, match="keep"):
        MemoryConfig(keep=0)
    one = ConfigStore(MemoryConfig(keep=1))
    for _ in range(3):
        await one.put("a", {}, **WHY)
    assert [r.revision for r in await one.history("a")] == [3]


# ------------------------------------------------------------------------------------------------ sick records


class SickRecords(MemoryConfig):
    """Records that can be down, hang, or be restored from an old backup."""

    def __init__(self) -> None:
        super().__init__()
        self.fault = ""

    async def newest(self, key: str) -> ConfigRevision | None:
        await self.be_sick()
        return await super().newest(key)

    async def after(self, key: str, revision: int, limit: int) -> Sequence[ConfigRevision]:
        await self.be_sick()
        return await super().after(key, revision, limit)

    async def be_sick(self) -> None:
        if self.fault == "down":
            raise ConfigError("the records cannot be reached")
        if self.fault == "hung":
            await anyio.sleep_forever()

    def restore(self, key: str, revision: int) -> None:
        self._kept[key] = [item for item in self._kept[key] if item.revision <= revision]


async def test_records_that_are_down_or_hang_are_an_error_and_change_nothing() -> None:
    records: SickRecords = SickRecords()
    store = ConfigStore(records, timeout=0.01)
    await store.put("a", {}, **WHY)
    watch = store.watch("a")
    for fault, error in (("down", ConfigError), ("hung", DeadlineExceeded)):
        records.fault = fault
        for call in (store.get("a"), store.put("a", {"n": 1}, **WHY), store.history("a"), watch.__anext__()):
            with pytest.raises(error):
                await call
    records.fault = ""
    assert [r.revision for r in await store.history("a")] == [1]
    assert (await watch.__anext__()).revision == 1


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_restored_backup_never_silently_goes_back(restarted: bool) -> None:
    records, journal = SickRecords(), MemoryJournal()
    store = ConfigStore(records, journal=journal)
    for number in range(1, 10):
        await store.put("a", {"n": number}, **WHY)
    watch = store.watch("a", after=9)
    records.restore("a", 5)
    if restarted:
        store = ConfigStore(records, journal=journal)
        watch = store.watch("a", after=9)
    with pytest.raises(ConfigError, match="went back from revision 9 to 5"):
        await store.get("a")
    with pytest.raises(ConfigError, match="went back from revision 9 to 5"):
        await watch.__anext__()
    with pytest.raises(ConfigConflict):
        await store.put("a", {"n": 10}, expect=9, **WHY)
    healed = await store.rollback("a", 5, **WHY)
    assert healed.revision == 10
    with anyio.fail_after(20):
        assert await watch.__anext__() == healed
    assert await store.get("a") == healed
    assert [r.revision for r in await store.history("a", after=4)] == [5, 10]
    assert await collect(store, "a", 6) == [1, 2, 3, 4, 5, 10]


PORTS: list[type[ConfigRecords]] = [MemoryConfig, SickRecords]  # mypy checks that they are
