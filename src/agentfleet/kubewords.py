"""Words as Kubernetes takes them: names, labels, quantities, and plain JSON that never changes.

The rules are those of `k8s.io/apimachinery/pkg/util/validation`, so that a spec is wrong here and not only there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from agentfleet.frozen import FrozenDict
from agentfleet.specbase import Text
from agentfleet.units import show

_MAX_DEPTH = 64
_MAX_VALUES = 100_000
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", re.ASCII)
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", re.ASCII)
_SERVICE = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", re.ASCII)
_WORD = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", re.ASCII)
_FILE = re.compile(r"[-._A-Za-z0-9]{1,253}", re.ASCII)
_VARIABLE = re.compile(r"[-._A-Za-z][-._A-Za-z0-9]*", re.ASCII)
_QUANTITY = re.compile(r"\d{1,15}(\.\d{1,9})?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?", re.ASCII)


def is_service_name(value: str) -> bool:
    """Whether a Service may have this name (RFC 1035 label)."""
    return bool(_SERVICE.fullmatch(value))


def is_variable_name(value: str) -> bool:
    """Whether every Kubernetes takes this as the name of an environment variable (1.30 became more generous)."""
    return bool(_VARIABLE.fullmatch(value))


def is_label_name(value: str) -> bool:
    """Whether this is a DNS-1123 label, which namespaces and containers are named by."""
    return bool(_LABEL.fullmatch(value))


def _label_name(value: str) -> str:
    if not is_label_name(value):
        raise PydanticCustomError("dns_label", "use 1 to 63 lower-case letters, digits and '-' (a DNS-1123 label)")
    return value


def _object_name(value: str) -> str:
    if len(value) > 253 or not _SUBDOMAIN.fullmatch(value):
        raise PydanticCustomError(
            "object_name", "use lower-case letters, digits, '-' and '.', at most 253 (a DNS-1123 subdomain)"
        )
    return value


def _service_name(value: str) -> str:
    if not is_service_name(value):
        raise PydanticCustomError(
            "service_name", "use 1 to 63 lower-case letters, digits and '-', the first a letter (DNS-1035)"
        )
    return value


def _qualified(value: str) -> str:
    prefix, slash, name = value.rpartition("/")
    if not _WORD.fullmatch(name) or (slash and (len(prefix) > 253 or not _SUBDOMAIN.fullmatch(prefix))):
        raise PydanticCustomError(
            "label_key", "write a key like 'team' or 'example.com/team': a DNS prefix, '/', at most 63 letters"
        )
    return value


def _label_value(value: str) -> str:
    if value and not _WORD.fullmatch(value):
        raise PydanticCustomError(
            "label_value", "use at most 63 letters, digits, '-', '_' and '.', letters or digits at both ends"
        )
    return value


def _file(value: str) -> str:
    if not _FILE.fullmatch(value) or value in (".", "..") or value.startswith(".."):
        raise PydanticCustomError("file", "use letters, digits, '-', '_' and '.', not beginning with '..'")
    return value


def _variable(value: str) -> str:
    if not is_variable_name(value):
        raise PydanticCustomError("variable", "use letters, digits, '_', '-' and '.', not beginning with a digit")
    return value


def _quantity(value: str) -> str:
    if not _QUANTITY.fullmatch(value):
        raise PydanticCustomError("quantity", 'write a quantity like "500m", "1Gi" or "2"')
    return value


def _absolute(value: str) -> str:
    if not value.startswith("/") or ":" in value:
        raise PydanticCustomError("path", "must be an absolute path without ':'")
    return value


def _image(value: str) -> str:
    if any(sign.isspace() for sign in value):
        raise PydanticCustomError("image", "write an image like 'agent:1.4.0', without spaces")
    return value


def _ours(keys: Mapping[str, str]) -> FrozenDict:
    for key in keys:
        if key.startswith("agentfleet.io/"):
            raise PydanticCustomError(
                "reserved", "keys that begin with 'agentfleet.io/' are agentfleet's own; choose another prefix"
            )
    return FrozenDict(keys)


def selector_labels(labels: Mapping[str, str]) -> FrozenDict:
    """Labels that may select a Deployment's pods for ever."""
    for key in ("app.kubernetes.io/version", "pod-template-hash"):
        if key in labels:
            raise PydanticCustomError(
                "selector", "'{key}' changes with each upgrade, and a selector may never change", {"key": key}
            )
    return _ours(labels)


def _json(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Plain JSON, frozen all the way down."""
    left = [_MAX_VALUES]

    def freeze(item: object, place: str, depth: int) -> Any:
        left[0] -= 1
        if depth > _MAX_DEPTH or left[0] < 0:
            raise PydanticCustomError(
                "json",
                "is more than {depth} levels deep or {values} values; make it smaller",
                {"depth": _MAX_DEPTH, "values": _MAX_VALUES},
            )
        if isinstance(item, Mapping):
            for key in item:
                if not _is_text(key):
                    raise PydanticCustomError(
                        "json", "{at}: keys must be words, not {key}", {"at": place or "(top)", "key": show(key)}
                    )
            return FrozenDict({k: freeze(v, f"{place}.{k[:80]}".lstrip("."), depth + 1) for k, v in item.items()})
        if isinstance(item, list | tuple):
            return tuple(freeze(each, f"{place}.{n}".lstrip("."), depth + 1) for n, each in enumerate(item))
        if item is None or isinstance(item, bool | int) or _is_text(item):
            return item
        if isinstance(item, float) and math.isfinite(item):
            return item
        raise PydanticCustomError(
            "json", "{at}: {value} is no JSON value", {"at": place or "(top)", "value": show(item)}
        )

    frozen: Mapping[str, Any] = freeze(value, "", 0)
    return frozen


def _is_text(value: object) -> bool:
    """Whether it is a string that UTF-8 can write, which half of a surrogate pair is not."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


LabelName = Annotated[str, AfterValidator(_label_name)]
ObjectName = Annotated[str, AfterValidator(_object_name)]
ServiceName = Annotated[str, AfterValidator(_service_name)]
LabelKey = Annotated[str, Field(max_length=317), AfterValidator(_qualified)]
LabelValue = Annotated[str, AfterValidator(_label_value)]
FileName = Annotated[str, AfterValidator(_file)]
VariableName = Annotated[str, Field(max_length=1024), AfterValidator(_variable)]
Quantity = Annotated[str, AfterValidator(_quantity), Field(examples=["500m", "1Gi"])]
Folder = Annotated[str, Field(max_length=4096), AfterValidator(_absolute)]
Image = Annotated[Text, Field(max_length=1024, examples=["agent:1.4.0"]), AfterValidator(_image)]
Port = Annotated[int, Field(ge=1, le=65_535)]
UserId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Words = Annotated[str, Field(max_length=262_144)]
Labels = Annotated[Mapping[LabelKey, LabelValue], AfterValidator(_ours), Field(max_length=1000)]
Annotations = Annotated[Mapping[LabelKey, Words], AfterValidator(_ours), Field(max_length=1000)]
Quantities = Annotated[Mapping[LabelKey, Quantity], AfterValidator(FrozenDict), Field(max_length=100)]
Json = Annotated[Mapping[str, Any], AfterValidator(_json)]
"""Any JSON object, in Kubernetes' own notation."""
