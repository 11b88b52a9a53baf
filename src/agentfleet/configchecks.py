"""What a configuration document must satisfy: a pydantic model or JSON schema, and functions of the user's own."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from agentfleet.core.documents import WHOLE, Problem, write_path
from agentfleet.core.secrets import find_secrets
from agentfleet.errors import ConfigError, MissingExtra, SpecError

Findings = None | str | Iterable[str] | Mapping[str, str]
"""What a validator found: nothing, one problem, several, or what is wrong with each field, by its path."""

Validator = Callable[[Any], Findings | Awaitable[Findings]]
"""Takes the document (a copy of its own) and returns what is wrong; raising ValueError says the same."""

Schema = type[BaseModel] | Mapping[str, Any]

_TELLING = ("required", "additionalProperties", "unevaluatedProperties", "dependentRequired", "propertyNames")
_WORDS = {
    "type": "must be of type",
    "enum": "must be one of",
    "const": "must be",
    "minimum": "must be at least",
    "maximum": "must be at most",
    "exclusiveMinimum": "must be more than",
    "exclusiveMaximum": "must be less than",
    "multipleOf": "must be a multiple of",
    "minLength": "must have at least this many characters:",
    "maxLength": "must have at most this many characters:",
    "minItems": "must have at least this many items:",
    "maxItems": "must have at most this many items:",
    "pattern": "must match the pattern",
    "format": "must be in the format",
}


class Checks:
    """Everything registered for one key."""

    __slots__ = ("_plain_secrets", "_schema", "_validators")

    def __init__(
        self, schema: Schema | None = None, validators: Iterable[Validator] = (), *, plain_secrets: bool = False
    ) -> None:
        """Prepare; raises `SpecError` for a bad schema, `MissingExtra` if JSON schema is not installed."""
        self._validators = tuple(validators)
        self._plain_secrets = plain_secrets
        self._schema: Callable[[str], Iterator[Problem]] | None = None
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            self._schema = _by_model(schema)
        elif isinstance(schema, Mapping):
            self._schema = _by_json_schema(schema)
        elif schema is not None:
            raise SpecError(f"schema: must be a pydantic model class or a JSON schema dictionary; got {schema!r:.80}")

    async def problems(self, text: str) -> list[Problem]:
        """What is wrong with a document, given as JSON text. The functions run only once the schema is satisfied.

        An exception other than ValueError is a bug in the user's function and comes out as it is.
        """
        found = [] if self._plain_secrets else list(find_secrets(json.loads(text)))
        if found:
            return found  # alone: what others say of such a field might tell what it holds
        found = list(self._schema(text)) if self._schema is not None else []
        if not found:
            for validator in self._validators:
                found += await _run(validator, json.loads(text))
        return found


async def _run(validator: Validator, document: Any) -> list[Problem]:
    try:
        findings = validator(document)
        if inspect.isawaitable(findings):
            findings = await findings
    except ValueError as error:
        findings = str(error) or type(error).__name__
    if findings is None:
        return []
    if isinstance(findings, Mapping):
        return [Problem(path, message) for path, message in findings.items()]
    return [Problem(WHOLE, message) for message in ([findings] if isinstance(findings, str) else findings)]


def _by_model(model: type[BaseModel]) -> Callable[[str], Iterator[Problem]]:
    def check(text: str) -> Iterator[Problem]:
        try:
            model.model_validate_json(text)
        except ValidationError as error:
            for item in error.errors(include_url=False, include_input=False, include_context=False):
                yield Problem(write_path(item["loc"]), item["msg"])

    return check


def _by_json_schema(schema: Mapping[str, Any]) -> Callable[[str], Iterator[Problem]]:
    try:
        jsonschema = importlib.import_module("jsonschema")
        specifications = importlib.import_module("jsonschema_specifications")
        referencing = importlib.import_module("referencing.jsonschema")
        unresolvable = importlib.import_module("referencing.exceptions").Unresolvable
    except ImportError as error:
        raise MissingExtra("JSON schemas need jsonschema: pip install 'agentfleet[jsonschema]'") from error
    try:
        own = json.loads(json.dumps(dict(schema), allow_nan=False))  # later changes to it shall change nothing here
        kind = jsonschema.validators.validator_for(own, default=jsonschema.Draft202012Validator)
        kind.check_schema(own)
    except (ValueError, TypeError, RecursionError, jsonschema.SchemaError) as error:
        raise SpecError(f"schema: not a JSON schema: {getattr(error, 'message', error)}") from error
    # with a registry of its own the library fetches nothing from the network for a "$ref"
    registry = specifications.REGISTRY
    root = referencing.specification_with(kind.META_SCHEMA["$schema"]).create_resource(own)
    try:
        _resolve(root, registry.resolver_with_root(root))
    except unresolvable as error:
        raise SpecError(f"schema: {_dangling(error)}") from error
    except (ValueError, RecursionError) as error:
        raise SpecError(f"schema: a reference cannot be followed: {error}") from error
    validator = kind(own, registry=registry, format_checker=kind.FORMAT_CHECKER)

    def check(text: str) -> Iterator[Problem]:
        try:
            for error in validator.iter_errors(json.loads(text)):
                yield _say(jsonschema.exceptions.best_match([error]))
        except unresolvable as error:  # a dynamic one: where it leads depends on the document
            raise ConfigError(f"the JSON schema {_dangling(error)}") from error

    return check


def _resolve(schema: Any, resolver: Any) -> None:
    """Follow each "$ref" of a schema once: one that leads nowhere is found before a document needs it."""
    contents = schema.contents
    if isinstance(contents, dict) and isinstance(contents.get("$ref"), str):
        resolver.lookup(contents["$ref"])
    for each in schema.subresources():
        _resolve(each, resolver.in_subresource(each))


def _dangling(error: Any) -> str:
    where = error.ref or getattr(error, "anchor", "")  # an anchor is not in what the library calls the reference
    return f"refers to {where!r}, which it does not contain; inline it"


def _say(error: Any) -> Problem:
    """A schema violation in words. Never the offending value: it may be a secret, and problems are recorded."""
    keyword = str(error.validator)
    if keyword in _TELLING:
        message = str(error.message)
    elif keyword in _WORDS:
        message = f"{_WORDS[keyword]} {json.dumps(error.validator_value, ensure_ascii=False)}"
    elif error.validator is None:
        message = "is not allowed here; remove it"
    else:
        message = f"does not satisfy the schema's {keyword!r}"
    return Problem(write_path(list(error.absolute_path)), message[:300])
