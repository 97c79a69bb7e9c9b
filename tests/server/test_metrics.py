"""What Prometheus reads, counted by hand."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

from flextron import ElasticModel
from tests.server.running import Running, running, wait_until


def samples(server: Running) -> dict[tuple[str, str], float]:
    """Values by name, and by target or reason where there is one."""
    answer = httpx.get(f"{server.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            label = sample.labels.get("target") or sample.labels.get("finished_reason") or ""
            assert sample.labels["model_name"] == "tiny"
            found[sample.name, label] = sample.value
    return found


def test_everything_is_counted(model: ElasticModel) -> None:
    with running(model, {"page_size": 4}) as made:
        client = made.client()
        at_first = samples(made)
        assert at_first["vllm:generation_tokens_total", ""] == 0
        prompt = list(range(1, 11))
        for name, tokens in (("tiny", 6), ("tiny@0.6", 4), ("tiny@0.6", 5)):
            client.completions.create(model=name, prompt=prompt, max_tokens=tokens, temperature=0)
        client.completions.create(
            model="tiny", prompt=prompt, max_tokens=3, extra_body={"flextron": {"params": 200_000 + 17}}
        )
        made.wait_until_idle()
        wait_until(lambda: samples(made)["vllm:num_requests_running", ""] == 0)
        found = samples(made)
    assert found["vllm:prompt_tokens_total", ""] == 4 * len(prompt)
    assert found["vllm:generation_tokens_total", ""] == 6 + 4 + 5 + 3
    assert found["vllm:time_to_first_token_seconds_count", ""] == 4
    assert found["vllm:time_per_output_token_seconds_count", ""] == 5 + 3 + 4 + 2
    assert found["vllm:inter_token_latency_seconds_count", ""] == 5 + 3 + 4 + 2
    assert found["vllm:e2e_request_latency_seconds_count", ""] == 4
    parts = [found[f"vllm:request_{part}_time_seconds_sum", ""] for part in ("queue", "prefill", "decode")]
    assert all(part > 0 for part in parts)
    assert abs(sum(parts) - found["vllm:e2e_request_latency_seconds_sum", ""]) < 1e-6
    assert found["vllm:request_prompt_tokens_sum", ""] == 4 * len(prompt)
    assert found["vllm:request_generation_tokens_sum", ""] == found["vllm:request_params_max_tokens_sum", ""] == 18
    assert found["vllm:request_success_total", "length"] == 4
    assert found["vllm:num_requests_waiting", ""] == found["vllm:kv_cache_usage_perc", ""] == 0
    assert found["vllm:num_preemptions_total", ""] == 0
    assert found["vllm:prefix_cache_queries_total", ""] == 4 * len(prompt)
    # the second and third were of one sub-network, and so is the last: two full pages of four tokens each time
    assert found["vllm:prefix_cache_hits_total", ""] == 2 * 8
    assert {k[1]: v for k, v in found.items() if k[0] == "flextron:requests_total"} == {
        "full": 1,
        "latency=0.60": 2,
        "params": 1,
    }
    assert found["flextron:tokens_total", "latency=0.60"] == 9


def test_load_is_seen_while_it_lasts(model: ElasticModel) -> None:
    with running(model, {"max_num_seqs": 2, "max_num_batched_tokens": 16}) as made:
        made.slow_down(0.02)
        stream = made.client().completions.create(model="tiny", prompt="a", n=3, max_tokens=60, stream=True)
        next(stream)
        wait_until(lambda: samples(made)["vllm:num_requests_running", ""] == 2)
        found = samples(made)
        assert found["vllm:num_requests_waiting", ""] == 1
        assert 0 < found["vllm:kv_cache_usage_perc", ""] < 1
        stream.close()
        made.wait_until_idle()


def test_two_servers_in_a_process_count_apart(server: Running, model: ElasticModel) -> None:
    with running(model) as made:
        made.client().completions.create(model="tiny", prompt="a", max_tokens=1)
        assert samples(made)["vllm:generation_tokens_total", ""] == 1
        assert samples(server)["vllm:generation_tokens_total", ""] != 1
