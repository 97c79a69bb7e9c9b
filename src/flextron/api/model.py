"""What `convert` and `load` give: a model to train, profile, ask for sub-networks and cut into dense ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from flextron.api.dense import DenseModel
from flextron.api.routing import TOKEN_TARGETS, route, route_tokens
from flextron.api.stored import StoredModel
from flextron.api.texts import Texts, check_prompt
from flextron.api.training import train_model
from flextron.elastic import extract
from flextron.errors import FlextronError
from flextron.export import Exported, Format, export, format_for, holds, write_slices
from flextron.generation.sampling import SamplingParams
from flextron.progress import OnProgress, OnStep
from flextron.routing.token_router import PricedRouter
from flextron.spec import SubnetSpec, Target
from flextron.training.recipe import TrainRecipe
from flextron.training.router_recipe import RouterRecipe
from flextron.training.routers import RouterResult
from flextron.training.token_recipe import TokenRouterRecipe
from flextron.training.token_routing import TokenRouterResult
from flextron.training.trainer import TrainResult

__all__ = ["ElasticModel"]


@dataclass(slots=True)
class ElasticModel(StoredModel):
    """A pretrained model that holds a sub-network for every target."""

    def to(self, device: torch.device | str) -> ElasticModel:
        """Move the weights."""
        self.decoder.to(device)
        return self

    def train(
        self,
        text: Texts = None,
        recipe: TrainRecipe | None = None,
        *,
        teacher: str | Path | None = None,
        specs: Sequence[SubnetSpec] = (),
        with_router: bool = False,
        run_directory: str | Path | None = None,
        on_step: OnStep | None = None,
    ) -> TrainResult:
        """Train the sub-networks against the frozen full model.

        A frontier and a token router from before no longer hold and are dropped; latency tables stay.

        Args:
            text: documents, or a file, directory or `datasets` id; by default text that is on this machine.
            recipe: settings.
            teacher: another checkpoint of the same vocabulary to learn from; by default the model as it is now.
            specs: the sub-networks to train, each as often as it is listed; drawn by the recipe if none are given.
            with_router: let the router draw the sub-networks, and train it along (joint finetuning, Flextron 3.3).
            run_directory: where states for resuming go, and the packed text.
            on_step: called after each step with steps done, steps in all, and losses.

        Raises:
            FlextronError: the text is too short, the recipe does not fit, there is no router to train along, or the run
                directory holds another run.
        """
        trained = train_model(
            self,
            text,
            recipe or TrainRecipe(),
            adapter=self.adapter,
            router=self.router,
            teacher=teacher,
            specs=specs,
            with_router=with_router,
            run_directory=None if run_directory is None else Path(run_directory),
            on_step=on_step,
        )
        self.adapter, self.info = trained.adapter, trained.info
        if self.router is not None:
            self.router.eval().requires_grad_(False)
        # these hold for the weights of before; latencies depend on widths alone
        self.frontier = self.losses = self.token_router = None
        return trained.result

    def route(
        self,
        text: Texts = None,
        recipe: RouterRecipe | None = None,
        *,
        num_tokens: int = 1024,
        context: int = 256,
        run_directory: str | Path | None = None,
        on_measure: OnProgress | None = None,
        on_round: OnStep | None = None,
        on_compare: OnProgress | None = None,
    ) -> RouterResult:
        """Train the static router on the frozen model, and add what it chooses to the frontier.

        Args:
            text: documents, or a file, directory or `datasets` id; by default prose that is on this machine. Its first
                tokens train the router, as many after them measure what it chooses.
            recipe: settings.
            num_tokens: tokens of text on which each sub-network's loss is measured.
            context: tokens of a sequence of that text.
            run_directory: where measured losses are kept, so that a killed run goes on.
            on_measure: called with timing rounds done and in all.
            on_round: called after each round of training with rounds done, in all, and figures.
            on_compare: called with sub-networks measured and to be measured.
        """
        directory = None if run_directory is None else Path(run_directory)
        result, self.frontier = route(
            self,
            text,
            recipe,
            num_tokens=num_tokens,
            context=context,
            run_directory=directory,
            on_measure=on_measure,
            on_round=on_round,
            on_compare=on_compare,
        )
        self.router = result.router
        return result

    def route_tokens(
        self,
        text: Texts = None,
        recipe: TokenRouterRecipe | None = None,
        *,
        targets: Sequence[float] = TOKEN_TARGETS,
        context: int = 256,
        on_step: OnStep | None = None,
    ) -> TokenRouterResult:
        """Train the input-adaptive router on the frozen model, around the static sub-network of each target.

        Args:
            text: documents, or a file, directory or `datasets` id; by default docstrings that are on this machine.
            recipe: settings.
            targets: latency fractions that can be asked for afterwards (`generate(..., router="token")`).
            context: tokens of a sequence of the text.
            on_step: called after each epoch and step with their number, how many there are in all, and losses.

        Raises:
            FlextronError: the model was not profiled or routed on this device, a target is out of reach, or the text
                is too short.
        """
        result, self.token_router = route_tokens(self, text, recipe, targets=targets, context=context, on_step=on_step)
        return result

    def generate(
        self,
        prompt: str,
        *,
        spec: SubnetSpec | None = None,
        router: Literal["token"] | None = None,
        add_special_tokens: bool = True,
        **options: Any,
    ) -> str:
        """Continue a prompt.

        Args:
            prompt: text.
            spec: the sub-network; the full one by default, unless a target is among the options.
            router: `token` routes each token by itself, so that they cost a `latency` target on average.
            add_special_tokens: whether the prompt begins as the tokenizer begins a text (with BOS, for some).
            options: a target as for `select`, or fields of `SamplingParams`; greedy by default, whatever
                `generation_config.json` says.

        Raises:
            FlextronError: as for `select` and `SamplingParams`.
        """
        check_prompt(prompt)
        names = {f.name for f in fields(Target)}
        target = {k: v for k, v in options.items() if k in names}
        params = SamplingParams(**{k: v for k, v in options.items() if k not in names})
        if router is not None:
            routed, by_token = self.routed(Target(**target))
            return self._generate([prompt], routed, params, by_token, add_special_tokens=add_special_tokens)[0]
        if spec is None:
            spec = self.select(**target) if target else self.space.full
        return self._generate([prompt], spec, params, add_special_tokens=add_special_tokens)[0]

    def routed(self, target: Target) -> tuple[SubnetSpec, PricedRouter]:
        """The static sub-network of a `latency` target and the router that deals its MLP widths to tokens.

        Raises:
            FlextronError: there is no token router, or it is not calibrated for the target.
        """
        if self.token_router is None:
            raise FlextronError("the model has no token router yet; run model.route_tokens() (flextron route --token)")
        if target.latency is None:
            raise FlextronError("a token router answers latency targets only; give latency")
        return self.token_router.static_spec(target.latency), self.token_router.at(target.latency)

    def extract(self, spec: SubnetSpec) -> DenseModel:
        """A sub-network as a model of its own."""
        return DenseModel(extract(self.decoder, spec), self.tokenizer, self.hf_config, self.generation_config)

    def export(
        self,
        path: str | Path,
        *,
        spec: SubnetSpec | None = None,
        format: str | None = None,
        precision: str | None = None,
        pad: bool = False,
        overwrite: bool = False,
        **target: Any,
    ) -> Exported:
        """Write a sub-network for another program.

        Args:
            path: file or directory to write.
            spec: the sub-network; by default the full one, or the best one for the target that the format can hold.
            format: `hf` (a Hugging Face directory), `gguf` (llama.cpp) or `nemotron-nas` (vLLM); by default what the
                path's suffix says, else `hf`.
            precision: type of the numbers: `float32`, `bfloat16`, `float16`, and for GGUF also `q8_0` and `q4_0`; by
                default float32 for `hf`, bfloat16 for `nemotron-nas`, float16 for `gguf`.
            pad: where the format cannot hold the sub-network, widen its layers with zeros until it can.
            overwrite: replace what is there.
            target: a limit, as for `Target`.

        Raises:
            FlextronError: both a spec and a target are given, nothing is within the target, or the format cannot hold
                the sub-network; names the nearest that it can hold.
        """
        if spec is not None and target:
            raise FlextronError(f"give a sub-network or a target, not both: spec and {', '.join(target)}")
        kind = format_for(Path(path), format)
        if spec is None:
            spec = self._exportable(kind, Target(**target), pad=pad) if target else self.space.full
        return export(self, Path(path), spec, format=kind, precision=precision, pad=pad, overwrite=overwrite)

    def _exportable(self, kind: Format, target: Target, *, pad: bool) -> SubnetSpec:
        """The best sub-network within a target that a format can hold."""
        config = self.decoder.config
        allowed = None if pad else (lambda spec: holds(kind, config, spec))
        return self._profiled(target).select(target, allowed=allowed).spec

    def export_slices(self, path: str | Path, *, overwrite: bool = False) -> int:
        """Write the measured sub-networks as a table of slices, in the form of Gemma 3n's; returns their number.

        Args:
            path: the CSV file.
            overwrite: replace it if it exists.

        Raises:
            FlextronError: nothing was measured, or no measured sub-network is a slice: MLP widths and skipped layers
                alone.
        """
        return write_slices(Path(path), self.frontier, self.space.full, overwrite=overwrite)
