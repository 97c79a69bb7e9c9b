"""Packing loses no token; batches are seeded permutations that any step can be entered at; files are whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from flextron.errors import FlextronError
from flextron.texts.blocks import TokenBlocks, pack_tokens

VOCAB = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(8)}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token, so that a dictionary is the reference."""
    model = Tokenizer(WordLevel(VOCAB, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", model_max_length=4)


def blocks_of(num_blocks: int, *, context: int = 3, seed: int = 0) -> TokenBlocks:
    """Blocks with all tokens different."""
    return TokenBlocks.from_tokens(np.arange(num_blocks * context, dtype=np.int32), context=context, seed=seed)


@given(
    documents=st.lists(st.lists(st.sampled_from(sorted(VOCAB)[2:]), max_size=6), max_size=12),
    context=st.integers(1, 9),
    num_contexts=st.integers(1, 6),
    extra=st.integers(0, 8),
    batch_chars=st.integers(1, 40),
)
def test_packing_loses_no_token_and_keeps_the_order(
    tokenizer: PreTrainedTokenizerFast,
    documents: list[list[str]],
    context: int,
    num_contexts: int,
    extra: int,
    batch_chars: int,
) -> None:
    """The stream is the documents' words with a separator between, cut to whole contexts."""
    num_tokens = num_contexts * context + extra
    stream: list[int] = []
    for words in filter(None, documents):
        stream += [VOCAB["<eos>"]] * bool(stream) + [VOCAB[w] for w in words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flextron.texts.blocks._BATCH_CHARS", batch_chars)
        texts = [" ".join(words) for words in documents]
        if len(stream) < context:
            with pytest.raises(FlextronError, match=f"hold {len(stream)} tokens.*add text or shorten the context"):
                pack_tokens(texts, tokenizer, num_tokens=num_tokens, context=context)
            return
        packed = pack_tokens(texts, tokenizer, num_tokens=num_tokens, context=context)
    num_wanted = min(num_tokens, len(stream))
    assert packed.tolist() == stream[: num_wanted - num_wanted % context]
    assert packed.dtype == np.int32


@pytest.mark.parametrize(("before", "after"), [(["<bos>"], []), (["<bos>"], ["<eos>"]), ([], ["<eos>"])])
def test_documents_begin_as_texts_do_and_one_separator_stands_between(before: list[str], after: list[str]) -> None:
    """What the tokenizer would put behind a text is not doubled by the separator."""
    vocab = VOCAB | {"<bos>": len(VOCAB)}
    model = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    named = [(name, vocab[name]) for name in {*before, *after}]
    model.post_processor = TemplateProcessing(single=[*before, "$A", *after], special_tokens=named)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>")
    assert tokenizer("w1")["input_ids"] == [vocab[t] for t in (*before, "w1", *after)]
    packed = pack_tokens(["w1 w2", "", "w3"], tokenizer, num_tokens=9, context=1)
    assert packed.tolist() == [vocab[t] for t in (*before, "w1", "w2", "<eos>", *before, "w3")]


def test_documents_are_read_only_as_far_as_needed(tokenizer: PreTrainedTokenizerFast) -> None:
    """An endless stream of large documents is left after the second."""
    num_read = 0

    def endless() -> Iterator[str]:
        nonlocal num_read
        while True:
            num_read += 1
            yield "w1 w2 " * 50_000

    packed = pack_tokens(endless(), tokenizer, num_tokens=150_000, context=1000)
    assert (num_read, len(packed)) == (2, 150_000)
    assert packed[100_000] == VOCAB["<eos>"]


@pytest.mark.parametrize(("num_tokens", "context"), [(3, 4), (4, 0), (0, -1)])
def test_packing_refuses_less_than_a_block(tokenizer: PreTrainedTokenizerFast, num_tokens: int, context: int) -> None:
    """Before reading anything."""
    with pytest.raises(FlextronError, match="num_tokens must be at least one context"):
        pack_tokens(["w1 " * 9], tokenizer, num_tokens=num_tokens, context=context)


def test_packing_needs_a_separator() -> None:
    """Without it documents would run into each other."""
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(VOCAB, unk_token="<unk>")))
    with pytest.raises(FlextronError, match="set its eos_token"):
        pack_tokens(["w1"], bare, num_tokens=4, context=4)


def test_packing_refuses_tokens_that_the_embedding_lacks(tokenizer: PreTrainedTokenizerFast) -> None:
    """As where tokens were added to a tokenizer, and the model was not resized."""
    with pytest.raises(FlextronError, match=r"the token 'w5' of id 7, but the model's vocabulary has 7 tokens"):
        pack_tokens(["w1 w2", "w5 w1"], tokenizer, num_tokens=4, context=2, vocab_size=7)
    assert pack_tokens(["w1 w2", "w4 w1"], tokenizer, num_tokens=4, context=2, vocab_size=7).max() == 6


@given(num_blocks=st.integers(1, 17), batch_size=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_every_block_comes_once_an_epoch(num_blocks: int, batch_size: int, seed: int) -> None:
    """However batches and epochs fall together."""
    blocks = blocks_of(num_blocks, seed=seed)
    num_steps = -(-3 * num_blocks // batch_size)
    ids = np.concatenate([blocks.block_ids(step, batch_size) for step in range(num_steps)])
    for epoch in range(3):
        assert sorted(ids[epoch * num_blocks : (epoch + 1) * num_blocks]) == list(range(num_blocks))


@given(
    num_blocks=st.integers(1, 17),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 99),
    steps=st.permutations(range(8)),
)
def test_a_batch_depends_on_seed_and_step_alone(num_blocks: int, batch_size: int, seed: int, steps: list[int]) -> None:
    """A fresh object that is entered at any step, in any order, gives what one run from the start gives."""
    run = blocks_of(num_blocks, seed=seed)
    batches = [run.batch(step, batch_size) for step in range(8)]
    for step in steps:
        resumed = blocks_of(num_blocks, seed=seed)
        torch.testing.assert_close(resumed.batch(step, batch_size), batches[step], rtol=0, atol=0)


def test_a_batch_holds_the_rows_of_its_ids() -> None:
    """As int64, which embeddings take."""
    blocks = blocks_of(10, context=4)
    batch = blocks.batch(3, 6)
    assert batch.dtype == torch.int64
    assert batch.tolist() == [list(range(4 * i, 4 * i + 4)) for i in blocks.block_ids(3, 6)]


def test_seeds_and_epochs_differ() -> None:
    """The order is shuffled anew for each."""
    orders = [blocks_of(50, seed=seed).block_ids(epoch, 50).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in [*orders, range(50)]}) == 5


@pytest.mark.parametrize(
    "tokens",
    [np.zeros(4, np.int32), np.zeros((0, 4), np.int32), np.zeros((2, 4), np.int64)],
    ids=["1-D", "empty", "long"],
)
def test_what_token_blocks_refuse(tokens: np.ndarray) -> None:
    """Only int32 rows are blocks."""
    with pytest.raises(FlextronError, match="make them with pack_tokens"):
        TokenBlocks(tokens=tokens)


def test_bad_arguments() -> None:
    """Seeds, steps and sizes out of range."""
    blocks = blocks_of(4)
    with pytest.raises(FlextronError, match="seed must be at least 0"):
        blocks_of(4, seed=-1)
    with pytest.raises(FlextronError, match="no whole number of blocks"):
        TokenBlocks.from_tokens(np.zeros(7, np.int32), context=3)
    for step, batch_size in ((-1, 2), (0, 0)):
        with pytest.raises(FlextronError, match="step must be at least 0"):
            blocks.batch(step, batch_size)


def test_save_and_load(tmp_path: Path) -> None:
    """A map of the file gives the same batches, and the file is an ordinary `.npy`."""
    blocks = blocks_of(9, seed=5)
    blocks.save(tmp_path / "blocks.npy")
    loaded = TokenBlocks.load(tmp_path / "blocks.npy", seed=5)
    assert isinstance(loaded.tokens, np.memmap)
    assert not loaded.tokens.flags.writeable
    assert torch.equal(loaded.batch(2, 5), blocks.batch(2, 5))
    assert np.array_equal(np.load(tmp_path / "blocks.npy"), blocks.tokens)
    assert os.listdir(tmp_path) == ["blocks.npy"]


@pytest.mark.parametrize("broken", ["os.replace", "numpy.save", "os.fsync"])
def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Whole, and nothing beside it."""

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    path = tmp_path / "blocks.npy"
    blocks_of(2).save(path)
    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        with pytest.raises(OSError, match="disk full"):
            blocks_of(3).save(path)
    assert TokenBlocks.load(path).num_blocks == 2
    assert os.listdir(tmp_path) == ["blocks.npy"]


def test_files_that_hold_no_blocks(tmp_path: Path) -> None:
    """Missing, cut off, pickled, archives, or arrays of something else."""
    blocks_of(50).save(tmp_path / "cut.npy")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-8])
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", a=np.zeros(3))
    for name in ("missing.npy", "cut.npy", "pickled.npy", "archive.npz"):
        with pytest.raises(FlextronError, match="holds no token blocks"):
            TokenBlocks.load(tmp_path / name)
    np.save(tmp_path / "floats.npy", np.zeros((2, 2)))
    with pytest.raises(FlextronError, match="not float64"):
        TokenBlocks.load(tmp_path / "floats.npy")
