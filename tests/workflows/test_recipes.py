"""The recipes in `recipes/`: each is read, fits its hardware, and takes a step in true shapes on the meta device."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flextron.api.convert import _default_multiple, _max_skipped
from flextron.model.cost import num_parameters
from flextron.spec import SearchSpace
from flextron.workflows.elastify import read_recipe
from tests.workflows.recipe_shapes import MODELS, budget, decoder_config

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
GIB = 2**30
MEMORY = {"cpu": 64 * GIB, "gpu": 80 * GIB, "8gpu": 80 * GIB}
"""Memory of a process's device."""
PROCESSES = {"cpu": 1, "gpu": 1, "8gpu": 8}
QUICK = ("smollm2-135m-cpu", "pythia-410m-cpu")
FIGURES = re.compile(r"# memory: ([\d.]+) GiB a process; work: ([\d.e+]+) floating-point operations")


def hardware(path: Path) -> str:
    return path.stem.rsplit("-", 1)[-1]


@pytest.mark.parametrize("source", MODELS)
def test_shapes_have_the_published_number_of_parameters(source: str) -> None:
    config = decoder_config(source)
    assert num_parameters(config, config.full_spec) == MODELS[source][1]


def test_every_model_has_recipes() -> None:
    assert {read_recipe(path).source for path in RECIPES} == MODELS.keys()
    assert {hardware(path) for path in RECIPES} == MEMORY.keys()


@pytest.mark.parametrize(
    "path",
    # large models take seconds even without memory
    [pytest.param(p, id=p.stem, marks=[] if p.stem in QUICK else [pytest.mark.slow]) for p in RECIPES],
)
def test_a_recipe_fits_its_hardware(path: Path) -> None:
    recipe, kind = read_recipe(path), hardware(path)
    config, train, convert = decoder_config(recipe.source), recipe.train, recipe.convert
    assert train is not None
    # what the trainer and `convert` would refuse
    config.check_length(train.context)
    each, rest = divmod(train.batch_size, PROCESSES[kind])
    assert rest == 0
    assert each % min(train.micro_batch_size, each) == 0
    space = SearchSpace.from_ratios(
        num_hidden_layers=config.num_hidden_layers,
        intermediate_size=config.intermediate_size,
        num_groups=config.num_groups,
        ratios=convert.ratios,
        multiple_of=convert.multiple_of or _default_multiple(config.intermediate_size),
        max_skipped_layers=_max_skipped(config.num_hidden_layers, convert.max_skipped_layers),
        skippable_layers=range(1, config.num_hidden_layers - 1),
    )
    assert len(space.intermediate_sizes) > 3

    found = budget(config, train)
    assert found.total < 0.9 * MEMORY[kind]
    said = FIGURES.search(path.read_text(encoding="utf-8"))
    assert said is not None
    assert float(said[1]) == pytest.approx(found.total / GIB, rel=0.02)
    assert float(said[2]) == pytest.approx(found.operations, rel=0.02)
