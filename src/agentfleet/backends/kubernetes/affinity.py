"""Node affinity that keeps a pod off one node, whatever else it says: a pure function from affinity to affinity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


def away_from(affinity: Mapping[str, Any] | None, node: str) -> dict[str, Any]:
    """A pod's affinity, as before but for one node.

    A pod may go where any of the terms holds, and a term holds where all that it says does; so each of them is told. An
    empty term holds nowhere, and stays so.

    Args:
        affinity: What the pod says by now, if anything.
        node: The name of the node to keep away from.
    """
    wanted = dict(affinity or {})
    nodes = dict(wanted.get("nodeAffinity") or {})
    field = {"key": "metadata.name", "operator": "NotIn", "values": [node]}
    required = nodes.get(_REQUIRED)
    terms = [{"matchFields": [field]}]
    if required is not None:
        terms = [_told(term, field) for term in required.get("nodeSelectorTerms") or ()]
    return {**wanted, "nodeAffinity": {**nodes, _REQUIRED: {**(required or {}), "nodeSelectorTerms": terms}}}


def _told(term: Mapping[str, Any], field: Mapping[str, Any]) -> dict[str, Any]:
    if not term.get("matchExpressions") and not term.get("matchFields"):
        return dict(term)
    return {**term, "matchFields": [*(term.get("matchFields") or ()), field]}
