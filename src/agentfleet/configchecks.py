"""What a configuration document must satisfy: a pydantic model or JSON schema, and functions of the user's own."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from agentfleet.core.documents import Problem, write_path
from agentfleet.errors import ConfigError, MissingExtra, SpecError

Findings = None | str | Iterable[str]
"""What a validator found: nothing, one problem, or several."""

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

    __slots__ = ("_schema", "_validators")

    def __init__(self, schema: Schema | None, validators: Iterable[Validator]) -> None:
        """Prepare; raises `SpecError` for a bad schema, `MissingExtra` if JSON schema is not installed."""
        self._validators = tuple(validators)
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
        found = list(self._schema(text)) if self._schema is not None else []
        if not found:
            for validator in self._validators:
                found += [Problem("(the whole)", message) for message in await _run(validator, json.loads(text))]
        return found


async def _run(validator: Validator, document: Any) -> list[str]:
    try:
        findings = validator(document)
        if inspect.isawaitable(findings):
            findings = await findings
    except ValueError as error:
        return [str(error) or type(error).__name__]
    if findings is None:
        return []
    return [findings] if isinstance(findings, str) else list(findings)


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
        referencing = importlib.import_module("referencing.exceptions")
    except ImportError as error:
        raise MissingExtra("JSON schemas need jsonschema: pip install 'agentfleet[jsonschema]'") from error
    try:
        own = json.loads(json.dumps(dict(schema), allow_nan=False))  # later changes to it shall change nothing here
        kind = jsonschema.validators.validator_for(own, default=jsonschema.Draft202012Validator)
        kind.check_schema(own)
    except (ValueError, TypeError, RecursionError, jsonschema.SchemaError) as error:
        raise SpecError(f"schema: not a JSON schema: {getattr(error, 'message', error)}") from error
    # with a registry of its own the library fetches nothing from the network for a "$ref"
    validator = kind(own, registry=specifications.REGISTRY, format_checker=kind.FORMAT_CHECKER)

    def check(text: str) -> Iterator[Problem]:
        try:
            for error in validator.iter_errors(json.loads(text)):
                yield _say(jsonschema.exceptions.best_match([error]))
        except referencing.Unresolvable as error:
            raise ConfigError(
                f"the JSON schema refers to {error.ref!r}, which it does not contain; inline it"
            ) from error

    return check


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
