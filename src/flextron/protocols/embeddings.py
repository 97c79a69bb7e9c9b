"""`/v1/embeddings`: vectors of texts, which are the model's own final hidden states, pooled.

Nothing was trained to make them. Vectors of different sub-networks, adapters or poolings do not compare, so a request
gets exactly what it names, whatever the load.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor
from torch.nn.functional import normalize

from flextron.engine import Pooling
from flextron.generation.prompts import check_prompt
from flextron.generation.sampling import SamplingParams
from flextron.protocols.responses import CLIENT_LEFT, collect, unless_client_leaves
from flextron.protocols.sampling import RequestBody
from flextron.serving.errors import bad_value
from flextron.serving.service import Service
from flextron.serving.targets import Choice, TargetBody
from flextron.serving.worker import GenerationRequest

__all__ = ["EmbeddingBody", "embeddings"]

_MOST_INPUTS = 2048
"""OpenAI's limit."""
_NO_TOKENS = SamplingParams(max_tokens=0, temperature=0.0)


class EmbeddingBody(RequestBody):
    """Body of `/v1/embeddings`."""

    endpoint = "embeddings"
    prompt_key = "input"

    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """The hidden size is all that there is."""
    add_special_tokens: bool | None = None
    """vLLM's key: whether texts begin as the tokenizer begins a text; true by default."""
    normalize: bool | None = None
    """vLLM's key: whether vectors have length 1; true by default."""
    pooling: Pooling | None = None
    """Whether a vector is the mean over all tokens (by default), or the last token's."""
    flextron: TargetBody | None = None

    @model_validator(mode="after")
    def _check_inputs(self) -> EmbeddingBody:
        if not self.input or not all(given or isinstance(given, int) for given in self.input):
            raise bad_value("input is empty, or a part of it; give at least one token", "input")
        if len(self.inputs) > _MOST_INPUTS:
            raise bad_value(f"input has {len(self.inputs)} texts, more than {_MOST_INPUTS}; send fewer", "input")
        if self.flextron is not None and self.flextron.min_latency_target is not None:
            raise bad_value(
                "embeddings are not narrowed under load, because those of different sub-networks do not compare; leave "
                "min_latency_target out",
                "flextron.min_latency_target",
            )
        return self

    @property
    def inputs(self) -> list[str | list[int]]:
        """One entry a vector."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [[t for t in self.input if isinstance(t, int)]]
        return [given for given in self.input if not isinstance(given, int)]


async def embeddings(request: Request, service: Service, body: EmbeddingBody) -> Response:
    """Vectors of texts.

    Raises:
        PromptError: the model cannot read an input.
        ApiError: the request cannot be answered.
    """
    choice = service.catalog.choose(body.model, body.flextron)
    config = service.core.decoder.config
    if body.dimensions not in (None, config.hidden_size):
        raise bad_value(
            f"the model's vectors have {config.hidden_size} dimensions, and no part of them says as much; leave "
            "dimensions out",
            "dimensions",
        )
    special = body.add_special_tokens is not False
    prompts = [
        await service.prompts.encode(p, add_special_tokens=special) if isinstance(p, str) else p for p in body.inputs
    ]
    for prompt in prompts:
        check_prompt(config, prompt, 0)
    pooling: Pooling = body.pooling or "mean"
    vectors = await unless_client_leaves(request, _vectors(service, choice, prompts, pooling))
    if vectors is None:
        return Response(status_code=CLIENT_LEFT)
    report = choice.report() | {"pooling": pooling, "normalized": body.normalize is not False}
    num_tokens = sum(map(len, prompts))
    answer = {
        "object": "list",
        "model": choice.model_id,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        "flextron": report,
    }
    # millions of numbers are written in a thread, while others get their tokens
    return await asyncio.to_thread(lambda: JSONResponse(answer | {"data": _data(vectors, body)}))


async def _vectors(service: Service, choice: Choice, prompts: Sequence[list[int]], pooling: Pooling) -> list[Tensor]:
    """The vectors, computed by as many requests at a time as the engine runs."""
    vectors: list[Tensor] = []
    most = service.core.settings.max_num_seqs
    for i in range(0, len(prompts), most):
        requests = [
            GenerationRequest(j, prompt, _NO_TOKENS, (), choice.spec, choice.router, pooling=pooling)
            for j, prompt in enumerate(prompts[i : i + most])
        ]
        session = await service.open(requests, choice)
        try:
            found = await collect(session, len(requests))
        finally:
            session.close()
        vectors += [piece.embedding for piece in found if piece.embedding is not None]
    return vectors


def _data(vectors: Sequence[Tensor], body: EmbeddingBody) -> list[dict[str, Any]]:
    """OpenAI's entries."""
    return [{"object": "embedding", "index": i, "embedding": _written(v, body)} for i, v in enumerate(vectors)]


def _written(vector_D: Tensor, body: EmbeddingBody) -> str | list[float]:
    """A vector as the client wants it; in base64 its numbers are float32, the least significant byte first."""
    if body.normalize is not False:
        vector_D = normalize(vector_D, dim=0)
    if body.encoding_format == "base64":
        return base64.b64encode(vector_D.numpy().astype("<f4").tobytes()).decode()
    numbers: list[float] = vector_D.tolist()
    return numbers
