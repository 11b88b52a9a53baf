"""The documents tell today's truth: their code compiles and runs, their links lead somewhere, nothing is left out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.test_examples import run

import agentfleet
from agentfleet.backends.kubernetes.measures import MEASURES
from agentfleet.core.recovery import Remedy
from agentfleet.selfmetrics import SELF_METRICS
from agentfleet.server.metrics import API_METRICS
from agentfleet.telemetry import METRICS

ROOT = Path(__file__).parent.parent
DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = [ROOT / "README.md", *DOCS]
RUNS = "<!-- runs -->"

if not DOCS:
    pytest.skip("no documents here: these are the tests of a wheel", allow_module_level=True)

RUN_BLOCK = """
import ast, asyncio, inspect, sys

code = compile(open(sys.argv[1]).read(), "block", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
answer = eval(code, {"__name__": "__main__"})
if inspect.iscoroutine(answer):
    asyncio.run(answer)
"""


@dataclass
class Block:
    """A fenced block of a document."""

    page: Path
    line: int
    language: str
    text: str
    runs: bool
    """Whether it is marked to be run; what it prints is then what the next block says, if that is a `text` block."""

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        lines = page.read_text().splitlines()
        language, begun, before = None, 0, ""
        for number, line in enumerate(lines):
            if line.startswith("```"):
                if language is None:
                    language, begun = line[3:].strip(), number
                else:
                    yield Block(page, begun + 1, language, "\n".join(lines[begun + 1 : number]) + "\n", before == RUNS)
                    language, before = None, ""
            elif language is None and line.strip():
                before = line.strip()
        assert language is None, f"{page.name}: a block that begins in line {begun + 1} does not end"


def runs() -> Iterator[tuple[Block, Block | None]]:
    found = list(blocks())
    for block, following in zip(found, [*found[1:], None], strict=True):
        if block.runs:
            told = following if following is not None and following.language == "text" else None
            yield block, told if told is not None and told.page == block.page else None


@pytest.mark.parametrize("block", [block for block in blocks() if block.language == "python"], ids=str)
def test_code_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)


@pytest.mark.integration
@pytest.mark.parametrize(("block", "told"), list(runs()), ids=str)
def test_code_runs(block: Block, told: Block | None, tmp_path: Path) -> None:
    assert block.language == "python"
    file = tmp_path / "block.py"
    file.write_text(block.text)
    output = run("-c", RUN_BLOCK, str(file), folder=tmp_path)
    if told is not None:
        assert output == told.text


# ------------------------------------------------------------------------------------------------ links

LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The names by which a page's headings are linked to."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue  # not ours
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


# ------------------------------------------------------------------------------------------------ nothing left out

RECORDERS = {"record", "_record", "_note", "write", "_set", "Event"}
KIND = re.compile(r"[a-z]+(\.[a-z_]+)+")


def recorded() -> set[str]:
    """Every kind of event that the package records, but for those of its demo, read from its source."""
    found: set[str] = set()
    package = ROOT / "src" / "agentfleet"
    for path in package.rglob("*.py"):
        if "demo" in path.relative_to(package).parts:
            continue
        tree = ast.parse(path.read_text())
        named: dict[str, list[ast.expr]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                named.setdefault(node.targets[0].id, []).append(node.value)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _name(node.func) in RECORDERS:
                for argument in node.args:
                    found |= _kinds(argument, named)
    return found


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _kinds(node: ast.expr, named: dict[str, list[ast.expr]]) -> set[str]:
    match node:
        case ast.Constant(value=str(text)) if KIND.fullmatch(text):
            return {text}
        case ast.IfExp(body=one, orelse=other):
            return _kinds(one, named) | _kinds(other, named)
        case ast.Name(id=name) if name in named:
            return set().union(*(_kinds(value, {}) for value in named[name]))
        case ast.JoinedStr(values=[ast.Constant(value="recovery."), _]):
            return {f"recovery.{remedy.value}" for remedy in Remedy}
        case ast.JoinedStr(values=[ast.Constant(value=str(text)), _]) if text in (
            "state.recovery.",
            "state.disruption.",
        ):
            return {f"{text}N"}
    return set()


def first_column(page: str, pattern: str) -> list[str]:
    return re.findall(rf"^\| `({pattern})` \|", (ROOT / "docs" / page).read_text(), re.MULTILINE)


def test_every_event_is_told() -> None:
    told = first_column("events.md", r"[a-z]+(?:\.[a-zN_]+)+")
    assert len(told) == len(set(told))
    assert set(told) == recorded()


def test_every_metric_is_told() -> None:
    pages = {"events.md": METRICS, "managers.md": SELF_METRICS, "rest.md": API_METRICS, "kubernetes.md": MEASURES}
    for page, metrics in pages.items():
        told = first_column(page, r"agentfleet_\w+")
        assert len(told) == len(set(told))
        assert set(told) == set(metrics)


def test_every_public_name_is_told() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    missing = [name for name in agentfleet.__all__ if not re.search(rf"\b{name}\b", text)]
    assert not missing


def test_every_document_is_linked_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in LINK.findall((ROOT / "README.md").read_text())}
    missing = [page.name for page in DOCS if f"docs/{page.name}" not in linked]
    assert missing in ([], ["embedding.md"])
