"""What a backward pass needs: bytes that autograd holds for peft, and that finetuning in chunks keeps."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from benchmarks import smollm2
from flextron.finetuning.example import Example
from flextron.finetuning.layerwise import Finetuning
from flextron.model.adapter import Adapter

__all__ = ["saved_by_chunks", "saved_by_peft"]

_LENGTH = 1024


@cache
def saved_by_peft() -> tuple[int, int]:
    """Bytes of distinct memory, parameters aside, after a forward pass; of the layers alone, and with head and loss."""
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(smollm2.peer(), config).train()  # type: ignore[arg-type]
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tokens = smollm2.eval_sequences(_LENGTH, _LENGTH)

    def held(with_loss: bool) -> int:
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in parameters:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            if with_loss:
                out = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            else:
                out = model.get_base_model().model(tokens, use_cache=False).last_hidden_state
        assert out.requires_grad
        return sum(t.untyped_storage().nbytes() for t in kept.values())

    return held(False), held(True)


@cache
def saved_by_chunks() -> int:
    """The most bytes that are kept between two units, for the same text; nothing but what exactness needs is kept."""
    decoder = smollm2.decoder()
    (tokens,) = smollm2.eval_sequences(_LENGTH, _LENGTH)
    example = Example(torch.cat((tokens, tokens[:1])), torch.ones(_LENGTH + 1))
    work = Finetuning(decoder, Adapter.lora(decoder.config, rank=16, alpha=32), [example])
    most = 0
    while work.run(256):
        most = max(most, work.saved.num_bytes)
    return most
