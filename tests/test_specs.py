"""Specs: whatever is put into any field, the answer is a valid spec or an error that names the field."""

from __future__ import annotations

import copy
import json
import math
import pickle
import reprlib
import typing
from collections.abc import Iterator
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from agentfleet import specs
from agentfleet.errors import SpecError
from agentfleet.specbase import Spec
from agentfleet.specs import AgentTemplate, Backoff, CustomCheck, FleetSpec, HttpCheck, RecoveryPolicy, ScalingPolicy
from agentfleet.testing.strategies import fleet_specs

MODELS: list[type[Spec]] = sorted(
    (
        each
        for each in vars(specs).values()
        if isinstance(each, type) and issubclass(each, Spec) and each is not Spec and not each.__name__.startswith("_")
    ),
    key=lambda each: each.__name__,
)

LEAST: dict[str, dict[str, Any]] = {
    "AgentTemplate": {"command": ["x"]},
    "CpuTarget": {"utilization": 50},
    "MemoryTarget": {"utilization": 50},
    "QueueTarget": {"length": 2},
    "MetricTarget": {"metric": "m", "value": 1.0},
    "ScalingRule": {"count": 1},
    "ScalingBehavior": {"stabilization": 0, "rules": [{"count": 1}]},
    "ScalingPolicy": {"max_replicas": 5},
    "CustomCheck": {"call": "package.module:function"},
    "KubernetesOptions": {"image": "registry/agent:1"},
    "FleetSpec": {"name": "a", "template": {"command": ["x"]}},
}
"""What a model needs at the least; others need nothing."""

FIELDS = [(model, field) for model in MODELS for field in model.model_fields]
IDS = [f"{model.__name__}.{field}" for model, field in FIELDS]


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def knot() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


HUGE = "x" * (1 << 20)
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, -1.5, 0.5, 1e308, 5e-324, math.nan, math.inf, -math.inf, 10**18, 10**400, -(10**400),
    10**5000, "", " ", "x", "\ud800", "\0", "☃" * 10, HUGE, "9" * (1 << 20), "9" * 5000, "1e5", "NaN", "-1s", "0s",
    "1" * 16 + "d", "999999999999999d", "999999999999999P", "101%", "0%", "10%", "٣s", "0x10", "1_0", "/x y", "a:b\n",
    [], {}, [None], [[]], [HUGE], {"a": 1}, {"kind": "cpu"}, {"kind": "nope"}, {"kind": deep(2000)}, [{"kind": []}],
    [{"kind": "http"}], [{"kind": "http", "pth": 1}], [{}] * 1000, {1: 2}, {None: None}, {"": ""}, {"A": "b"},
    {"A=B": "c"}, {"A": "\0"}, {"\ud800": "x"}, {HUGE: 1}, {10**5000: 1}, b"x", b"\xff", object(), (), ("x",), set(),
    {1}, int, deep(2000), knot(), 1j, Backoff(), range(3),
]  # fmt: skip


def outcome(model: type[Spec], data: dict[str, Any], field: str) -> Spec | None:
    """The spec, if the data is one; checks that a refusal names the field, in both forms, in few words."""
    try:
        made = model(**data)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        assert any(field in map(str, item["loc"]) or field in item["msg"] for item in found), found
        made = None
    try:
        parsed = model.parse(data)
    except SpecError as error:
        assert made is None
        text = str(error)
        assert field in text
        assert len(text) < 10_000
        assert text.encode()
        return None
    assert parsed == made
    return parsed


@pytest.mark.parametrize(("model", "field"), FIELDS, ids=IDS)
def test_every_field_survives_every_junk(model: type[Spec], field: str) -> None:
    for junk in JUNK:
        data = {**LEAST.get(model.__name__, {}), field: junk}
        made = outcome(model, data, field)
        if made is not None:
            assert_round_trips(made, reprlib.repr(junk))


@pytest.mark.parametrize(("model", "field"), FIELDS, ids=IDS)
def test_every_field_may_be_absent_or_is_named(model: type[Spec], field: str) -> None:
    data = {name: value for name, value in LEAST.get(model.__name__, {}).items() if name != field}
    made = outcome(model, data, field) if field in LEAST.get(model.__name__, {}) and not one_of(model) else None
    assert made is None or model.model_fields[field].is_required() is False


def one_of(model: type[Spec]) -> bool:
    """Whether a rule over several fields, none of them required, decides."""
    return model.__name__ in ("MetricTarget", "ScalingRule")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | SCALARS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_values_in_random_fields(data: st.DataObject) -> None:
    model, field = data.draw(st.sampled_from(FIELDS))
    made = outcome(model, {**LEAST.get(model.__name__, {}), field: data.draw(VALUES)}, field)
    if made is not None:
        assert_round_trips(made, field)


@given(data=VALUES)
def test_whole_inputs_of_any_kind(data: object) -> None:
    for model in (FleetSpec, ScalingPolicy):
        with pytest.raises(SpecError, match=model.__name__):
            model.parse(data)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spec=fleet_specs(), data=st.data())
def test_one_wrong_leaf_in_a_valid_spec_is_named(spec: FleetSpec, data: st.DataObject) -> None:
    plain = spec.to_dict()
    place = data.draw(st.sampled_from(list(leaves(plain))))
    holder: Any = plain
    for part in place[:-1]:
        holder = holder[part]
    holder[place[-1]] = object()
    with pytest.raises(SpecError) as caught:
        FleetSpec.parse(plain)
    named = [part for part in place if isinstance(part, str)]
    assert any(part in str(caught.value) for part in named[-2:])


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*place, key))
    elif place:
        yield place


# ------------------------------------------------------------------------------------------------ texts


def assert_round_trips(made: Spec, what: str) -> None:
    if callable(getattr(made, "call", None)):
        return  # only functions that can be imported by name can be written; see below
    model = type(made)
    assert model.parse(made.to_dict()) == made, what
    assert model.from_json(made.to_json()) == made, what
    assert model.from_yaml(made.to_yaml()) == made, what
    assert_agrees_with_schema(made)


SCHEMAS: dict[type[Spec], Any] = {}


def assert_agrees_with_schema(made: Spec) -> None:
    model = type(made)
    if model not in SCHEMAS:
        schema = model.model_json_schema()
        jsonschema.Draft202012Validator.check_schema(schema)
        SCHEMAS[model] = jsonschema.Draft202012Validator(schema)
    SCHEMAS[model].validate(json.loads(made.to_json()))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spec=fleet_specs())
def test_generated_specs_round_trip_and_agree_with_the_schema(spec: FleetSpec) -> None:
    assert_round_trips(spec, "generated")
    assert copy.deepcopy(spec) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert hash(copy.deepcopy(spec)) == hash(spec)
    assert spec.replace() == spec


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_the_schema_is_valid_and_refuses_unknown_keys(model: type[Spec]) -> None:
    schema = model.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["additionalProperties"] is False
    made = model.parse(LEAST.get(model.__name__, {}))
    assert_agrees_with_schema(made)


def test_the_schema_tells_what_stands_under_each_field() -> None:
    properties = HttpCheck.model_json_schema()["properties"]
    assert properties["period"]["description"] == "Time between probes of one instance."  # of the base
    assert properties["path"]["description"].startswith("Path on the instance's own address.")
    assert "description" not in properties["kind"]
    inner = FleetSpec.model_json_schema()["$defs"]["RecoveryPolicy"]["properties"]
    assert inner["backoff"] == {"$ref": "#/$defs/Backoff", "description": "Waiting between attempts on one instance."}


@pytest.mark.parametrize(
    "text",
    [
        "!!omap 3",
        "!!int ''", "!!bool x", "!!timestamp x", "!!float x", "!!set [1]", "!!python/object:os.system x", "[[",
        "? [a]\n: b", "a: *b", "%X", "\x00", "[" * 1500, "{a: 2024-99-99}", "0b", "&a [*a]", "a: &a {b: *a}", "\ud800",
        "9" * 5000, "", "- 1", "name: [", "name: a\n---\nname: b", "{? {a: b} : c}", "name: 2024-01-01", "!!binary '%'",
    ],
)  # fmt: skip
def test_texts_that_are_no_yaml_spec(text: str) -> None:
    with pytest.raises(SpecError):
        FleetSpec.from_yaml(text)


@pytest.mark.parametrize(
    "text", ["[" * 50_000, "9" * 5000, "nan", "\ud800", b"\xff", "", "{}", "[]", "NaN", '{"name": "\\ud800"}']
)
def test_texts_that_are_no_json_spec(text: str | bytes) -> None:
    with pytest.raises(SpecError):
        FleetSpec.from_json(text)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: a\nreplicas: 1\nreplicas: 2\n", "line 3: the key 'replicas' stands in line 2"),
        ("name: a\ntemplate:\n  command: [x]\n  env: {A: b, A: c}", "line 4: the key 'A' stands in line 4"),
        ("name: a\n'name': b", "line 2: the key 'name' stands in line 1"),
        ("<<: {name: a}\n<<: {name: b}", "line 2: the key '<<' stands in line 1"),
        ("- {a: 1}\n- {a: 1, b: 2,\n   b: 3}", "line 3: the key 'b' stands in line 2"),
    ],
)
def test_a_yaml_key_may_stand_once(text: str, line: str) -> None:
    with pytest.raises(SpecError, match=line):
        FleetSpec.from_yaml(text)


@pytest.mark.parametrize(
    "text", ["\x85", "a\x85b", " \n a", "\r", "\u2028", "\ufeff", "\t#", "'\"\\", "null", "1_0", "<<"]
)
def test_odd_texts_survive_yaml(text: str) -> None:
    made = AgentTemplate(command=("x", text), env={"A": text})
    assert AgentTemplate.from_yaml(made.to_yaml()) == made


def test_yaml_may_share_and_overrule_parts() -> None:
    text = """
        name: a
        template: {command: [x]}
        scaling:
          max_replicas: 9
          targets: [{kind: queue, length: 1}]
          up: &fast {stabilization: 0, tolerance: 0.5, rules: [{count: 1}]}
          down: {<<: *fast, stabilization: 60}
    """
    scaling = FleetSpec.from_yaml(text).scaling
    assert scaling is not None
    assert (scaling.down.stabilization, scaling.down.tolerance) == (60, 0.5)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"name": "a", "name": "b"}', "'name'"),
        ('{"name": "a", "template": {"command": ["x"], "env": {"A": "b", "B": "c", "A": "b"}}}', "'A'"),
    ],
)
def test_a_json_key_may_stand_once(text: str, key: str) -> None:
    with pytest.raises(SpecError, match=f"the key {key} stands twice"):
        FleetSpec.from_json(text)


@given(text=st.text() | st.binary())
def test_random_texts(text: str | bytes) -> None:
    with pytest.raises(SpecError):
        FleetSpec.from_json(text)
    if isinstance(text, str):
        with pytest.raises(SpecError):
            FleetSpec.from_yaml(text)


def test_an_error_in_a_text_names_each_wrong_field_on_a_line() -> None:
    with pytest.raises(SpecError) as caught:
        FleetSpec.from_yaml("name: Bad Name\ntemplate: {command: [x], cpu: lots}\nreplicas: -1\n")
    lines = str(caught.value).splitlines()
    assert lines[0] == "the YAML text is not a valid FleetSpec:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["name", "template.cpu", "replicas"]
    assert 'like "250m"' in lines[2]


def test_a_size_of_a_billion_is_refused_wherever_it_is_written() -> None:
    """The message names the field and the most that it may be."""
    good = FleetSpec.from_yaml("name: a\ntemplate: {command: [x]}\nreplicas: 1000000\n")
    most = "less than or equal to 1000000"
    for text in ("replicas: 1000000000", "scaling: {max_replicas: 1000000000}"):
        with pytest.raises(SpecError, match=f"replicas: .*{most}"):
            FleetSpec.from_yaml(f"name: a\ntemplate: {{command: [x], cpu: 1}}\n{text}\n")
    with pytest.raises(ValidationError, match=f"replicas\n.*{most}"):
        good.replace(replicas=10**9)
    with pytest.raises(SpecError, match="replicas must be a whole number from 0 to 1,000,000, not 1000000000"):
        good.check_size(10**9)


def test_a_thousand_errors_are_not_a_thousand_lines() -> None:
    with pytest.raises(SpecError) as caught:
        FleetSpec.parse({"name": "a", "template": {"command": ["x"], "env": {f"k{n}": n for n in range(1000)}}})
    assert len(str(caught.value).splitlines()) < 30
    assert "more" in str(caught.value)


# ------------------------------------------------------------------------------------------------ manners


@pytest.mark.parametrize(
    ("model", "key", "hint"),
    [
        (FleetSpec, "replica", "did you mean 'replicas'?"),
        (ScalingPolicy, "min_replica", "did you mean 'min_replicas'?"),
        (AgentTemplate, "comand", "did you mean 'command'?"),
        (Backoff, "zzz", "known are initial, factor, limit"),
        (Backoff, 10**5000, "known are initial"),
        (Backoff, HUGE, "known are initial"),
        (Backoff, None, "known are initial"),
    ],
    ids=range(7),
)
def test_unknown_keys_get_a_suggestion(model: type[Spec], key: Any, hint: str) -> None:
    with pytest.raises(SpecError) as caught:
        model.parse({**LEAST.get(model.__name__, {}), key: 1})
    assert hint in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_specs_are_frozen_and_hashable(model: type[Spec]) -> None:
    made = model.parse(LEAST.get(model.__name__, {}))
    for field in model.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(made, field, getattr(made, field))
    assert isinstance(hash(made), int)


def test_a_template_is_frozen_all_the_way_down() -> None:
    given_env = {"A": "1"}
    template = AgentTemplate(command=["x"], env=given_env)
    given_env["A"] = "2"
    env = typing.cast("dict[str, str]", template.env)
    for change in (
        lambda: env.__setitem__("A", "3"),
        lambda: env.pop("A"),
        lambda: env.update(A="3"),
        env.clear,
        lambda: env.setdefault("B", "3"),
        lambda: env.__delitem__("A"),
        env.popitem,
        lambda: env.__ior__({"A": "3"}),
    ):
        with pytest.raises(TypeError, match="frozen"):
            change()
    assert env == {"A": "1"}
    assert template.replace(env={"A": "9"}).env == {"A": "9"}


def test_defaults_are_written_once_and_not_shared() -> None:
    first, second = FleetSpec.parse(LEAST["FleetSpec"]), FleetSpec.parse(LEAST["FleetSpec"])
    assert first == second
    assert first.replace(replicas=3) != second


def test_replace_is_validated() -> None:
    spec = FleetSpec.parse(
        {
            **LEAST["FleetSpec"],
            "replicas": 2,
            "scaling": {"max_replicas": 5, "targets": [{"kind": "queue", "length": 1}]},
        }
    )
    assert spec.replace(replicas=5).replicas == 5
    for changes in ({"replicas": 6}, {"replica": 3}, {"name": ""}):
        with pytest.raises(ValidationError):
            spec.replace(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scaling": {"min_replicas": 6, "max_replicas": 5}}, "min_replicas \\(6\\) is more than max_replicas \\(5\\)"),
        (
            {"replicas": 9, "scaling": {"max_replicas": 5, "targets": [{"kind": "queue", "length": 1}]}},
            "replicas \\(9\\) is outside",
        ),
        ({"scaling": {"max_replicas": 5}}, "template.cpu, which is not set"),
        ({"rollout": {"max_surge": 0, "max_unavailable": "0.0%"}}, "nothing could move"),
        ({"rollout": {"min_ready": "1h"}}, "progress_deadline must be longer"),
        ({"recovery": {"backoff": {"initial": "10m"}}}, "initial is more than limit"),
        ({"template": {"command": ["x"], "env": {"A=B": "c"}}}, "'A=B' is no variable"),
    ],
)
def test_rules_over_several_fields(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        FleetSpec.parse(LEAST["FleetSpec"] | changes)


@given(initial=st.floats(0, 1e6), factor=st.floats(1, 100), limit=st.floats(0, 1e18), attempt=st.integers(-5, 10**6))
def test_backoff_rises_to_its_limit(initial: float, factor: float, limit: float, attempt: int) -> None:
    backoff = Backoff(initial=min(initial, limit), factor=factor, limit=limit)
    delay = backoff.delay(attempt)
    assert 0 <= delay <= limit
    assert delay <= backoff.delay(attempt + 1)
    assert backoff.delay(0) == 0
    assert backoff.delay(1) == backoff.initial


@pytest.mark.parametrize(
    ("share", "replicas", "budget"), [("10%", 5, 1), ("10%", 1000, 100), (0, 9, 0), ("0%", 9, 0), (3, 2, 3)]
)
def test_budget_of_disruption(share: int | str, replicas: int, budget: int) -> None:
    assert RecoveryPolicy(max_disrupted=share).budget(replicas) == budget


def probe(instance: object) -> bool:
    return True


def test_custom_checks_are_written_by_name() -> None:
    check = CustomCheck(call=probe)
    assert check.to_dict()["call"].endswith(":probe")
    assert CustomCheck.from_json(check.to_json()).call == check.to_dict()["call"]
    with pytest.raises(ValueError, match="cannot be imported by name"):
        CustomCheck(call=lambda _instance: True).to_json()


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("name: a\ntemplate: {command: python x, version: '1'}", "must be a list"),
        ("name: a\ntemplate: {command: [x], version: 1.10}", "in quotes"),
        ("fleet.yaml", "read a file first"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_what_newcomers_write_is_answered_with_the_fix(text: str, fix: str) -> None:
    with pytest.raises(SpecError, match=fix):
        FleetSpec.from_yaml(text)
