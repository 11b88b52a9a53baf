"""How objects are called and labelled, so that they are found again.

Labels follow the Kubernetes documentation's "Recommended Labels" (`app.kubernetes.io/…`); agentfleet's own begin with
`agentfleet.io/`. A Deployment's selector can never change, so it holds nothing that an upgrade changes. It does not
hold `FLEET` either: an instance that was taken out of the selector (isolated) is still found by that label.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from agentfleet.specs import FleetSpec

MANAGER = "agentfleet"
"""Value of app.kubernetes.io/managed-by, and name of the one field manager (server-side apply)."""
FLEET = "agentfleet.io/fleet"
"""Label on everything that belongs to a fleet: its name."""
REVISION = "agentfleet.io/revision"
"""Label on pods and annotation on Deployments: number of the fleet's revision."""
VERSION = "agentfleet.io/version"
"""Annotation on pods: template.version exactly; the label app.kubernetes.io/version holds what a label may hold."""
REPLICAS = "agentfleet.io/replicas"
"""Annotation on a stopped Deployment: its size when it runs."""
CONFIG_REVISION = "agentfleet.io/config-revision"
"""Annotation on the ConfigMap: revision of the configuration document in it."""
CONFIG_MANAGER = f"{MANAGER}-config"
"""Field manager of the configuration document, which changes at other times than the rest of the ConfigMap."""
CHANGE_CAUSE = "kubernetes.io/change-cause"
"""Annotation on Deployments that `kubectl rollout history` shows."""
INSTANCE = "app.kubernetes.io/instance"
"""The selector's label that is changed on an isolated pod."""
ISOLATED = "agentfleet.io/isolated"
"""Label on pods that were taken out of the selector for examination: "true"."""
ISOLATED_SINCE = "agentfleet.io/isolated-since"
"""Annotation on isolated pods: since when, in RFC 3339."""
ISOLATED_UNTIL = "agentfleet.io/isolated-until"
"""Annotation on isolated pods: when they are ended, in RFC 3339; without it, not before they are released."""
ISOLATED_REASON = "agentfleet.io/isolated-reason"
"""Annotation on isolated pods: why."""
STAND_IN = "agentfleet.io/stand-in"
"""Label on pods that wait to take another's place: "true"."""
STANDS_IN_FOR = "agentfleet.io/stands-in-for"
"""Annotation on these: the name of the other pod."""
STANDS_IN_UID = "agentfleet.io/stands-in-uid"
"""Annotation on these: its uid."""
CONTAINER = "agent"
"""Name of the container that runs the agent."""

_NO_LABEL = re.compile(r"[^A-Za-z0-9_.-]+", re.ASCII)


def label_of(text: str) -> str:
    """Any text as near as a label value can come to it; "" where nothing is left."""
    return _NO_LABEL.sub("-", text)[:63].strip("-_.")


def selector_of(spec: FleetSpec) -> dict[str, str]:
    """The labels by which the Deployment, its Service and its disruption budget know the pods."""
    options = spec.template.kubernetes
    if options is not None and options.selector is not None:
        return dict(options.selector)
    return {"app.kubernetes.io/name": spec.name, "app.kubernetes.io/instance": spec.name}


def keys_apart(selector: Mapping[str, str]) -> list[str]:
    """The labels that are changed on a pod so that a selector does not know it; no more than that takes.

    Network policies, say, should go on to hold for it. Of a selector that is not known one label is taken to be in it.
    """
    return [INSTANCE] if INSTANCE in selector or not selector else list(selector)


def labels_of(spec: FleetSpec) -> dict[str, str]:
    """The labels of every object of a fleet."""
    options = spec.template.kubernetes
    version = label_of(spec.template.version)
    labels = {
        "app.kubernetes.io/name": spec.name,
        "app.kubernetes.io/instance": spec.name,
        "app.kubernetes.io/component": options.component if options is not None else "agent",
        "app.kubernetes.io/part-of": (options.part_of if options is not None else None) or spec.name,
    }
    if version:
        labels["app.kubernetes.io/version"] = version
    if options is not None:
        labels |= options.labels
    return {**labels, **selector_of(spec), "app.kubernetes.io/managed-by": MANAGER, FLEET: spec.name}


def pod_labels_of(spec: FleetSpec, revision: int | None) -> dict[str, str]:
    """The labels of a fleet's pods."""
    return labels_of(spec) | ({} if revision is None else {REVISION: str(revision)})


def selector_text(labels: Mapping[str, str]) -> str:
    """Labels as a query's `labelSelector`."""
    return ",".join(f"{key}={value}" for key, value in labels.items())
