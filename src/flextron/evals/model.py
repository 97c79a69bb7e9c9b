"""One sub-network as lm-eval sees a model: likelihoods of texts, and answers.

Texts become tokens as in lm-eval's own `hf` type, so that both give the same figures for the full network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  # registers lm-eval's own types, which would refuse to come second
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from flextron.api import ElasticModel, load
from flextron.api.texts import needed
from flextron.errors import FlextronError
from flextron.evals.answers import Wanted, answers
from flextron.generation.encoding import encode
from flextron.scoring.continuations import Continuation, score_continuations
from flextron.spec import SubnetSpec

__all__ = ["FlextronLM"]

OnDone = Callable[[int, int], None]
Encoded = tuple[tuple[str, str] | None, list[int], list[int]]
"""Context and continuation as text, where they have one of their own, and as token ids."""


@register_model("flextron")
class FlextronLM(TemplateLM):  # type: ignore[misc]
    """A sub-network of an elastic model."""

    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        pretrained: ElasticModel | str | Path,
        *,
        spec: SubnetSpec | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        device: str | None = None,
        on_done: OnDone | None = None,
        **target: Any,
    ) -> None:
        """Choose the sub-network.

        Args:
            pretrained: the model, or where its checkpoint lies.
            spec: the sub-network; the full one by default, unless a target is given.
            batch_size: sequences of a forward pass.
            max_batch_size: passed by lm-eval, and without effect.
            device: moves the model there.
            on_done: called with requests answered and in all.
            target: a limit, as for `ElasticModel.select`.

        Raises:
            FlextronError: as for `load` and `select`, there is no tokenizer, or the batch size is no positive number.
        """
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise FlextronError(f"batch_size must be a whole number of at least 1, not {batch_size!r}")
        self.model = pretrained if isinstance(pretrained, ElasticModel) else load(pretrained)
        if device is not None:
            self.model.to(device)
        if spec is None:
            spec = self.model.select(**target) if target else self.model.space.full
        self.spec, self.batch_size, self.on_done = spec, int(batch_size), on_done
        self.tokenizer = needed(self.model.tokenizer)
        self._device = self.model.decoder.device

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        token: int | None = self.tokenizer.eos_token_id
        if token is None:
            raise FlextronError("the tokenizer names no token that ends a text; set its eos_token")
        return token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        token: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if token is None else token

    @property
    def max_length(self) -> int:
        """Tokens that the model can read."""
        return self.model.decoder.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval notes beside its results."""
        return {"model_num_parameters": self.model.num_parameters(self.spec), "subnet": self.spec.to_dict()}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as the model's own template writes them; an answer that was begun stays open."""
        if self.tokenizer.chat_template is None:
            raise FlextronError("the model has no chat template; evaluate it without one")
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, begun as the tokenizer begins a text unless a template has done so, or the caller says how."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._text(self.prefix_token_id))
        return encode(self.tokenizer, string, add_special_tokens=add_special_tokens)

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """See `LM.loglikelihood`."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **options: Any) -> list[tuple[float, bool]]:
        asked = [self._fitted(context, continuation) for _, context, continuation in requests]
        scores = score_continuations(
            self.model.decoder, asked, self.spec, batch_size=self.batch_size, on_done=self.on_done
        )
        found = [(score.log_likelihood, score.is_greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def _fitted(self, context: list[int], continuation: list[int]) -> Continuation:
        """Without what lies too far back; the last token of all is never read."""
        if len(continuation) > self.max_length:
            raise FlextronError(
                f"an answer has {len(continuation)} tokens; the model has {self.max_length} positions, so leave the "
                "task out"
            )
        tokens = (*context, *continuation)[-(self.max_length + 1) :]
        return Continuation(tokens[: len(tokens) - len(continuation)], tuple(continuation))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """See `LM.loglikelihood_rolling`."""
        windows: list[Encoded] = []
        counts = []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own: list[Encoded] = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows))
        sums = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """See `LM.generate_until`."""
        wanted = [Wanted.of(request.args[1], eos=self._text(self.eot_token_id)) for request in requests]
        prompts: list[list[int]] = []
        for (text, _), one in zip((request.args for request in requests), wanted, strict=True):
            room = self.max_length - one.params.max_tokens
            if room < 1:
                raise FlextronError(
                    f"the task asks for {one.params.max_tokens} tokens; the model has {self.max_length} positions, so "
                    "lower the task's max_gen_toks"
                )
            prompts.append(self.tok_encode(text)[-room:])
        texts = answers(
            self.model.decoder,
            self.tokenizer,
            prompts,
            wanted,
            self.spec,
            batch_size=self.batch_size,
            on_done=self.on_done,
        )
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts
