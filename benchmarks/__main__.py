"""`make bench`: every figure, with how it grows. `python -m benchmarks scaling turn` runs only those."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from pathlib import Path

from agentfleet.display import table

HERE = Path(__file__).parent


def main(names: list[str]) -> None:
    """Run the named benchmarks, or all."""
    found = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    unknown = set(names) - set(found)
    if unknown:
        sys.exit(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    python = f"{platform.python_implementation()} {platform.python_version()}"
    print(f"{python}, {os.cpu_count()} cores, {platform.machine()}\n")
    for name in names or found:
        rows = importlib.import_module(f"benchmarks.bench_{name}").run()
        print(table(name, ("what", "size", "time", "growth", "per item", "note"), _shown(rows)), "\n", flush=True)


def _shown(rows: list[dict[str, object]]) -> list[tuple[object, ...]]:
    """Each row with its time in words, and its ratio to the smallest size of the same name."""
    first: dict[object, float] = {}
    shown: list[tuple[object, ...]] = []
    for row in rows:
        seconds = row.get("seconds")
        growth = None
        if isinstance(seconds, float) and row.get("size") is not None:
            growth = f"x{seconds / first.setdefault(row['name'], seconds):.2f}"
        shown.append((row["name"], row.get("size"), _time(seconds), growth, row.get("per_item"), row.get("note")))
    return shown


def _time(seconds: object) -> str | None:
    if not isinstance(seconds, float):
        return None
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


if __name__ == "__main__":
    main(sys.argv[1:])
