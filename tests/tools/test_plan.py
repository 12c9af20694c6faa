"""Estimates of tools.plan: values computed by hand, and properties that hold for all numbers."""

import json
from dataclasses import replace
from pathlib import Path

from tools import plan
from tools.plan import GRADIENT_BYTES, Plan, estimate_build, estimate_training, exchange_seconds

import pytest
from hypothesis import given
from hypothesis import strategies as st


def test_a_clip_of_29_s_has_ten_segments_and_a_track_of_four_minutes_89():
    assert Plan(1, seconds=29.0).segments_per_clip == 10  # 639,450 samples / 59,049 = 10.8
    assert Plan(1, seconds=240.0).segments_per_clip == 89  # 5,292,000: 89.6


def test_build_by_hand():
    few_cores = Plan(1000, kbit_s=80.0, decode_ms=50.0, cores=5, storage=1.0)
    found = estimate_build(few_cores)
    assert found["build_seconds"] == 10  # 50 core seconds on 5 cores
    assert found["build_bottleneck"] == "decoding"
    found = estimate_build(replace(few_cores, cores=50))
    assert found["build_seconds"] == pytest.approx(0.290 + 2.36196)  # 0.29 and 2.36 GB at 1 GB/s
    assert found["build_bottleneck"] == "storage"


def test_exchange_by_hand():
    assert exchange_seconds(Plan(1, gpus=1)) == 0
    # Four GPUs of a host: 2 x 3/4 of the gradients over their link, and 45 exchanges of 4 hops.
    one_host = Plan(1, gpus=4, gpu_link=100.0, latency_us=10.0)
    assert exchange_seconds(one_host) == pytest.approx(1.5 * GRADIENT_BYTES / 100e9 + 180 * 10e-6)
    # Sixteen GPUs of two hosts: 2 x 15/16 of the gradients over 80 Gbit/s, 10 GB/s.
    two_hosts = Plan(1, gpus=16, network=80.0, latency_us=1e-9)
    assert exchange_seconds(two_hosts) == pytest.approx(1.875 * GRADIENT_BYTES / 10e9)


def test_training_by_hand():
    one_gpu = Plan(
        25_000, gpus=1, gpu_rate=1000.0, input_rate=2000.0, sequential_rate=2500.0, epochs=3,
        stages=2, gpu_memory=100.0,
    )  # fmt: skip
    found = estimate_training(one_gpu)
    assert found["source"] == "GPU memory"  # 187,500 segments are 44.3 GB of at most 45
    # 20,000 segments of 2,000 clips: read in 8 s, predicted at three times the rate, scored.
    assert found["epoch_validation_seconds"] == pytest.approx(8 + 20_000 / 3000 + 2000 * 2e-5)
    epoch = 187_500 // 64 * 64 / 1000 + found["epoch_validation_seconds"] + 1.4
    test = 42_500 / 2500 + 42_500 / 3000 + 4250 * 2e-5
    start = 187_500 / 900_000 + 187_500 / 2000
    assert found["training_seconds"] == pytest.approx(start + 3 * epoch + 2 * test)
    assert found["training_bottleneck"] == "GPU"


@pytest.mark.parametrize(
    ("changes", "source", "bottleneck"),
    [
        ({"gpu_memory": 1.0}, "page cache", "input"),
        ({"gpu_memory": 1.0, "input_rate": 1e9, "gpu_rate": 1e3}, "page cache", "GPU"),
        ({"host_memory": 1.0, "gpu_memory": 1.0, "input_rate": 4e3}, "storage", "input"),
        ({"host_memory": 1.0, "gpu_memory": 1.0, "storage": 0.1}, "storage", "storage"),
        ({"gpus_per_host": 1, "input_rate": 1e9, "network": 10.0}, "page cache", "exchange"),
        ({"gpu_memory": 1e3, "sequential_rate": 10.0}, "GPU memory", "validation"),
    ],
)
def test_the_slowest_part_is_the_bottleneck(changes, source, bottleneck):
    found = estimate_training(replace(Plan(25_000, gpus=8), **changes))
    assert (found["source"], found["training_bottleneck"]) == (source, bottleneck)


@given(
    clips=st.integers(20_000, 10**7),
    gpus=st.sampled_from([1, 2, 8, 64]),
    rates=st.fixed_dictionaries(
        {
            "gpu_rate": st.floats(100, 1e5),
            "input_rate": st.floats(100, 1e6),
            "sequential_rate": st.floats(100, 1e6),
            "storage": st.floats(0.01, 100),
            "network": st.floats(1, 1000),
            "gpu_link": st.floats(1, 1000),
        }
    ),
    factor=st.floats(1, 100),
)
def test_a_faster_part_never_makes_training_longer(clips, gpus, rates, factor):
    before = Plan(clips, gpus, **rates)
    seconds = estimate_training(before)["training_seconds"]
    for name, rate in rates.items():
        faster = estimate_training(replace(before, **{name: factor * rate}))
        assert faster["training_seconds"] <= seconds * (1 + 1e-9), name


def test_the_command_prints_a_table_or_json_with_one_column_per_plan(capsys):
    arguments = ["--clips", "250000", "10000000", "--gpus", "8", "64", "--encoding", "int16"]
    assert plan.main(arguments) == 0
    assert {row.count("|") for row in capsys.readouterr().out.splitlines()} == {6}
    assert plan.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found)[1] == "250,000 clips, 64 GPUs"
    expected = estimate_training(Plan(250_000, 64, encoding="int16"))["training_seconds"]
    assert found["250,000 clips, 64 GPUs"]["training_seconds"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "12"], "--gpus 12: not a multiple of --gpus-per-host 8"),
        (["--seconds", "2"], "--seconds 2: shorter than a segment (2.68 s)"),
        (["--clips", "20"], "--gpu-batch-size 64: a step of 512 segments is larger than the"),
    ],
)
def test_numbers_that_do_not_fit_together_are_an_error_of_one_line(arguments, message, capsys):
    assert plan.main(arguments) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert not output.out


def test_the_table_of_the_scaling_page_is_the_output_of_its_command(capsys):
    page = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text("utf-8")
    assert plan.main(["--clips", "250000", "10000000"]) == 0
    assert capsys.readouterr().out in page
