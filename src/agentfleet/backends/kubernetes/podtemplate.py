"""The pod template: what the Deployment's controller makes every instance from.

The default security context keeps the *restricted* Pod Security Standard
(kubernetes.io/docs/concepts/security/pod-security-standards), with a read-only root and a writable /tmp besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agentfleet.backends.kubernetes import naming
from agentfleet.backends.kubernetes.environment import environment, environment_from
from agentfleet.backends.kubernetes.merge import merged, thaw
from agentfleet.backends.kubernetes.probes import probes
from agentfleet.backends.kubernetes.rendering import (
    Rendering,
    literal,
    present,
    quantity,
    written_cpu,
    written_memory,
)
from agentfleet.kubespec import EmptyDir, PreStop, Security, Volume

_CONFIG = "agentfleet-config"
_TMP = "agentfleet-tmp"


def pod_template(rendering: Rendering) -> dict[str, Any]:
    """A Deployment's `spec.template`, the template's raw fields merged last."""
    options = rendering.options
    labels = naming.pod_labels_of(rendering.spec, rendering.revision)
    template = {
        "metadata": {
            "labels": labels,
            "annotations": {**options.pod_annotations, naming.VERSION: rendering.template.version},
        },
        "spec": _pod(rendering),
    }
    return _checked(rendering, merged(template, options.raw))


def _checked(rendering: Rendering, template: dict[str, Any]) -> dict[str, Any]:
    """Raw fields may do anything but cut the fleet off from its own pods."""
    place = "template.kubernetes.raw"
    if unknown := sorted(template.keys() - {"metadata", "spec"}):
        rendering.wrong(place, f"a pod template has 'metadata' and 'spec', and no {', '.join(unknown)}")
    metadata, spec = template.get("metadata"), template.get("spec")
    if not isinstance(metadata, dict) or not isinstance(spec, dict):
        rendering.wrong(place, "'metadata' and 'spec' must be objects")
    labels = metadata.get("labels")
    for key, value in (naming.selector_of(rendering.spec) | {naming.FLEET: rendering.spec.name}).items():
        if not isinstance(labels, dict) or labels.get(key) != value:
            rendering.wrong(place, f"the label {key} must stay {value!r}: the fleet finds its pods by it")
    containers = spec.get("containers")
    if not isinstance(containers, list) or not any(
        isinstance(each, dict) and each.get("name") == naming.CONTAINER for each in containers
    ):
        rendering.wrong(place, f"the container {naming.CONTAINER!r} must stay; add yours beside it")
    return template


def _pod(rendering: Rendering) -> dict[str, Any]:
    options = rendering.options
    volumes, mounts = _volumes(rendering)
    return present(
        serviceAccountName=options.service_account or "default",  # left out, the server would keep the last one
        automountServiceAccountToken=options.mount_token,
        imagePullSecrets=[{"name": name} for name in options.pull_secrets],
        priorityClassName=options.priority_class,
        nodeSelector=dict(options.node_selector),
        tolerations=_tolerations(rendering),
        topologySpreadConstraints=_spread(rendering),
        affinity=thaw(options.affinity),
        securityContext=_pod_security(options.security),
        terminationGracePeriodSeconds=_grace(rendering),
        containers=[_container(rendering, mounts)],
        volumes=volumes,
    )


def _container(rendering: Rendering, mounts: list[dict[str, Any]]) -> dict[str, Any]:
    options, template = rendering.options, rendering.template
    command = options.command
    port = None if template.port is None else {"name": "http", "containerPort": template.port, "protocol": "TCP"}
    return {
        **present(
            name=naming.CONTAINER,
            image=_image(rendering),
            imagePullPolicy=options.pull,
            command=_words(rendering, template.command, plain=True) if command is None else _words(rendering, command),
            args=_words(rendering, options.args),
            workingDir=options.working_dir,
            ports=None if port is None else [port],
            envFrom=environment_from(rendering),
            env=environment(rendering),
            resources=_resources(rendering),
        ),
        **probes(rendering),
        **present(
            lifecycle=None if options.pre_stop is None else {"preStop": _pre_stop(rendering, options.pre_stop)},
            securityContext=_container_security(options.security),
            volumeMounts=mounts,
        ),
    }


def _image(rendering: Rendering) -> str:
    image = rendering.filled(rendering.options.image)
    if any(sign.isspace() for sign in image):
        rendering.wrong("template.version", f"the image would be {image!r}, with a space; use a version without")
    return image


def _words(rendering: Rendering, words: Sequence[str], *, plain: bool = False) -> list[str]:
    filled = [rendering.filled(word) for word in words]
    return [literal(word) for word in filled] if plain else filled


def _resources(rendering: Rendering) -> dict[str, Any]:
    template, options = rendering.template, rendering.options
    requests = present(
        cpu=None if template.cpu is None else written_cpu(template.cpu),
        memory=None if template.memory is None else written_memory(template.memory),
    ) | dict(options.requests)
    for name, asked in requests.items():
        limit = quantity(options.limits, name)
        wanted = quantity(requests, name)
        if limit is not None and wanted is not None and limit < wanted:
            rendering.wrong(
                f"template.kubernetes.limits.{name}",
                f"{options.limits[name]} is less than the {asked} asked for; raise one or lower the other",
            )
    return present(requests=requests, limits=dict(options.limits))


# ------------------------------------------------------------------------------------------------ the end of a pod


def _grace(rendering: Rendering) -> int:
    """The template's drain, and what comes before SIGTERM. Never 0, which would delete without asking the kubelet."""
    stop = rendering.options.pre_stop
    before = 0.0 if stop is None else (stop.sleep if stop.sleep is not None else stop.allow)
    return rendering.seconds(rendering.template.drain + before, "template.drain", least=1)


def _pre_stop(rendering: Rendering, stop: PreStop) -> dict[str, Any]:
    if stop.command is not None:
        return {"exec": {"command": list(stop.command)}}
    if stop.path is not None:
        return {"httpGet": {"path": stop.path, "port": rendering.port("the preStop request"), "scheme": "HTTP"}}
    assert stop.sleep is not None, "the spec demands exactly one"
    seconds = rendering.seconds(stop.sleep, "template.kubernetes.pre_stop.sleep", least=1)
    if rendering.api.sleep_action:
        return {"sleep": {"seconds": seconds}}
    return {"exec": {"command": ["sleep", str(seconds)]}}


# ------------------------------------------------------------------------------------------------ where it may run


def _tolerations(rendering: Rendering) -> list[dict[str, Any]]:
    place = "template.kubernetes.tolerations"
    return [
        present(
            key=each.key,
            operator="Exists" if each.value is None else "Equal",
            value=each.value,
            effect=each.effect,
            tolerationSeconds=None if each.duration is None else rendering.seconds(each.duration, place),
        )
        for each in rendering.options.tolerations
    ]


def _spread(rendering: Rendering) -> list[dict[str, Any]]:
    return [
        present(
            maxSkew=each.max_skew,
            topologyKey=each.over,
            whenUnsatisfiable="DoNotSchedule" if each.strict else "ScheduleAnyway",
            labelSelector={"matchLabels": naming.selector_of(rendering.spec)},
            # each revision is spread by itself, or the old one's places would crowd out the new one's
            matchLabelKeys=["pod-template-hash"] if rendering.api.spread_by_revision else None,
        )
        for each in rendering.options.spread
    ]


# ------------------------------------------------------------------------------------------------ what it may do


def _pod_security(security: Security) -> dict[str, Any]:
    own = present(runAsUser=security.user, runAsGroup=security.group, fsGroup=security.volume_group)
    if security.profile == "none":
        return own
    return {"runAsNonRoot": True, **own, "seccompProfile": {"type": "RuntimeDefault"}}


def _container_security(security: Security) -> dict[str, Any]:
    if security.profile == "none":
        return {}
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": not security.writable_root,
    }


# ------------------------------------------------------------------------------------------------ files


def _volumes(rendering: Rendering) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The pod's volumes, and where the container sees them."""
    options = rendering.options
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []
    taken = {each.path.rstrip("/") or "/" for each in options.volumes}
    for each in options.volumes:
        if each.name in (_CONFIG, _TMP):
            rendering.wrong("template.kubernetes.volumes", f"{each.name} is agentfleet's own volume; rename yours")
        volumes.append({"name": each.name, **_source(each)})
        read_only = each.read_only if each.read_only is not None else bool(each.secret or each.config_map)
        mounts.append(present(name=each.name, mountPath=each.path, subPath=each.sub_path, readOnly=read_only or None))
    if options.config is not None:
        if options.config.path in taken:
            rendering.wrong("template.kubernetes.config.path", f"a volume is at {options.config.path} too; move one")
        name = f"{rendering.spec.name}-config"
        volumes.append({"name": _CONFIG, "configMap": {"name": name, "optional": True}})
        mounts.append({"name": _CONFIG, "mountPath": options.config.path, "readOnly": True})
    security = options.security
    if security.profile == "restricted" and not security.writable_root and "/tmp" not in taken:  # noqa: S108
        volumes.append({"name": _TMP, "emptyDir": _empty(EmptyDir(size=security.tmp_size))})
        mounts.append({"name": _TMP, "mountPath": "/tmp"})  # noqa: S108 - in the pod
    return volumes, mounts


def _source(volume: Volume) -> Mapping[str, Any]:
    if volume.secret is not None:
        return {"secret": {"secretName": volume.secret}}
    if volume.config_map is not None:
        return {"configMap": {"name": volume.config_map}}
    if volume.claim is not None:
        return {"persistentVolumeClaim": {"claimName": volume.claim}}
    if volume.empty is not None:
        return {"emptyDir": _empty(volume.empty)}
    source: dict[str, Any] = thaw(volume.source)
    return source


def _empty(volume: EmptyDir) -> dict[str, Any]:
    return present(
        medium="Memory" if volume.in_memory else None,
        sizeLimit=None if volume.size is None else written_memory(volume.size),
    )
