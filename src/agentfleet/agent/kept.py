"""The last configuration that an agent has accepted, on its disk: what it starts with when nobody answers."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

FORMAT = 1


class KeptConfig:
    """One file, replaced in one step, so that whoever is killed at any instant finds the one before or the one after.

    Args:
        path: Of the file; its directory is made if there is none.
        instance: Whose configuration it is. That of another instance is not read: it may have been on trial there.
    """

    __slots__ = ("_instance", "_path", "trouble")

    def __init__(self, path: str, instance: str | None) -> None:
        self._path, self._instance = path, instance
        self.trouble: str | None = None
        """Why the last reading or writing failed."""

    def read(self) -> tuple[int, dict[str, Any]] | None:
        """The revision and the document that are kept; None if there is nothing that can be used."""
        self.trouble = None
        try:
            with open(self._path, "rb") as file:  # noqa: PTH123  importing pathlib costs more than all of this
                kept = json.loads(file.read())
            revision, document = kept["revision"], kept["document"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            self.trouble = f"{self._path} cannot be used: {error!r:.200}"
            return None
        mine = kept.get("format") == FORMAT and kept.get("instance") == self._instance
        sound = type(revision) is int and 1 <= revision < 2**63 and isinstance(document, dict)
        return (revision, document) if mine and sound else None

    def write(self, revision: int, document: dict[str, Any]) -> bool:
        """Keep a document; whether that has worked. Blocks until it is on the disk."""
        self.trouble = None
        data = {"format": FORMAT, "instance": self._instance, "revision": revision, "document": document}
        fresh = f"{self._path}.{os.getpid()}.new"
        try:
            os.makedirs(os.path.dirname(self._path) or ".", mode=0o700, exist_ok=True)  # noqa: PTH103, PTH120
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(json.dumps(data, separators=(",", ":")).encode("ascii"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self._path)  # noqa: PTH105
            _sync_folder(os.path.dirname(self._path) or ".")  # noqa: PTH120
        except OSError as error:
            self.trouble = f"{self._path} cannot be written: {error.strerror or error}"
            with contextlib.suppress(OSError):
                os.unlink(fresh)  # noqa: PTH108
            return False
        return True


def _sync_folder(path: str) -> None:
    """Have the new name survive the loss of power, too."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
