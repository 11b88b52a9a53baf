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


class Container(_Slim, frozen=True):
    """spec.containers[]."""

    name: str
    image: str = ""
    ports: tuple[Port, ...] = ()


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
