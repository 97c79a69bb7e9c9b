"""Traces and data sets: both formats, slices, and broken lines told in one sentence."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import zstandard

from flextron.bench.dataset import read_dataset
from flextron.bench.lengths import Lengths, Limits, Sizes
from flextron.bench.plan import Arrivals, Load, make_plan
from flextron.bench.prompts import PromptMaker
from flextron.bench.traces import read_trace, slice_trace
from flextron.errors import FlextronError

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 23:59:59.9805900,374,44\r
2023-11-17 00:00:01.2305900,396,109\r
2023-11-17 00:00:00.4805900,879,55\r
2023-11-17 00:00:09,9,5"""

AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:00.509930+00:00,2399,6
"""

BURST = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,ChatGPT,1087,0,1087,Conversation log
118,GPT-4,417,276,693,API log
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, newline="")
    return path


def test_azure_traces_are_read_in_order_of_time(tmp_path: Path) -> None:
    entries = read_trace(write(tmp_path / "azure.csv", AZURE))
    offsets = [entry.time_s - entries[0].time_s for entry in entries]
    assert offsets == pytest.approx([0, 0.5, 1.25, 9.01941], abs=1e-5)
    assert [entry.sizes.prompt for entry in entries] == [374, 879, 396, 9]
    assert [entry.sizes.output for entry in entries] == [44, 55, 109, 5]


def test_time_zones_fractions_and_compression_are_understood(tmp_path: Path) -> None:
    packed = tmp_path / "azure.csv.zst"
    packed.write_bytes(zstandard.compress(AZURE_2024.encode()))
    first, second = read_trace(packed)
    assert second.time_s - first.time_s == pytest.approx(0.5, abs=1e-5)


def test_burst_traces_leave_out_what_failed(tmp_path: Path) -> None:
    entries = read_trace(write(tmp_path / "burst.csv", BURST))
    assert [(e.time_s, e.sizes) for e in entries] == [
        (5, Sizes(prompt=472, output=18)),
        (118, Sizes(prompt=417, output=276)),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a,b\n1,2\n", "must name the columns"),
        ("", "must name the columns"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no requests"),
        (AZURE_2024 + "2024-05-10 00:00:01,many,3\n", "line 4: .*many"),
        (AZURE_2024 + "yesterday,1,3\n", "line 4: .*yesterday"),
        (AZURE_2024 + "2024-13-10 00:00:01,1,3\n", "line 4"),
        (AZURE_2024 + "2024-05-10 00:00:01,1\n", "line 4"),
        (AZURE_2024 + "2024-05-10 00:00:01,1,-3\n", "line 4"),
        (BURST + "inf,GPT-4,1,2,3,API log\n", "line 5"),
    ],
)
def test_broken_traces_are_refused_in_one_sentence(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(FlextronError, match=reason) as caught:
        read_trace(write(tmp_path / "trace.csv", text))
    assert "\n" not in str(caught.value)


def test_missing_and_binary_traces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FlextronError, match="does not exist"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "plain.csv.zst").write_text(AZURE)
    for name in ("bytes.csv", "plain.csv.zst"):
        with pytest.raises(FlextronError, match="cannot be read"):
            read_trace(tmp_path / name)


def test_slices_are_timed_from_their_beginning_and_rescaled(tmp_path: Path) -> None:
    entries = read_trace(write(tmp_path / "azure.csv", AZURE))
    piece = slice_trace(entries, start_s=0.4, seconds=2.0, rescale=2.0)
    assert [entry.time_s for entry in piece] == pytest.approx([0.05, 0.425])
    assert [entry.sizes.prompt for entry in piece] == [879, 396]
    assert len(slice_trace(entries)) == 4
    with pytest.raises(FlextronError, match="lies in the piece"):
        slice_trace(entries, start_s=100)
    with pytest.raises(FlextronError, match="must be positive"):
        slice_trace(entries, rescale=0)


def test_a_trace_becomes_a_plan_with_its_times_and_clipped_lengths(tmp_path: Path) -> None:
    trace = write(tmp_path / "azure.csv", AZURE)
    load = Load(arrivals=Arrivals(trace=trace, rescale=2), num_requests=3, limits=Limits(prompt=400, total=450))
    plan = make_plan(load, PromptMaker())
    assert [request.scheduled_s for request in plan.requests] == pytest.approx([0, 0.25, 0.625])
    assert [(r.sizes.prompt, r.sizes.output) for r in plan.requests] == [(374, 44), (395, 55), (341, 109)]
    assert [len(request.prompt.split()) for request in plan.requests] == [374, 395, 341]
    assert plan.num_clipped == 2
    assert plan.offered_rate == pytest.approx(2 / 0.625)


def test_data_sets_of_lengths_are_shuffled_and_repeated(tmp_path: Path) -> None:
    path = write(tmp_path / "lengths.csv", "prompt_tokens,output_tokens,turns\n33,256,12\n17,73,2\n0,9,1\n")
    plan = make_plan(Load(arrivals=Arrivals(rate=1), dataset=path, num_requests=10), PromptMaker())
    sizes = [(request.sizes.prompt, request.sizes.output) for request in plan.requests]
    assert sorted(sizes) == [(17, 73)] * 5 + [(33, 256)] * 5


def test_data_sets_of_texts_are_sent_as_they_are(tmp_path: Path) -> None:
    records = [{"prompt": "Why  so?", "output_tokens": 7}, {"prompt": "one two three four"}]
    path = write(tmp_path / "texts.jsonl", "\n".join(map(json.dumps, records)) + "\n\n")
    load = Load(dataset=path, num_requests=2, output_tokens="9", limits=Limits(prompt=3))
    plan = make_plan(load, PromptMaker())
    assert sorted((r.prompt, r.sizes.output) for r in plan.requests) == [("Why  so?", 7), ("one two three", 9)]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("x.csv", "prompt,output\n1,2\n", "line 2: .*prompt_tokens"),
        ("x.csv", "prompt_tokens,output_tokens\n1,2\n3,four\n", "line 3"),
        ("x.csv", "prompt_tokens,output_tokens\n", "holds no prompts"),
        ("x.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2"),
        ("x.jsonl", '{"prompt": "a"}\n\nnot json\n', "line 3"),
        ("x.jsonl", "[1]\n", "line 1"),
        ("x.txt", "a", "must end in"),
    ],
)
def test_broken_data_sets_are_refused(tmp_path: Path, name: str, text: str, reason: str) -> None:
    with pytest.raises(FlextronError, match=reason):
        read_dataset(write(tmp_path / name, text), Lengths.parse("4"), random.Random(0))


def test_a_trace_and_a_data_set_exclude_each_other(tmp_path: Path) -> None:
    trace = write(tmp_path / "azure.csv", AZURE)
    with pytest.raises(FlextronError, match="either a trace or a data set"):
        make_plan(Load(arrivals=Arrivals(trace=trace), dataset=trace), PromptMaker())
