"""What every spec is: a frozen, strict pydantic model that writes itself in words, and says which field is wrong."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import json
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from agentfleet.errors import SpecError
from agentfleet.units import show

_MOST_LINES = 20
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", re.ASCII)


def _listed(value: object) -> object:
    """Lists become tuples, so that YAML, JSON and Python callers may all write [a, b]."""
    if isinstance(value, str):
        raise PydanticCustomError("list", "must be a list such as ['python', '-m', 'my_agent'], not one text")
    return tuple(value) if isinstance(value, list) else value


def _quoted(value: object) -> object:
    """YAML reads 1.10 as the number 1.1: whoever means a text must say so."""
    if isinstance(value, int | float):
        raise PydanticCustomError("text", "must be text; write it in quotes, as in '1.10'")
    return value


if TYPE_CHECKING:
    Listed = Sequence
else:

    class Listed:
        """Written as any list, kept as a tuple: what `Sequence` means to a type checker here."""

        def __class_getitem__(cls, item: object) -> object:
            """The pydantic form of a list of `item`."""
            return Annotated[tuple[item, ...], BeforeValidator(_listed)]


def is_name(value: str) -> bool:
    """Whether a fleet may be called so."""
    return _NAME.fullmatch(value) is not None


def _name(value: str) -> str:
    if not is_name(value):
        raise PydanticCustomError(
            "name", "use 1 to 63 lower-case letters, digits and '-', starting and ending with a letter or digit"
        )
    return value


def _text(value: str) -> str:
    if not value or not value.isprintable():
        raise PydanticCustomError("text", "must be printable text and not empty")
    return value


def _argument(value: str) -> str:
    if not value or "\0" in value:
        raise PydanticCustomError("text", "must not be empty and hold no NUL; several lines are fine")
    return value


def _path(value: str) -> str:
    if not value.startswith("/") or not value.isascii() or not value.isprintable() or " " in value:
        raise PydanticCustomError("path", "must be an absolute URL path such as '/health'")
    return value


Name = Annotated[str, AfterValidator(_name), Field(examples=["researchers"])]
Text = Annotated[str, Field(max_length=4096), BeforeValidator(_quoted), AfterValidator(_text)]
Argument = Annotated[str, Field(max_length=131_072), AfterValidator(_argument)]
UrlPath = Annotated[str, Field(max_length=1024, examples=["/health"]), AfterValidator(_path)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]
Positive = Annotated[int, Field(ge=1, le=1_000_000)]
Ratio = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Metric = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Spec(BaseModel):
    """Base of every spec: frozen, strict, no unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        defer_build=True,
        ser_json_inf_nan="constants",
    )

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: object) -> object:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    written = key if isinstance(key, str) and len(key) <= 80 and key.isprintable() else show(key)
                    close = difflib.get_close_matches(written, cls.model_fields, n=1)
                    hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(cls.model_fields)}"
                    raise PydanticCustomError(
                        "unknown_field", "unknown field '{field}'; {hint}", {"field": written, "hint": hint}
                    )
        return data

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema)["properties"]
        for field, words in _told(cls).items():
            properties[field]["description"] = words
        return schema

    @classmethod
    def parse(cls, data: object, *, source: str = "input") -> Self:
        """Validate plain data (dicts, lists, words).

        Raises:
            SpecError: Each wrong field on a line of its own, with the fix.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise SpecError(describe(error, f"{source} is not a valid {cls.__name__}")) from error

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Read a spec from YAML text; raises `SpecError` that names each wrong field."""
        from agentfleet import yamltext  # noqa: PLC0415 - PyYAML takes long to import, and specs are made without it too

        if not isinstance(text, str):
            raise SpecError(f"from_yaml takes YAML text, not {type(text).__name__}; read a file first")
        data = yamltext.read(text)
        if isinstance(data, str):
            raise SpecError(
                f"from_yaml takes YAML text with a {cls.__name__}'s fields, not {show(data)}; read a file first"
            )
        return cls.parse(data, source="the YAML text")

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a spec from JSON text; raises `SpecError` that names each wrong field."""
        try:
            data = json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"this is not JSON: {error}") from error
        return cls.parse(data, source="the JSON text")

    def to_dict(self) -> dict[str, Any]:
        """Plain data in words, without fields left at their defaults of None."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_json(self) -> str:
        """JSON text that `from_json` reads back to an equal spec."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def to_yaml(self) -> str:
        """YAML text that `from_yaml` reads back to an equal spec."""
        from agentfleet import yamltext  # noqa: PLC0415

        return yamltext.write(self.to_dict())

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated like a new one."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)


def describe(error: ValidationError, title: str) -> str:
    """A validation error as people read it: one line a field."""
    lines = [f"{title}:"]
    found = error.errors(include_url=False, include_input=False, include_context=False)
    for item in found[:_MOST_LINES]:
        place = ".".join(str(part) if len(str(part)) <= 80 else show(part) for part in item["loc"]) or "(the whole)"
        lines.append(f"  {place}: {item['msg']}".encode("utf-8", "backslashreplace").decode())
    if len(found) > _MOST_LINES:
        lines.append(f"  … and {len(found) - _MOST_LINES} more")
    return "\n".join(lines)


@functools.cache
def _told(model: type[Spec]) -> dict[str, str]:
    """What the docstrings under a model's fields say; nothing where there is no source.

    pydantic would read them from the source as each class is made, which takes longer than making it: a schema is
    asked for once in a while, an import happens every time.
    """
    told: dict[str, str] = {}
    for each in reversed(model.__mro__):
        if issubclass(each, Spec):
            try:
                (definition,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
            except OSError:
                continue
            assert isinstance(definition, ast.ClassDef)
            for pair in pairwise(definition.body):
                match pair:
                    case ast.AnnAssign(target=ast.Name(id=field)), ast.Expr(value=ast.Constant(value=str(words))):
                        told[field] = inspect.cleandoc(words)
    return told


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys all differ: of two that are equal the last would silently win."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {show(twice)} stands twice in one object; remove one")
    return found
