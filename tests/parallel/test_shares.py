"""What ranks hold, against lists of units dealt out one by one; cut and put together again, all is as it was."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flextron.errors import FlextronError
from flextron.model.adapter import Adapter
from flextron.model.bypass import Dora, Lora
from flextron.model.decoder import Decoder
from flextron.parallel.shares import Share, cut_parameters
from flextron.parallel.wire import adapter_form, adapter_of, config_form, config_of, numbers_of, text_of
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import MECHANISMS
from tests.model.adapter_cases import random_ia3, random_lora, randomize
from tests.random_decoders import random_decoder

sizes, layers = st.integers(1, 9), st.integers(0, 40)


def dealt(width: int, size: int, layer: int) -> list[list[int]]:
    """Units of each rank, given out one after the other, beginning with another rank in each layer."""
    hands: list[list[int]] = [[] for _ in range(size)]
    for unit in range(width):
        hands[(layer + unit) % size].append(unit)
    return hands


@given(st.integers(0, 200), sizes, layers)
def test_every_prefix_is_spread_as_evenly_as_units_allow(width: int, size: int, layer: int) -> None:
    widths = [Share(rank, size).width(width, layer) for rank in range(size)]
    assert widths == [len(hand) for hand in dealt(width, size, layer)]
    assert max(widths) - min(widths) <= 1
    if width:  # biases are added by a rank that has a part
        (first,) = [rank for rank in range(size) if Share(rank, size).first(layer) == 0]
        assert widths[first] > 0


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), sizes)
def test_over_all_layers_ranks_hold_about_the_same(groups: list[int], size: int) -> None:
    spec = SubnetSpec.of(groups, [groups[0]] * len(groups))
    for rank in range(size):
        share = Share(rank, size).spec(spec)
        assert share.intermediate_sizes == tuple(len(dealt(w, size, i)[rank]) for i, w in enumerate(groups))
    held = [sum(Share(rank, size).spec(spec).num_groups) for rank in range(size)]
    assert max(held) - min(held) <= size


@given(st.integers(1, 30), st.integers(1, 4), sizes, layers, st.data())
def test_cut_rows_of_any_prefix_are_the_ranks_own_prefix_and_make_the_whole(
    units: int, rows: int, size: int, layer: int, data: st.DataObject
) -> None:
    whole = torch.randn(units * rows, 3)
    prefix = data.draw(st.integers(0, units))
    again = torch.empty_like(whole)
    for rank, hand in enumerate(dealt(units, size, layer)):
        share = Share(rank, size)
        own = share.rows(whole, layer, rows)
        assert torch.equal(own, torch.cat([whole[u * rows : (u + 1) * rows] for u in hand] or [whole[:0]]))
        width = share.width(prefix, layer) * rows
        assert torch.equal(own[:width], share.rows(whole[: prefix * rows], layer, rows))
        share.put(own, again, layer, rows)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("case", [case for case in MECHANISMS if case != "olmo2"])
def test_parameters_of_all_ranks_make_the_decoder(case: str) -> None:
    decoder = random_decoder(case)
    parts = [dict(Share(rank, 2).parameters(decoder)) for rank in range(2)]
    for name, whole in decoder.state_dict().items():
        held = [part[name] for part in parts if name in part]
        if len(held) == 2 and held[0].shape != whole.shape:
            assert sum(map(len, held)) == len(whole)
            rows = sorted(map(tuple, torch.cat(held).reshape(len(whole), -1).tolist()))
            assert rows == sorted(map(tuple, whole.reshape(len(whole), -1).tolist()))
        else:
            assert all(torch.equal(own, whole) for own in held)
            is_added_once = name.endswith(("o.bias", "down.bias"))
            assert len(held) == (1 if is_added_once else 2)


def dora(decoder: Decoder) -> Adapter:
    """DoRA beside all linears, with what it makes of biases."""
    lora = random_lora(decoder.config)

    def make(layer: int, target: str, shape: object) -> Dora:
        own = lora.at(layer)[target]
        assert isinstance(own, Lora)
        out = Dora(own, torch.rand(len(own.b)))
        out.settle(torch.randn(len(own.b), len(own.a)), torch.randn(len(own.b)))
        return out

    return Adapter(decoder.config, decoder.widths, make)


@pytest.mark.parametrize("case", ["llama-3", "llama-mqa", "gpt2"])
def test_adapters_are_cut_and_told_as_they_are(case: str) -> None:
    """Through the forms that travel to another rank."""
    decoder = random_decoder(case)
    config = config_of(text_of(numbers_of(config_form(decoder.config))))
    assert config == decoder.config
    for adapter in (random_lora(decoder.config), random_ia3(decoder.config), randomize(dora(decoder))):
        parameters = dict(adapter.named_parameters())
        again = {name: torch.full_like(p, torch.nan) for name, p in parameters.items()}
        for rank in range(2):
            share = Share(rank, 2).adapter(adapter)
            told = adapter_of(text_of(numbers_of(adapter_form(share))), config, share.state_dict())
            assert told.state_dict().keys() == share.state_dict().keys()
            cut = {f"layers.{i}.{t}.{name}": (i, rows) for i, t, name, rows in cut_parameters(adapter)}
            for name, own in told.named_parameters():
                if name in cut:
                    Share(rank, 2).put(own.detach(), again[name], *cut[name])
                else:
                    again[name] = own.detach()
        for name, whole in parameters.items():
            assert torch.equal(again[name], whole), name


def test_what_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(FlextronError, match="normalises the queries of all heads as one"):
        list(Share(0, 2).parameters(random_decoder("olmo2")))
    with pytest.raises(FlextronError, match=r"^3 ranks cannot share the 2 attention groups of layer 0; use at most 2$"):
        list(Share(0, 3).parameters(random_decoder("llama-3")))
