"""What an agent finds in its environment: the template's variables, references, and who and where it is."""

from __future__ import annotations

from typing import Any

from agentfleet.backends.kubernetes.rendering import Rendering, literal, present
from agentfleet.kubespec import EnvSource
from agentfleet.kubewords import is_variable_name

_ANY_ADDRESS = "0.0.0.0"  # noqa: S104 - a pod has an address of its own, on which its probes and peers ask


def environment(rendering: Rendering) -> list[dict[str, Any]]:
    """The container's `env`. Equal specs give equal lists: plain variables by name, then what refers to others."""
    found: dict[str, dict[str, Any]] = {}
    for name, text in rendering.template.env.items():
        if not is_variable_name(name):
            rendering.wrong(
                "template.env", f"{name[:80]!r} is no variable on Kubernetes; use letters, digits, '_', '-' and '.'"
            )
        found[name] = {"name": name, "value": literal(text)}
    for name, source in rendering.options.env.items():
        if name in found:
            rendering.wrong("template.kubernetes.env", f"{name} stands in template.env already; remove one")
        found[name] = _variable(name, source)
    for each in _own(rendering):
        found.pop(each["name"], None)  # who an instance is, is not the template's to say
        found[each["name"]] = each
    first = {name: each for name, each in found.items() if not _refers(rendering, name)}
    return [*(first[name] for name in sorted(first)), *(each for name, each in found.items() if name not in first)]


def environment_from(rendering: Rendering) -> list[dict[str, Any]]:
    """The container's `envFrom`."""
    return [
        present(
            prefix=each.prefix,
            secretRef=None if each.secret is None else _named(each.secret, optional=each.optional),
            configMapRef=None if each.config_map is None else _named(each.config_map, optional=each.optional),
        )
        for each in rendering.options.env_from
    ]


def _refers(rendering: Rendering, name: str) -> bool:
    """Whether a variable's text may hold "$(NAME)": only what was defined before it is found there."""
    source = rendering.options.env.get(name)
    return source is not None and source.value is not None and "$(" in source.value


def _own(rendering: Rendering) -> list[dict[str, Any]]:
    """What `ProcessBackend` tells an instance too, so that one agent runs in both places."""
    template, options = rendering.template, rendering.options
    own = []
    if options.describe_instance:
        drain = template.drain - min(1.0, template.drain / 10)  # its last answers are out before it is killed
        values = {
            "AGENTFLEET_HOST": _ANY_ADDRESS,
            "AGENTFLEET_FLEET": rendering.spec.name,
            "AGENTFLEET_VERSION": literal(template.version),
            "AGENTFLEET_DRAIN": f"{drain:g}",
        }
        if template.port is not None:
            values |= {"AGENTFLEET_PORT": str(template.port), "PORT": str(template.port)}
        if rendering.revision is not None:
            values["AGENTFLEET_REVISION"] = str(rendering.revision)
        own = [{"name": name, "value": value} for name, value in values.items()]
        own.append(_variable("AGENTFLEET_INSTANCE", EnvSource(field="metadata.name")))
    if options.token is not None:
        own.append(_variable("AGENTFLEET_TOKEN", options.token))
    return own


def _variable(name: str, source: EnvSource) -> dict[str, Any]:
    if source.value is not None:
        return {"name": name, "value": source.value}
    if source.field is not None:
        # the version is the server's default, and would look like somebody else's edit if it were left out
        return {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": source.field}}}
    if source.resource is not None:
        return {"name": name, "valueFrom": {"resourceFieldRef": {"resource": source.resource}}}
    kind, owner = ("secretKeyRef", source.secret) if source.secret else ("configMapKeyRef", source.config_map)
    assert owner is not None, "the spec demands exactly one"
    return {"name": name, "valueFrom": {kind: {**_named(owner, optional=source.optional), "key": source.key}}}


def _named(name: str, *, optional: bool) -> dict[str, Any]:
    return {"name": name, "optional": True} if optional else {"name": name}
