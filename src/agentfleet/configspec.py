"""What a user asks for when a configuration is to reach the fleet in steps."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from agentfleet.specbase import Listed, Ratio, Spec
from agentfleet.units import Duration, Share


class ConfigRollout(Spec):
    """How a new configuration reaches the fleet: ring by ring, each proved before the next."""

    rings: Annotated[Listed[Share], Field(min_length=1, max_length=32)] = (1, "5%", "100%")
    """How many instances have it in each ring, as a number or as a share of the fleet, which rounds up; each at least
    one, and the last "100%"."""
    bake: Duration = 300.0
    """How long an instance must have been well with it before it has proved it."""
    confirm: Duration = 15.0
    """How long a failure is looked at before it is judged: what befalls all instances alike shows by then, and is not
    the configuration's fault."""
    max_failed: Share = "10%"
    """Of the instances that have it, those that may refuse it, turn sick, exit or restart before it has failed; a share
    rounds up, and one is always enough in a ring of one."""
    max_errors: Ratio = 0.1
    """How much greater the share of failed tasks may be than before, and than at the others meanwhile; 0.1 is ten in a
    hundred. Judged from 20 tasks on."""
    auto_rollback: bool = True
    """Whether one that has failed is taken back by itself: the content from before under a new number, to all."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if self.rings[-1] != "100%":
            raise PydanticCustomError("rings", "rings: the last must be '100%', or else the rollout would never end")
        if any(ring in (0, "0%") for ring in self.rings):
            raise PydanticCustomError("rings", "rings: each must hold at least one instance")
        for alike in (
            [ring for ring in self.rings if isinstance(ring, int)],
            [float(ring[:-1]) for ring in self.rings if isinstance(ring, str)],
        ):
            if alike != sorted(alike):
                raise PydanticCustomError("rings", "rings: each must hold no fewer instances than the one before it")
        return self
