"""Convert, train and profile from one recipe file, stage by stage; what is done already is not done again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flextron.api import ElasticModel, Texts, convert, load
from flextron.errors import FlextronError
from flextron.files import read_text
from flextron.parallel.processes import Processes
from flextron.routing import SearchSettings
from flextron.spec import SubnetSpec
from flextron.training.recipe import TrainRecipe
from flextron.training.trainer import TrainResult

__all__ = [
    "ElastifyRecipe",
    "ProfileStage",
    "Progress",
    "StepCallback",
    "check_own",
    "elastify",
    "read_recipe",
    "run_profile",
    "train_in_place",
    "validate",
]


M = TypeVar("M", bound=BaseModel)
_OF_A_RUN = ("state", ".state*", "tokens-*.npy", ".tokens-*", "sensitivity.json", ".sensitivity.json*")


class StepCallback(Protocol):
    """Told of progress."""

    def __call__(self, done: int, total: int, figures: dict[str, float] | None = None, /) -> None:
        """`done` of `total` steps are over; `figures` are the latest."""


_LARGEST_RECIPE = 16 * 1024
"""Bytes; recipes have some hundred."""
Progress = Callable[[str], AbstractContextManager[StepCallback]]
"""Opens a progress display for a named stage."""


class _PlainLoader(yaml.SafeLoader):
    """Without aliases: a few lines of them can stand for any number of entries."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """See `yaml.composer.Composer`."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses aliases (*name); write the values out")
        return super().compose_node(parent, index)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ConvertStage(_Strict):
    """Keywords of `flextron.convert`."""

    calibration: str | None = None
    """Text to rank on: file, directory or data set. Default: text on this machine."""
    method: Literal["activation", "reconstruction"] = "reconstruction"
    """Ranking by `reconstruction` or by `activation`."""
    ratios: tuple[float, ...] = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
    """Choices of MLP width and attention groups, as fractions of the full ones."""
    multiple_of: int | None = Field(None, gt=0)
    """MLP widths are multiples of this. Default: 64, or less where the width asks for it."""
    max_skipped_layers: int | None = Field(None, ge=0)
    """Layers that a sub-network may skip at most. Default: a third of the layers."""


class ProfileStage(_Strict):
    """Keywords of `ElasticModel.profile`."""

    text: str | None = None
    """Text to measure losses on. Default: text on this machine."""
    num_tokens: int = Field(2048, gt=0)
    """Tokens of that text."""
    batch_size: int = Field(1, gt=0, le=2**16)
    """Sequences of the timed decode step."""
    decode_context: int = Field(128, gt=0, le=2**24)
    """Tokens that each of these sequences holds."""
    rounds: int = Field(2, gt=0, le=1000)
    """Rounds of proposals at each target."""
    refinements: int = Field(1, ge=0, le=1000)
    """Refinements of the best sub-network at each target."""


class ElastifyRecipe(_Strict):
    """The way from a pretrained checkpoint to a profiled elastic one."""

    source: str
    """Hub id, directory or .gguf file."""
    output: str
    """Directory of the elastic checkpoint; its unfinished training lies in `<output>.run`."""
    text: str | None = None
    """Training text: file, directory or `datasets` id."""
    convert: ConvertStage = ConvertStage()
    train: TrainRecipe | None = TrainRecipe()
    """Settings of training; None skips it."""
    profile: ProfileStage = ProfileStage()


def read_recipe(path: Path) -> ElastifyRecipe:
    """Read a YAML (or JSON) recipe.

    Raises:
        FlextronError: it is missing, malformed, or has unknown or impossible entries; names the first.
    """
    if not path.exists():
        raise FlextronError(f"recipe {path} does not exist")
    text = read_text(path, _LARGEST_RECIPE)
    try:
        data = yaml.load(text, _PlainLoader)  # noqa: S506 (safe, and without aliases)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        # ValueError: numbers of thousands of digits, dates that are none
        raise FlextronError(f"recipe {path} cannot be read: {str(error).splitlines()[0]}") from error
    return validate(ElastifyRecipe, data, f"recipe {path}")


def validate(kind: type[M], data: Any, name: str) -> M:
    """Check data against a recipe class.

    Raises:
        FlextronError: names the first entry that does not fit.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the recipe"
        raise FlextronError(f"{name}: {where}: {first['msg']}") from error


def elastify(recipe: ElastifyRecipe, progress: Progress) -> ElasticModel:
    """Run the stages that are not done yet; of several processes, all train, and the first alone does the rest.

    Raises:
        FlextronError: as for the stages, or the output directory holds the result of another recipe.
    """
    output, processes = Path(recipe.output), Processes.join()
    processes.from_first(lambda: _converted(recipe, progress))
    model = load(output)
    if recipe.train is not None and not model.info.recipe:
        train_in_place(model, output, recipe.text, recipe.train, progress)

    def profile() -> None:
        if model.frontier is None:
            run_profile(model, recipe.profile, progress)
            model.save_profile(output)

    processes.from_first(profile)
    return model


def _converted(recipe: ElastifyRecipe, progress: Progress) -> None:
    """See that the output directory holds the converted checkpoint, or a later stage of it.

    Raises:
        FlextronError: it holds the result of another recipe.
    """
    output = Path(recipe.output)
    if output.exists():
        _check_same(load(output), recipe)
        return
    with progress("converting"):
        model = convert(recipe.source, **recipe.convert.model_dump())
    marked = {**model.info.provenance, "elastify": _identity(recipe)}
    model.info = replace(model.info, provenance=marked)
    model.save(output)


def train_in_place(
    model: ElasticModel,
    directory: Path,
    text: Texts,
    recipe: TrainRecipe,
    progress: Progress,
    *,
    teacher: str | None = None,
    specs: Sequence[SubnetSpec] = (),
    with_router: bool = False,
    as_adapter: bool = False,
) -> TrainResult:
    """Train a model and write it to its directory; its state lies in `<directory>.run` meanwhile.

    Args:
        model: to train.
        directory: directory of the model, or of the new elastic adapter; all processes see the same.
        text: as for `ElasticModel.train`.
        recipe: settings.
        progress: opens the display.
        teacher: as for `ElasticModel.train`.
        specs: as for `ElasticModel.train`.
        with_router: as for `ElasticModel.train`.
        as_adapter: write what was added to the base alone.
    """
    run_directory = directory.with_name(directory.name + ".run")
    check_own(run_directory, _OF_A_RUN)
    with progress("training") as step:
        result = model.train(
            text,
            recipe,
            teacher=teacher,
            specs=specs,
            with_router=with_router,
            run_directory=run_directory,
            on_step=step,
        )

    def write() -> None:
        (model.save_adapter if as_adapter else model.save)(directory, overwrite=True)
        shutil.rmtree(run_directory)

    Processes.join().from_first(write)
    return result


def check_own(directory: Path, names: Sequence[str]) -> None:
    """See that a directory that is removed in the end holds nothing else than what is put there.

    Raises:
        FlextronError: it does.
    """
    if directory.exists() and not directory.is_dir():
        raise FlextronError(f"{directory} is in the way of unfinished work; move it away")
    found = sorted(p.name for p in directory.iterdir()) if directory.exists() else []
    foreign = [name for name in found if not any(fnmatch(name, pattern) for pattern in names)]
    if foreign:
        raise FlextronError(f"{directory} is for unfinished work and holds something else, {foreign[0]}; move it away")


def run_profile(model: ElasticModel, stage: ProfileStage, progress: Progress, text: Texts = None) -> None:
    """Measure and search, with displays; `text` stands in for the stage's."""
    with progress("measuring latencies") as measure, progress("searching the frontier") as search:
        model.profile(
            text or stage.text,
            settings=SearchSettings(rounds=stage.rounds, refinements=stage.refinements),
            num_tokens=stage.num_tokens,
            batch_size=stage.batch_size,
            decode_context=stage.decode_context,
            on_measure=measure,
            on_search=search,
        )


def _identity(recipe: ElastifyRecipe) -> dict[str, Any]:
    """The recipe without the place of its result."""
    return recipe.model_dump(mode="json", exclude={"output"})


def _check_same(model: ElasticModel, recipe: ElastifyRecipe) -> None:
    """The directory must be this recipe's, at some stage."""
    found, wanted = dict(model.info.provenance.get("elastify", {})), _identity(recipe)
    changed = [key for key in wanted if found.get(key) != wanted[key]]
    if changed:
        raise FlextronError(
            f"{recipe.output} holds the result of another recipe (it differs in {', '.join(changed)}); "
            "choose another output directory"
        )
