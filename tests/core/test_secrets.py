"""Which fields look like secrets, and what is said of them: where, and never what they hold."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentfleet.core.secrets import REFERENCE, find_secrets, is_secret


@pytest.mark.parametrize(
    "name",
    [
        "password",
        "dbPassword",
        "DB_PASSWORD",
        "auth-token",
        "token",
        "api_key",
        "apiKey",
        "APIKey",
        "apikey",
        "API_KEY",
        "client_secret",
        "private.key",
        "accessKey",
        "aws.credentials",
        "signingKey",
        "smtp_passwd",
        "password_1",
        "token2",
        "API_KEY_2",
        "api_keys",
        "apiKeys",
        "passwords",
        "secrets",
        "access_tokens",
        "db_pwd",
    ],
)
def test_these_look_like_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "max_tokens",
        "tokens",
        "tokenizer",
        "token_limit",
        "tokenUrl",
        "secret_name",
        "password_policy",
        "key",
        "keys",
        "sort_key",
        "primaryKey",
        "keyboard",
        "monkey",
        "123",
        "compass",
        "secretary",
        "max_tokens_2",
        "stop_tokens",
        "access_key_id",
        "key_1",
        "authorization",
        "tokens_per_minute",
        "-",
        "_",
    ],
)
def test_these_do_not(name: str) -> None:
    assert not is_secret(name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["model", "limits", "x"]), inner),
    max_leaves=10,
)
ONE = st.sampled_from(["password", "api_key", "authToken", "client-secret", "password_1", "token2"])
NAMES = ONE | st.sampled_from(["apiKeys", "secrets"])
SECRET = "hunter2-"
HELD = st.recursive(
    st.just(SECRET),
    lambda inner: st.builds(lambda it: [None, it], inner) | st.builds(lambda it: {"of": it, "on": True}, inner),
    max_leaves=3,
)
"""A secret, or one somewhere in what a field holds."""


def place_into(document: Any, path: list[str], value: Any) -> Any:
    """A document with a value somewhere inside."""
    for step in reversed(path):
        value = [document, value] if step == "[]" else {"beside": document, step: value}
    return value


PATHS = st.lists(st.sampled_from(["a", "b", "[]"]), max_size=4)


def told(document: Any) -> str:
    """The one problem's path. It never tells the secret, and always what to do."""
    (found,) = find_secrets(document)
    assert SECRET not in str(found)
    assert REFERENCE in found.message
    return found.path


@given(document=JSON, path=PATHS, name=NAMES, value=HELD)
def test_wherever_it_is_it_is_found_and_not_told(document: Any, path: list[str], name: str, value: Any) -> None:
    assert told(place_into(document, path, {name: value})).endswith((name, f'"{name}"'))


@given(document=JSON, path=PATHS, name=ONE, number=st.integers() | st.floats(allow_nan=False))
def test_a_number_may_be_a_secret_and_how_many_there_are_is_none(
    document: Any, path: list[str], name: str, number: float
) -> None:
    assert told(place_into(document, path, {name: number})).endswith((name, f'"{name}"'))
    assert not list(find_secrets(place_into(document, path, {"passwords": number, "api_keys": number})))


@given(document=JSON, path=PATHS, name=NAMES, labels=st.sampled_from([("name", "value"), ("key", "Value")]), value=HELD)
def test_a_pair_of_name_and_value_is_a_field(
    document: Any, path: list[str], name: str, labels: tuple[str, str], value: Any
) -> None:
    of, holds = labels
    assert told(place_into(document, path, {of: name, holds: value, "more": 1})).endswith(holds)
    for fine in ("", None, True, {REFERENCE: "openai"}, [{REFERENCE: "openai"}]):
        assert not list(find_secrets(place_into(document, path, {of: name, holds: fine})))
    assert not list(find_secrets(place_into(document, path, {of: "MODEL", holds: value})))


USERS = st.text("abcdefghijklmnopqrstuvwxyz0123456789-._", max_size=5)


@given(document=JSON, path=PATHS, user=USERS, scheme=st.sampled_from(["postgresql", "redis", "https", "amqp+ssl"]))
def test_a_url_holds_no_password(document: Any, path: list[str], user: str, scheme: str) -> None:
    url = f"{scheme}://{user}:{SECRET}@db.example:5432/name?x=1"
    for text in (url, f"see {url} and more", f"{scheme}://h/ {url}"):
        assert told(place_into(document, path, {"url": text})).endswith("url")
        assert told([{"url": "https://h"}, text]) == "1"
    for blank in ("${PASSWORD}", "$(PASSWORD)", "{password}", "<password>", "***"):
        assert not list(find_secrets(place_into(document, path, {"url": url.replace(SECRET, blank)})))
    for fine in (f"{scheme}://{user}@h/d", f"{scheme}://h:5432/a@b", f"{scheme}://h/a:b@c", "mailto:a:b@c", "a:b@c"):
        assert not list(find_secrets(place_into(document, path, {"url": fine})))


@pytest.mark.parametrize(
    ("document", "path"),
    [
        ({"api_keys": [SECRET]}, "api_keys"),
        ({"secrets": {"openai": SECRET}}, "secrets"),
        ({"password": {"value": "x"}}, "password"),
        ({"password": 12345}, "password"),
        ({"authorization": f"Bearer {SECRET}"}, "authorization"),
        ({"headers": {"Proxy-Authorization": [f"Basic {SECRET}"]}}, "headers.Proxy-Authorization"),
        ({"authorization": "sk-0123456789-0123456789"}, "authorization"),
        ({"env": [{"name": "A", "value": "b"}, {"name": "OPENAI_API_KEY", "value": SECRET}]}, "env.1.value"),
        ({"database_url": f"postgresql://u:{SECRET}@h/d"}, "database_url"),
        ({"password": [{REFERENCE: "a"}, {"of": SECRET}]}, "password"),
    ],
)
def test_ordinary_forms(document: Any, path: str) -> None:
    assert told(document).replace('"', "") == path


@pytest.mark.parametrize(
    "document",
    [
        {"max_tokens": 4096, "tokens": ["<eos>"], "stop_tokens": ["END"], "token_limit": 7, "tokenizer": "bpe"},
        {"password_policy": {"length": 12}, "secretary": "ann", "secret_name": "openai-key", "key": "a", "keys": ["b"]},
        {"authorization": "rbac", "env": [{"name": "MODEL", "value": "small"}, {"name": "max_tokens", "value": 7}]},
        {"password": {"current": {REFERENCE: "a"}, "previous": {REFERENCE: "b"}, "rotates": True, "hint": None}},
        {"env": [{"name": "API_KEY", "valueFrom": {"secretKeyRef": {"name": "openai", "key": "api"}}}]},
        {"database_url": "postgresql://fleet@db:5432/fleet", "time": "12:30", "at": "user:name@nowhere"},
    ],
)
def test_what_only_sounds_like_it_is_free(document: Any) -> None:
    assert not list(find_secrets(document))


@given(document=JSON, path=st.lists(st.sampled_from(["a", "b", "[]"]), max_size=4), name=NAMES)
def test_a_name_of_one_is_fine_wherever_it_is(document: Any, path: list[str], name: str) -> None:
    for value in ({REFERENCE: "openai"}, [{REFERENCE: "one"}, {REFERENCE: "two"}], None, "", [], {}, True):
        assert not list(find_secrets(place_into(document, path, {name: value})))


@pytest.mark.parametrize(
    ("document", "path"),
    [
        ({"a": {REFERENCE: ""}}, f'a."{REFERENCE}"'),
        ({"a": [{REFERENCE: 7}]}, f'a.0."{REFERENCE}"'),
        ({"a": {REFERENCE: "x", "more": 1}}, "a"),
    ],
)
def test_a_reference_that_is_none_is_named(document: Any, path: str) -> None:
    assert [each.path for each in find_secrets(document)] == [path]


@pytest.mark.parametrize("piece", ["a", "a://", "://a:", "://a:b@", "A1", "a:@/"])
def test_the_largest_document_is_looked_through_at_once(piece: str) -> None:
    """A megabyte of text that nearly fits must not hold up the event loop."""
    text = piece * (2**20 // len(piece))
    began = time.perf_counter()
    list(find_secrets({"text": text, text[:4000]: [text[:1000]], "authorization": text}))
    assert time.perf_counter() - began < 1.0
