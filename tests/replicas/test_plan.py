"""Plans, and the configurations of clusters that hold them, without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flextron.engine import EngineSettings
from flextron.errors import FlextronError
from flextron.replicas.plan import Plan, plan_of

DEPLOY = Path(__file__).parents[2] / "deploy"


def configurations() -> dict[str, dict[str, Any]]:
    """What Serve is given, by file."""
    service = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
    return {
        "serve.yaml": yaml.safe_load((DEPLOY / "serve.yaml").read_text()),
        "rayservice.yaml": yaml.safe_load(service["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
@pytest.mark.filterwarnings("ignore")
def test_an_example_is_what_serve_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.serve")
    from ray._common.utils import import_attr
    from ray.serve.schema import ServeDeploySchema

    found = ServeDeploySchema.model_validate(configurations()[name])
    (application,) = found.applications
    # a misspelt key is dropped by some of Ray's schemas
    assert set(configurations()[name]) <= set(ServeDeploySchema.model_fields)
    assert set(configurations()[name]["applications"][0]) <= set(type(application).model_fields)
    build = import_attr(application.import_path)
    monkeypatch.setenv("FLEXTRON_API_KEY", "secret")
    built = build(application.args)
    ingress, plan = built._bound_deployment, plan_of(application.args)
    assert ingress.name == "Ingress"
    assert ingress.init_args[1] == plan
    replica = ingress.init_args[0]._bound_deployment
    assert (replica.name, replica.init_args) == ("Replica", (plan,))
    scaling = replica._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.get_target_ongoing_requests()) == (2, 4, 48)
    assert (plan.server.api_key, plan.server.allowed_hosts, plan.engine.kv_cache_gb) == ("secret", None, 4.0)


def test_both_examples_agree() -> None:
    found = configurations()
    assert found["serve.yaml"]["applications"] == found["rayservice.yaml"]["applications"]


def test_the_nodes_of_the_example_fit_its_replicas() -> None:
    spec = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())["spec"]
    args = configurations()["rayservice.yaml"]["applications"][0]["args"]
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    # a node holds a replica and one of the two fronts
    assert float(container["resources"]["limits"]["cpu"]) >= args["num_cpus"] + 2 * 0.1
    assert group["maxReplicas"] >= args["max_replicas"]
    version = spec["rayClusterConfig"]["rayVersion"]
    assert f"ARG RAY={version}-" in (DEPLOY / "Containerfile").read_text()
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"/models", args["state_directory"]}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "model: Field required"),
        ({"model": "m", "replica": 2}, "replica: Extra inputs"),
        ({"model": "m", "replicas": "two"}, "replicas: Input should be a valid integer"),
        ({"model": "m", "replicas": 0}, "at least 1, not 0"),
        ({"model": "m", "replicas": 3, "max_replicas": 2}, "max_replicas is 2"),
        ({"model": "m", "server": {"api_key": "k"}}, "FLEXTRON_API_KEY"),
        ({"model": "m", "server": {"no_such": 1}}, "no_such"),
        ({"model": "m", "engine": {"tensor_parallel": 2}}, "one device"),
        ({"model": "m", "engine": {"max_num_seqs": 0}}, "must be above 0"),
        ({"model": "m", "server": {"max_queue": "many"}}, "do not fit"),
        (["m"], "malformed"),
    ],
)
def test_bad_arguments(args: Any, message: str) -> None:
    with pytest.raises(FlextronError, match=message):
        plan_of(args)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
        max_leaves=5,
    )
)
def test_any_arguments_give_one_sentence(args: Any) -> None:
    with pytest.raises(FlextronError):
        plan_of(args)


def test_a_replica_refuses_what_is_too_much_itself() -> None:
    plan = Plan(directory="m", engine=EngineSettings(max_num_seqs=3))
    assert plan.most_requests > 3 + plan.server.max_queue
