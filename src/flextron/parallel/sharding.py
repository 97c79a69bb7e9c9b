"""A model in training, in shards on all processes: PyTorch's FSDP2, and what nested weights ask of it.

Each layer is one group: its parameters are gathered before it runs and freed behind it, and slices are taken from the
gathered weights, so nothing in the decoder knows of shards. Four things are notable:

- A process whose sequences skip half a layer has no gradient for it, while another may have one; the two would then
  reduce different buffers. Where any process runs a half, those that do not contribute zeros. Halves that none runs
  keep no gradient at all, so that AdamW leaves them alone, as in one process.
- In training of low rank, student and teacher share the frozen linears as modules. Their shards lie in the student's
  groups, and the teacher's layers borrow them. Low-rank updates belong to the group of the layer beside which they
  stand, although a batch carries them in.
- The caller's modules are not touched but lent: copies of them are sharded, their memory is given up, and in the end
  they get all their parameters back.
- In bf16, layers are gathered in it, half as many bytes; embeddings, final norm and head stay in float32, and so does
  the residual stream.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from flextron.model.adapter import Adapter
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.parallel.processes import Processes
from flextron.spec import SubnetSpec

__all__ = ["Roles", "Sharded", "in_shards"]

M = TypeVar("M", bound=nn.Module)
Roles = tuple[Decoder, Decoder | None, Adapter | None]
"""Student, teacher, and what trains beside the student's weights."""


_MLP = ("gate", "up", "down")


class _Loan:
    """A copy of a module whose parameters take the place of the module's, until they are given back."""

    def __init__(self, whole: nn.Module, kept: Sequence[Tensor] = ()) -> None:
        """Copy modules, and share parameters and the tensors that are `kept`."""
        self._lent = dict(whole.named_parameters())
        shared = {id(t): t for t in (*self._lent.values(), *kept)}
        self._copy = copy.deepcopy(whole, shared)

    def give_up(self) -> None:
        """Free the memory of the lender's parameters, once the copy has them in shards."""
        for p in self._lent.values():
            p.data = p.new_empty(0)

    @torch.no_grad()
    def give_back(self) -> None:
        """Gather all parameters into the modules that lent them; on every process."""
        for name, p in self._lent.items():
            held = self._copy.get_parameter(name)
            p.data = (held.full_tensor() if isinstance(held, DTensor) else held.detach()).to(p.device)


@contextmanager
def in_shards(decoder: Decoder, processes: Processes) -> Iterator[Decoder]:
    """A frozen decoder for forward passes that all processes make, each of its own sub-networks.

    Meanwhile the decoder has no parameters; it has them back in the end, unless an error came.
    """
    loan = _Loan(decoder)
    copied = cast("Decoder", loan._copy)
    mesh = init_device_mesh(processes.device.type, (processes.size,))
    for layer in copied.layers:
        fully_shard(layer, mesh=mesh)
    # the head is read after the pass
    fully_shard(copied, mesh=mesh, reshard_after_forward=False)
    loan.give_up()
    yield copied
    cast("FSDPModule", copied).reshard()
    loan.give_back()


class Sharded(_Loan, Generic[M]):
    """A module in training whose parameters lie in shards on all processes."""

    def __init__(
        self, whole: M, roles: Callable[[M], Roles], processes: Processes, *, kept: Sequence[Tensor], lowered: bool
    ) -> None:
        """Shard a copy, and give up the memory of the original's parameters until `give_back`.

        Args:
            whole: the same on every process.
            roles: finds student, teacher and adapter in it.
            processes: among which the parameters are dealt.
            kept: tensors beside its parameters that need not be copied.
            lowered: gather layers of float32 weights in bfloat16.
        """
        super().__init__(whole, kept)
        self.module = cast("M", self._copy)
        self._specs: list[SubnetSpec] = []
        self._shard(*roles(self.module), processes, lowered=lowered)
        self.give_up()

    def run(self, specs: list[SubnetSpec], *args: Any, last: bool) -> dict[str, Tensor]:
        """The module's losses.

        Args:
            specs: sub-networks that any of the processes runs now.
            args: of the module.
            last: whether the step's gradients are complete after this backward pass; they are reduced then.
        """
        self._specs = specs
        cast("FSDPModule", self.module).set_requires_gradient_sync(last)
        with warnings.catch_warnings():
            # a skipped layer gives back what it got; nothing is added to it in place
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
            return self.module(*args)  # type: ignore[no-any-return]

    def _shard(
        self, student: Decoder, teacher: Decoder | None, adapter: Adapter | None, processes: Processes, *, lowered: bool
    ) -> None:
        mesh = init_device_mesh(processes.device.type, (processes.size,))
        lower = lowered and adapter is None
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if lower else None,
            reduce_dtype=torch.float32 if lower else None,
            cast_forward_inputs=False,
        )
        students = list(student.layers)
        for i, layer in enumerate(students):
            if adapter is not None:
                layer.add_module("bypasses", adapter.layers[i])
        teachers = [] if teacher is None else list(teacher.layers)
        lenders = [_lender(layer, students) for layer in teachers]
        for layer in students:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
            layer.register_forward_pre_hook(self._fill_gaps)
        for layer, lender in zip(teachers, lenders, strict=True):
            if lender is None:
                fully_shard(layer, mesh=mesh, mp_policy=policy)
            else:
                _borrow(layer, cast("FSDPModule", lender))
        # linears that a teacher borrows are found below it, too
        placed: set[nn.Parameter] = {p for p in self.module.parameters() if isinstance(p, DTensor)}
        fully_shard(self.module, mesh=mesh, ignored_params=placed)

    def _fill_gaps(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before a layer runs: zeros as gradients of what other processes use in it, and this one does not."""
        x_ND, batch, index, *rest = args
        if not torch.is_grad_enabled():
            return args
        missing = _halves(self._specs, index) - _halves([s.spec for s in cast("Batch", batch).segments], index)
        unused = [p for name, p in layer.named_parameters() if p.requires_grad and _half(name) in missing]
        if unused:
            x_ND = _WithZeros.apply(x_ND, *unused)  # type: ignore[no-untyped-call]
        return (x_ND, batch, index, *rest)


class _WithZeros(torch.autograd.Function):
    """The same tensor; parameters that nothing reads get gradients of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *unused: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in unused]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], *(torch.zeros(size, dtype=dtype, device=device) for size, dtype, device in ctx.like)


def _halves(specs: Sequence[SubnetSpec], layer: int) -> set[str]:
    """Halves of a layer that any of the sub-networks runs."""
    widths = [spec.layers[layer] for spec in specs]
    attention = {"attention"} if any(w.num_groups for w in widths) else set()
    return attention | ({"mlp"} if any(w.intermediate_size for w in widths) else set())


def _half(name: str) -> str:
    """The half to which a parameter of a layer belongs, low-rank updates included."""
    first, second, *_ = name.split(".")
    if first == "bypasses":
        return "mlp" if second in _MLP else "attention"
    return "mlp" if first.startswith("mlp") else "attention"


def _lender(layer: nn.Module, students: Sequence[nn.Module]) -> nn.Module | None:
    """The student's layer in whose group a teacher's linears are sharded; None if it has its own."""
    modules = set(layer.modules())
    return next((s for s in students if any(m in modules for m in s.modules())), None)


def _borrow(layer: nn.Module, lender: FSDPModule) -> None:
    """Gather the lender's parameters while the layer runs."""

    def gather(*_: object) -> None:
        lender.unshard()

    def free(*_: object) -> None:
        lender.reshard()

    layer.register_forward_pre_hook(gather)
    layer.register_forward_hook(free)
