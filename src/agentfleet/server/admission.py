"""What of a spec may be said from afar, and by whom.

Whoever says what runs has the rights of what runs. So the parts of a template have three levels:

- **operate**: which version, how much CPU and memory, which port, how long a drain; and every policy.
- **admin** of the fleet: what runs within the fleet's own walls: program, variables, image, probes, placement.
- **admin of every fleet** (`*`): what reaches beyond them: on Kubernetes other objects' names, references to Secrets,
  accounts, host paths, raw fields; on the process backend the program itself, which runs as the manager's own user.

An operator of the server can lower single parts to *operate*. A function to import by name is no part of a spec that
comes from afar at all (`rest.clusters.RemoteCheck`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from agentfleet.errors import SpecError
from agentfleet.kubespec import EnvSource, KubernetesOptions, Security, ServiceOptions, Volume
from agentfleet.rest.base import FieldError
from agentfleet.server.principals import Principal
from agentfleet.server.problems import Refusal
from agentfleet.specs import AgentTemplate
from agentfleet.stores.tokens import Scope

EngineKind = Literal["kubernetes", "memory", "process"]
_FREE = frozenset({"version", "cpu", "memory", "drain", "port"})
_SAFE_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}", re.ASCII)
"""Of who may not say the program: a version is put into the program's arguments, and into the image's name."""


def _env_is_own(value: Mapping[str, EnvSource]) -> bool:
    return all(each.secret is None and each.config_map is None for each in value.values())


def _volumes_are_own(value: tuple[Volume, ...]) -> bool:
    return all(each.empty is not None for each in value)


def _security_holds(value: Security) -> bool:
    return value.profile == "restricted" and value.user != 0


def _service_is_own(value: ServiceOptions) -> bool:
    return value.name is None and value.kind in ("ClusterIP", "Headless") and not value.annotations


_OWN: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        (
            "image",
            "pull",
            "command",
            "args",
            "working_dir",
            "describe_instance",
            "requests",
            "limits",
            "readiness",
            "liveness",
            "startup",
            "pre_stop",
            "node_selector",
            "tolerations",
            "spread",
            "affinity",
            "disruption_budget",
            "config",
        ),
        lambda _: True,
    ),
    "env": _env_is_own,
    "volumes": _volumes_are_own,
    "security": _security_holds,
    "service": _service_is_own,
    "autoscaler": lambda value: value.name is None,
}
"""Fields of `KubernetesOptions` that stay within the fleet's walls, by value. All others reach beyond them."""


@dataclass(frozen=True, slots=True)
class Admission:
    """Decides what a request may say.

    Attributes:
        engine: What runs the instances; None is unknown, and treated like processes.
        template: Used where a request names none; the operator's own word, so that anybody may use it.
        lowered: Parts that *operate* suffices for, such as "command" and "kubernetes.image".
        namespaces: Where who does not reach every fleet may have one; the first is the default.
    """

    engine: EngineKind | None = None
    template: AgentTemplate | None = None
    lowered: frozenset[str] = frozenset()
    namespaces: tuple[str, ...] = ("default",)
    _known: frozenset[str] = field(
        default=frozenset({"command", "env", *(f"kubernetes.{name}" for name in KubernetesOptions.model_fields)}),
        repr=False,
    )

    def __post_init__(self) -> None:
        wrong = next((each for each in sorted(self.lowered) if each not in self._known), None)
        if wrong is not None:
            raise SpecError(f"operators may: {wrong!r:.80} is none of {', '.join(sorted(self._known))}")
        if not self.namespaces:
            raise SpecError("namespaces: name at least one")

    def namespace(self, principal: Principal, asked: str | None) -> str:
        """Where a new fleet lives; raises a 403 for a place that is not open to everybody."""
        if asked is None:
            return self.namespaces[0]
        if asked not in self.namespaces and not principal.everywhere:
            raise Refusal(
                403,
                "forbidden",
                f"namespace: {principal.name} may use {', '.join(self.namespaces)}",
                errors=[FieldError(field="namespace", message=f"use one of {', '.join(self.namespaces)}")],
            )
        return asked

    def check(self, principal: Principal, after: AgentTemplate, before: AgentTemplate | None) -> None:
        """Raise a 403 that names each part that this principal may not say.

        Args:
            principal: Who asks.
            after: The template that is asked for.
            before: The one that holds now; None for a new fleet, which is compared with the server's own.
        """
        before = self.template if before is None else before
        refused = [
            FieldError(field=f"template.{part}", message=f"needs {needed}")
            for part, needed in self._needs(after, before)
            if not _has(principal, needed)
        ]
        if refused:
            names = ", ".join(each.field for each in refused)
            raise Refusal(
                403,
                "forbidden",
                f"{principal.name} has the scope {principal.scope}, and may not say {names}",
                errors=refused,
            )

    def _needs(self, after: AgentTemplate, before: AgentTemplate | None) -> Iterator[tuple[str, str]]:
        """Parts that differ, and what is needed to say them."""
        for name in AgentTemplate.model_fields:
            value = getattr(after, name)
            if name == "kubernetes":
                yield from self._kubernetes_needs(value, None if before is None else before.kubernetes)
                continue
            if value == getattr(before, name) if before is not None else not value:
                continue
            if name not in _FREE:
                yield name, _OPERATE if name in self.lowered else self._program
            elif name == "version" and not _SAFE_VERSION.fullmatch(str(value)):
                yield name, self._program

    @property
    def _program(self) -> str:
        return _ADMIN if self.engine in ("kubernetes", "memory") else _EVERYWHERE

    def _kubernetes_needs(
        self, after: KubernetesOptions | None, before: KubernetesOptions | None
    ) -> Iterator[tuple[str, str]]:
        if after is None:
            if before is not None:
                yield "kubernetes", _ADMIN
            return
        plain = KubernetesOptions(image=after.image) if before is None else before
        for name in KubernetesOptions.model_fields:
            value, part = getattr(after, name), f"kubernetes.{name}"
            if value == getattr(plain, name) and not (before is None and name == "image"):
                continue
            if part in self.lowered:
                yield part, _OPERATE
            else:
                own = _OWN.get(name)
                yield part, _ADMIN if own is not None and own(value) else _EVERYWHERE


_OPERATE, _ADMIN, _EVERYWHERE = "the scope operate", "the scope admin", "the scope admin for every cluster ('*')"


def _has(principal: Principal, needed: str) -> bool:
    if needed == _OPERATE:
        return principal.may(Scope.OPERATE)
    return principal.may(Scope.ADMIN) and (needed == _ADMIN or principal.everywhere)
