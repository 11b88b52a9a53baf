"""What calls of a `ConfigStore` may say: keys, authors, reasons, numbers; what agents answer, and what errors tell."""

from __future__ import annotations

import json

from agentfleet.errors import DeadlineExceeded, SpecError
from agentfleet.units import show

_REQUEST = 64


def check_audit(key: str, author: str, reason: str, origin: str) -> None:
    """Raise SpecError unless it is said who publishes what, why, and from where."""
    check_words(key=key, author=author, reason=reason, **({"origin": origin} if origin else {}))


def check_words(**words: object) -> None:
    """Raise SpecError unless each word is text that people can read, and not too long."""
    for name, word in words.items():
        most = 4096 if name == "reason" else 253
        if not isinstance(word, str) or not _is_readable(word, most, breaks=name == "reason"):
            raise SpecError(f"{name}: must be printable text of 1 to {most} characters; got {show(word)}")


def _is_readable(word: str, most: int, *, breaks: bool) -> bool:
    return bool(word.strip()) and len(word) <= most and all(c.isprintable() or (c == "\n" and breaks) for c in word)


def check_number(name: str, number: object) -> None:
    """Raise SpecError unless it can be the number of a revision."""
    if type(number) is not int:
        raise SpecError(f"{name}: must be the number of a revision, a whole number; got {show(number)}")


def check_request(request: object) -> None:
    """Raise SpecError unless it can tell one request from all others."""
    if not isinstance(request, str) or len(request) > _REQUEST or not request.isprintable():
        raise SpecError(f"request: must be up to {_REQUEST} printable characters, not {show(request)}")


def told_of(error: Exception) -> dict[str, str]:
    """What events and answers say of a store's error. Its text is for the log: a driver's names hosts and users."""
    if isinstance(error, DeadlineExceeded):
        said = "the store did not answer in time; the manager's log has more"
    elif error.__cause__ is not None:
        said = "the store cannot be reached; the manager's log has more"
    else:
        said = str(error)[:4000]  # our own words, such as that its records went back
    return {"error": type(error).__name__, "message": said}


def revision_in(answer: bytes) -> int:
    """The revision that an agent's answer says it runs; 0 if it says none."""
    try:
        said = json.loads(answer)
    except (ValueError, RecursionError):
        return 0
    revision = said.get("revision") if isinstance(said, dict) else None
    return revision if type(revision) is int and 0 <= revision < 2**63 else 0
