"""A sub-network on its own, and what it shares with the elastic model: text in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from flextron.api.texts import needed
from flextron.files import new_directory
from flextron.model.batch import TokenChoice
from flextron.model.checkpoint import write_checkpoint
from flextron.model.decoder import Decoder
from flextron.model.detokenize import continuation
from flextron.model.generation import SamplingParams, generate
from flextron.spec import SubnetSpec

__all__ = ["DenseModel", "Generates"]


class Generates:
    """What elastic and dense models share: text in, text out."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase | None

    def _generate(
        self, prompts: Sequence[str], spec: SubnetSpec, params: SamplingParams, router: TokenChoice | None = None
    ) -> list[str]:
        tokenizer = needed(self.tokenizer)
        if not params.stop_token_ids and tokenizer.eos_token_id is not None:
            params = replace(params, stop_token_ids=(tokenizer.eos_token_id,))
        ids = [tokenizer.encode(p, add_special_tokens=False) for p in prompts]
        answers = generate(self.decoder, ids, spec, params, router)
        return [continuation(tokenizer, prompt, answer) for prompt, answer in zip(ids, answers, strict=True)]


@dataclass(slots=True)
class DenseModel(Generates):
    """A sub-network on its own."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase | None
    hf_config: Mapping[str, Any]

    def generate(self, prompt: str, **params: Any) -> str:
        """Continue a prompt; keywords as for `SamplingParams`."""
        return self._generate([prompt], self.decoder.widths, SamplingParams(**params))[0]

    def save_pretrained(self, directory: str | Path, *, overwrite: bool = False) -> None:
        """Write an ordinary Hugging Face checkpoint, which `AutoModelForCausalLM` loads.

        Raises:
            FlextronError: the layers differ in width, or the directory exists.
        """
        with new_directory(Path(directory), overwrite=overwrite) as temporary:
            write_checkpoint(self.decoder, temporary, hf_config=self.hf_config, tokenizer=self.tokenizer)
