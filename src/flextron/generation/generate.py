"""Plain generation with a KV cache, for a handful of prompts; the engine is for more than that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from flextron.generation.decoding import Steps
from flextron.generation.processors import check_named_tokens, processed
from flextron.generation.prompts import check_prompt
from flextron.generation.sampling import SamplingParams, sample
from flextron.model.batch import TokenChoice
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec

__all__ = ["generate", "stream"]


@torch.inference_mode()
def stream(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    spec: SubnetSpec,
    params: SamplingParams,
    router: TokenChoice | None = None,
) -> Iterator[list[int]]:
    """Yield the next token of every prompt, iteration by iteration; finished ones go on (the caller cuts).

    Args:
        decoder: the model.
        prompts: token ids of each.
        spec: the sub-network.
        params: how tokens are chosen.
        router: chooses the MLP width of each token, of prompts and answers; by default all have the spec's.

    Raises:
        FlextronError: the model cannot continue a prompt (`check_prompt`), or the router is of another model.
    """
    if not prompts:
        return
    if router is not None:
        router.check(decoder.config, spec)
    for prompt in prompts:
        check_prompt(decoder.config, prompt, params.max_tokens)
    longest = max(len(p) for p in prompts) + params.max_tokens
    check_named_tokens(params, decoder.config.vocab_size)
    device = decoder.device
    generator = None if params.seed is None else torch.Generator(device).manual_seed(params.seed)
    steps = Steps(decoder, spec, len(prompts), longest, router, likeliest=params.is_plain_greedy)
    new = [torch.tensor(p, device=device) for p in prompts]
    starts = [0] * len(prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    for _ in range(params.max_tokens):
        logits_BV = steps.run(new, starts)
        if params.processes:
            rows = zip(logits_BV, prompts, answers, strict=True)
            logits_BV = torch.stack([processed(logits_V, params, p, answer) for logits_V, p, answer in rows])
        tokens = sample(logits_BV, params, generator)
        starts = [a + len(t) for a, t in zip(starts, new, strict=True)]
        new = list(tokens.unsqueeze(1))
        for answer, token in zip(answers, tokens.tolist(), strict=True):
            answer.append(token)
        yield tokens.tolist()


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    spec: SubnetSpec,
    params: SamplingParams,
    router: TokenChoice | None = None,
) -> list[list[int]]:
    """New token ids of each prompt, without the stop token; arguments as for `stream`.

    Raises:
        FlextronError: as for `stream`.
    """
    out: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for tokens in stream(decoder, prompts, spec, params, router):
        for i in sorted(running):
            if tokens[i] in params.stop_token_ids:
                running.discard(i)
            else:
                out[i].append(tokens[i])
        if not running:
            break
    return out
