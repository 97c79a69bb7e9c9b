"""The server without HTTP: admits requests, hands them to the worker, and knows how to stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from flextron.api import ElasticModel
from flextron.engine import CoServing, CoServingScheduler, EngineCore, EngineSettings, StepOutput
from flextron.errors import FlextronError
from flextron.jobs.driver import TrainingDriver
from flextron.jobs.jobs import Jobs
from flextron.parallel.companions import LostRankError
from flextron.serving.adapters import AdapterNames, LoadedAdapters, NamedAdapter, adapter_reader
from flextron.serving.adaptive import INTERVAL_SECONDS, Adaptive, Objective
from flextron.serving.errors import ApiError, bad_request, engine_died, shutting_down
from flextron.serving.metrics import Metrics
from flextron.serving.prompts import Prompts
from flextron.serving.session import Session
from flextron.serving.settings import ServerSettings
from flextron.serving.targets import Catalog, Choice, TargetBody
from flextron.serving.tokens import TokenNames
from flextron.serving.worker import GenerationRequest, Worker

__all__ = ["Service"]

_LOSS_SECONDS = 2.0
"""How long a server that lost a rank waits for the engine's thread."""


class Service:
    """One model behind one engine; its methods belong to the event loop."""

    def __init__(
        self,
        model: ElasticModel,
        settings: ServerSettings,
        engine: EngineSettings,
        adapters: AdapterNames | None = None,
        jobs: Jobs | None = None,
    ) -> None:
        """Reserve the KV cache; the arguments are those of `create_app`.

        Raises:
            FlextronError: the model has no tokenizer, its name does not fit, there is an objective and no frontier, or
                the ranks cannot be had.
        """
        if model.tokenizer is None:
            raise FlextronError("the checkpoint has no tokenizer; put the original's tokenizer.json into its directory")
        num_ranks = engine.tensor_parallel
        if jobs is not None and num_ranks > 1:
            raise FlextronError("finetuning needs the whole model in one process; leave it out, or serve on one rank")
        self._model, self.settings, self.tokenizer = model, settings, model.tokenizer
        names = adapters or AdapterNames()
        self.catalog = Catalog(model, settings.name, settings.min_latency_target, names)
        self.core = EngineCore(model.decoder, engine)
        # of the ranks, none keeps the whole
        model.decoder = self.core.decoder
        self.adaptive: Adaptive | None = None
        if settings.slo_tpot_ms is not None or settings.slo_ttft_ms is not None:
            objective = Objective(tpot_ms=settings.slo_tpot_ms, ttft_ms=settings.slo_ttft_ms)
            if jobs is None or model.frontier is not None:
                # says why there are no narrower sub-networks to turn to
                model.select(latency=1.0)
                self.adaptive = Adaptive(objective, self.catalog.rungs)
        self.names = TokenNames(self.tokenizer)
        self.defaults = model.generation_defaults
        self.worker = Worker(self.core, self.tokenizer, on_loss=self._hear_of_loss)
        self._driver: TrainingDriver | None = None
        self._coserving: CoServingScheduler[StepOutput] | None = None
        if jobs is not None:
            self._prepare(jobs)
        reader = adapter_reader(model.decoder, has_weights=num_ranks == 1)
        self.adapters = LoadedAdapters(names, reader, settings.max_loaded_adapters, self.worker.forget)
        self.metrics = Metrics(settings.name, lambda: self.worker.load, lambda: self.cap, self._num_trained)
        self.started_at = int(time.time())
        self._most_requests = engine.max_num_seqs + settings.max_queue
        self.is_draining = self._is_measuring = False
        self._sessions: set[Session] = set()
        self._has_no_session, self._has_loss = asyncio.Event(), asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.loss: LostRankError | None = None
        """Why nothing can be answered any more, once a rank is lost."""
        self._adapting: asyncio.Task[None] | None = None
        self.prompts = Prompts(self.tokenizer, model.decoder.config, self.defaults.ends)

    def start(self) -> None:
        """Start the engine's thread and training. Call it in the event loop."""
        self._has_no_session.set()
        self._loop = asyncio.get_running_loop()
        self.worker.begin(self._loop)
        self.core.on_loss(self._hear_of_loss)
        self.prompts.start()
        if self._driver is not None:
            self._driver.start()
        if self.adaptive is not None:
            self._adapting = asyncio.create_task(self._adapt(self.adaptive))

    def _prepare(self, jobs: Jobs) -> TrainingDriver:
        settings = self.settings
        self._driver = TrainingDriver(jobs, self.worker.wake)
        objectives = CoServing(tpot_ms=settings.slo_tpot_ms, ttft_ms=settings.slo_ttft_ms)
        self._coserving = CoServingScheduler(self.core, self._driver, objectives)
        self.worker.train(self._coserving)
        return self._driver

    def attach(self, jobs: Jobs) -> None:
        """Train jobs from now on, which a service without any may begin at any time. Call it in the event loop."""
        self._prepare(jobs).start()

    async def stop(self) -> None:
        """End the engine's thread and training."""
        if self._adapting is not None:
            self._adapting.cancel()
        self.worker.shut_down()
        # with a rank lost, a collective may never end
        await asyncio.to_thread(self.worker.join, None if self.loss is None else _LOSS_SECONDS)
        if self._driver is not None:
            # after the worker, in whose hands a step may be
            await asyncio.to_thread(self._driver.stop)
        self.prompts.stop()
        self.adapters.close()

    async def measure(self) -> None:
        """Measure here what targets need; requests wait meanwhile.

        Raises:
            ApiError: it is being measured already, or on several ranks, or the engine died.
        """
        if self.core.settings.tensor_parallel > 1:
            raise bad_request("a model on several ranks cannot be measured; run flextron profile before it is served")
        if self._is_measuring:
            raise ApiError(409, "the model is being measured; wait until that is done", code="measuring")
        self._is_measuring = True
        measured = self.worker.call(self._model.profile_here)
        try:
            await asyncio.wrap_future(measured)
        except asyncio.CancelledError as error:
            if measured.cancelled():
                raise engine_died() from error
            raise
        finally:
            self._is_measuring = False
        self.catalog.refresh()

    @property
    def is_healthy(self) -> bool:
        """Whether requests can be answered."""
        return self.worker.is_alive() and not self.is_draining

    @property
    def progress(self) -> int | None:
        """A number that grows while the engine works; None while it has nothing to do, or latencies are measured."""
        return None if self.worker.is_resting or self._is_measuring else self.worker.num_turns

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return not self._sessions

    @property
    def cap(self) -> float:
        """The widest latency target of requests that allow a narrower one. At 1 all run as they ask."""
        return 1.0 if self.adaptive is None else self.adaptive.cap

    def _num_trained(self) -> int:
        return 0 if self._driver is None else self._driver.num_tokens

    def choose(self, model_id: str, body: TargetBody | None) -> Choice:
        """What a request that arrives now runs in.

        Raises:
            ApiError: as for `Catalog.choose`.
        """
        return self.catalog.choose(model_id, body, self.cap)

    async def _adapt(self, adaptive: Adaptive) -> None:
        """Tell the policy what clients see, interval by interval, and narrow what runs to what it says."""
        loop = asyncio.get_running_loop()
        begun, trained = loop.time(), 0.0
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            now, load = loop.time(), self.worker.load
            training = 0.0 if self._coserving is None else self._coserving.seconds
            adaptive.end_interval(
                now - begun,
                num_running=load.num_running,
                num_waiting=load.num_waiting,
                oldest=max((s.unanswered_for for s in self._sessions), default=0.0),
                training=training - trained,
            )
            begun, trained = now, training
            for session in self._sessions:
                narrower = self.catalog.narrower(session.choice, self.cap)
                if narrower is not None:
                    session.narrow(narrower)

    async def drain(self) -> None:
        """Take no new requests. Wait for those that run, as long as the settings say, and then break them off."""
        self.is_draining = True
        try:
            await asyncio.wait_for(self._has_no_session.wait(), self.settings.drain_seconds)
        except (TimeoutError, asyncio.TimeoutError):
            for session in self._sessions:
                session.fail(shutting_down())

    async def lost(self) -> None:
        """Wait until a rank is lost."""
        await self._has_loss.wait()

    def _hear_of_loss(self, error: LostRankError) -> None:
        """Break all requests off, and take no more; callable from any thread."""

        def lose() -> None:
            if self.loss is None:
                self.loss, self.is_draining = error, True
                for session in list(self._sessions):
                    session.fail(engine_died())
                self._has_loss.set()

        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lose)

    def room(self, num_prompt: int, choice: Choice) -> int:
        """The most tokens of an answer; at least 1, so that the engine says what does not fit."""
        capacity = self.core.capacity(choice.spec)
        return max(1, min(capacity - num_prompt, self.settings.max_tokens_limit or capacity))

    def check(self, num_requests: int, max_tokens: int | None) -> None:
        """Refuse a request that is larger than the operator allows.

        Raises:
            ApiError: it is.
        """
        if num_requests > self._most_requests:
            raise bad_request(f"{num_requests} answers at once are more than this server's {self._most_requests}")
        limit = self.settings.max_tokens_limit
        if limit is not None and max_tokens is not None and max_tokens > limit:
            raise bad_request(f"max_tokens is {max_tokens}; this server allows at most {limit}", "max_tokens")

    async def open(self, requests: Sequence[GenerationRequest], choice: Choice) -> Session:
        """Queue requests, all or none of them.

        Raises:
            ApiError: the server is full, or stops, the adapter cannot be had, or it does not go with the sub-network.
            PromptError: the engine cannot take one of the prompts.
        """
        if self.is_draining:
            raise shutting_down()
        if sum(s.num_open for s in self._sessions) + len(requests) > self._most_requests:
            headers = {"retry-after": "1"}
            raise ApiError(429, "the queue is full; ask again later", kind="rate_limit_error", headers=headers)
        session = Session(
            requests, choice, worker=self.worker, metrics=self.metrics, adaptive=self.adaptive, on_close=self._forget
        )
        self._sessions.add(session)
        self._has_no_session.clear()
        try:
            if choice.adapter is not None:
                await self._load_adapter(session, requests, choice.adapter)
            await session.accepted()
        except BaseException:
            session.close()
            raise
        return session

    async def _load_adapter(self, session: Session, requests: Sequence[GenerationRequest], named: NamedAdapter) -> None:
        """Give requests their adapter, which is held until the session is closed."""
        adapter = await self.adapters.acquire(named)
        session.adapter = named
        for request in requests:
            request.adapter = adapter

    def _forget(self, session: Session) -> None:
        if session.adapter is not None:
            self.adapters.release(session.adapter)
        self._sessions.discard(session)
        if not self._sessions:
            self._has_no_session.set()
