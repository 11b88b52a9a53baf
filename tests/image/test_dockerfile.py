"""The reader of Dockerfiles: what it understands it carries out, what it does not know it refuses."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest
from tests.image.build import Build, Image
from tests.image.context import Context
from tests.image.dockerfile import DockerfileError, Instruction, expand, parse

PLACE = Instruction(1, "ENV", {}, "")


def test_stages_lines_and_flags_are_read() -> None:
    file = parse(
        "# a comment\nARG BASE=debian\n\nFROM ${BASE} AS build\nRUN one \\\n  # in between\n  && two\n"
        "from scratch\nCOPY --from=build --chown=1:2 /a /b\n"
    )
    assert [each.text for each in file.arguments] == ["BASE=debian"]
    build, last = file.stages
    assert (build.base, build.name, last.base, last.name) == ("${BASE}", "build", "scratch", None)
    assert [(each.line, each.word, each.text) for each in build.instructions] == [(5, "RUN", "one && two")]
    (copy,) = last.instructions
    assert (dict(copy.flags), copy.words()) == ({"from": "build", "chown": "1:2"}, ("/a", "/b"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no FROM"),
        ("RUN a", "line 1: RUN: nothing but ARG"),
        ("FROM a\nADD b c", "line 2: unknown instruction 'ADD'"),
        ('FROM a\nSHELL ["b"]', "unknown instruction 'SHELL'"),
        ("FROM a\nRUN --mount=type=cache b", "line 2: RUN: unknown flag --mount"),
        ("FROM a\nRUN <<END\nb\nEND", "here-documents"),
        ("FROM a\nRUN", "says nothing"),
        ("FROM a\nRUN b \\", "goes on into nothing"),
        ("# syntax=docker/dockerfile:1\nFROM a", "parser directives"),
        ("FROM --platform=b a", "unknown flag --platform"),
        ("FROM a AS b c", "not 'image' or"),
    ],
)
def test_what_is_not_known_is_refused(text: str, problem: str) -> None:
    with pytest.raises(DockerfileError, match=problem):
        parse(text)


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("$A-${A}", "1-1"),
        ("${B:-two}${A:-three}", "two1"),
        ("${A:+set}${B:+set}", "set"),
        (r"\$A", "$A"),
        ("${EMPTY:-x}", "x"),
        ("plain", "plain"),
    ],
)
def test_variables_are_put_in(text: str, expanded: str) -> None:
    assert expand(text, {"A": "1", "EMPTY": ""}, PLACE) == expanded


@pytest.mark.parametrize("text", ["${A#x}", "$", "${A:-${B}}", "$(date)"])
def test_other_uses_of_variables_are_refused(text: str) -> None:
    with pytest.raises(DockerfileError, match="unknown use"):
        expand(text, {"A": "1"}, PLACE)


def carried_out(text: str, folder: Path, **arguments: str) -> Image:
    """Carry out a Dockerfile that runs nothing, upon an empty base."""
    (folder / "context").mkdir()
    (folder / "roots").mkdir()
    context = folder / "context"
    for name in ("a/one", "a/b/two", "three", "secret"):
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (context / name).write_text(name)
    (context / ".dockerignore").write_text("*\n!a\n!three\n**/two\n")
    build = Build(Context(context), folder / "roots", Path.exists, variables={}, mounts={})
    return build.run(parse(text), arguments)


def files(image: Image) -> set[str]:
    return {str(each.relative_to(image.root)) for each in image.root.rglob("*") if each.is_file()}


def test_what_engines_read_of_an_image_is_noted(tmp_path: Path) -> None:
    image = carried_out(
        'ARG OUTER=o\nFROM base\nARG OUTER\nARG V=1\nENV A=$V \\\n B="b c"\nENV C=${A}${V} V=9\nLABEL l="$B $V"\n'
        'USER 7:8\nWORKDIR /w\nWORKDIR x/../y\nEXPOSE 80 81/tcp\nVOLUME ["/data"]\nENTRYPOINT ["/p"]\nCMD a b\n'
        'HEALTHCHECK --interval=1s CMD ["/p", "ok"]\n',
        tmp_path,
        V="2",
    )
    assert {name: image.env[name] for name in "ABCV"} == {"A": "2", "B": "b c", "C": "22", "V": "9"}
    assert image.arguments == {"OUTER": "o", "V": "2"}
    assert image.labels == {"l": "b c 9"}
    assert (image.uid, image.gid, image.folder) == (7, 8, "/w/y")
    assert (image.ports, image.volumes) == (["80", "81/tcp"], ["/data"])
    assert (image.entrypoint, image.command) == (("/p",), ("/bin/sh", "-c", "a b"))
    assert (image.health, dict(image.health_flags)) == (("/p", "ok"), {"interval": "1s"})


def test_files_are_copied_from_the_context_and_from_stages(tmp_path: Path) -> None:
    image = carried_out(
        "FROM base AS first\nWORKDIR /src\nCOPY a into\nCOPY three ./\nCOPY three renamed\n"
        "FROM base\nCOPY --from=first --chmod=640 /src/into /here\nCOPY --from=first /src/renamed /file\n",
        tmp_path,
    )
    assert files(image) == {"here/one", "file"}
    assert (image.root / "here/one").stat().st_mode & 0o777 == 0o640
    first = image.root.parent / "stage-0"
    assert (first / "src/into/one").read_text() == "a/one"
    assert (first / "src/three").read_text() == (first / "src/renamed").read_text() == "three"


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        ("COPY secret /", "not in the build's context"),
        ("COPY --from=nobody a b", "no stage 'nobody'"),
        ("COPY a three here", "must end with /"),
        ("COPY a* /", "neither wildcards"),
        ("ENV A 1", "is not name=value"),
        ("ENV A='$B'", "single quotes"),
        ("USER app", "by number"),
        ("HEALTHCHECK NONE", "only HEALTHCHECK CMD"),
        ("ENTRYPOINT [1]", "array"),
        ("ARG a-b", "neither name"),
    ],
)
def test_steps_that_cannot_be_carried_out_are_refused(step: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        carried_out(f"FROM base\n{step}\n", tmp_path)


@pytest.mark.parametrize(
    ("rules", "sent", "left_out"),
    [
        ("*\n!src\n**/__pycache__", ["src/a/b.py"], ["x", "x/src/y", "src/a/__pycache__/b.pyc", ".git/config"]),
        ("# all but logs\n*.log\n/build/", ["a/b.log", "builds"], ["b.log", "build/x"]),
        ("**/*.log\n!keep/**", ["a", "keep/a/b.log"], ["a.log", "x/y/z.log"]),
        ("", ["a"], []),
    ],
)
def test_the_last_rule_that_fits_decides_what_is_sent(
    rules: str, sent: list[str], left_out: list[str], tmp_path: Path
) -> None:
    (tmp_path / ".dockerignore").write_text(rules)
    context = Context(tmp_path)
    assert [each for each in (*sent, *left_out) if context.has(PurePosixPath(each))] == sent
