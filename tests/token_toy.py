"""What tests of token routing share: static sub-networks, a router."""

from __future__ import annotations

import torch

from flextron.routing.token_router import TokenRouter
from flextron.spec import SubnetSpec
from tests.toy import SPACE, TABLE

HIDDEN = 32
STATIC = {
    0.63: SubnetSpec.of([8, 8, 24], [1, 2, 1]),
    0.8: SubnetSpec.of([24, 8, 40], [2, 1, 2]),
    0.89: SubnetSpec.of([24, 24, 24], [2, 2, 2]),
}


def opinionated_router(seed: int = 0) -> TokenRouter:
    """Untrained, with predictions that differ widely from token to token and from width to width."""
    torch.manual_seed(seed)
    router = TokenRouter.for_table(SPACE, HIDDEN, TABLE, num_units=12, embedding_size=4)
    with torch.no_grad():
        router.unit.fill_(0.3)
        router.input_rms_L.fill_(2.0)
        for second in router.second:
            assert isinstance(second, torch.nn.Linear)
            second.weight.normal_(0, 1.0)
            # narrower costs more, as it does in trained ones
            second.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    return router.eval()
