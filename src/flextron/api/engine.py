"""Generation for many prompts at once, each in the sub-network for its own target, without a server."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypeVar

from flextron.api.checkpoint import load
from flextron.api.model import ElasticModel
from flextron.api.texts import needed
from flextron.checkpoints.peft.reading import read_adapter
from flextron.engine import EngineCore, EngineSettings, FinishReason, Logprobs, Network, Request, Speculation
from flextron.engine.output import Delta, OutputProcessor
from flextron.errors import FlextronError
from flextron.generation.encoding import bad_words_ids, encode
from flextron.generation.sampling import SamplingParams
from flextron.kernels.decoder import Weights
from flextron.model.adapter import Adapter
from flextron.routing.token_router import PricedRouter
from flextron.spec import SubnetSpec, Target

__all__ = ["Completion", "Engine", "speculation_of"]

_log = logging.getLogger("flextron.engine")
T = TypeVar("T")
_DRAFT_LATENCIES = (0.75, 0.5)
"""Targets whose sub-networks are tried as drafts."""
Asked = Target | SubnetSpec | None
"""What a prompt runs in: the best sub-network for a target, a given one, or the full one."""
Beside = Adapter | str | Path | None
"""What a prompt runs with: an adapter, one in a directory in peft's layout, or none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What a prompt was continued with."""

    text: str
    """Without special tokens, and cut before a stop string."""
    token_ids: tuple[int, ...]
    """All that were generated, those of a stop string included, a stop token not."""
    finish_reason: Literal["stop", "length"]
    spec: SubnetSpec
    """The sub-network that ran."""
    num_prompt_tokens: int
    logprobs: tuple[Logprobs, ...] | None
    """One entry a token, where they were asked for."""
    prompt_logprobs: tuple[Logprobs, ...] | None = None
    """One entry for each token of the prompt after the first, where they were asked for."""


class Engine:
    """Continuous batching: prompts of different targets share the iterations of one set of weights."""

    def __init__(self, model: ElasticModel | str | Path, *, speculate: Weights | None = None, **settings: Any) -> None:
        """Reserve the KV cache.

        Args:
            model: an elastic model that stays as it is while the engine lives, or where to load one.
            speculate: precision of self-speculative decoding, by default off; see `speculation_of`.
            settings: fields of `EngineSettings`: `max_num_seqs`, `max_num_batched_tokens`, `kv_cache_gb` and others.

        Raises:
            FlextronError: the model cannot be loaded or has no tokenizer, or a setting is unknown or out of range.
        """
        if unknown := settings.keys() - {f.name for f in fields(EngineSettings)}:
            known = ", ".join(f.name for f in fields(EngineSettings))
            raise FlextronError(f"the engine has no setting {sorted(unknown)[0]!r}; there are {known}")
        self.model = model if isinstance(model, ElasticModel) else load(model)
        self._tokenizer = needed(self.model.tokenizer)
        if speculate is not None:
            settings["speculation"] = speculation_of(self.model, speculate)
        self.core = EngineCore(self.model.decoder, EngineSettings(**settings))
        self._defaults = self.model.generation_defaults
        if (said := self._defaults.complaint) is not None:
            _log.warning("%s", said)
        # one object a target, because the engine tells routers apart by identity
        self._routed: dict[Target, tuple[SubnetSpec, PricedRouter]] = {}
        # and one a directory
        self._adapters: dict[Path, Adapter] = {}

    def __enter__(self) -> Engine:
        """The engine; it is closed at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """End the processes of an engine on several ranks (`tensor_parallel`); they also end with this process."""
        self.core.close()

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        target: Asked | Sequence[Asked] = None,
        router: Literal["token"] | None = None,
        adapter: Beside | Sequence[Beside] = None,
        stop: str | Sequence[str] = (),
        includes_stop: bool = False,
        bad_words: Sequence[str] = (),
        skip_special_tokens: bool = True,
        add_special_tokens: bool = True,
    ) -> list[Completion]:
        """Continue prompts, all in one batch.

        Args:
            prompts: a text, texts, or lists of token ids.
            params: how tokens are chosen, for all prompts or one entry each; by default with the temperature and
                `top_p` of the checkpoint's `generation_config.json`, or greedily if it names none.
            target: a `Target`, a sub-network, or None for the full one; for all prompts or one entry each.
            router: `token` routes each token by itself, so that they cost a `latency` target on average.
            adapter: an `Adapter`, its directory in peft's layout, which is read once, or None for the model alone; for
                all prompts or one entry each. It is sliced to the sub-network as the weights are. Only with those
                from directories do equal beginnings of prompts stay in the cache for the next call.
            stop: strings that end a text.
            includes_stop: whether a text keeps the stop string or stop token that ended it.
            bad_words: texts that must not come, beside `bad_words_ids` of the params.
            skip_special_tokens: whether special tokens have no text.
            add_special_tokens: whether texts begin as the tokenizer begins them (with BOS, for some); a chat template
                has written such tokens already. Token ids are taken as they are.

        Returns:
            Completions in the order of the prompts.

        Raises:
            FlextronError: numbers of prompts, params, targets and adapters differ, nothing is within a target, an
                adapter is damaged or does not fit, or a prompt is empty or too long.
        """
        tokens = self._encode(prompts, add_special_tokens=add_special_tokens)
        each_params = _one_each(params or self._defaults.sampling(), len(tokens), SamplingParams, "params")
        asked = _one_each(target, len(tokens), Target | SubnetSpec | None, "target")
        beside: list[Beside] = _one_each(adapter, len(tokens), Adapter | str | Path | None, "adapter")
        adapters = [self._adapter(a) for a in beside]
        networks = [self._network(t, router, a) for t, a in zip(asked, adapters, strict=True)]
        stops = [stop] if isinstance(stop, str) else list(stop)
        words = bad_words_ids(self._tokenizer, bad_words)
        options: Any = {"includes_stop": includes_stop, "skip_special_tokens": skip_special_tokens}
        requests: list[Request] = []
        try:
            for ids, p, network in zip(tokens, each_params, networks, strict=True):
                chosen = p if p.stop_token_ids else replace(p, stop_token_ids=self._defaults.ends)
                chosen = replace(chosen, bad_words_ids=(*chosen.bad_words_ids, *words)) if words else chosen
                requests.append(self.core.add(str(len(requests)), ids, chosen, network))
            processors = {r: OutputProcessor(self._tokenizer, stops, r.tokens, **options) for r in requests}
            self._run(processors)
        finally:
            for request in requests:
                self.core.abort(request)
            for given in adapters:
                if given is not None and given not in self._adapters.values():  # it may change until the next call
                    self.core.forget(given)
        return [_completion(request, processor.answer) for request, processor in processors.items()]

    def _run(self, processors: dict[Request, OutputProcessor]) -> None:
        while self.core.has_unfinished:
            for output in self.core.step():
                processor = processors[output.request]
                # a stop string may end it with an earlier token of this step
                if processor.answer.finish_reason is None and processor.take(output).finish_reason is not None:
                    self.core.abort(output.request)

    def _encode(
        self, prompts: str | Sequence[str] | Sequence[Sequence[int]], *, add_special_tokens: bool
    ) -> list[list[int]]:
        given = [prompts] if isinstance(prompts, str) else prompts
        if any(isinstance(p, int) for p in given):
            raise FlextronError("prompts are texts or lists of token ids; put a single list of ids into a list")
        for prompt in given:
            if not isinstance(prompt, str) and not all(isinstance(token, Integral) for token in prompt):
                raise FlextronError("prompts are texts or lists of token ids; give tensors as tensor.tolist()")
        return [
            encode(self._tokenizer, p, add_special_tokens=add_special_tokens) if isinstance(p, str) else list(p)
            for p in given
        ]

    def _adapter(self, given: Beside) -> Adapter | None:
        if given is None or isinstance(given, Adapter):
            return given
        path = Path(given).resolve()
        if path not in self._adapters:
            decoder = self.model.decoder
            self._adapters[path] = read_adapter(path, decoder).to(decoder.device, decoder.dtype)
        return self._adapters[path]

    def _network(self, asked: Asked, router: str | None, adapter: Adapter | None) -> Network:
        if router is None:
            if isinstance(asked, Target):
                asked = self.model.best(asked).spec
            return self.core.network(asked or self.model.space.full, adapter=adapter)
        if router != "token" or not isinstance(asked, Target):
            raise FlextronError("router is None or 'token', and 'token' needs a target by latency for every prompt")
        if asked not in self._routed:
            self._routed[asked] = self.model.routed(asked)
        return self.core.network(*self._routed[asked], adapter)


def speculation_of(model: ElasticModel, weights: Weights) -> Speculation:
    """Sub-networks that may draft for a model.

    Args:
        model: with a frontier, or no narrow sub-networks are among them.
        weights: `float32` takes no memory, and needs sub-networks that often agree with the full one; with `int8` and
            `int4` the full network drafts, too, from a copy in eight bits, which agrees nearly always, or in four,
            which agrees less often and is faster.

    Raises:
        FlextronError: the model has no frontier of this device, and `float32` is asked for.
    """
    drafts = [] if weights == "float32" else [model.space.full]
    for fraction in _DRAFT_LATENCIES:
        try:
            spec = model.select(latency=fraction)
        except FlextronError:
            continue
        if spec not in (model.space.full, *drafts):
            drafts.append(spec)
    if not drafts:
        raise FlextronError("there are no narrow sub-networks to draft with; run flextron profile, or draft in int8")
    return Speculation(drafts=tuple(drafts), weights=weights)


def _one_each(given: T | Sequence[T], count: int, kind: Any, name: str) -> list[T]:
    """One entry for each prompt."""
    if isinstance(given, kind):
        return [given] * count
    entries = list(given)  # type: ignore[arg-type]
    if len(entries) != count:
        raise FlextronError(f"{len(entries)} entries of {name} for {count} prompts; give one, or one for each")
    return entries


def _completion(request: Request, answer: Delta) -> Completion:
    assert answer.finish_reason is not None
    return Completion(
        text=answer.text,
        token_ids=tuple(answer.token_ids),
        finish_reason="stop" if answer.finish_reason is FinishReason.STOP else "length",
        spec=request.network.spec,
        num_prompt_tokens=request.num_prompt,
        logprobs=None if request.params.logprobs is None else tuple(answer.logprobs),
        prompt_logprobs=None if answer.prompt_logprobs is None else tuple(answer.prompt_logprobs),
    )
