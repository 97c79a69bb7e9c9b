"""llama.cpp as a peer, in a process of its own: a JSON object a line in, one a line out.

Runs under any interpreter that has `llama_cpp` (llama-cpp-python) and needs nothing else of this project.

    python llamacpp_peer.py quantize FROM.gguf TO.gguf F32|Q8_0|Q4_0
    python llamacpp_peer.py serve MODEL.gguf NUM_THREADS NUM_SLOTS SLOT_TOKENS
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass, field

import llama_cpp as ll
import numpy as np

_BATCH_TOKENS = 512


@dataclass
class Slot:
    """One sequence that llama.cpp holds."""

    index: int
    todo: list[int]
    """Tokens to decode next: the prompt at first, then one at a time."""
    num_tokens: int
    """To generate."""
    answer: list[int] = field(default_factory=list)
    position: int = 0


class Context:
    """A model with slots for sequences."""

    def __init__(self, path: str, num_threads: int, num_slots: int, slot_tokens: int) -> None:
        """Load a file. Keys and values are in float32 where the weights are, else as llama.cpp has them."""
        self._model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
        self._num_tokens = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self._model))
        settings = ll.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.n_batch = slot_tokens * num_slots, num_slots, _BATCH_TOKENS
        settings.n_threads = settings.n_threads_batch = num_threads
        if "F32" in path:
            settings.type_k = settings.type_v = ll.GGML_TYPE_F32
        self._context = ll.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot open {path}")
        self._batch = ll.llama_batch_init(_BATCH_TOKENS, 0, 1)
        self._num_slots = num_slots

    def advance(self, slots: list[Slot]) -> None:
        """Decode what the slots have to do, and append the likeliest token to each."""
        batch, n, ends = self._batch, 0, []
        for slot in slots:
            for token in slot.todo:
                batch.token[n], batch.pos[n] = token, slot.position
                batch.n_seq_id[n], batch.seq_id[n][0], batch.logits[n] = 1, slot.index, 0
                slot.position += 1
                n += 1
            batch.logits[n - 1] = 1
            ends.append(n - 1)
        batch.n_tokens = n
        if ll.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        for slot, end in zip(slots, ends):  # noqa: B905 - the peer's Python may be older than ours
            logits = np.ctypeslib.as_array(ll.llama_get_logits_ith(self._context, end), (self._num_tokens,))
            slot.todo = [int(logits.argmax())]
            slot.answer += slot.todo

    def free(self, slot: Slot) -> None:
        """Forget a sequence."""
        ll.llama_memory_seq_rm(ll.llama_get_memory(self._context), slot.index, -1, -1)

    def serve(self, requests: list[tuple[list[int], int]]) -> tuple[float, list[list[int]]]:
        """Answer all requests with continuous batching: decoding slots first, then prompts while the batch has room.

        Args:
            requests: prompt, and tokens to generate.

        Returns:
            Seconds, and the answers.
        """
        start = time.perf_counter()
        waiting, running, free = deque(enumerate(requests)), [], list(range(self._num_slots))
        answers: list[list[int]] = [[] for _ in requests]
        while waiting or running:
            room = _BATCH_TOKENS - len(running)
            while waiting and free and len(waiting[0][1][0]) <= room:
                number, (prompt, num_tokens) = waiting.popleft()
                running.append((number, Slot(free.pop(), list(prompt), num_tokens)))
                room -= len(prompt)
            self.advance([slot for _, slot in running])
            for number, slot in running:
                if len(slot.answer) == slot.num_tokens:
                    answers[number] = slot.answer
                    self.free(slot)
                    free.append(slot.index)
            running = [(number, slot) for number, slot in running if len(slot.answer) < slot.num_tokens]
        return time.perf_counter() - start, answers

    def begin(self, prompt: list[int]) -> Slot:
        """A sequence that decodes without end."""
        slot = Slot(0, prompt, 0)
        self.free(slot)
        self.advance([slot])
        return slot

    def prompt_seconds(self, prompt: list[int]) -> float:
        """Time of a prompt and the first token after it, in batches as large as they may be."""
        start = time.perf_counter()
        slot = Slot(0, [], 0)
        self.free(slot)
        for first in range(0, len(prompt), _BATCH_TOKENS):
            slot.todo = prompt[first : first + _BATCH_TOKENS]
            self.advance([slot])
        return time.perf_counter() - start

    def step_seconds(self, slot: Slot, steps: int) -> float:
        """Median time of a decode step, after one that is not counted."""
        times = []
        for _ in range(steps + 1):
            start = time.perf_counter()
            self.advance([slot])
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])


def features() -> list[str]:
    """Instruction sets that llama.cpp was compiled for."""
    parts = ll.llama_print_system_info().decode().replace(":", "|").split("|")
    return [name.strip() for name, _, value in (p.partition("=") for p in parts) if value.strip() == "1"]


def serve(path: str, num_threads: int, num_slots: int, slot_tokens: int) -> None:
    """Answer lines from stdin until it ends."""
    context = Context(path, num_threads, num_slots, slot_tokens)
    slot = None
    print(json.dumps({"features": features()}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "requests" in asked:
            seconds, answers = context.serve(asked["requests"])
            said = {"seconds": seconds, "answers": answers}
        elif "steps" not in asked:
            said = {"seconds": context.prompt_seconds(asked["prompt"])}
        else:
            slot = slot or context.begin(asked["prompt"])
            said = {"seconds": context.step_seconds(slot, asked["steps"])}
        print(json.dumps(said), flush=True)


def quantize(source: str, target: str, kind: str) -> None:
    """Write a GGUF file in another precision."""
    params = ll.llama_model_quantize_default_params()
    params.ftype = {
        "F32": ll.LLAMA_FTYPE_ALL_F32,
        "Q8_0": ll.LLAMA_FTYPE_MOSTLY_Q8_0,
        "Q4_0": ll.LLAMA_FTYPE_MOSTLY_Q4_0,
    }[kind]
    params.allow_requantize = True
    if ll.llama_model_quantize(source.encode(), target.encode(), params):
        raise RuntimeError(f"llama.cpp cannot write {target}")


if __name__ == "__main__":
    ll.llama_backend_init()
    if sys.argv[1] == "quantize":
        quantize(*sys.argv[2:5])
    else:
        serve(sys.argv[2], *map(int, sys.argv[3:6]))
