"""The sub-networks that requests run in, each made once for all of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from itertools import count

from flextron.engine.request import Network
from flextron.engine.runner import Runner
from flextron.errors import FlextronError
from flextron.model.adapter import Adapter
from flextron.model.batch import Segment, TokenChoice
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec

__all__ = ["Networks"]


class Networks:
    """What a runner has been asked for, until an adapter that stands in it is forgotten."""

    def __init__(self, decoder: Decoder, runner: Runner) -> None:
        """Start with none.

        Args:
            decoder: the full model, of whose sizes only is made use here.
            runner: what makes them.
        """
        self._decoder, self._runner = decoder, runner
        self._known: dict[tuple[Hashable, ...], Network] = {}
        """The key is sub-network, router and adapter, or what requests began in and what they go on in."""
        self._names = count()
        self._leaving: set[Network] = set()
        """Those with adapters that were forgotten while requests ran."""

    def get(self, spec: SubnetSpec, router: TokenChoice | None = None, adapter: Adapter | None = None) -> Network:
        """See `EngineCore.network`."""
        key = (spec, id(router), id(adapter))
        if key not in self._known:
            self._check(spec, router, adapter)
            self._known[key] = self._runner.network(spec, router, self._name(), adapter)
        return self._known[key]

    def narrowed(self, own: Network, spec: SubnetSpec) -> Network:
        """A sub-network in which requests of another go on, over the pages that they have.

        Args:
            own: what they run in.
            spec: has at most `own`'s KV groups in every layer, for no others have been kept of earlier tokens.

        Raises:
            FlextronError: it has more, there is a router, or the sub-network does not go with the adapter.
        """
        key = (own, spec)
        if key not in self._known:
            if own.router is not None:
                raise FlextronError("a request with a token router keeps its sub-network")
            if any(new > old for new, old in zip(spec.num_groups, own.spec.num_groups, strict=True)):
                raise FlextronError("a running request cannot go on with more KV groups than it has had")
            self._check(spec, None, own.adapter)
            self._known[key] = self._runner.network(spec, None, self._name(), own.adapter, own.layout)
        return self._known[key]

    def forget(self, adapter: Adapter) -> None:
        """Give out those with an adapter no more."""
        own = [key for key, network in self._known.items() if network.adapter is adapter]
        self._leaving.update(self._known.pop(key) for key in own)

    def leave(self, used: Iterable[Network]) -> set[Adapter]:
        """The forgotten adapters of which no network is used any more; each is told once."""
        if not self._leaving:
            return set()
        unused = self._leaving - set(used)
        self._leaving -= unused
        return {n.adapter for n in unused if n.adapter is not None}

    def _name(self) -> str:
        return f"{next(self._names)}"

    def _check(self, spec: SubnetSpec, router: TokenChoice | None, adapter: Adapter | None) -> None:
        config = self._decoder.config
        if not spec.is_nested_in(self._decoder.widths):
            raise FlextronError(f"the sub-network {spec.describe()} is not nested in the model")
        if router is not None:
            router.check(config, spec)
        if adapter is not None and adapter.config != config:
            raise FlextronError("the adapter is for another model; give one that was made for this one")
        Segment(spec, (), router=router, adapter=adapter)  # refuses what does not fit together
