"""The schema of `adapter_config.json`: the settings that are read, each with its type and bounds.

peft takes the keys of `alpha_pattern` for regular expressions, and some of those never end. So only such are taken as
cannot take long: no repeated groups, at most two repetitions, no references and no looking around.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from flextron.errors import FlextronError
from flextron.files import checked

__all__ = ["check_adapter_config", "is_targeted"]

_COSTLY = re.compile(r"\)[*+?{]|\(\?|\\[1-9]")
_REPEATED = re.compile(r"(?<!\\)[*+{]")


def _quick(pattern: str) -> str:
    """A regular expression that is done in no time on a module's name."""
    if _COSTLY.search(pattern) or len(_REPEATED.findall(pattern)) > 2:
        raise ValueError("a key is too complex a regular expression; write the modules' names out")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError("a key is no regular expression") from error
    return pattern


_Pattern = Annotated[str, Field(max_length=200), AfterValidator(_quick)]
_Rank = Annotated[int, Field(ge=1, le=2**20)]
_Alpha = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


_Name = Annotated[str, Field(max_length=200)]
_Modules = _Name | Annotated[list[_Name], Field(max_length=100_000)] | None
_LAYER = re.compile(r".*?\.(\d+)\.")


class _AdapterConfig(BaseModel):
    """The entries of `adapter_config.json` that are read; others are looked at by `read_adapter`."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    peft_type: Annotated[str, Field(max_length=100)] | None = None
    r: _Rank = 8
    rank_pattern: Annotated[dict[_Pattern, _Rank], Field(max_length=10_000)] | None = None
    lora_alpha: _Alpha = 8
    alpha_pattern: Annotated[dict[_Pattern, _Alpha], Field(max_length=10_000)] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    modules_to_save: Annotated[list[_Name], Field(max_length=1000)] | None = None
    target_modules: _Modules = None
    exclude_modules: _Modules = None
    layers_to_transform: int | list[int] | None = None
    base_model_name_or_path: str | None = None


def check_adapter_config(data: Any, what: str) -> dict[str, Any]:
    """Check what an `adapter_config.json` holds.

    Args:
        data: parsed JSON.
        what: its path, for the message.

    Raises:
        FlextronError: it is no object, or an entry has a value of the wrong type or size.
    """
    checked(_AdapterConfig, data, what, "save the adapter again")
    if any(len(key) > 100 for key in data):
        raise FlextronError(f"{what} has a key of more than 100 characters; save the adapter again")
    return dict(data)


def is_targeted(settings: Mapping[str, Any], name: str) -> bool:
    """Whether peft gives a linear a part of the adapter, and so reads what is stored for it.

    Args:
        settings: a checked `adapter_config.json`.
        name: the linear's name in the checkpoint.
    """
    targets, layers = settings.get("target_modules"), settings.get("layers_to_transform")
    if targets is None or _names(settings.get("exclude_modules"), name):
        return targets is None
    if isinstance(targets, str):
        return targets == "all-linear" or _names(targets, name)
    if layers is not None and name not in targets:
        found = _LAYER.match(name)
        if found is None or int(found[1]) not in ([layers] if isinstance(layers, int) else layers):
            return False
    return _names(targets, name)


def _names(modules: str | Sequence[str] | None, name: str) -> bool:
    """Whether a list names a module by its end, or an expression all of it; one that may take long is not asked."""
    if isinstance(modules, str):
        try:
            return re.fullmatch(_quick(modules), name) is not None
        except ValueError:
            return True
    return any(name == module or name.endswith(f".{module}") for module in modules or ())
