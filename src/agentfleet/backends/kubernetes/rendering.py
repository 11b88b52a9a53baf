"""What every part of a manifest is made from, and how numbers become Kubernetes' kinds of numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from agentfleet.backends.kubernetes.apiversions import ApiVersions
from agentfleet.errors import SpecError
from agentfleet.kubespec import KubernetesOptions
from agentfleet.specs import AgentTemplate, FleetSpec
from agentfleet.units import format_cpu, format_memory

Manifest = dict[str, Any]
"""One object in JSON."""

_INT32 = 2**31 - 1
_PLACEHOLDER = re.compile(r"\{(version|port)\}")


@dataclass(frozen=True, slots=True)
class Rendering:
    """One fleet being written as manifests.

    Attributes:
        spec: The fleet.
        options: Its template's `kubernetes`.
        api: What the cluster understands.
        revision: Number of the fleet's revision, if there is one.
        notes: What could not be said exactly, a sentence each; grows while manifests are made.
    """

    spec: FleetSpec
    options: KubernetesOptions
    api: ApiVersions
    revision: int | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, spec: FleetSpec, api: ApiVersions, revision: int | None = None) -> Rendering:
        """Begin; raises `SpecError` where the spec says nothing about Kubernetes."""
        if spec.template.kubernetes is None:
            raise SpecError(
                f"fleet {spec.name}: template.kubernetes is not set; a cluster needs at least template.kubernetes.image"
            )
        return cls(spec, spec.template.kubernetes, api, revision)

    @property
    def template(self) -> AgentTemplate:
        """The agent."""
        return self.spec.template

    def wrong(self, place: str, message: str) -> NoReturn:
        """Refuse; names the field and the fix."""
        raise SpecError(f"fleet {self.spec.name}: {place}: {message}")

    def note(self, sentence: str) -> None:
        """Tell, once, what could not be said exactly."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def seconds(self, value: float, place: str, *, least: int = 0) -> int:
        """Whole seconds, rounded up, as every field of Kubernetes counts them."""
        if value > _INT32:
            self.wrong(place, f"Kubernetes counts at most {_INT32} seconds; write less")
        whole = max(least, math.ceil(value))
        if whole != value:
            self.note(f"{place}: Kubernetes counts whole seconds, at least {least}: {value:g} s become {whole} s.")
        return whole

    def share(self, value: int | str, place: str, *, round_up: bool) -> int | str:
        """A number or a whole percentage (`intstr`)."""
        if isinstance(value, int):
            return value
        exact = float(value[:-1])
        percent = math.ceil(exact) if round_up else max(math.floor(exact), 1 if exact else 0)
        if percent != exact:
            self.note(f"{place}: Kubernetes knows whole percents: {value} becomes {percent}%.")
        return f"{percent}%"

    def port(self, why: str) -> int:
        """The template's port, where it is needed."""
        if self.template.port is None:
            self.wrong("template.port", f"is not set, but {why} needs it; set it to the port where the agent answers")
        return self.template.port

    def filled(self, word: str) -> str:
        """A word with "{version}" and "{port}" replaced."""

        def value(match: re.Match[str]) -> str:
            return self.template.version if match[1] == "version" else str(self.port('"{port}"'))

        return _PLACEHOLDER.sub(value, word)


def literal(word: str) -> str:
    """A word in which a kubelet finds no "$(NAME)" to expand (`k8s.io/…/forked/golang/expansion`)."""
    return re.sub(r"\$(?=[$(])", "$$", word)


def written_cpu(cores: float) -> str:
    """Cores as a quantity."""
    words = str(format_cpu(cores))
    return words if words.removesuffix("m").isdigit() else f"{math.ceil(cores * 1000)}m"  # 1m is the smallest


def written_memory(size: int) -> str:
    """Bytes as a quantity."""
    return str(format_memory(size))


def present(**fields: Any) -> dict[str, Any]:
    """The fields that say something: neither None nor empty."""
    return {key: value for key, value in fields.items() if value is not None and value not in ({}, [], "")}


def quantity(value: Mapping[str, str], name: str) -> float | None:
    """A quantity of a map as a number, or None where it is not there or not plain enough to compare."""
    match = re.fullmatch(r"([\d.]+)(\D*)", value.get(name, ""))
    if match is None:
        return None
    binary = {f"{sign}i": 1024.0 ** (n + 1) for n, sign in enumerate("KMGTPE")}
    decimal = {"": 1.0, "m": 0.001, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
    return float(match[1]) * (binary | decimal)[match[2]]
