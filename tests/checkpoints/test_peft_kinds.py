"""DoRA, whole modules, and adapters of embeddings and heads, against peft: whole, merged, and in narrow networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from flextron.checkpoints.peft.reading import read_adapter
from flextron.checkpoints.peft.writing import write_adapter
from flextron.elastic.extract import extract
from flextron.engine import EngineCore
from flextron.errors import FlextronError
from flextron.finetuning.layerwise import Finetuning
from flextron.generation.generate import SamplingParams
from flextron.model.adapter import Adapter
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import (
    LAYOUTS,
    decoder_of,
    hf_logits,
    in_float64,
    our_logits,
    random_model,
    random_tokens,
    relative_error,
)
from tests.engine.test_engine import PATHS, engine
from tests.random_decoders import ragged_specs

pytestmark = [
    # peft asks transformers under a name that the latter has retired
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # and says what it does about tied heads and GPT-2's linears
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
TOKENS = random_tokens(2, 12)
EMBEDDINGS = {"gpt2": "wte", "neox": "embed_in"}


def adapted_logits(decoder: Decoder, adapter: Adapter | None, spec: SubnetSpec | None = None) -> Tensor:
    """With the adapter beside all tokens."""
    spec = spec or decoder.widths
    batch = Batch.ragged(list(TOKENS), [spec] * 2, adapters=[adapter] * 2)
    return decoder.logits(decoder(batch), None if adapter is None else adapter.outer).unflatten(0, TOKENS.shape)


def randomized(model: Any, seed: int = 0) -> Any:
    """Every parameter of the adapter drawn; lengths of rows stay about what they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_magnitude" in name:
                p.mul_(1 + 0.3 * torch.rand(p.shape, generator=generator))
            elif "lora_" in name or "modules_to_save" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model.eval()


def made(case: str, directory: Path, **options: Any) -> tuple[Any, Decoder]:
    """A model with a random adapter, which is saved, and our decoder without it."""
    model = in_float64(random_model(case))
    decoder = decoder_of(model).requires_grad_(False)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", "fan_in_fan_out": case.startswith("gpt2"), **options}
    )
    theirs = randomized(get_peft_model(model, config, autocast_adapter_dtype=False))
    theirs.save_pretrained(directory)
    return theirs, decoder


def linears(case: str) -> list[str]:
    """Names by which peft finds all linears of the layers."""
    names = {
        "gpt2": ["c_attn", "c_proj", "c_fc"],
        "neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    }
    usual = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return names.get(case, usual)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("case", [*LAYOUTS, "llama-3", "qwen2", "stablelm"])
def test_dora(case: str, rslora: bool, tmp_path: Path) -> None:
    theirs, decoder = made(case, tmp_path, target_modules=linears(case), use_dora=True, use_rslora=rslora)
    adapter = read_adapter(tmp_path, decoder)
    ours = adapted_logits(decoder, adapter)
    assert relative_error(ours, hf_logits(theirs, TOKENS)) <= 1e-10
    assert relative_error(ours, adapted_logits(decoder, None)) > 1e-2
    # a sub-network is the leading part of the merged model
    merged = decoder_of(theirs.merge_and_unload())
    for spec in ragged_specs(decoder.config, 3):
        if decoder.config.qk_norm == "width" and not spec.is_uniform:
            continue
        assert relative_error(adapted_logits(decoder, adapter, spec), our_logits(merged, TOKENS, spec)) <= 1e-10
        narrow = adapted_logits(extract(decoder, spec), adapter.narrowed(spec))
        assert relative_error(narrow, our_logits(merged, TOKENS, spec)) <= 1e-10


OUTER: dict[str, dict[str, Any]] = {
    "both": {"target_modules": ["q_proj", "{embedding}", "lm_head"]},
    "dora": {"target_modules": ["q_proj", "{embedding}", "lm_head"], "use_dora": True},
    "embedding alone": {"target_modules": ["{embedding}"], "use_rslora": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["{embedding}", "lm_head"]},
    "saved head": {"target_modules": ["q_proj", "{embedding}"], "modules_to_save": ["lm_head"]},
    "tied": {"target_modules": ["q_proj"], "modules_to_save": ["{embedding}"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("kind", OUTER)
@pytest.mark.parametrize("case", ["llama", "qwen3", "gpt2", "neox", "gemma2", "gemma3", "granite"])
def test_embeddings_and_heads(case: str, kind: str, tmp_path: Path) -> None:
    """Tied and untied, scaled and capped."""
    names = {"{embedding}": EMBEDDINGS.get(case, "embed_tokens"), "q_proj": linears(case)[0]}
    options = {k: [names.get(n, n) for n in v] if isinstance(v, list) else v for k, v in OUTER[kind].items()}
    theirs, decoder = made(case, tmp_path, **options)
    adapter = read_adapter(tmp_path, decoder)
    assert adapter.outer is not None
    assert relative_error(adapted_logits(decoder, adapter), hf_logits(theirs, TOKENS)) <= 1e-10
    assert relative_error(adapted_logits(decoder, adapter), adapted_logits(decoder, None)) > 1e-2


def test_ia3_with_a_head_of_its_own(tmp_path: Path) -> None:
    model = in_float64(random_model("llama"))
    config = IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], modules_to_save=["lm_head"]
    )
    theirs = randomized(get_peft_model(model, config, autocast_adapter_dtype=False))
    theirs.save_pretrained(tmp_path)
    decoder = decoder_of(in_float64(random_model("llama")))
    ours = adapted_logits(decoder, read_adapter(tmp_path, decoder))
    assert relative_error(ours, hf_logits(theirs, TOKENS)) <= 1e-10


def test_what_peft_loads_of_a_saved_embedding_that_is_no_target(tmp_path: Path) -> None:
    """It goes into the model itself, and so into a tied head."""
    model = in_float64(random_model("qwen3"))
    decoder = decoder_of(model)
    theirs = randomized(get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]), autocast_adapter_dtype=False))
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.weight"
    save_file(tensors | {name: torch.randn(67, 32, dtype=torch.float64) * 0.2}, tmp_path / "adapter_model.safetensors")
    again = PeftModel.from_pretrained(in_float64(random_model("qwen3")), tmp_path, autocast_adapter_dtype=False).eval()
    ours = adapted_logits(decoder, read_adapter(tmp_path, decoder))
    assert relative_error(ours, hf_logits(again, TOKENS)) <= 1e-10
    assert relative_error(ours, hf_logits(theirs, TOKENS)) > 1e-2


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma2"])
def test_the_engine_serves_them_beside_each_other(case: str, native: bool, tmp_path: Path) -> None:
    """In float32, compiled where there are kernels; greedy tokens of peft, prompt after prompt."""
    kinds: list[dict[str, Any]] = [
        {"target_modules": linears(case), "use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["v_proj"]},
    ]
    decoder = decoder_of(random_model(case)).requires_grad_(False)
    core: EngineCore = engine(decoder, num_pages=60, native=native)
    prompts = [random_tokens(n, seed=n).tolist() for n in (3, 9)]
    params, asked, wanted = SamplingParams(max_tokens=10), [], []
    for i, options in enumerate(kinds):
        theirs = randomized(get_peft_model(random_model(case), LoraConfig(r=3, task_type="CAUSAL_LM", **options)), i)
        theirs.save_pretrained(tmp_path / f"{i}", save_embedding_layers=False)
        network = core.network(decoder.widths, adapter=read_adapter(tmp_path / f"{i}", decoder))
        for j, prompt in enumerate(prompts):
            asked.append(core.add(f"{i}.{j}", prompt, params, network))
            tokens = list(prompt)
            for _ in range(10):
                tokens.append(int(hf_logits(theirs, torch.tensor([tokens]))[0, -1].argmax()))
            wanted.append(tokens[len(prompt) :])
    while core.has_unfinished:
        core.step()
    assert [request.answer for request in asked] == wanted


def edited(directory: Path, **changes: Any) -> Path:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def test_what_goes_wrong_is_refused(tmp_path: Path) -> None:
    _, decoder = made("llama", tmp_path, target_modules=["q_proj", "embed_tokens", "lm_head"])
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    embedding = "base_model.model.model.embed_tokens"
    changes: dict[str, tuple[dict[str, Tensor], str]] = {
        "copy": (
            {f"{embedding}.base_layer.weight": tensors[f"{embedding}.base_layer.weight"] * 1.5},
            "differs from this",
        ),
        "size": ({f"{embedding}.lora_embedding_A": torch.zeros(4, 70)}, "as after tokens were added.*merge_and_unload"),
        "nan": ({f"{embedding}.lora_embedding_A": torch.full((4, 67), torch.nan)}, "NaN"),
        "norm": ({"base_model.model.model.norm.weight": torch.ones(32)}, "norm.weight.*no place.*merge_and_unload"),
    }
    for own, said in changes.values():
        save_file(tensors | own, weights)
        with pytest.raises(FlextronError, match=said):
            read_adapter(tmp_path, decoder)
    save_file(tensors, weights)
    with pytest.raises(FlextronError, match="lacks the head that its config names"):
        read_adapter(edited(tmp_path, modules_to_save=["lm_head"]), decoder)
    with pytest.raises(FlextronError, match="does not name as a target"):
        read_adapter(edited(tmp_path, modules_to_save=None, target_modules="all-linear", exclude_modules=None), decoder)
    with pytest.raises(FlextronError, match=r"q_proj.*no place"):
        read_adapter(edited(tmp_path, target_modules=["q_proj", "embed_tokens", "lm_head"], use_dora=True), decoder)


def test_what_only_serves_is_refused_elsewhere(tmp_path: Path) -> None:
    _, decoder = made("llama", tmp_path / "outer", target_modules=["q_proj", "lm_head"])
    outer = read_adapter(tmp_path / "outer", decoder)
    with pytest.raises(FlextronError, match="served, but not written"):
        write_adapter(outer, tmp_path / "again")
    with pytest.raises(FlextronError, match="served, but not trained"):
        Finetuning(decoder, outer, [])
    made("llama", tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(FlextronError, match="all of it is LoRA or all IA3"):
        write_adapter(read_adapter(tmp_path / "dora", decoder), tmp_path / "again")
