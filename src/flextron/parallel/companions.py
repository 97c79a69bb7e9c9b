"""The ranks of a server or an engine: started by the first as processes of this machine, or by a launcher.

The first rank is the process that the user started. The others end when they are told to, and, whatever happens to the
first one, when it is gone: they read from a pipe that closes with it. They leave signals to it, as a terminal's Ctrl-C
and a service manager's SIGTERM reach all processes, while running answers are to end. One that dies is noticed at once,
by a thread that waits for them, also while nothing is computed or a collective hangs.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from flextron.errors import FlextronError
from flextron.parallel.launcher import is_first_launched, num_launched

__all__ = [
    "Companions",
    "LostRankError",
    "check_ranks",
    "device_of",
    "join_first",
    "join_launched",
    "join_started",
    "part",
    "threads_each",
]

_ADDRESS = "127.0.0.1"
_START_SECONDS, _END_SECONDS = 300, 5
_PATIENCE = timedelta(days=3650)
"""The others wait for the first as long as nobody asks for anything; that one is gone is noticed otherwise."""


class LostRankError(FlextronError):
    """Another rank is gone, and with it its part of all weights and of all that is cached."""


def check_ranks(num_ranks: int) -> None:
    """Raise unless so many ranks can be had here.

    Raises:
        FlextronError: a launcher started another number of processes, or there are too few GPUs.
    """
    if num_launched() not in (1, num_ranks):
        raise FlextronError(
            f"a launcher started {num_launched()} processes, but the engine is to run on {num_ranks} ranks; let "
            "--tensor-parallel be the number of processes, or run it without a launcher"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count and num_launched() == 1 and num_ranks > count:
        raise FlextronError(f"{num_ranks} ranks need a GPU each, and there are {count}; use at most {count}")


def device_of(rank: int) -> torch.device:
    """Where a rank computes: each on a GPU of its own, if there are any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) if num_launched() > 1 else rank)


def threads_each(num_ranks: int) -> int:
    """Threads of one of the ranks; a launcher has dealt them out already."""
    return max(1, torch.get_num_threads() // (num_ranks if num_launched() == 1 else 1))


def join_first(num_ranks: int, companions: Sequence[str]) -> Companions | None:
    """Become the first rank, and wait for the others.

    Where this process is the first of a group of the right size already, that is taken, and nobody is started.

    Args:
        num_ranks: W.
        companions: command of the others, which goes on with rank, W and port; not needed under a launcher.

    Returns:
        The others, if this process started them.

    Raises:
        FlextronError: one of them ended before all were there, or this process is in another group already.
    """
    if not is_first_launched():
        raise FlextronError("the first process of a launcher makes an engine; the others call flextron.engine.follow")
    if dist.is_initialized():
        if dist.get_rank() or dist.get_world_size() != num_ranks or _count_engines(1) > 1:
            raise FlextronError(
                "this process belongs to a group of processes that the engine cannot use; close the other engine that "
                "runs on several ranks, or start this one in another process"
            )
        return None
    if num_launched() > 1:
        _join(0, num_ranks, None)
        _count_engines(1)
        return None
    # by default it would listen on all interfaces
    listening = socket.create_server((_ADDRESS, 0))
    port = listening.getsockname()[1]
    store = _store(port, num_ranks, listening.detach())
    started = Companions(num_ranks, companions, port)
    try:
        started.await_arrival(store)
        _join(0, num_ranks, store)
        _count_engines(1)
    except BaseException:
        started.close()
        raise
    return started


def part(companions: Companions | None) -> None:
    """Leave what `join_first` joined, once the others have been told."""
    if companions is None:
        _count_engines(-1)
        return
    companions.close()
    dist.destroy_process_group()


def _count_engines(change: int) -> int:
    """How many engines use this process's group; it has room for one."""
    return int(dist.distributed_c10d._get_default_store().add("flextron/engines", change))


def join_started(rank: int, num_ranks: int, port: int) -> None:
    """Become one of the others: leave signals to the first rank, and end with it."""
    _ignore_signals()
    threading.Thread(target=_end_with_first, name="flextron-first-rank", daemon=True).start()
    store = _store(port, num_ranks, None)
    store.set(_arrived(rank), "")
    _join(rank, num_ranks, store)


def join_launched() -> None:
    """Become one of the others that a launcher started; signals are left to the first, as above."""
    _ignore_signals()
    _join(int(os.environ["RANK"]), num_launched(), None)


class Companions:
    """The other ranks, as processes that this one started."""

    def __init__(self, num_ranks: int, command: Sequence[str], port: int) -> None:
        """Start them."""
        environment = os.environ | {"OMP_NUM_THREADS": str(threads_each(num_ranks))}
        self._processes = {
            rank: subprocess.Popen(
                [sys.executable, *command, str(rank), str(num_ranks), str(port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env=environment,
            )
            for rank in range(1, num_ranks)
        }
        self.lost: LostRankError | None = None
        """Why nothing can be computed any more."""
        self._is_closing, self._has_lost = threading.Event(), threading.Event()
        self._listeners: list[Callable[[LostRankError], None]] = []
        self._lock = threading.Lock()
        for rank, process in self._processes.items():
            name = f"flextron-rank-{rank}"
            threading.Thread(target=self._watch, args=(rank, process), name=name, daemon=True).start()

    def await_arrival(self, store: TCPStore) -> None:
        """Until all of them have started.

        Raises:
            LostRankError: one has ended instead.
        """
        waited = threading.Event()
        for _ in range(_START_SECONDS * 20):
            if self.lost is not None:
                raise self.lost
            if store.check([_arrived(rank) for rank in self._processes]):
                return
            waited.wait(0.05)
        raise FlextronError(f"the other ranks did not start within {_START_SECONDS} s; see what they said above")

    def on_loss(self, listener: Callable[[LostRankError], None]) -> None:
        """Have something called, in a thread of its own, when a rank is lost; at once if one is."""
        with self._lock:
            self._listeners.append(listener)
            lost = self.lost
        if lost is not None:
            listener(lost)

    def wait_for_loss(self, seconds: float) -> LostRankError | None:
        """Why a collective has failed, as soon as it is known; None if all of them live."""
        self._has_lost.wait(seconds)
        return self.lost

    def close(self) -> None:
        """End them all."""
        self._is_closing.set()
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes.values():
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        with self._lock:
            if self._is_closing.is_set() or self.lost is not None:
                return
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            self.lost = LostRankError(
                f"rank {rank} of {len(self._processes) + 1} {how}, and its part of the model is gone; start again"
            )
            self._has_lost.set()
            listeners = list(self._listeners)
        for listener in listeners:
            listener(self.lost)


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _store(port: int, num_ranks: int, listening: int | None) -> TCPStore:
    """Where ranks find each other; the first gives a socket that listens."""
    is_first = listening is not None
    patience = timedelta(seconds=_START_SECONDS)
    return TCPStore(_ADDRESS, port, num_ranks, is_first, patience, wait_for_workers=False, master_listen_fd=listening)


def _arrived(rank: int) -> str:
    return f"flextron/rank/{rank}"


def _join(rank: int, num_ranks: int, store: Store | None) -> None:
    """Numbers of a plan go by gloo in any case, sums between GPUs by NCCL."""
    device = device_of(rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with _on_this_machine(store is not None):
        dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=_PATIENCE)


@contextmanager
def _on_this_machine(is_local: bool) -> Iterator[None]:
    """Let gloo listen on the loopback interface alone, unless the user names another."""
    name = "GLOO_SOCKET_IFNAME"
    if not is_local or name in os.environ or not sys.platform.startswith("linux"):
        yield
        return
    os.environ[name] = "lo"
    try:
        yield
    finally:
        del os.environ[name]


def _end_with_first() -> None:
    """Wait until the first rank closes the pipe, or is gone."""
    while os.read(0, 1):
        pass
    os._exit(0)
