"""What a metric is, and one figure of it, for whoever counts something and for whoever shows it to Prometheus."""

from __future__ import annotations

from dataclasses import dataclass

OTHER = "(other)"
"""Where what exceeds the bound of a label is counted."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its kind, help text, labels and, for a histogram, its buckets (seconds)."""

    kind: str
    text: str
    labels: tuple[str, ...] = ("fleet",)
    buckets: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """What one metric shows now."""

    name: str
    """Of the metric; of a counter without "_total"."""
    value: float
    """Of a counter all that was counted since `of` was made: it never falls."""
    labels: tuple[str, ...] = ()
    """Values of the metric's labels, in their order."""
    of: object = None
    """Who counts it; None is whoever gives the sample. What several share, as a connection, is counted once. It must
    take weak references."""


def is_label(value: str) -> bool:
    """Whether a text can be a label: short, and free of what cannot be written (half of a surrogate pair)."""
    return len(value) <= 100 and value.isprintable()
