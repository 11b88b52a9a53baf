"""One fleet as Kubernetes objects: a spec goes in, plain dictionaries come out. Nothing here talks to a cluster.

| agentfleet | Kubernetes |
| --- | --- |
| the fleet, its template and rollout policy | Deployment |
| template.port | Service |
| recovery.max_disrupted | PodDisruptionBudget |
| configuration | ConfigMap |
| scaling, where the cluster is to do it | HorizontalPodAutoscaler |

The objects say whatever agentfleet decides about them, also where that is the API's default: under server-side apply
(KEP-555) a field that is not said is a field that anybody may change unnoticed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentfleet.backends.kubernetes import naming
from agentfleet.backends.kubernetes.apiversions import ApiVersions
from agentfleet.backends.kubernetes.autoscaling import autoscaler
from agentfleet.backends.kubernetes.merge import merged, thaw
from agentfleet.backends.kubernetes.podtemplate import pod_template
from agentfleet.backends.kubernetes.rendering import Manifest, Rendering, present
from agentfleet.kubewords import is_label_name, is_service_name
from agentfleet.specs import FleetSpec

_MAX_CONFIG = 1_048_576
_KINDS = ("ConfigMap", "Service", "PodDisruptionBudget", "Deployment", "HorizontalPodAutoscaler")


@dataclass(frozen=True, slots=True)
class Configuration:
    """A fleet's configuration document, as the ConfigMap holds it in "config.json"."""

    revision: int
    document: Any


@dataclass(frozen=True, slots=True)
class Manifests:
    """The objects of one fleet, in the order in which to apply them, and what they cannot say exactly."""

    objects: tuple[Manifest, ...]
    notes: tuple[str, ...] = ()

    def get(self, kind: str) -> Manifest | None:
        """The object of a kind; a fleet has at most one of each."""
        return next((each for each in self.objects if each["kind"] == kind), None)

    def to_yaml(self) -> str:
        """All of them as YAML documents, as `kubectl apply -f` takes them."""
        from agentfleet import yamltext  # noqa: PLC0415 - PyYAML takes long to import

        return "---\n".join(yamltext.write(each) for each in self.objects)


def render(
    spec: FleetSpec,
    api: ApiVersions | None = None,
    *,
    namespace: str | None = None,
    hpa: bool | None = None,
    replicas: int | None = None,
    paused: bool = False,
    revision: int | None = None,
    cause: str | None = None,
    configuration: Configuration | None = None,
    owner: str | None = None,
    annotations: Mapping[str, str] | None = None,
    sized: bool = True,
) -> Manifests:
    """Write a fleet as the objects that make it up.

    Args:
        spec: The fleet; its template needs `kubernetes`.
        api: What the cluster understands; by default the newest Kubernetes known.
        namespace: Where the objects live; by default the template's, and without that it is left out.
        hpa: Whether the cluster's own autoscaler scales; by default as the template says.
        replicas: Size to write, by default the spec's. An object that is applied again must say its *present* size:
            a field that its only manager does not repeat returns to its default, which is 1.
        paused: Whether the rollout is held.
        revision: Number of the fleet's revision. It is part of the pod template: another number is another rollout.
        cause: Why, for `kubectl rollout history`.
        configuration: The configuration document to keep in the ConfigMap.
        owner: The Deployment's uid, once it exists; the other objects are then collected with it.
        annotations: More annotations on the Deployment.
        sized: Whether the Deployment says its size. What the cluster's own autoscaler has taken over must not, once
            nobody owns the field by apply.

    Raises:
        SpecError: The fleet cannot be said in Kubernetes' words; names the field and the fix.
    """
    rendering = Rendering.of(spec, api or ApiVersions(), revision)
    wanted = rendering.options.autoscaler.enabled if hpa is None else hpa
    main = deployment(rendering, replicas=replicas, paused=paused, cause=cause, annotations=annotations)
    if not sized:
        del main["spec"]["replicas"]
    beside = {
        "ConfigMap": config_map(rendering, configuration),
        "Service": service(rendering),
        "PodDisruptionBudget": disruption_budget(rendering),
        "HorizontalPodAutoscaler": autoscaler(rendering) if wanted else None,
    }
    space = rendering.options.namespace if namespace is None else namespace
    if space is not None and not is_label_name(space):
        rendering.wrong("namespace", "use 1 to 63 lower-case letters, digits and '-' (a DNS-1123 label)")
    finished = (
        _finished(rendering, each, space, None if each is main else owner)
        for each in ({**beside, "Deployment": main}[kind] for kind in _KINDS)
        if each is not None
    )
    return Manifests(tuple(finished), tuple(rendering.notes))


def config_document(
    spec: FleetSpec, configuration: Configuration, *, namespace: str, owner: str | None = None
) -> Manifest | None:
    """The part of the ConfigMap that is the configuration document, for `naming.CONFIG_MANAGER` to apply.

    Args:
        spec: The fleet.
        configuration: Its document.
        namespace: Where it lives.
        owner: The Deployment's uid, once it exists.

    Returns:
        None where the spec asks for no ConfigMap.

    Raises:
        SpecError: A ConfigMap cannot hold the document beside the files.
    """
    rendering = Rendering.of(spec, ApiVersions(), None)
    whole = config_map(rendering, configuration)
    if rendering.options.config is None or whole is None:
        return None
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": present(
            name=whole["metadata"]["name"],
            namespace=namespace,
            labels={naming.FLEET: spec.name, "app.kubernetes.io/managed-by": naming.MANAGER},
            annotations={naming.CONFIG_REVISION: str(configuration.revision)},
            ownerReferences=None if owner is None else [_owner(rendering, owner)],
        ),
        "data": {"config.json": whole["data"]["config.json"]},
    }


def _finished(rendering: Rendering, manifest: Manifest, namespace: str | None, owner: str | None) -> Manifest:
    """What all objects share, and the raw fields last."""
    metadata = manifest["metadata"]
    annotations = {**rendering.options.annotations, **metadata.get("annotations", {})}
    whole = {
        "apiVersion": manifest["apiVersion"],
        "kind": manifest["kind"],
        "metadata": present(
            name=metadata["name"],
            namespace=namespace,
            labels=metadata["labels"],
            annotations=annotations,
            ownerReferences=None if owner is None else [_owner(rendering, owner)],
        ),
        **{key: value for key, value in manifest.items() if key not in ("apiVersion", "kind", "metadata")},
    }
    raw = rendering.options.raw_objects.get(manifest["kind"])
    if raw is None:
        return thaw(whole)  # type: ignore[no-any-return]
    return _checked(rendering, whole, merged(whole, raw))


def _checked(rendering: Rendering, before: Manifest, after: Manifest) -> Manifest:
    """Raw fields may do anything but make another object of it, or take it away from its fleet."""

    def identity(manifest: Manifest) -> dict[str, Any]:
        metadata, spec = manifest.get("metadata"), manifest.get("spec")
        metadata = metadata if isinstance(metadata, dict) else {}
        labels = metadata.get("labels")
        return {
            "apiVersion": manifest.get("apiVersion"),
            "kind": manifest.get("kind"),
            "metadata.name": metadata.get("name"),
            "metadata.namespace": metadata.get("namespace"),
            f"metadata.labels.{naming.FLEET}": labels.get(naming.FLEET) if isinstance(labels, dict) else None,
            "spec.selector": spec.get("selector") if isinstance(spec, dict) else None,
            "spec.template": spec.get("template") if isinstance(spec, dict) else None,
        }

    now = identity(after)
    for field, value in identity(before).items():
        if now[field] != value:
            fix = "use template.kubernetes.raw" if field == "spec.template" else "leave it out"
            rendering.wrong(
                f"template.kubernetes.raw_objects.{before['kind']}", f"{field} is not for raw fields; {fix}"
            )
    return after


def _owner(rendering: Rendering, uid: str) -> dict[str, Any]:
    return {"apiVersion": "apps/v1", "kind": "Deployment", "name": rendering.spec.name, "uid": uid}


# ------------------------------------------------------------------------------------------------ the objects


def deployment(
    rendering: Rendering,
    *,
    replicas: int | None = None,
    paused: bool = False,
    cause: str | None = None,
    annotations: Mapping[str, str] | None = None,
) -> Manifest:
    """The Deployment: how many instances, from which template, and how a new one replaces the old one."""
    spec = rendering.spec
    rollout = spec.rollout
    min_ready = rendering.seconds(rollout.min_ready, "rollout.min_ready")
    deadline = rendering.seconds(rollout.progress_deadline, "rollout.progress_deadline", least=1)
    told = {
        **(annotations or {}),
        **({} if rendering.revision is None else {naming.REVISION: str(rendering.revision)}),
        **({} if cause is None else {naming.CHANGE_CAUSE: cause}),
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": spec.name, "labels": naming.labels_of(spec), "annotations": told},
        "spec": {
            "replicas": spec.replicas if replicas is None else replicas,
            "selector": {"matchLabels": naming.selector_of(spec)},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {
                    "maxSurge": rendering.share(rollout.max_surge, "rollout.max_surge", round_up=True),
                    "maxUnavailable": rendering.share(
                        rollout.max_unavailable, "rollout.max_unavailable", round_up=False
                    ),
                },
            },
            "minReadySeconds": min_ready,
            "progressDeadlineSeconds": max(deadline, min_ready + 1),
            "revisionHistoryLimit": rollout.keep_revisions,
            "paused": paused,
            "template": pod_template(rendering),
        },
    }


def service(rendering: Rendering) -> Manifest | None:
    """The Service in front of the instances; None for a fleet without a port, or where none is wanted."""
    spec, options = rendering.spec, rendering.options.service
    if not options.enabled or spec.template.port is None:
        return None
    name = options.name or spec.name
    if not is_service_name(name):
        rendering.wrong(
            "name",
            f"{name!r} cannot be a Service's name, which begins with a letter (DNS-1035); "
            "choose another, or set template.kubernetes.service.name",
        )
    port = {"name": "http", "port": options.port or spec.template.port, "protocol": "TCP"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "labels": naming.labels_of(spec),
            "annotations": dict(options.annotations),
        },
        "spec": present(
            type="ClusterIP" if options.kind == "Headless" else options.kind,
            clusterIP="None" if options.kind == "Headless" else None,
            selector=naming.selector_of(spec),
            ports=[{**port, "targetPort": spec.template.port}],
        ),
    }


def disruption_budget(rendering: Rendering) -> Manifest | None:
    """What evictions by others may take away at once (KEP-85, and KEP-3017 for instances that are not ready)."""
    spec, options = rendering.spec, rendering.options.disruption_budget
    if not options.enabled:
        return None
    if options.max_unavailable is None:
        place, share = "recovery.max_disrupted", spec.recovery.max_disrupted
    else:
        place, share = "template.kubernetes.disruption_budget.max_unavailable", options.max_unavailable
    policy = "AlwaysAllow" if options.evict_unhealthy else "IfHealthyBudget"
    return {
        "apiVersion": f"policy/{rendering.api.policy}",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": spec.name, "labels": naming.labels_of(spec)},
        "spec": present(
            maxUnavailable=rendering.share(share, place, round_up=False),
            selector={"matchLabels": naming.selector_of(spec)},
            unhealthyPodEvictionPolicy=policy if rendering.api.unhealthy_eviction else None,
        ),
    }


def config_map(rendering: Rendering, configuration: Configuration | None = None) -> Manifest | None:
    """The ConfigMap of files and of the configuration document; None where there is neither."""
    options = rendering.options.config
    data = {} if options is None else dict(options.files)
    told = {}
    if configuration is not None:
        data["config.json"] = json.dumps(configuration.document, ensure_ascii=False, indent=1, sort_keys=True)
        told = {naming.CONFIG_REVISION: str(configuration.revision)}
    if not data:
        return None
    size = sum(len(name) + len(text.encode()) for name, text in data.items())
    if size > _MAX_CONFIG:
        rendering.wrong(
            "template.kubernetes.config.files",
            f"is {size} bytes together with the configuration document; a ConfigMap holds {_MAX_CONFIG}",
        )
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": f"{rendering.spec.name}-config",
            "labels": naming.labels_of(rendering.spec),
            "annotations": told,
        },
        "data": data,
    }
