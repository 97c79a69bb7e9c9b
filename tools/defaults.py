"""`python -m tools.defaults`: writes the tables of options and defaults in the documentation from the code.

A table stands between a line `<!-- defaults: NAME -->` and a line `<!-- /defaults -->`. NAME is a settings class of
`SETTINGS`, `flextron` and a verb of the command line, `keys` and an endpoint of the server, or `clients`. With
`--check` nothing is written, and the exit code is 1 if a table is out of date.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from flextron.cli.main import app
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.protocols.keys import KEYS, Does
from flextron.training.recipe import TrainRecipe
from flextron.workflows.elastify import ConvertStage, ProfileStage

__all__ = ["PAGES", "SETTINGS", "fill", "main", "table"]

ROOT = Path(__file__).parent.parent
PAGES = (
    "docs/guides/finetuning.md",
    "docs/guides/recipes.md",
    "docs/reference/clients.md",
    "docs/reference/command-line.md",
    "docs/reference/request-keys.md",
)
SETTINGS = {kind.__name__: kind for kind in (ConvertStage, Hyperparameters, ProfileStage, TrainRecipe)}
_BLOCK = re.compile(r"^(<!-- defaults: ([^\n]+) -->\n)(.*?)^(<!-- /defaults -->)$", re.MULTILINE | re.DOTALL)
_DEFAULT = re.compile(r" Default: (.*)\.$", re.DOTALL)


def _row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in cells) + " |"


def _shown(value: Any, switch: tuple[str, str] = ("`false`", "`true`")) -> str:
    """A default as people write it; nothing for None, whose meaning the description tells.

    Args:
        value: the default.
        switch: words for False and True.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return switch[value]
    if isinstance(value, tuple):
        return ", ".join(_shown(v) for v in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, int) else f"`{value}`"


def _meaning(text: str, default: str) -> tuple[str, str]:
    """Description and default; a description may end with `Default: ….`, in words."""
    told = _DEFAULT.search(text)
    return (_DEFAULT.sub("", text), told[1]) if told else (text, default)


def _descriptions(kind: type[Any]) -> dict[str, str]:
    """The docstring under each field of a class."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def _settings_table(kind: type[Any]) -> list[str]:
    fields = getattr(kind, "model_fields", None) or kind.__dataclass_fields__
    told = _descriptions(kind)
    rows = []
    for name, field in fields.items():
        meaning, default = _meaning(told[name], _shown(field.default))
        rows.append(_row(f"`{name}`", default, meaning))
    return ["| entry | default | meaning |", "|---|---|---|", *rows]


def _verb_table(words: Sequence[str]) -> list[str]:
    command: Any = typer.main.get_command(app)
    for word in words:
        command = command.get_command(None, word)
    rows = []
    for option in command.params:
        if option.param_type_name != "option" or option.name in ("as_json", "help"):
            continue
        default = "required" if option.required else _shown(option.default, ("off", "on"))
        if option.envvar:
            default = f"`${option.envvar}`"
        meaning, default = _meaning(option.help or "", default)
        names = " ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
        rows.append(_row(names, default, meaning))
    return ["| option | default | meaning |", "|---|---|---|", *rows]


def _keys_table(endpoint: str) -> list[str]:
    """What the server does with each key, those that it serves first."""
    words = {Does.SERVE: "served", Does.IGNORE: "changes no answer", Does.REFUSE: "refused"}
    rows = []
    for does, word in words.items():
        for key in KEYS[endpoint].values():
            if key.does is does:
                neutral = ", ".join(f"`{json.dumps(value)}`" for value in key.neutral)
                rows.append(_row(f"`{key.name}`", key.origin, word + (f", but for {neutral}" if neutral else "")))
    return ["| key | of | what happens |", "|---|---|---|", *rows]


def _clients_table() -> list[str]:
    """What each client did with the server when the tests recorded it."""
    found = json.loads((ROOT / "tests/server/clients/results.json").read_text(encoding="utf-8"))
    rows = [
        _row(name, entry["version"], "; ".join(feature for feature, passed in entry["features"].items() if passed))
        for name, entry in found.items()
    ]
    return ["| client | version | what works |", "|---|---|---|", *rows]


def table(name: str) -> str:
    """The table of a settings class, of a verb, of an endpoint or of clients, as Markdown.

    Raises:
        KeyError: there is no such class, verb or endpoint.
    """
    first, *words = name.split()
    if first == "keys":
        return "\n".join(_keys_table(words[0]))
    if first == "clients":
        return "\n".join(_clients_table())
    lines = _verb_table(words) if first == "flextron" else _settings_table(SETTINGS[first])
    return "\n".join(lines)


def fill(text: str) -> str:
    """A page with its tables made anew."""
    return _BLOCK.sub(lambda match: f"{match[1]}\n{table(match[2])}\n\n{match[4]}", text)


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    """Fill the tables, or with `--check` only compare.

    Returns:
        Exit code: 0 if all is up to date, 1 if `--check` found a page that is not, 2 for bad input.
    """
    if set(arguments) - {"--check"}:
        print("usage: python -m tools.defaults [--check]", file=sys.stderr)
        return 2
    stale = []
    for name in PAGES:
        old = (root / name).read_text(encoding="utf-8")
        new = fill(old)
        if new != old:
            stale.append(name)
            if not arguments:
                (root / name).write_text(new, encoding="utf-8")
    for name in stale:
        print(f"{name} {'is out of date; run python -m tools.defaults' if arguments else 'written'}")
    return 1 if stale and arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
