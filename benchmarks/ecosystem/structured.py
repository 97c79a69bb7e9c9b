"""Answers that follow a JSON schema: whether they do, and what each token costs more."""

from __future__ import annotations

import json
import time

import jsonschema

from benchmarks import smollm2
from benchmarks.harness import Figure, interleaved, median, ratios
from flextron.api import load
from flextron.engine import EngineCore, EngineSettings
from flextron.generation.constraints import Grammars
from flextron.generation.sampling import SamplingParams
from flextron.workflows.tiny import tiny_model
from tests.server.test_structured import SCHEMAS, an_object

__all__ = ["grammar_cost", "valid_answers"]

_COUNT, _BATCH, _STEPS, _ROUNDS = 200, 8, 24, 7
_LONG = an_object(
    items={"type": "array", "items": an_object(name={"type": "string"}, n={"type": "integer"}), "minItems": 99}
)


def valid_answers() -> Figure:
    """Answers by 20 schemas at temperature 1, beside free ones, checked by jsonschema."""
    model = load(tiny_model())
    tokenizer, config = model.tokenizer, model.decoder.config
    assert tokenizer is not None
    ends = model.generation_defaults.ends
    grammars = Grammars(tokenizer, config.vocab_size, ends)
    core = EngineCore(model.decoder, EngineSettings(kv_cache_gb=0.05))
    network = core.network(model.space.full)
    prompt, asked = tokenizer("In")["input_ids"], []
    for i in range(_COUNT):
        params = SamplingParams(max_tokens=110, temperature=1.0, seed=i, stop_token_ids=ends)
        constraint = grammars.constraint("json", SCHEMAS[i % len(SCHEMAS)])
        asked.append(core.add(f"{i}", prompt, params, network, constraint))
        if i % 3 == 0:
            core.add(f"free {i}", prompt, params, network)
    while core.has_unfinished:
        core.step()
    ended = [(r, SCHEMAS[i % len(SCHEMAS)]) for i, r in enumerate(asked) if r.finish_reason.value == "stop"]
    valid = 0
    for request, schema in ended:
        try:
            jsonschema.validate(json.loads(tokenizer.decode(request.answer, skip_special_tokens=True)), schema)
            valid += 1
        except (ValueError, jsonschema.ValidationError):
            pass
    return Figure(
        name="answers by JSON schema at temperature 1: valid ones among those that ended",
        value=valid / len(ended),
        unit="of all",
        op="==",
        bar=1.0,
        note=f"{_COUNT} requests, {len(SCHEMAS)} schemas, beside free ones; {_COUNT - len(ended)} reached max_tokens",
    )


def grammar_cost() -> Figure:
    """Time of a token with a grammar, at temperature 1, over the time without."""
    decoder, tokenizer = smollm2.decoder(), smollm2.pretrained().tokenizer
    assert tokenizer is not None
    grammars = Grammars(tokenizer, decoder.config.vocab_size, [tokenizer.eos_token_id])
    core = EngineCore(decoder, EngineSettings(kv_cache_gb=0.3, prefix_caching=False))
    network, prompt = core.network(decoder.widths), tokenizer("Some JSON:")["input_ids"]

    def seconds(has_grammar: bool) -> float:
        constraint = grammars.constraint("json", _LONG)
        params = SamplingParams(max_tokens=_STEPS + 9, temperature=1.0, seed=1)
        requests = [
            core.add(f"{i}", prompt, params, network, constraint.copy() if has_grammar else None) for i in range(_BATCH)
        ]
        core.step()
        start = time.perf_counter()
        for _ in range(_STEPS):
            core.step()
        taken = (time.perf_counter() - start) / _STEPS
        for request in requests:
            core.abort(request)
        return taken

    times = interleaved({"free": lambda: seconds(False), "grammar": lambda: seconds(True)}, _ROUNDS)
    spread = median(ratios(times, "grammar", "free"))
    return Figure(
        name="answers by JSON schema: time of a token over that of a free answer, temperature 1",
        value=spread[1],
        unit="x",
        op="<=",
        bar=1.05,
        peer={"name": "free answers, ms a step", "value": 1e3 * median(times["free"])[1]},
        spread=spread,
        note=f"SmolLM2-135M, {_BATCH} requests; {1e3 * median(times['grammar'])[1]:.2f} ms a step with a grammar",
    )
