"""Job files: YAML, read with care, since files come from anywhere."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from quadapt.config.check import checked
from quadapt.config.commands import RunConfig
from quadapt.config.values import check_text
from quadapt.errors import ConfigError

MOST_BYTES, MOST_VALUES, MOST_DEPTH = 2**20, 10_000, 20
"""No job is larger. A few hundred bytes of aliases would otherwise grow to gigabytes, and deep nesting end in Python's
own limit."""


def read_job(path: str, changes: Sequence[str] = ()) -> RunConfig:
    """Read a job file and check all of its settings.

    Args:
        path: The file.
        changes: Settings that replace those of the file: `tune.max_steps=5`, with a value as YAML has it.

    Raises:
        ConfigError: It is missing, not YAML, too large, or has a wrong setting (named with its section).
    """
    try:
        file = Path(os.path.expanduser(check_text(path)))
    except ValueError as error:
        raise ConfigError(f"{path!r}: {error}") from None
    if not file.is_file():
        near = difflib.get_close_matches(
            file.name, [item.name for item in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        )
        raise ConfigError(f"{path!r} does not exist." + (f" Did you mean {near[0]!r}?" if near else ""))
    if file.stat().st_size > MOST_BYTES:
        raise ConfigError(f"{path}: has over {MOST_BYTES:,} bytes, which no job has. Give another file")
    try:
        values = _loaded(file.read_text(encoding="utf-8"), path)
    except RecursionError:
        raise ConfigError(f"{path}: {_TOO_DEEP}") from None
    # What the values of its tags are made of is not checked by the library: `!!bool x` is a KeyError, for one.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{path}: is not YAML ({reason})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no settings. It needs at least output and tune")
    values = _changed(values, changes)
    stages: dict[str, Any] = {name: {} for name in ("merge", "eval", "export") if values.get(name, ...) is None}
    return checked(RunConfig, {**values, **stages}, f"{path}: ")


def _changed(values: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """The settings of a job with some of them replaced; sections that are not there begin with them."""
    values = dict(values)
    for each in changes:
        name, equals, text = each.partition("=")
        section, dot, setting = name.strip().rpartition(".")
        if not equals or not setting or bool(dot) != bool(section) or "." in section:
            raise ConfigError(
                f"--set {each!r}: must be a setting and its value, such as tune.max_steps=5 or output=job"
            )
        try:
            value = _loaded(text, f"--set {name}")
        except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"--set {each!r}: the value is not YAML. Put it in quotes") from None
        before = values.get(section) or {}
        if not section:
            values[setting] = value
        elif isinstance(before, dict):  # else the section itself is wrong, which is said below
            values[section] = {**before, setting: value}
    return values


_TOO_DEEP = f"is nested more than {MOST_DEPTH} levels deep. A job has sections, and settings in them"


def _loaded(text: str, path: str) -> Any:
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _check_size(root, path)
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _check_size(root: yaml.Node, path: str) -> None:
    """Walk the nodes as their reader would, with aliases followed, before anything is made of them.

    Raises:
        ConfigError: There are too many, they are too deep, or a name stands twice in a section.
    """
    left = [(root, 0)]
    seen = 0
    while left:
        node, depth = left.pop()
        seen += 1
        if seen > MOST_VALUES:
            raise ConfigError(f"{path}: has over {MOST_VALUES:,} values, aliases followed. Write the job without them")
        if depth > MOST_DEPTH:
            raise ConfigError(f"{path}: {_TOO_DEEP}")
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
            if twice is not None:
                line = node.start_mark.line + 1
                raise ConfigError(f"{path}: {twice} stands twice in the section at line {line}. Leave one out")
            left += [(each, depth + 1) for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            left += [(each, depth + 1) for each in node.value]
