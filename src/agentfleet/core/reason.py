"""Why a decision is what it is: a code for machines, the numbers it rests on, one sentence for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Number = int | float


@dataclass(frozen=True, slots=True)
class Reason:
    """One step of an explanation.

    Attributes:
        code: Stable, dotted, machine-readable: "scaling.tolerance", "governor.frozen".
        text: One plain sentence.
        numbers: The figures the step used, by name, with the unit in the name where one applies ("age_s").
    """

    code: str
    text: str
    numbers: Mapping[str, Number] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """A JSON-ready form for journals and answers."""
        return {"code": self.code, "text": self.text, "numbers": dict(self.numbers)}

    def __str__(self) -> str:
        return self.text
