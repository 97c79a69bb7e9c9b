"""How the makers of a GGUF file draw tokens, against what the converter's own code makes of a checkpoint's settings.

`gguf.Metadata` reads `generation_config.json` and writes the keys, as llama.cpp's conversion does. What its values mean
is told by llama.cpp's list of options: a `top_k` of 0 is off, a `temp` of 0 or less is greedy, and so on.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import GenerationConfig, LlamaConfig

from flextron import convert
from flextron.errors import FlextronError
from flextron.generation.defaults import generation_defaults
from flextron.generation.sampling import SamplingParams
from flextron.gguf.checkpoint import open_gguf
from flextron.gguf.file import read_file
from flextron.gguf.sampling import generation_config_from_metadata, sampling_metadata
from tests.gguf.test_checkpoint import HEADS, SIZES, random_model
from tests.gguf.writing import fields_of, to_gguf, write_gguf
from tests.tokenizers_zoo import gguf_metadata

KEY = "general.sampling."
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05},
    {"temperature": 1, "top_k": 64},
    {"temperature": 1.5, "min_p": 0.1},
    {"top_k": 40},
]


def converted(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The file's keys and values after llama.cpp's conversion of a checkpoint with these settings."""
    (folder / "generation_config.json").write_text(json.dumps(settings))
    writer = gguf.GGUFWriter(folder / "keys.gguf", "llama")
    gguf.Metadata.load(model_path=folder, model_name="a model").set_gguf_meta_model(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_file(folder / "keys.gguf")[0]


def drawn(settings: dict[str, Any]) -> SamplingParams:
    return generation_defaults(settings, {}, None).sampling()


@pytest.mark.parametrize("settings", SETTINGS)
def test_converted_settings_are_the_checkpoints(settings: dict[str, Any], tmp_path: Path) -> None:
    metadata = converted(settings, tmp_path)
    assert any(key.startswith(KEY) for key in metadata)
    found = generation_config_from_metadata(metadata)
    assert drawn(found) == drawn(settings) != SamplingParams()
    (tmp_path / "generation_config.json").write_text(json.dumps(found))
    stock = GenerationConfig.from_pretrained(tmp_path)
    assert all(getattr(stock, key) == value for key, value in settings.items())


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_is_written_is_what_the_converter_writes(settings: dict[str, Any], tmp_path: Path) -> None:
    expected = {key: value for key, value in converted(settings, tmp_path).items() if key.startswith(KEY)}
    own = sampling_metadata(generation_defaults(settings, {}, None))
    assert own == pytest.approx(expected, rel=1e-6)


def test_a_penalty_of_all_tokens_comes_back() -> None:
    """llama.cpp counts the last 64 tokens unless told otherwise."""
    written = sampling_metadata(generation_defaults({"repetition_penalty": 1.1}, {}, None))
    assert written == {f"{KEY}penalty_repeat": 1.1, f"{KEY}penalty_last_n": -1}
    again = generation_defaults(generation_config_from_metadata(written), {}, None)
    assert (again.repetition_penalty, again.complaint) == (1.1, None)


@pytest.mark.parametrize(
    ("keys", "params"),
    [
        ({"temp": 0.0, "top_k": 3}, {"top_k": 3}),
        ({"temp": -1.0}, {}),
        ({"temp": 0.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"temperature": 0.5}),
        ({"temp": 0.5, "top_k": -1, "top_p": 2.0, "min_p": -1.0}, {"temperature": 0.5}),
        ({"temp": 0.5, "penalty_repeat": 1.2}, {"temperature": 0.5, "repetition_penalty": 1.2}),
        ({"temp": 0.5, "penalty_repeat": 1.2, "penalty_last_n": 0}, {"temperature": 0.5}),
        ({"temp": 0.5, "xtc_threshold": 0.1, "mirostat_tau": 5.0, "mirostat_eta": 0.1}, {"temperature": 0.5}),
    ],
)
def test_values_that_turn_a_setting_off(keys: dict[str, Any], params: dict[str, Any]) -> None:
    found = generation_config_from_metadata({KEY + key: value for key, value in keys.items()})
    assert drawn(found) == SamplingParams(**params)
    assert generation_defaults(found, {}, None).complaint is None


def test_what_is_not_applied_is_told(caplog: pytest.LogCaptureFixture) -> None:
    keys = {
        "xtc_probability": 0.5,
        "mirostat": 2,
        "sequence": "top_k;temp",
        "penalty_repeat": 1.2,
        "penalty_last_n": 64,
    }
    found = generation_config_from_metadata({KEY + key: value for key, value in keys.items()})
    said = generation_defaults(found, {}, None).complaint
    assert said is not None
    assert all(part in said for part in ("xtc_probability 0.5", "mirostat 2", "sequence top_k;temp", "last_n 64"))
    with caplog.at_level(logging.WARNING):
        assert generation_config_from_metadata({f"{KEY}top_n_sigma": 1.0}) == {}
    assert "general.sampling.top_n_sigma" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [("temp", "hot"), ("temp", float("nan")), ("top_p", True), ("top_k", float("inf")), ("penalty_repeat", 0.0)],
)
def test_damaged_values_are_refused(key: str, value: Any) -> None:
    with pytest.raises(FlextronError, match=rf"needs a number.*{KEY}{key}.*convert it again"):
        generation_config_from_metadata({KEY + key: value})


def test_a_converted_file_keeps_them_with_its_ends(tmp_path: Path) -> None:
    tokenizer = gguf_metadata("llama-3")
    ends = {"eos_token_id": tokenizer["tokenizer.ggml.eos_token_id"]}
    config = LlamaConfig(**SIZES | HEADS | ends | {"vocab_size": len(tokenizer["tokenizer.ggml.tokens"])})
    fields, arrays = fields_of(config) | tokenizer, to_gguf(random_model(config).state_dict(), config)
    plain = open_gguf(write_gguf(tmp_path / "plain.gguf", "llama", fields, arrays))
    assert plain.generation_config is None
    path = write_gguf(tmp_path / "drawn.gguf", "llama", fields | {f"{KEY}temp": 0.6, f"{KEY}top_k": 7}, arrays)

    model = convert(path, num_calibration_tokens=64, context=16)
    model.save(tmp_path / "elastic")
    stock = GenerationConfig.from_pretrained(tmp_path / "elastic")
    assert (stock.do_sample, stock.temperature, stock.top_k) == (True, 0.6, 7)
    assert stock.eos_token_id == plain.hf_config["eos_token_id"]
    model.export(tmp_path / "again.gguf", format="gguf")
    again = read_file(tmp_path / "again.gguf")[0]
    assert again[f"{KEY}temp"] == pytest.approx(0.6)
    assert again[f"{KEY}top_k"] == 7
