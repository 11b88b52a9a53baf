"""Reads a Dockerfile into stages of instructions. It knows what ours uses; any other word or flag is an error.

Variables are put in later, by whoever carries the instructions out (`expand`): their values depend on what came before.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

FLAGS: Mapping[str, frozenset[str]] = {
    "FROM": frozenset(),
    "ARG": frozenset(),
    "CMD": frozenset(),
    "COPY": frozenset({"from", "chown", "chmod"}),
    "ENTRYPOINT": frozenset(),
    "ENV": frozenset(),
    "EXPOSE": frozenset(),
    "HEALTHCHECK": frozenset({"interval", "timeout", "start-period", "retries"}),
    "LABEL": frozenset(),
    "RUN": frozenset(),
    "USER": frozenset(),
    "VOLUME": frozenset(),
    "WORKDIR": frozenset(),
}
"""The flags of each known instruction."""

SHELL = ("/bin/sh", "-c")
_VARIABLE = re.compile(r"\\\$|\$(?:\{(?P<braced>\w+)(?::(?P<how>[-+])(?P<word>[^}$]*))?\}|(?P<bare>\w+))?")
_STAGE = re.compile(r"(?P<base>\S+)(?:\s+(?:AS|as)\s+(?P<name>[a-z][a-z0-9._-]*))?")


class DockerfileError(ValueError):
    """A Dockerfile that is wrong, or beyond what is known here; the message names the line."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its first line, its word in capitals, its flags, and the rest as it was written."""

    line: int
    word: str
    flags: Mapping[str, str]
    text: str

    def error(self, problem: str) -> DockerfileError:
        """What is wrong here."""
        return DockerfileError(f"line {self.line}: {self.word}: {problem}")

    def command(self) -> tuple[str, ...]:
        """The program and its arguments; the shell form is given to a shell, as the specification says."""
        if not self.text.startswith("["):
            return (*SHELL, self.text)
        return self._array()

    def words(self) -> tuple[str, ...]:
        """The words of a JSON array or of a plain list."""
        return self._array() if self.text.startswith("[") else tuple(self.text.split())

    def _array(self) -> tuple[str, ...]:
        try:
            found = json.loads(self.text)
        except json.JSONDecodeError as error:
            raise self.error(f"no JSON array: {error}") from error
        if not found or not all(isinstance(each, str) for each in found):
            raise self.error("an array of one or more texts is needed")
        return tuple(found)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """`name=value` words, in order; the old form `name value` is not known."""
        if "'" in self.text:
            raise self.error("single quotes would keep variables from being put in: use double quotes")
        for word in shlex.split(self.text):
            name, equals, value = word.partition("=")
            if not (equals and name):
                raise self.error(f"{word!r} is not name=value")
            yield name, value


@dataclass(frozen=True, slots=True)
class Stage:
    """What follows one FROM."""

    line: int
    base: str
    name: str | None
    instructions: list[Instruction] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Dockerfile:
    """All of it: the ARGs before the first FROM, and the stages."""

    arguments: list[Instruction]
    stages: list[Stage]


def parse(text: str) -> Dockerfile:
    """Read a Dockerfile.

    Raises:
        DockerfileError: It is wrong, or holds what is not known here.
    """
    found = Dockerfile([], [])
    for instruction in _instructions(text):
        if instruction.word == "FROM":
            found.stages.append(_stage(instruction))
        elif found.stages:
            found.stages[-1].instructions.append(instruction)
        elif instruction.word == "ARG":
            found.arguments.append(instruction)
        else:
            raise instruction.error("nothing but ARG may stand before the first FROM")
    if not found.stages:
        raise DockerfileError("there is no FROM")
    return found


def expand(text: str, values: Mapping[str, str], place: Instruction) -> str:
    """`text` with `$name`, `${name}`, `${name:-word}` and `${name:+word}` put in; an unknown name is empty."""

    def value(match: re.Match[str]) -> str:
        if match.group() == r"\$":
            return "$"
        name = match["braced"] or match["bare"]
        if name is None:
            raise place.error(f"unknown use of $ in {text!r}")
        known = values.get(name, "")
        if match["how"] == "-":
            return known or match["word"]
        return (match["word"] if known else "") if match["how"] == "+" else known

    return _VARIABLE.sub(value, text)


def _stage(instruction: Instruction) -> Stage:
    match = _STAGE.fullmatch(instruction.text)
    if match is None:
        raise instruction.error(f"not 'image' or 'image AS name': {instruction.text!r}")
    return Stage(instruction.line, match["base"], match["name"])


def _instructions(text: str) -> Iterator[Instruction]:
    for line, logical in _logical_lines(text):
        word, _, rest = logical.partition(" ")
        word = word.upper()
        if word not in FLAGS:
            raise DockerfileError(f"line {line}: unknown instruction {word!r}")
        flags, rest = _flags(line, word, rest.strip())
        if not rest:
            raise DockerfileError(f"line {line}: {word} says nothing")
        if "<<" in rest:
            raise DockerfileError(f"line {line}: {word}: here-documents are not known")
        yield Instruction(line, word, flags, rest)


def _flags(line: int, word: str, rest: str) -> tuple[dict[str, str], str]:
    flags: dict[str, str] = {}
    while rest.startswith("--"):
        flag, _, rest = rest.partition(" ")
        name, _, value = flag[2:].partition("=")
        if name not in FLAGS[word]:
            raise DockerfileError(f"line {line}: {word}: unknown flag --{name}")
        flags[name] = value
        rest = rest.strip()
    return flags, rest


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their continuations, and the number of the first; comments and empty lines are left out."""
    begun: list[str] = []
    first = 0
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if re.match(r"#\s*(syntax|escape|check)\s*=", stripped):
            raise DockerfileError(f"line {number}: parser directives are not known")
        if not stripped or stripped.startswith("#"):
            continue
        first = first if begun else number
        if stripped.endswith("\\"):
            begun.append(stripped[:-1].strip())
            continue
        yield first, " ".join([*begun, stripped])
        begun = []
    if begun:
        raise DockerfileError(f"line {first}: the last line goes on into nothing")
