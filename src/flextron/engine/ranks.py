"""The engine on several ranks: the first schedules, draws and answers, and all run the same iterations on their shards.

What the first rank says before an iteration is one broadcast of numbers (`flextron.engine.plans`), and the iteration
itself has the decoder's two sums a layer and no other collective. The head is whole, and the first rank's alone, so
that logits are nowhere to be gathered. Each rank has pages for its own KV heads; one block table holds for all of them,
since a page has as many blocks on each as the rank with the most KV heads needs.

The first rank alone reads checkpoints and adapters, and sends each rank its part, so the others need no files. They
are told of an adapter, or of a sub-network, when a request first runs in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import IntEnum
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from flextron.engine.plans import PlanReader, PlanWriter
from flextron.engine.request import Chunk, Network
from flextron.engine.runner import Computed, Runner
from flextron.errors import FlextronError
from flextron.kernels.decoder import Weights
from flextron.model.adapter import Adapter
from flextron.model.batch import TokenChoice
from flextron.model.decoder import Decoder
from flextron.parallel.companions import (
    Companions,
    LostRankError,
    check_ranks,
    device_of,
    join_first,
    join_launched,
    part,
    threads_each,
)
from flextron.parallel.processes import is_loss
from flextron.parallel.shares import Share, check_divisible
from flextron.parallel.tensor import TensorParallel
from flextron.parallel.wire import (
    adapter_form,
    adapter_of,
    config_form,
    config_of,
    hear,
    numbers_of,
    receive_tensors,
    send_tensors,
    spec_form,
    spec_of,
    tell,
    text_of,
)
from flextron.spec import SubnetSpec

__all__ = ["LeadingRunner", "follow"]

_COMMAND = ("-m", "flextron.engine.companion")
_HEAD = "head.weight"
_OF_HEAD = ("outer.head", "outer.bypass")
"""What an adapter has beside the head, which is the first rank's."""
_GONE = "another rank is gone, and its part of the model with it; start again"
_LOSS_SECONDS = 2.0
"""How long after a failed collective the system may take to say which process ended."""


class _Kind(IntEnum):
    """What the first rank says."""

    END = 0
    SHARD = 1
    ADAPTER = 2
    NETWORK = 3
    FORGET = 4
    RUN = 5


class LeadingRunner(Runner):
    """The runner of the first rank, which has all others run the same."""

    def __init__(self, decoder: Decoder, num_ranks: int, *, num_blocks: int, page_size: int) -> None:
        """Start the other ranks, unless a launcher did, and give each its shard.

        Args:
            decoder: the whole, which is not needed afterwards.
            num_ranks: W.
            num_blocks: blocks of each rank's cache.
            page_size: tokens of a page.

        Raises:
            FlextronError: the ranks cannot be had, or cannot share the decoder.
        """
        check_divisible(decoder, num_ranks)
        check_ranks(num_ranks)
        self.companions: Companions | None = join_first(num_ranks, _COMMAND)
        """The other ranks, where this process started them."""
        self._ranks = TensorParallel()
        self._threads = threads_each(num_ranks)
        self._writer = PlanWriter()
        self._numbers, self._own = dict[Network, int](), dict[Network, Network]()
        self._shares: dict[Adapter, tuple[int, Adapter]] = {}
        self._next, self._is_closed = count(), False
        try:
            shard = self._share_out(decoder, num_blocks=num_blocks, page_size=page_size)
        except BaseException:
            self.close()
            raise
        super().__init__(shard, num_blocks=num_blocks, page_size=page_size, native=False)

    def _share_out(self, decoder: Decoder, **sizes: int) -> Decoder:
        """Send each of the others its shard, and return this rank's."""
        with self._together():
            said: dict[str, Any] = {"config": config_form(decoder.config), "widths": spec_form(decoder.widths)}
            tell(_Kind.SHARD, numbers_of(said | sizes))
            for share in self._others():
                send_tensors(((name, t) for name, t in share.parameters(decoder) if name != _HEAD), share.rank)
        return self._ranks.decoder(decoder).to(device_of(0))

    def close(self) -> None:
        """End the other ranks; a second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            with self._together():
                tell(_Kind.END, torch.empty(0, dtype=torch.int32))
        except LostRankError:
            pass  # they end by themselves
        finally:
            part(self.companions)

    def network(
        self,
        spec: SubnetSpec,
        router: TokenChoice | None,
        name: str,
        adapter: Adapter | None = None,
        layout: SubnetSpec | None = None,
    ) -> Network:
        """See `Runner`.

        Raises:
            FlextronError: there is a router.
        """
        if router is not None:
            raise FlextronError(
                "token routers do not run on several ranks; leave the router out, or serve without --tensor-parallel"
            )
        network = super().network(spec, None, name, adapter, layout)
        return replace(network, num_blocks=self.num_page_blocks(network.layout))

    def num_page_blocks(self, spec: SubnetSpec) -> int:
        """See `Runner`; those of the rank with the most."""
        shares = (Share(rank, self._ranks.size) for rank in range(self._ranks.size))
        return max(sum(self._kv_heads(share.spec(spec))) for share in shares)

    def forget(self, adapter: Adapter) -> None:
        """See `Runner`."""
        if adapter not in self._shares:
            return
        number, share = self._shares.pop(adapter)
        for network in [n for n in self._numbers if n.adapter is adapter]:
            del self._numbers[network], self._own[network]
        super().forget(share)
        if self.companions is None or self.companions.lost is None:
            with self._together():
                tell(_Kind.FORGET, torch.tensor([number], dtype=torch.int32))

    def run(self, chunks: Sequence[Chunk], weights: Weights | None = None) -> Computed:
        """See `Runner`.

        Raises:
            LostRankError: another rank is gone.
        """
        with self._together():
            for network in dict.fromkeys(c.network for c in chunks):
                if network not in self._numbers:
                    self._introduce(network)
            tell(_Kind.RUN, self._writer.write(chunks, self._numbers))
            return super().run([replace(c, network=self._own[c.network]) for c in chunks], weights)

    def _introduce(self, network: Network) -> None:
        """Tell the others of a network, and of its adapter if they do not know it."""
        adapter = network.adapter
        if adapter is not None and adapter not in self._shares:
            number = next(self._next)
            tell(_Kind.ADAPTER, numbers_of({"number": number} | adapter_form(adapter)))
            for share in self._others():
                parameters = share.adapter(adapter).state_dict().items()
                send_tensors(((k, t) for k, t in parameters if not k.startswith(_OF_HEAD)), share.rank)
            self._shares[adapter] = number, self._ranks.adapter(adapter).to(self.decoder.device)
        known = None if adapter is None else self._shares[adapter]
        number = next(self._next)
        said = {"number": number, "adapter": None if known is None else known[0], "num_blocks": network.num_blocks}
        specs = {"spec": spec_form(network.spec), "layout": spec_form(network.layout)}
        tell(_Kind.NETWORK, numbers_of(said | specs))
        self._numbers[network] = number
        self._own[network] = replace(network, adapter=None if known is None else known[1])

    def _others(self) -> Iterator[Share]:
        return (Share(rank, self._ranks.size) for rank in range(1, self._ranks.size))

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Do something with all ranks, on this one's part of the processor."""
        lost = None if self.companions is None else self.companions.lost
        if lost is not None:
            raise lost
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            yield
        except RuntimeError as error:
            if not is_loss(error):
                raise
            found = None if self.companions is None else self.companions.wait_for_loss(_LOSS_SECONDS)
            raise found or LostRankError(_GONE) from error
        finally:
            torch.set_num_threads(before)


def follow() -> None:
    """Serve the first rank until it says that all is over; what other processes of a launcher call.

    Raises:
        LostRankError: another rank is gone.
    """
    if not dist.is_initialized():
        join_launched()
    try:
        kind, said = hear()
        if kind == _Kind.SHARD:
            _Follower(said).follow()
    except RuntimeError as error:
        if is_loss(error):
            raise LostRankError(_GONE) from error
        raise


class _Follower:
    """Another rank than the first."""

    def __init__(self, said: Tensor) -> None:
        """Receive the shard."""
        form, ranks = text_of(said), TensorParallel()
        # the head is the first rank's alone
        config = replace(config_of(form["config"]), tie_word_embeddings=True)
        shard = ranks.shard(config, spec_of(form["widths"]), receive_tensors()).to(device_of(ranks.rank))
        self._runner = Runner(shard, num_blocks=form["num_blocks"], page_size=form["page_size"], native=False)
        self._reader = PlanReader()
        self._networks, self._page_blocks = dict[int, Network](), dict[int, int]()
        self._adapters: dict[int, Adapter] = {}

    def follow(self) -> None:
        """Until the first rank says that all is over."""
        while True:
            kind, said = hear()
            if kind == _Kind.END:
                return
            if kind == _Kind.RUN:
                self._runner.run(self._reader.read(said, self._networks, self._page_blocks))
            elif kind == _Kind.ADAPTER:
                self._take_adapter(said)
            elif kind == _Kind.NETWORK:
                self._take_network(said)
            elif kind == _Kind.FORGET:
                self._forget(int(said))

    def _take_adapter(self, said: Tensor) -> None:
        form, decoder = text_of(said), self._runner.decoder
        adapter = adapter_of(form, decoder.config, receive_tensors())
        self._adapters[form["number"]] = adapter.to(decoder.device)

    def _take_network(self, said: Tensor) -> None:
        form = text_of(said)
        adapter = None if form["adapter"] is None else self._adapters[form["adapter"]]
        network = self._runner.network(spec_of(form["spec"]), None, "", adapter, spec_of(form["layout"]))
        self._networks[form["number"]], self._page_blocks[form["number"]] = network, max(1, form["num_blocks"])

    def _forget(self, number: int) -> None:
        adapter = self._adapters.pop(number)
        for known in [i for i, n in self._networks.items() if n.adapter is adapter]:
            del self._networks[known], self._page_blocks[known]
        self._runner.forget(adapter)
