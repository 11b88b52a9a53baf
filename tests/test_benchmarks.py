"""Every benchmark can be run by `python -m benchmarks`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.skipif(not BENCHMARKS.exists(), reason="the benchmarks are not part of the wheel")
def test_every_benchmark_has_a_run_that_needs_no_arguments() -> None:
    """Read, not imported: what some of them measure needs programs that are not everywhere."""
    modules = sorted(BENCHMARKS.glob("bench_*.py"))
    assert modules
    for module in modules:
        made = [each for each in ast.parse(module.read_text()).body if isinstance(each, ast.FunctionDef)]
        run = next((each for each in made if each.name == "run"), None)
        assert run is not None, f"{module.name} has no run()"
        needed = len(run.args.posonlyargs + run.args.args) - len(run.args.defaults)
        assert (needed, [each for each in run.args.kw_defaults if each is None]) == (0, []), module.name
