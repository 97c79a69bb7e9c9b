"""What tests of token routing share: a latency table that nobody measured, static sub-networks, a router."""

from __future__ import annotations

import torch

from flextron.routing.latency import LatencyTable
from flextron.routing.token_router import TokenRouter
from flextron.spec import SubnetSpec
from tests.toy import SPACE, synthetic_ms

HIDDEN = 32
FULL_MS = synthetic_ms(SPACE.full)
TABLE = LatencyTable(
    device="none",
    batch_size=1,
    context=8,
    base_ms=1.5,
    mlp_ms={w: 0.02 * w for w in SPACE.intermediate_sizes},
    attention_ms={g: 0.75 * g for g in SPACE.num_groups},
    full_ms=FULL_MS,
    median_error=0.0,
    max_error=0.0,
)
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
