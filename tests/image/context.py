"""What a build may see of a folder: all but what .dockerignore leaves out. The last pattern that fits decides."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


class Context:
    """A folder that is sent to a build.

    Args:
        folder: The root of the checkout, with its `.dockerignore` if there is one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ignored = folder / ".dockerignore"
        self._rules = list(_rules(ignored.read_text())) if ignored.exists() else []

    def has(self, path: PurePosixPath) -> bool:
        """Whether a file is sent; one whose folder is left out is, too, unless it is asked for again."""
        sent = True
        for pattern, keep in self._rules:
            if any(pattern.fullmatch(str(each)) for each in (path, *path.parents)):
                sent = keep
        return sent

    def files(self, source: str) -> Iterator[PurePosixPath]:
        """The files that one COPY source stands for, by their path in the folder: a file, or all below a folder."""
        if any(sign in source for sign in "*?[") or ".." in PurePosixPath(source).parts:
            raise ValueError(f"COPY {source}: neither wildcards nor .. are known here")
        place = self.folder / source
        for each in [place] if place.is_file() else sorted(place.rglob("*")):
            path = PurePosixPath(each.relative_to(self.folder).as_posix())
            if each.is_file() and self.has(path):
                yield path


def _rules(text: str) -> Iterator[tuple[re.Pattern[str], bool]]:
    for line in text.splitlines():
        rule = line.strip()
        if rule and not rule.startswith("#"):
            keep = rule.startswith("!")
            yield re.compile(_regex(rule.removeprefix("!").strip("/"))), keep


def _regex(pattern: str) -> str:
    """A pattern of .dockerignore as a regular expression: * and ? stay within a folder, ** does not."""
    found = ""
    for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern):
        found += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(part, re.escape(part))
    return found
