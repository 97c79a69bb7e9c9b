"""A sub-network on its own, and what it shares with the elastic model: text in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from flextron.api.texts import check_prompt, needed
from flextron.checkpoints.weights import write_checkpoint
from flextron.files import new_directory
from flextron.generation.defaults import GenerationDefaults, generation_defaults
from flextron.generation.detokenize import continuation
from flextron.generation.encoding import encode
from flextron.generation.generate import generate
from flextron.generation.sampling import SamplingParams
from flextron.model.batch import TokenChoice
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec

__all__ = ["DenseModel", "Generates"]


class Generates:
    """What elastic and dense models share: text in, text out."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase | None
    hf_config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None

    @property
    def generation_defaults(self) -> GenerationDefaults:
        """What the checkpoint says about generating."""
        return generation_defaults(self.generation_config, self.hf_config, self.tokenizer)

    def _generate(
        self,
        prompts: Sequence[str],
        spec: SubnetSpec,
        params: SamplingParams,
        router: TokenChoice | None = None,
        *,
        add_special_tokens: bool = True,
    ) -> list[str]:
        tokenizer = needed(self.tokenizer)
        if not params.stop_token_ids:
            params = replace(params, stop_token_ids=self.generation_defaults.ends)
        ids = [encode(tokenizer, p, add_special_tokens=add_special_tokens) for p in prompts]
        answers = generate(self.decoder, ids, spec, params, router)
        return [continuation(tokenizer, prompt, answer) for prompt, answer in zip(ids, answers, strict=True)]


@dataclass(slots=True)
class DenseModel(Generates):
    """A sub-network on its own."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase | None
    hf_config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None = None

    def generate(self, prompt: str, *, add_special_tokens: bool = True, **params: Any) -> str:
        """Continue a prompt.

        Args:
            prompt: text.
            add_special_tokens: whether it begins as the tokenizer begins a text.
            params: fields of `SamplingParams`; greedy by default, whatever `generation_config.json` says.
        """
        check_prompt(prompt)
        widths, chosen = self.decoder.widths, SamplingParams(**params)
        return self._generate([prompt], widths, chosen, add_special_tokens=add_special_tokens)[0]

    def save_pretrained(self, directory: str | Path, *, overwrite: bool = False) -> None:
        """Write an ordinary Hugging Face checkpoint, which `AutoModelForCausalLM` loads.

        Raises:
            FlextronError: the layers differ in width, or the directory exists.
        """
        with new_directory(Path(directory), overwrite=overwrite) as temporary:
            write_checkpoint(
                self.decoder,
                temporary,
                hf_config=self.hf_config,
                tokenizer=self.tokenizer,
                generation_config=self.generation_config,
            )
