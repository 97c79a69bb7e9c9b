"""The compiled iteration of `csrc/decoder.cpp`: a decoder as one call.

Where there is no compiler, or a model has a shape that the kernels do not take, the engine runs PyTorch's operators.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from flextron.errors import FlextronError
from flextron.kernels.adapters import NativeAdapter
from flextron.kernels.build import load_library
from flextron.kernels.layout import (
    ACTIVATIONS,
    LANES,
    WEIGHTS,
    Ends,
    LayerWeights,
    Linear,
    Norm,
    Shape,
    Tokens,
    Weights,
)
from flextron.kernels.pace import ThreadPace
from flextron.kernels.quantization import (
    GROUP,
    PANEL_ROWS,
    column_scales,
    pack_groups,
    pack_panels,
    quantize_groups,
    quantize_rows,
    row_errors,
)
from flextron.model.decoder import Decoder
from flextron.model.norms import LayerNorm, RMSNorm
from flextron.model.rope import Tables, rotary_tables

__all__ = ["NativeStep", "Weights", "why_not_native"]

_PRODUCTS_A_READ = 16
"""Products of a row of weights with tokens that take about as long as reading it from memory."""
_TANH = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
"""Names of one function."""


def why_not_native(decoder: Decoder) -> str | None:
    """Why a decoder cannot run in the compiled iteration, in one sentence; None if it can."""
    config = decoder.config
    if decoder.num_ranks > 1:
        return f"the weights are shared by {decoder.num_ranks} ranks"
    if decoder.device.type != "cpu":
        return f"the weights lie on {decoder.device.type}"
    if decoder.dtype != torch.float32:
        return f"the weights are {decoder.dtype}"
    if config.hidden_size % LANES or config.head_dim % LANES:
        return f"hidden size {config.hidden_size} or head size {config.head_dim} is no multiple of {LANES}"
    library = load_library("decoder")
    return library if isinstance(library, str) else None


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _addresses(tensors: Sequence[Tensor | None]) -> Tensor:
    """An array of pointers, null for None."""
    return torch.tensor([_address(t) or 0 for t in tensors], dtype=torch.int64)


_screens: weakref.WeakKeyDictionary[Decoder, tuple[tuple[int, int], tuple[Tensor, Tensor, Tensor]]] = (
    weakref.WeakKeyDictionary()
)


def _screen(decoder: Decoder) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, scales and errors of the head in eight bits; made once for a decoder, until its head changes."""
    head_VD = decoder.head_weight
    # tensors made for inference alone do not count their changes
    state = head_VD.data_ptr(), 0 if head_VD.is_inference() else head_VD._version
    known, made = _screens.get(decoder, (None, None))
    if made is None or known != state:
        numbers, scales = quantize_rows(head_VD)
        made = numbers, scales, row_errors(head_VD, numbers, scales)
        _screens[decoder] = state, made
    return made


class NativeStep:
    """A decoder as one call, from token ids to logits. Weights stay where they are; the decoder must outlive this."""

    def __init__(
        self,
        decoder: Decoder,
        page_size: int,
        weights: Weights = "float32",
        *,
        screens_head: bool = False,
        adapts_threads: bool = False,
    ) -> None:
        """Collect pointers; with `int8` and `int4`, quantize a copy.

        Args:
            decoder: in float32 on the CPU.
            page_size: tokens of a page of the KV cache.
            weights: `int8` reads an eight-bit copy of all matrices, a scale a row (norms and biases stay as they are);
                `int4` one of four bits, a scale for 32 columns of a row, with `o`, `down` and the head in eight. What
                eight bits are multiplied with is rounded token by token (`csrc/int8.h`).
            screens_head: keep an eight-bit copy of a float32 head, which finds the likeliest token at a quarter of the
                bytes; see `num_full` of a call.
            adapts_threads: run on fewer threads than PyTorch has while that is faster.

        Raises:
            FlextronError: `why_not_native` has a reason, or `int4` is asked for and rows cannot be cut into groups.
        """
        reason = why_not_native(decoder)
        library = load_library("decoder")
        if reason is not None or isinstance(library, str):
            raise FlextronError(
                f"no compiled iteration: {reason}"
                if weights == "float32"
                else f"weights of {weights} run in the compiled CPU iteration only, and {reason}; leave them out (on a "
                "GPU, bfloat16 reads half the bytes of float32), or load the model in float32 on a CPU"
            )
        if weights == "int4" and decoder.config.hidden_size % GROUP:
            raise FlextronError(
                f"int4 needs a hidden size that is a multiple of {GROUP}, not {decoder.config.hidden_size}; use int8"
            )
        self.weights: Weights = weights
        """Precision of the matrices."""
        self._library, self._decoder = library, decoder
        config = decoder.config
        self._shape = Shape(
            hidden_size=config.hidden_size,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            num_layers=config.num_hidden_layers,
            rotated=0 if config.rope is None else int(config.head_dim * config.rope.fraction),
            page_size=page_size,
            query_rows_per_group=config.query_rows_per_group,
            is_multi_query=config.is_multi_query,
            parallel_residual=config.parallel_residual,
            is_layer_norm=config.norm == "layer",
            activation=ACTIVATIONS.index("gelu_tanh" if config.activation in _TANH else config.activation),
            weights=WEIGHTS.index(weights),
            qk_norm_is_whole=config.qk_norm == "width",
            norm_eps=config.norm_eps,
            embedding_scale=config.embedding_scale,
            residual_scale=config.residual_scale,
            attention_cap=config.attention_cap or 0.0,
            logits_cap=config.logits_cap or 0.0,
        )
        self._layers = (LayerWeights * config.num_hidden_layers)()
        self._tables: tuple[Tables | None, ...] = ()
        self._num_positions = 0
        """Positions that the tables hold."""
        self._adapts_threads = adapts_threads
        self._pace = ThreadPace(torch.get_num_threads())
        self._made: list[Tensor] = []
        """Kept alive for the pointers."""
        for i, (layer, native) in enumerate(zip(decoder.layers, self._layers, strict=True)):
            native.window, native.query_scale = config.window_of(i) or 0, config.query_scale(i)
            for name, module in _parts(layer):
                if isinstance(module, RMSNorm | LayerNorm):
                    setattr(native, name, self._norm(module))
                else:
                    bias = _address(module.bias)
                    linear = self._linear(module.weight, bias, weights, sums_rows=name in ("o", "down"))
                    setattr(native, name, linear)
        norm: Any = decoder.final_norm
        positions: Any = getattr(decoder, "positions", None)
        self._ends = Ends(
            embedding=_address(decoder.embedding.weight),
            positions=None if positions is None else _address(positions.weight),
            final_norm=self._norm(norm),
            head=self._linear(decoder.head_weight, None, "float32" if weights == "float32" else "int8"),
        )
        self.screens_head = screens_head and weights == "float32"
        """Whether the likeliest token can be found without reading the whole head."""
        if self.screens_head:
            numbers, scales, errors = _screen(decoder)
            self._ends.screen = Linear(_address(numbers), None, scales=_address(scales))
            self._ends.errors = _address(errors)
            self._made += [numbers, scales, errors]

    @torch.no_grad()
    def _norm(self, norm: RMSNorm | LayerNorm) -> Norm:
        """With a copy of the gains where they are not the weights themselves."""
        gains = norm.gains
        if gains is not norm.weight:
            self._made.append(gains)
        return Norm(_address(gains), _address(getattr(norm, "bias", None)))

    def _linear(self, weight: Tensor, bias: int | None, weights: Weights, *, sums_rows: bool = False) -> Linear:
        """With a quantized copy, but for float32; `sums_rows` where rows are inputs, not outputs."""
        if weights == "float32":
            return Linear(_address(weight), bias)
        columns = column_scales(weight) if sums_rows else None
        if columns is not None:
            weight = weight / columns
        if weights == "int8" or sums_rows:
            numbers, scales = quantize_rows(weight)
            panels = self._keep(pack_panels(numbers.t() if sums_rows else numbers))
            linear = Linear(_address(panels), bias, panel_quads=panels.shape[1])
            linear.scales = _address(self._keep(pad(scales, (0, -len(scales) % PANEL_ROWS))))
            if columns is not None:
                linear.column_scales = _address(self._keep(pad(columns, (0, -len(columns) % PANEL_ROWS))))
            return linear
        numbers, scales = quantize_groups(weight)
        packed = self._keep(pack_groups(numbers))
        scales = self._keep(pad(scales.flatten(), (1, LANES)))  # the kernels read vectors around them
        return Linear(_address(packed), bias, group_scales=_address(scales[1:]))

    def _keep(self, tensor: Tensor) -> Tensor:
        """The tensor, which lives as long as this object."""
        self._made.append(tensor)
        return tensor

    def __call__(
        self,
        tokens_N: Tensor,
        positions_N: Tensor,
        mlp_widths_LN: Tensor,
        num_groups_LN: Tensor,
        block_tables: Sequence[Tensor],
        block_offsets_LN: Tensor,
        cache: Tensor,
        rows: Sequence[int],
        adapters: Sequence[NativeAdapter | None] | None = None,
        num_full: int | None = None,
        hidden_rows: Sequence[int] = (),
        hidden_RD: Tensor | None = None,
    ) -> Tensor:
        """Run all tokens through the decoder.

        Args:
            tokens_N: ids, int64.
            positions_N: int64.
            mlp_widths_LN: neurons of each token in each layer, int32; 0 skips.
            num_groups_LN: attention groups, int32; 0 skips.
            block_tables: block table of each token's sequence, (pages, blocks of a page), int32; tokens may share one.
            block_offsets_LN: first block of each layer in a row of that table, int32.
            cache: (blocks, 2, page size, head size), float32.
            rows: tokens after which logits are wanted.
            adapters: of each token, at least as wide as the token's sub-network, or None; none by default.
            num_full: of how many rows, the leading ones, all logits are wanted; all by default. Of the others only the
                largest logit is sure to be there, and those that are certainly smaller may be minus infinity.
            hidden_rows: tokens whose final hidden states, normalised, are wanted.
            hidden_RD: is filled with them, float32; needed where there are any.

        Returns:
            Logits after these, (rows, vocabulary).
        """
        addresses = torch.tensor([t.data_ptr() for t in block_tables])
        lengths = torch.tensor([t.shape[1] for t in block_tables])
        wanted, shown = torch.tensor(rows, dtype=torch.int64), torch.tensor(hidden_rows, dtype=torch.int64)
        owned = None if adapters is None else torch.tensor([0 if a is None else a.address for a in adapters])
        logits_RV = torch.empty(len(rows), self._shape.vocab_size)
        rotations = self._rotations(positions_N)
        cos, sin = (_addresses(tables) for tables in zip(*rotations, strict=True))
        tokens = Tokens(
            num_tokens=len(tokens_N),
            ids=_address(tokens_N),
            positions=_address(positions_N),
            mlp_widths=_address(mlp_widths_LN),
            num_groups=_address(num_groups_LN),
            block_tables=_address(addresses),
            table_rows=_address(lengths),
            block_offsets=_address(block_offsets_LN),
            cos=_address(cos),
            sin=_address(sin),
            adapters=_address(owned),
            max_rank=max((a.max_rank for a in adapters or () if a is not None), default=0),
            cache=_address(cache),
            num_logits=len(rows),
            rows=_address(wanted),
            num_full=len(rows) if num_full is None else num_full,
            logits=_address(logits_RV),
            num_hidden=len(hidden_rows),
            hidden_rows=_address(shown),
            hidden=_address(hidden_RD),
        )
        self._run(tokens, mlp_widths_LN)
        return logits_RV

    def _run(self, tokens: Tokens, mlp_widths_LN: Tensor) -> None:
        """Call the library on as many threads as are the fastest now."""
        structs = [ctypes.byref(self._shape), self._layers, ctypes.byref(self._ends), ctypes.byref(tokens)]
        most = torch.get_num_threads()
        if not self._adapts_threads or most == 1:
            self._library.flextron_step(*structs, most)
            return
        if self._pace.most != most:
            self._pace = ThreadPace(most)
        threads = self._pace.choose()
        began = perf_counter()
        self._library.flextron_step(*structs, threads)
        seconds = perf_counter() - began
        # a row of weights is read once, and multiplied with each token that is as wide
        rows = mlp_widths_LN.amax(1).sum() + mlp_widths_LN.sum() / _PRODUCTS_A_READ
        self._pace.learn(float(rows), seconds)

    def _rotations(self, positions_N: Tensor) -> list[tuple[Tensor | None, Tensor | None]]:
        """Cosines and sines of the positions in each layer, out of tables that grow with the longest sequence.

        Returns:
            Of each layer (N, 1, rotated) each, or None where it rotates nothing; layers share what is the same.
        """
        config = self._decoder.config
        last = int(positions_N.max())
        if last >= self._num_positions:
            self._num_positions = max(last + 1, min(max(256, 2 * last), config.max_position_embeddings))
            self._tables = rotary_tables(config, torch.arange(self._num_positions), torch.float32)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for tables in self._tables:
            if tables is not None and id(tables) not in found:
                found[id(tables)] = tables[0][positions_N], tables[1][positions_N]
        return [(None, None) if tables is None else found[id(tables)] for tables in self._tables]


def _parts(layer: nn.Module) -> list[tuple[str, Any]]:
    """Weights of a layer by the kernels' names; absent ones are left out."""
    attention, mlp = getattr(layer, "attention", None), getattr(layer, "mlp", None)
    norms = ("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm")
    parts = [(name, getattr(layer, name, None)) for name in norms]
    parts += [(name, getattr(attention, name, None)) for name in ("q", "k", "v", "o", "q_norm", "k_norm")]
    parts += [(name, getattr(mlp, name, None)) for name in ("gate", "up", "down")]
    return [(name, module) for name, module in parts if module is not None and not isinstance(module, nn.Identity)]
