"""What a node must know of a pod, decoded from the API server's JSON without the rest."""

from __future__ import annotations

import msgspec


class _Slim(msgspec.Struct, rename="camel", gc=False, frozen=True):
    """Fields in camel case; what is not named here is skipped."""


class Meta(_Slim, frozen=True):
    """metadata."""

    name: str
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    deletion_timestamp: str | None = None
    deletion_grace_period_seconds: int | None = None


class Port(_Slim, frozen=True):
    """A declared port of a container."""

    container_port: int


class Reference(_Slim, frozen=True):
    """A Secret or a ConfigMap of the pod's namespace, or one of its keys."""

    name: str = ""
    key: str = ""
    optional: bool = False


class Source(_Slim, frozen=True):
    """spec.containers[].env[].valueFrom, as far as it names other objects."""

    secret_key_ref: Reference | None = None
    config_map_key_ref: Reference | None = None


class Variable(_Slim, frozen=True):
    """spec.containers[].env[]."""

    value_from: Source | None = None


class Variables(_Slim, frozen=True):
    """spec.containers[].envFrom[]."""

    secret_ref: Reference | None = None
    config_map_ref: Reference | None = None


class Container(_Slim, frozen=True):
    """spec.containers[]."""

    name: str
    image: str = ""
    ports: tuple[Port, ...] = ()
    env: tuple[Variable, ...] = ()
    env_from: tuple[Variables, ...] = ()

    @property
    def needs(self) -> list[tuple[str, Reference]]:
        """What it cannot start without, with the kind of object: "secret" or "configmap"."""
        found: list[tuple[str, Reference | None]] = []
        for each in self.env_from:
            found += [("configmap", each.config_map_ref), ("secret", each.secret_ref)]
        for source in (each.value_from for each in self.env if each.value_from is not None):
            found += [("configmap", source.config_map_key_ref), ("secret", source.secret_key_ref)]
        return [(kind, named) for kind, named in found if named is not None and not named.optional]


class Gate(_Slim, frozen=True):
    """spec.readinessGates[]."""

    condition_type: str


class Condition(_Slim, frozen=True):
    """status.conditions[]."""

    type: str
    status: str


class Spec(_Slim, frozen=True):
    """spec."""

    node_name: str = ""
    containers: tuple[Container, ...] = ()
    readiness_gates: tuple[Gate, ...] = ()
    restart_policy: str = "Always"


class Status(_Slim, frozen=True):
    """status."""

    phase: str = ""
    conditions: tuple[Condition, ...] = ()


class Pod(_Slim, frozen=True):
    """A pod."""

    metadata: Meta
    spec: Spec
    status: Status = Status()

    @property
    def name(self) -> str:
        """Namespace and name, as faults name it."""
        return f"{self.metadata.namespace}/{self.metadata.name}"

    @property
    def path(self) -> str:
        """Its path below the API server."""
        return f"/api/v1/namespaces/{self.metadata.namespace}/pods/{self.metadata.name}"

    @property
    def needs(self) -> bool:
        """Whether any of its containers cannot start without a Secret or a ConfigMap."""
        return any(each.needs for each in self.spec.containers)

    @property
    def ready(self) -> bool:
        """What its condition says."""
        return any(each.type == "Ready" and each.status == "True" for each in self.status.conditions)

    @property
    def gates_open(self) -> bool:
        """Whether the conditions of all its readiness gates are True."""
        if not self.spec.readiness_gates:
            return True
        true = {each.type for each in self.status.conditions if each.status == "True"}
        return all(gate.condition_type in true for gate in self.spec.readiness_gates)


class ListMeta(_Slim, frozen=True):
    """metadata of a list."""

    resource_version: str = ""
    next: str = msgspec.field(name="continue", default="")


class PodList(_Slim, frozen=True):
    """One page of pods."""

    metadata: ListMeta
    items: tuple[Pod, ...] = ()


class Event(_Slim, frozen=True):
    """One line of a watch; the object is decoded once its type is known."""

    type: str
    object: msgspec.Raw


class Bookmark(_Slim, frozen=True):
    """The object of a bookmark or of an error."""

    metadata: ListMeta = ListMeta()
    code: int = 0
    message: str = ""


decode_list = msgspec.json.Decoder(PodList).decode
decode_event = msgspec.json.Decoder(Event).decode
decode_pod = msgspec.json.Decoder(Pod).decode
decode_bookmark = msgspec.json.Decoder(Bookmark).decode
