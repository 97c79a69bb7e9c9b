"""lm-eval's client of completions against the server, and the same tasks offline: equal to four digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

from flextron import ElasticModel
from flextron.evals.model import FlextronLM
from flextron.evals.tasks import local_task
from tests.evals.local_files import write_files
from tests.server.clients.record import client
from tests.server.running import Running

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TEXT = "The city was by the sea. It was said that in 1998 the first of them were there. "


class Shorter(FlextronLM):
    """The client cuts long texts two tokens earlier: it keeps room for a token that it asks for and one of context."""

    @property
    def max_length(self) -> int:
        return super().max_length - 2


def tasks(folder: Path) -> list[Any]:
    """Multiple choice, likelihoods of one answer, and rolling likelihoods of long texts."""
    texts = folder / "texts.json"
    texts.write_text("\n".join(json.dumps({"text": TEXT * n + "End"}) for n in (1, 2, 40)))
    rolling = {
        "task": "texts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(texts)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    }
    last_word = {
        **{key: rolling[key] for key in ("dataset_path", "dataset_kwargs", "test_split")},
        "task": "last_word",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text[:100]}}",
        "doc_to_target": " of the",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    return [local_task("piqa", folder), local_task("arc_easy", folder), rolling, last_word]


@client("lm-eval", "likelihoods, multiple choice and rolling likelihoods")
@pytest.mark.parametrize("name", ["tiny@0.6", "tiny"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_tasks_through_the_server_are_those_offline(
    server: Running, model: ElasticModel, tmp_path: Path, name: str, batch_size: int
) -> None:
    write_files(tmp_path)
    client = LocalCompletionsAPI(
        model=name,
        base_url=f"{server.url}/v1/completions",
        batch_size=batch_size,
        max_length=model.decoder.config.max_position_embeddings,
    )
    assert client.tokenizer_backend == "remote"
    offline = Shorter(model, latency=0.6) if "@" in name else Shorter(model)
    results = [
        simple_evaluate(
            model=lm,
            tasks=tasks(tmp_path),
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            log_samples=False,
        )["results"]
        for lm in (client, offline)
    ]
    found, wanted = (
        {(task, key): value for task, values in r.items() for key, value in values.items() if isinstance(value, float)}
        for r in results
    )
    assert len(wanted) >= 8
    assert found == pytest.approx(wanted, rel=1e-4)
