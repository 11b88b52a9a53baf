"""Merge raw fields into a manifest as `kubectl patch --type=strategic` would: pure, and nothing is shared.

Objects are merged key by key and null removes a key. Lists of objects are merged by the key that Kubernetes' own
`patchMergeKey` names for them ({"name": "agent", "$patch": "delete"} removes an item); any other list is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_MERGE_KEYS = {
    "containers": ("name",),
    "env": ("name",),
    "ephemeralContainers": ("name",),
    "hostAliases": ("ip",),
    "imagePullSecrets": ("name",),
    "initContainers": ("name",),
    "ports": ("containerPort", "port"),  # of a container, of a Service
    "resourceClaims": ("name",),
    "topologySpreadConstraints": ("topologyKey",),
    "volumeDevices": ("devicePath",),
    "volumeMounts": ("mountPath",),
    "volumes": ("name",),
}
_PATCH = "$patch"


def thaw(value: Any) -> Any:
    """A copy in plain dicts and lists, which is what JSON and YAML writers take."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [thaw(item) for item in value]
    return value


def merged(base: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `raw` merged into it; a new value."""
    result: dict[str, Any] = thaw(base)
    for key, value in raw.items():
        old = result.get(key)
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            result[key] = merged(old if isinstance(old, Mapping) else {}, value)
        elif isinstance(value, list | tuple):
            by = _merge_key(key, [*(old if isinstance(old, list) else []), *value])
            result[key] = _replaced(value) if by is None else _by_key(old or [], value, by)
        else:
            result[key] = value
    return result


def _merge_key(field: str, items: Sequence[Any]) -> str | None:
    """What the items of a list are known by, if all of them have it."""
    for key in _MERGE_KEYS.get(field, ()):
        if all(isinstance(item, Mapping) and isinstance(item.get(key), str | int) for item in items):
            return key
    return None


def _by_key(old: Sequence[Any], new: Sequence[Any], key: str) -> list[Any]:
    found: dict[Any, Any] = {item[key]: thaw(item) for item in old}
    for item in new:
        if item.get(_PATCH) == "delete":
            found.pop(item[key], None)
        else:
            found[item[key]] = merged(found.get(item[key], {}), item)
    return list(found.values())


def _replaced(items: Sequence[Any]) -> list[Any]:
    return [merged({}, item) if isinstance(item, Mapping) else thaw(item) for item in items]
