"""What the experiment's commands have in common: a scale whose settings can be changed, and errors in one sentence."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.reproduction.scales import SCALES, Scale
from flextron.cli.console import message
from flextron.errors import FlextronError

__all__ = ["changed", "command_options", "command_parser", "run_command", "scale_of"]


def command_parser(module: str, description: str | None, *, scale: str) -> argparse.ArgumentParser:
    """A parser with `--scale` and `--set`.

    Args:
        module: that the command runs.
        description: of the help.
        scale: the default one.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--scale", choices=sorted(SCALES), default=scale, help="how large")
    parser.add_argument(
        "--set",
        dest="changes",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a setting of the scale and its JSON value, such as elastic_batch_size=4; may be repeated",
    )
    return parser


def scale_of(parsed: argparse.Namespace) -> Scale:
    """The scale that `command_parser`'s options name."""
    return changed(SCALES[parsed.scale], parsed.changes)


def command_options(scale: Scale) -> list[str]:
    """The options that name a scale: the inverse of `scale_of`."""
    named = SCALES[scale.name]
    changes = {name: now for name in _changeable(scale) if (now := getattr(scale, name)) != getattr(named, name)}
    return ["--scale", scale.name, *(f"--set={name}={json.dumps(value)}" for name, value in changes.items())]


def _changeable(scale: Scale) -> list[str]:
    return [f.name for f in dataclasses.fields(scale) if f.name not in ("name", "shapes")]


def changed(scale: Scale, changes: Sequence[str]) -> Scale:
    """A scale with other settings.

    Args:
        scale: to begin with.
        changes: `name=value` each, with values in JSON.

    Raises:
        FlextronError: there is no such setting, or it does not take such a value.
    """
    return dataclasses.replace(scale, **dict(_change(scale, change) for change in changes))


def _change(scale: Scale, change: str) -> tuple[str, Any]:
    name, _, text = change.partition("=")
    if name not in _changeable(scale):
        raise FlextronError(f"a scale has no setting {name!r} to change; there are {', '.join(_changeable(scale))}")
    now = getattr(scale, name)
    try:
        return name, _alike(now, json.loads(text))
    except (TypeError, json.JSONDecodeError):
        raise FlextronError(f"{name} cannot be {text!r}; it is {json.dumps(now)} now, so give JSON like that") from None


def _alike(now: Any, value: Any) -> Any:
    """A value of the same type; of a setting by family, the named families' alone may be given, or one for all."""
    if isinstance(now, Mapping):
        given = value if isinstance(value, dict) else dict.fromkeys(now, value)
        if not given.keys() <= now.keys():
            raise TypeError
        return {family: _alike(old, given.get(family, old)) for family, old in now.items()}
    if isinstance(now, tuple) and isinstance(value, list):
        return tuple(_alike(now[0], item) for item in value)
    if isinstance(now, float) and type(value) is int:
        return float(value)
    if type(value) is not type(now):
        raise TypeError
    return value


def run_command(action: Callable[[], object]) -> int:
    """Do it; exit code 2, after one sentence, where something is wrong with the input."""
    try:
        action()
    except FlextronError as error:
        message(f"error: {error}")
        return 2
    return 0
