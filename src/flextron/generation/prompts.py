"""Which prompts a model can take."""

from __future__ import annotations

from collections.abc import Sequence

from flextron.errors import LongPromptError, PromptError
from flextron.model.config import DecoderConfig

__all__ = ["check_prompt"]


def check_prompt(config: DecoderConfig, prompt: Sequence[int], max_tokens: int) -> None:
    """Refuse a prompt that the model cannot continue.

    Args:
        config: config of the model.
        prompt: token ids.
        max_tokens: new tokens at most.

    Raises:
        PromptError: the prompt is empty, has unknown tokens, or is too long.
    """
    if not prompt:
        raise PromptError("the prompt is empty; give at least one token")
    if not all(0 <= token < config.vocab_size for token in prompt):
        raise PromptError(
            f"the prompt holds tokens outside the model's vocabulary of {config.vocab_size}; use its own tokenizer"
        )
    total = len(prompt) + max_tokens
    if total > config.max_position_embeddings:
        raise LongPromptError(
            f"prompt and answer come to {total} tokens, which is longer than the model's context length of "
            f"{config.max_position_embeddings} positions: shorten the prompt or lower max_tokens"
        )
