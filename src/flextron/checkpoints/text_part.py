"""The text part of a checkpoint that also sees images: its config, and its tensors by the text family's names.

What sees (`vision_tower`, `multi_modal_projector`) is left out. What is written later is of the text family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flextron.errors import FlextronError

__all__ = ["TextPart", "text_part_of"]

_TEXT_FAMILIES = {"gemma3": "gemma3_text"}
"""Model types that see, and the family of their text part."""
_PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}
"""Names before transformers 5 and since, and those in the text family."""
_SEEING = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_INHERITED = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "quantization_config")
"""Keys of the whole that count for its text part, where that has none of its own."""


@dataclass(frozen=True, slots=True)
class TextPart:
    """The text part."""

    hf_config: dict[str, Any]
    """Its `config.json`."""

    def names(self, names: frozenset[str]) -> frozenset[str]:
        """Those of its tensors that are among the checkpoint's, by the family's names."""
        return frozenset(own for name in names if (own := _own_name(name)) is not None)

    def stream(self, tensors: Callable[[], Iterator[tuple[str, Tensor]]]) -> Callable[[], Iterator[tuple[str, Tensor]]]:
        """The checkpoint's stream of tensors, without what sees."""
        return lambda: ((own, tensor) for name, tensor in tensors() if (own := _own_name(name)) is not None)


def text_part_of(hf_config: Any) -> TextPart | None:
    """The text part that a `config.json` describes; None if all of the checkpoint is text.

    Raises:
        FlextronError: it names a model that sees, and describes no text part.
    """
    family = hf_config.get("model_type") if isinstance(hf_config, Mapping) else None
    if not isinstance(family, str) or family not in _TEXT_FAMILIES:
        return None
    own = hf_config.get("text_config")
    if not isinstance(own, Mapping):
        raise FlextronError(
            f"config.json of a {family} model has no text_config; restore it from the original checkpoint"
        )
    inherited = {key: hf_config[key] for key in _INHERITED if key in hf_config}
    return TextPart({**inherited, **own, "model_type": _TEXT_FAMILIES[family], "architectures": None})


def _own_name(name: str) -> str | None:
    """A tensor's name in the text family; None if it belongs to what sees. Unknown names stay, to be refused later."""
    if name.startswith(_SEEING):
        return None
    for prefix, own in _PREFIXES.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name
