"""Ten thousand documents that are wrong, each in a way of its own: none is stored, and each refusal names the field.

What is wrong is known, because a good document is made first, and broken then.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
import pytest
from pydantic import BaseModel, ConfigDict, Field

from agentfleet import ConfigInvalid, ConfigStore, MemoryJournal
from agentfleet.core.documents import write_path
from agentfleet.stores.config import ConfigRecords
from agentfleet.stores.config_memory import MemoryConfig

COUNT, COUNT_IN_A_DATABASE = 10_000, 500
CANARY = "canary-7f3a"
"""Stands where a secret would: no message may repeat it."""
Place = tuple[str | int, ...]


class Tool(BaseModel):
    """A tool that agents may use."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(min_length=1, max_length=40)]
    limit: Annotated[int, Field(ge=1, le=100)]
    kind: Literal["read", "write"]


class Budget(BaseModel):
    """What may be spent."""

    model_config = ConfigDict(extra="forbid")
    least: Annotated[int, Field(ge=0)]
    most: Annotated[int, Field(ge=0)]
    per_model: dict[str, float]


class Document(BaseModel):
    """What agents are told."""

    model_config = ConfigDict(extra="forbid")
    model: Annotated[str, Field(pattern="^[a-z]+-[0-9]+$")]
    temperature: Annotated[float, Field(ge=0, le=2)]
    streams: bool
    tools: list[Tool]
    budget: Budget
    notes: str | None = None


SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["model", "temperature", "streams", "tools", "budget"],
    "properties": {
        "model": {"type": "string", "pattern": "^[a-z]+-[0-9]+$"},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
        "streams": {"type": "boolean"},
        "notes": {"type": ["string", "null"]},
        "tools": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["name", "limit", "kind"],
                "properties": {
                    "name": {"type": "string", "minLength": 1, "maxLength": 40},
                    "limit": {"type": "integer", "minimum": 1, "maximum": 100},
                    "kind": {"enum": ["read", "write"]},
                },
            },
        },
        "budget": {
            "type": "object",
            "additionalProperties": False,
            "required": ["least", "most", "per_model"],
            "properties": {
                "least": {"type": "integer", "minimum": 0},
                "most": {"type": "integer", "minimum": 0},
                "per_model": {"type": "object", "additionalProperties": {"type": "number"}},
            },
        },
    },
}


def consistent(document: dict[str, Any]) -> dict[str, str]:
    """A rule across fields that names them."""
    found = {}
    if document["budget"]["least"] > document["budget"]["most"]:
        found["budget.least"] = "must be no greater than budget.most"
    names = [tool["name"] for tool in document["tools"]]
    for number, name in enumerate(names):
        if name in names[:number]:
            found[f"tools.{number}.name"] = "is there twice"
    return found


async def priced(document: dict[str, Any]) -> None:
    """Another one, async, that raises."""
    await anyio.lowlevel.checkpoint()
    if document["model"] not in document["budget"]["per_model"]:
        raise ValueError("budget.per_model has no price of the model")


# ------------------------------------------------------------------------------------------------ good documents


def good(rng: random.Random) -> dict[str, Any]:
    """Any document that is right."""
    model = f"{''.join(rng.choices('abcxyz', k=rng.randint(1, 9)))}-{rng.randrange(1000)}"
    least = rng.randrange(1000)
    document: dict[str, Any] = {
        "model": model,
        "temperature": rng.choice([0, 2, 1.5, rng.random()]),
        "streams": rng.random() < 0.5,
        "tools": [
            {"name": f"tool {number}", "limit": rng.randint(1, 100), "kind": rng.choice(["read", "write"])}
            for number in range(rng.randint(2, 5))
        ],
        "budget": {
            "least": least,
            "most": least + rng.randrange(1000),
            "per_model": {model: 1.5, "other": rng.random()},
        },
    }
    if rng.random() < 0.5:
        document["notes"] = rng.choice([None, "", "ünïcödé ☃", "two\nlines"])
    return document


# ------------------------------------------------------------------------------------------------ what breaks them


class Kind(Enum):
    """What is broken, and so what refuses it; the first that does is heard alone."""

    PLAIN = "no plain JSON"
    SIZE = "too large or too deep"
    SECRET = "secrets"
    SCHEMA = "the schema"
    CROSS = "rules across fields"


Named = tuple[str, ...]
"""Words that the refusal must hold, all in one line, which begins with the first."""


def at(document: Any, place: Place) -> Any:
    for part in place:
        document = document[part]
    return document


def some_place(rng: random.Random, document: dict[str, Any]) -> Place:
    """Any field that holds no other."""
    tool = rng.randrange(len(document["tools"]))
    return rng.choice(
        [
            ("model",),
            ("temperature",),
            ("streams",),
            *((("tools", tool, name)) for name in ("name", "limit", "kind")),
            ("budget", "least"),
            ("budget", "most"),
            ("budget", "per_model", "other"),
        ]
    )


def set_(document: Any, place: Place, value: Any) -> None:
    at(document, place[:-1])[place[-1]] = value


WRONG: dict[str, list[Any]] = {
    "model": [None, 3, [], {}, "", "UPPER-1", "no number", True],
    "temperature": [None, "warm", -0.001, 2.001, [1], {}, 1e308, -(2**63)],
    "streams": [None, "perhaps", 7, [], {}, 0.5],
    "name": [None, "", "x" * 41, 5, [], {}],
    "limit": [None, 0, 101, 1.5, "many", [], {}, 2**63 - 1],
    "kind": [None, "rw", "", 1, ["read"], {}],
    "least": [None, -1, 0.5, "little", [], {}],
    "most": [None, -1, 0.5, "much", [], {}],
    "other": [None, "dear", [], {}],
}
NO_JSON: list[Callable[[], Any]] = [
    lambda: float("nan"),
    lambda: float("inf"),
    lambda: float("-inf"),
    lambda: b"bytes",
    lambda: {1, 2},
    frozenset,
    object,
    lambda: 1j,
    lambda: "\ud800",
    lambda: "a\udfffb",
    lambda: 2**63,
    lambda: -(10**40),
    lambda: range(3),
    lambda: iter(()),
    lambda: bytearray(b"x"),
    lambda: Path("x"),
    lambda: Exception("x"),
    lambda: len,
    lambda: Kind.PLAIN,
]


def break_plain(rng: random.Random, document: dict[str, Any]) -> Named:
    place = some_place(rng, document)
    if rng.random() < 0.15:
        key = rng.choice([1, None, 2.5, ("a",), True, "\udc00"])
        at(document, place[:-1])[key] = 1
        return (f"{write_path(place[:-1])}: key ", "is not a string")
    set_(document, place, rng.choice(NO_JSON)())
    return (f"{write_path(place)}: ",)


def break_size(rng: random.Random, document: dict[str, Any]) -> Named:
    place = some_place(rng, document)
    kind = rng.randrange(3)
    if kind == 0:
        deep: Any = 1
        for number in range(rng.choice([64, 70, 3000])):
            deep = [deep] if number % 2 else {"a": deep}
        set_(document, place, deep)
        return (write_path(place), "is nested more than 64 deep")
    if kind == 1:
        document["notes"] = "☃" * 30_000  # of more bytes than characters
        return ("(the whole): is ", "the largest part is notes")
    set_(document, place, ["x" * 1000] * rng.choice([70, 10_000]))
    return ("(the whole): is more than 65536 bytes", f"too large at {write_path(place)}.")


def break_secret(rng: random.Random, document: dict[str, Any]) -> Named:
    place = some_place(rng, document)[:-1]
    name = rng.choice(["api_key", "dbPassword", "auth-token", "client_secret", "credentials", "PRIVATE_KEY", "apikey"])
    kind = rng.randrange(4)
    here: Any = [CANARY, [CANARY], {"$secret": ""}, {"$secret": "openai-key", "value": CANARY}][kind]
    at(document, place)[name] = here
    return (write_path((*place, name, "$secret") if kind == 2 else (*place, name)) + ": ",)


def break_schema(rng: random.Random, document: dict[str, Any], *, by_model: bool) -> Named:
    place = some_place(rng, document)
    parent, name = place[:-1], str(place[-1])
    kind = rng.random()
    if kind < 0.15 and name != "other":
        del at(document, parent)[name]
        return (f"{write_path(place)}: ",) if by_model else (f"{write_path(parent)}: ", f"'{name}'")
    if kind < 0.3 and parent != ("budget", "per_model"):
        extra = rng.choice(["temprature", "Model", "x y", "", "ключ"])
        at(document, parent)[extra] = 1
        if by_model:
            return (f"{write_path((*parent, extra))}: ",)
        return (f"{write_path(parent)}: ", f"'{extra}'")
    if kind < 0.4:
        whole: Place = rng.choice([("tools",), ("budget",), ("tools", 0), ("budget", "per_model")])
        set_(document, whole, rng.choice([None, 3, "text", True]))
        return (f"{write_path(whole)}: ",)
    set_(document, place, rng.choice(WRONG[name]))
    return (f"{write_path(place)}: ",)


def break_cross(rng: random.Random, document: dict[str, Any]) -> Named:
    kind = rng.randrange(3)
    if kind == 0:
        document["budget"]["least"] = document["budget"]["most"] + rng.randint(1, 9)
        return ("budget.least: ",)
    if kind == 1:
        first, second = sorted(rng.sample(range(len(document["tools"])), 2))
        document["tools"][second]["name"] = document["tools"][first]["name"]
        return (f"tools.{second}.name: ",)
    document["budget"]["per_model"].pop(document["model"], None)
    return ("(the whole): ", "budget.per_model")


def broken(rng: random.Random, kind: Kind, *, by_model: bool) -> tuple[Any, Named]:
    """A document that is wrong, and what the refusal must say."""
    document = good(rng)
    known: dict[Kind, Callable[[random.Random, dict[str, Any]], Named]] = {
        Kind.PLAIN: break_plain,
        Kind.SIZE: break_size,
        Kind.SECRET: break_secret,
        Kind.SCHEMA: partial(break_schema, by_model=by_model),
        Kind.CROSS: break_cross,
    }
    if kind is Kind.SCHEMA and rng.random() < 0.02:
        return rng.choice([None, 3, "text", [], [document], True]), ("(the whole): ",)
    return document, known[kind](rng, document)


# ------------------------------------------------------------------------------------------------ the test


async def refusal_of(store: ConfigStore, key: str, document: object, expect: int | None) -> str | None:
    """Why it was refused; None if it was stored."""
    try:
        await store.put(key, document, author="ann", reason="bad", expect=expect)
    except ConfigInvalid as error:
        return str(error)
    return None


async def refused(records: ConfigRecords, count: int, seed: int) -> dict[Kind, int]:
    """Try so many; how many of each kind there were."""
    rng, journal = random.Random(seed), MemoryJournal(limit=2 * count + 100)
    store = ConfigStore(records, journal=journal, max_bytes=65_536)
    stored = {}
    for key, schema in (("model", Document), ("schema", SCHEMA)):
        store.register(key, schema=schema, validators=[consistent, priced])
        stored[key] = await store.put(key, good(rng), author="ann", reason="good")
    before, counts = len(journal.read()), dict.fromkeys(Kind, 0)
    for number in range(count):
        key, kind = rng.choice(["model", "schema"]), rng.choice(list(Kind))
        document, words = broken(rng, kind, by_model=key == "model")
        refusal = await refusal_of(store, key, document, rng.choice([None, 1]))
        told = f"document {number} of seed {seed}, {kind.value}, {words}: {refusal or repr(document)[:2000]}"
        lines = (refusal or "").splitlines()[1:]
        assert any(line.startswith(f"  {words[0]}") and all(word in line for word in words) for line in lines), told
        assert CANARY not in (refusal or "")
        assert len(refusal or "") < 8_000
        counts[kind] += 1
    for key, first in stored.items():
        assert await store.history(key) == [first], "something was applied"
    events = journal.read()[before:]
    assert [event.kind for event in events] == ["config.rejected"] * count
    assert not any(CANARY in event.to_json() for event in events)
    return counts


def test_ten_thousand_are_refused_by_name() -> None:
    counts = anyio.run(refused, MemoryConfig(), COUNT, 4)
    assert min(counts.values()) > COUNT / 10, json.dumps({kind.value: number for kind, number in counts.items()})


@pytest.mark.integration
def test_nor_does_one_get_into_a_database(tmp_path: Path) -> None:
    sql = pytest.importorskip("agentfleet.stores.sql")

    async def test() -> None:
        async with sql.Database(f"sqlite:///{tmp_path / 'config.db'}") as database:
            await refused(sql.SqlConfig(database), COUNT_IN_A_DATABASE, 5)

    anyio.run(test)


def test_what_is_not_broken_is_stored() -> None:
    """The documents are right before they are broken."""

    async def test() -> None:
        rng, store = random.Random(6), ConfigStore()
        for key, schema in (("model", Document), ("schema", SCHEMA)):
            store.register(key, schema=schema, validators=[consistent, priced])
            for _ in range(200):
                await store.put(key, good(rng), author="ann", reason="good")

    anyio.run(test)
