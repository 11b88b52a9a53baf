"""Which API versions and fields a cluster understands, from 1.20 to 1.36 and beyond; by discovery or by its number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from agentfleet.errors import SpecError
from agentfleet.units import show

OLDEST = 20
NEWEST = 36
_VERSION = re.compile(r"v?1\.(\d{1,3})\+?([.\-+].*)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class ApiVersions:
    """What of a cluster's API manifests depend on. The default is the newest Kubernetes known here.

    Attributes:
        minor: Y of Kubernetes 1.Y.
        policy: Version of PodDisruptionBudgets; v1 from 1.21, v1beta1 until 1.24.
        autoscaling: Version of HorizontalPodAutoscalers; v2 from 1.23, v2beta2 until 1.25.
        scale_to_zero: Whether the alpha gate HPAScaleToZero is on, which no API tells.
    """

    minor: int = NEWEST
    policy: Literal["v1", "v1beta1"] = "v1"
    autoscaling: Literal["v2", "v2beta2"] = "v2"
    scale_to_zero: bool = False

    @property
    def tolerance(self) -> bool:
        """Whether an autoscaler's behaviour may have a tolerance (KEP-4951, on by default from 1.35)."""
        return self.minor >= 35 and self.autoscaling == "v2"

    @property
    def unhealthy_eviction(self) -> bool:
        """Whether a budget knows `unhealthyPodEvictionPolicy` (KEP-3017, on by default from 1.27)."""
        return self.minor >= 27 and self.policy == "v1"

    @property
    def sleep_action(self) -> bool:
        """Whether a lifecycle hook can just sleep (KEP-3960, on by default from 1.30)."""
        return self.minor >= 30

    @property
    def spread_by_revision(self) -> bool:
        """Whether topology spread knows `matchLabelKeys` (KEP-3243, on by default from 1.27)."""
        return self.minor >= 27

    @classmethod
    def of(cls, version: str) -> ApiVersions:
        """What a Kubernetes of this number has: "1.36", "v1.20.2", "v1.29.4-gke.1".

        Raises:
            SpecError: It is no such number, or older than 1.20.
        """
        match = _VERSION.fullmatch(version)
        if match is None:
            raise SpecError(f"Kubernetes version {show(version)} is not understood; write one like 1.{NEWEST}")
        minor = int(match[1])
        _check(minor)
        return cls(minor, "v1" if minor >= 21 else "v1beta1", "v2" if minor >= 23 else "v2beta2")

    @classmethod
    def discovered(cls, version: Mapping[str, Any], groups: Mapping[str, Any]) -> ApiVersions:
        """What a cluster says it has: the answers of GET /version and of GET /apis (an APIGroupList).

        Raises:
            SpecError: The cluster is older than 1.20, or serves no usable version of a group.
        """
        digits = re.match(r"\d+", str(version.get("minor", "")))  # some distributions say "27+"
        if version.get("major") != "1" or digits is None:
            raise SpecError(f"the cluster's version is not understood: {show(dict(version))}")
        minor = int(digits[0])
        _check(minor)
        served = {each["groupVersion"] for group in groups.get("groups", ()) for each in group.get("versions", ())}
        if not served & {"policy/v1", "policy/v1beta1"}:
            raise SpecError(
                "the cluster serves neither policy/v1 nor policy/v1beta1: it cannot keep a disruption budget"
            )
        if not served & {"autoscaling/v2", "autoscaling/v2beta2"}:
            raise SpecError("the cluster serves neither autoscaling/v2 nor autoscaling/v2beta2")
        return cls(
            minor,
            "v1" if "policy/v1" in served else "v1beta1",
            "v2" if "autoscaling/v2" in served else "v2beta2",
        )


def _check(minor: int) -> None:
    if minor < OLDEST:
        raise SpecError(f"Kubernetes 1.{minor} is too old: agentfleet needs 1.{OLDEST} or newer")
