"""Quantities as people write them: "250m" cores, "512Mi" bytes, "30s", "10%".

Values are stored as plain numbers (cores, bytes, seconds) and written back in words, so that
`parse(format(x)) == x` for every representable value. The notation is Kubernetes' resource quantity
(`resource.Quantity`) for CPU and memory, and Go's duration words for time.
"""

from __future__ import annotations

import math
import re
import reprlib
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema
from pydantic_core import PydanticCustomError

_LIMIT = 1e18
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}
_DECIMAL = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_TIME = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = r"(\d{1,15}(?:\.\d{1,12})?)"
_CPU = re.compile(rf"{_NUMBER}(m?)", re.ASCII)
_MEMORY = re.compile(rf"{_NUMBER}({'|'.join([*_BINARY, *_DECIMAL])})?", re.ASCII)
_DURATION_PART = re.compile(rf"{_NUMBER}(ms|s|m|h|d)", re.ASCII)
_DURATION = re.compile(rf"(?:{_NUMBER}(?:ms|s|m|h|d))+", re.ASCII)
_PERCENT = re.compile(rf"{_NUMBER}%", re.ASCII)


def _number(value: object, what: str) -> float:
    """A finite, non-negative number, or an error that shows what would be right."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("quantity", "{what}, not {value}", {"what": what, "value": show(value)})
    if not value >= 0:  # NaN too; and compared before it becomes a float, which a huge int cannot
        raise PydanticCustomError(
            "quantity", "{what}, and not negative; got {value}", {"what": what, "value": show(value)}
        )
    if value > _LIMIT:
        raise PydanticCustomError("quantity", "{what}; {value} is beyond 1e18", {"what": what, "value": show(value)})
    return float(value)


def show(value: object) -> str:
    """A short form for messages, whatever it is: nested without end, megabytes long, or a number of 5,000 digits."""
    if isinstance(value, int) and abs(value) > _LIMIT:
        return "a whole number beyond 1e18" if value > 0 else "a whole number below -1e18"
    text = _SHORT.repr(value)
    # half of a surrogate pair could not be printed
    return (text if len(text) <= 60 else text[:57] + "...").encode("utf-8", "backslashreplace").decode()


def parse_cpu(value: object) -> float:
    """Cores from "250m", "1.5" or a number of cores."""
    what = 'write cores like "250m", "2" or 0.5'
    if isinstance(value, str) and (match := _CPU.fullmatch(value)):
        return float(match[1]) / 1000 if match[2] else float(match[1])
    return _number(value, what)


def format_cpu(cores: float) -> str | float:
    """Cores in the shortest exact words: whole cores, else millicores, else decimals; the bare number where none is."""
    milli = round(cores * 1000)
    for text in (f"{round(cores)}", f"{milli}m", _plain(cores)):
        if len(text) <= 15 and parse_cpu(text) == cores:
            return text
    return cores


def parse_memory(value: object) -> int:
    """Bytes from "512Mi", "1G" or a whole number of bytes."""
    what = 'write bytes like "512Mi", "2Gi", "500M" or a whole number'
    if isinstance(value, str) and (match := _MEMORY.fullmatch(value)):
        scale = (_BINARY | _DECIMAL).get(match[2], 1) if match[2] else 1
        value = float(match[1]) * scale if "." in match[1] else int(match[1]) * scale
    number = _number(value, what)
    if number != int(number):
        raise PydanticCustomError("quantity", "{what}; {value} is not whole", {"what": what, "value": show(value)})
    return int(value) if isinstance(value, int) else int(number)


def format_memory(size: int) -> str | int:
    """Bytes in the largest binary unit that is exact; the bare number where it has more digits than a word may have."""
    for unit, scale in reversed(_BINARY.items()):
        if size and size % scale == 0 and size // scale < 10**15:
            return f"{size // scale}{unit}"
    return str(size) if size < 10**15 else size


def parse_duration(value: object) -> float:
    """Seconds from "30s", "1m30s", "500ms" or a number of seconds."""
    what = 'write a duration like "30s", "5m", "1h30m", "250ms" or a number of seconds'
    if isinstance(value, str) and _DURATION.fullmatch(value):
        return _number(sum(float(n) * _TIME[unit] for n, unit in _DURATION_PART.findall(value)), what)
    return _number(value, what)


def format_duration(seconds: float) -> str | float:
    """Seconds in the largest unit that is exact; the bare number where no word is exact."""
    for unit in ("d", "h", "m", "s", "ms"):
        count = seconds / _TIME[unit]
        if count >= 1 and count == int(count) and count < 1e15 and parse_duration(f"{int(count)}{unit}") == seconds:
            return f"{int(count)}{unit}"
    return "0s" if seconds == 0 else seconds


def parse_share(value: object) -> int | str:
    """A count (3) or a share of the fleet ("10%", kept as written in its shortest form)."""
    what = 'write a whole number like 3, or a share like "10%"'
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value)):
        percent = float(match[1])
        if percent > 100:
            raise PydanticCustomError(
                "quantity", "{what}, at most 100%; got {value}", {"what": what, "value": show(value)}
            )
        return f"{_plain(percent)}%"
    _number(value, what)
    if not isinstance(value, int):
        raise PydanticCustomError("quantity", "{what}, not {value}", {"what": what, "value": show(value)})
    return int(value)


def share_of(share: int | str, total: int, *, round_up: bool) -> int:
    """What `share` means for a fleet of `total` instances.

    Kubernetes rounds a surge up and an unavailability down (`intstr.GetScaledValueFromIntOrPercent`); the
    caller says which one it is.
    """
    if isinstance(share, int):
        return share
    exact = round(float(share[:-1]) * total / 100, 9)  # 9 digits: 7% of 100 is 7, not 7.000000000000001
    return math.ceil(exact) if round_up else math.floor(exact)


def _plain(number: float) -> str:
    text = f"{number:.12f}".rstrip("0").rstrip(".")
    return text or "0"


def _schema(example: str, also: str, description: str) -> dict[str, Any]:
    return {
        "anyOf": [{"type": "string"}, {"type": also, "minimum": 0}],
        "examples": [example],
        "description": description,
    }


def _format_share(share: int | str) -> int | str:
    return share


if TYPE_CHECKING:
    # A checker cannot be told that "30s" may be written where a float is read back (PEP 712 would have allowed it), so
    # that values are checked when a spec is made, and their use inside the library by its tests.
    Cpu = Any
    Memory = Any
    Duration = Any
    Period = Any
    Share = Any
else:
    Cpu = Annotated[
        float,
        BeforeValidator(parse_cpu),
        PlainSerializer(format_cpu, return_type=str | float),
        WithJsonSchema(_schema("250m", "number", "CPU cores")),
    ]
    """CPU in cores; "250m" is a quarter of a core."""

    Memory = Annotated[
        int,
        BeforeValidator(parse_memory),
        PlainSerializer(format_memory, return_type=str | int),
        WithJsonSchema(_schema("512Mi", "integer", "Memory in bytes")),
    ]
    """Memory in bytes; "512Mi" is 512 · 2^20."""

    Duration = Annotated[
        float,
        BeforeValidator(parse_duration),
        PlainSerializer(format_duration, return_type=str | float),
        WithJsonSchema(_schema("30s", "number", "A duration; a bare number is seconds")),
    ]
    """A time span in seconds, zero allowed; "1m30s" is 90."""

    Period = Annotated[
        Duration,
        Field(gt=0),
    ]
    """A time span in seconds, more than zero."""

    Share = Annotated[
        int | str,
        BeforeValidator(parse_share),
        PlainSerializer(_format_share, return_type=int | str),
        WithJsonSchema(_schema("10%", "integer", "A number of instances, or a share of the fleet")),
    ]
    """A number of instances, or a share of the fleet such as "10%"."""
