"""YAML, stricter than PyYAML: plain data only, and a key that stands twice in one mapping is an error."""

from __future__ import annotations

from typing import Any

import yaml

from agentfleet.errors import SpecError
from agentfleet.units import show


class _Loader(yaml.SafeLoader):
    """Refuses equal keys in one mapping, of which the last would silently win."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):  # others are no plain data, which construction refuses
                line, same = key.start_mark.line + 1, (key.tag, key.value)
                if same in lines:
                    raise yaml.YAMLError(
                        f"line {line}: the key {show(key.value)} stands in line {lines[same]} already; remove one"
                    )
                lines[same] = line
        return node


class _Dumper(yaml.SafeDumper):
    """Writes every text so that it is read back as it was."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # in any other style PyYAML writes NEL as it is, and reads it back as a plain end of line
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if "\x85" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def read(text: str) -> Any:
    """The plain data in a YAML text.

    Raises:
        SpecError: It is not YAML, or a key stands twice in one mapping; the message names the line.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        # the last ones: PyYAML on tags that do not fit their values, such as "!!int ''" and "!!timestamp x"
        if isinstance(error, RecursionError):
            raise SpecError("this YAML is nested too deeply to be read") from None
        raise SpecError(f"this is not YAML: {' '.join(str(error).split())[:300]}") from error


def write(data: Any) -> str:
    """Plain data as YAML text that `read` reads back."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text
