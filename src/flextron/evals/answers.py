"""Answers to prompts up to stop strings, as lm-eval's tasks ask for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from flextron.errors import FlextronError
from flextron.generation.generate import stream
from flextron.generation.sampling import SamplingParams
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec

__all__ = ["Wanted", "answers"]

_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the same limit; the first that is there counts, as in lm-eval."""
_DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Wanted:
    """How an answer is made, and where it ends."""

    params: SamplingParams
    until: tuple[str, ...]
    """The text ends before any of these."""

    @classmethod
    def of(cls, options: Mapping[str, Any], *, eos: str) -> Wanted:
        """Read a task's `generation_kwargs`.

        Raises:
            FlextronError: they hold what is not offered here.
        """
        left = dict(options)
        until = left.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        limits = [left.pop(name) for name in _MAX_TOKENS if left.get(name) is not None]
        is_sampled = left.pop("do_sample", None)
        temperature = float(left.pop("temperature", None) or 0.0)
        if is_sampled is False:
            temperature = 0.0
        elif is_sampled and not temperature:
            temperature = 1.0
        top_p = float(left.pop("top_p", None) or 1.0)
        unknown = sorted(name for name, value in left.items() if value is not None)
        if unknown:
            raise FlextronError(
                f"the task generates with {', '.join(unknown)}, which is not offered here; leave the task out"
            )
        params = SamplingParams(
            max_tokens=int(limits[0]) if limits else _DEFAULT_MAX_TOKENS, temperature=temperature, top_p=top_p
        )
        return cls(params, tuple(dict.fromkeys([*filter(None, stops), *filter(None, [eos])])))

    def cut(self, text: str) -> tuple[str, bool]:
        """The text before the first stop string, and whether there was one."""
        ends = [end for stop in self.until if (end := text.find(stop)) >= 0]
        return (text[: min(ends)], True) if ends else (text, False)


def answers(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    wanted: Sequence[Wanted],
    spec: SubnetSpec,
    *,
    batch_size: int,
    on_done: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Texts that follow prompts, in their order.

    Args:
        decoder: holds the sub-network.
        tokenizer: of the texts.
        prompts: token ids of each.
        wanted: for each prompt.
        spec: the sub-network.
        batch_size: prompts that run at once, if they are answered in the same way.
        on_done: called with prompts answered and in all.
    """
    texts: dict[int, str] = {}
    for one in dict.fromkeys(wanted):
        # similar lengths side by side, because a batch reserves room for its longest
        same = sorted((i for i in range(len(prompts)) if wanted[i] == one), key=lambda i: len(prompts[i]))
        for start in range(0, len(same), batch_size):
            batch = same[start : start + batch_size]
            found = _batch(decoder, tokenizer, [prompts[i] for i in batch], one, spec)
            texts.update(zip(batch, found, strict=True))
            if on_done is not None:
                on_done(len(texts), len(prompts))
    return [texts[i] for i in range(len(prompts))]


def _batch(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Sequence[int]],
    wanted: Wanted,
    spec: SubnetSpec,
) -> list[str]:
    tokens: list[list[int]] = [[] for _ in prompts]
    texts: list[str] = [""] * len(prompts)
    running = set(range(len(prompts)))
    for step in stream(decoder, prompts, spec, wanted.params):
        for i in sorted(running):
            if step[i] == tokenizer.eos_token_id:
                running.discard(i)
                continue
            tokens[i].append(step[i])
            texts[i], has_ended = wanted.cut(str(tokenizer.decode(tokens[i], skip_special_tokens=True)))
            if has_ended:
                running.discard(i)
        if not running:
            break
    return texts
