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
    required = dict(nodes.get(_REQUIRED) or {})
    field = {"key": "metadata.name", "operator": "NotIn", "values": [node]}
    terms = [
        {**term, "matchFields": [*(term.get("matchFields") or ()), field]} if _says_anything(term) else term
        for term in required.get("nodeSelectorTerms") or ()
    ]
    required["nodeSelectorTerms"] = terms or [{"matchFields": [field]}]
    return {**wanted, "nodeAffinity": {**nodes, _REQUIRED: required}}


def _says_anything(term: Mapping[str, Any]) -> bool:
    return bool(term.get("matchExpressions") or term.get("matchFields"))
