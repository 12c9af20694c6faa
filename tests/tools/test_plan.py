"""Tests of the cost model and its command."""

import itertools
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from toolkit.errors import UsageError
from tools.plan import (
    GRADIENT_BYTES,
    Plan,
    exchange_seconds,
    gpu_rate,
    reckon_build,
    reckon_training,
    step_times,
    turning_points,
)

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
FREE_EXCHANGE = {"network": 1e12, "gpu_link": 1e12, "latency_us": 0.0}


def run_plan(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tools.plan", *arguments], capture_output=True, text=True, cwd=ROOT
    )


# --- The closed form, by hand --------------------------------------------------------------------


def test_a_clip_of_29_s_is_ten_segments_and_a_track_of_four_minutes_89():
    assert Plan(stop=29.0).segments_a_clip == 10  # 639,450 samples / 59,049 = 10.8
    assert Plan(seconds=240.0, stop=240.0).segments_a_clip == 89  # 5,292,000: 89.6
    assert Plan(seconds=240.0, stop=29.0).segments_a_clip == 10


def test_build_by_hand():
    found = reckon_build(
        Plan(clips=1000, seconds=30.0, stop=29.0, kbit_s=80.0, decode_ms=50.0,
             cores=5, storage_rate=1.0)
    )  # fmt: skip
    assert found["audio_bytes"] == 1000 * 300_000
    assert found["shard_bytes_float32"] == 10_000 * 236_196
    assert found["shard_bytes_int16"] == 10_000 * 118_098
    assert found["build_core_seconds"] == 50
    assert found["build_seconds"] == 10  # 50 core seconds on 5 cores
    assert found["build_bottleneck"] == "decoding"
    # 29 of 30 s are read, all segments written: 0.29 + 2.36 GB at 1 GB/s.
    assert found["build_moved_bytes"] == pytest.approx(290e6 + 2361.96e6)
    assert found["build_full_cores"] == math.ceil(50 / 2.65196)
    slow = reckon_build(
        Plan(clips=1000, seconds=30.0, stop=29.0, kbit_s=80.0, decode_ms=50.0, cores=50,
             storage_rate=1.0)
    )  # fmt: skip
    assert slow["build_bottleneck"] == "storage"
    assert slow["build_seconds"] == pytest.approx(2.65196)


def test_a_gpu_is_bound_by_memory_in_bfloat16_and_by_arithmetic_in_plain_float32():
    # 118 MB at 3.35 TB/s are 35.2 us, 10.5 GFLOP at 67 TFLOP/s are 156.7 us; half of each rate.
    assert gpu_rate(Plan(precision="bfloat16")) == pytest.approx(0.5 * 3.35e12 / 118e6)
    assert gpu_rate(Plan(precision="float32")) == pytest.approx(0.5 * 67e12 / 10.5e9)
    assert gpu_rate(Plan(precision="tf32")) == pytest.approx(0.5 * 3.35e12 / 236e6)
    assert gpu_rate(Plan(gpu_rate=1234.0)) == 1234.0


def test_exchange_by_hand():
    assert exchange_seconds(Plan(gpus=1)) == 0
    # Four GPUs of a host: 2 x 3/4 of the gradients over their link, and 45 exchanges of 4 hops.
    four = Plan(gpus=4, gpu_link=100.0, latency_us=10.0)
    assert exchange_seconds(four) == pytest.approx(1.5 * GRADIENT_BYTES / 100e9 + 45 * 4 * 10e-6)
    # Sixteen GPUs of two hosts: 2 x 15/16 through 80 Gbit/s, 10 GB/s.
    sixteen = Plan(gpus=16, gpus_per_host=8, network=80.0, latency_us=0.0)
    assert exchange_seconds(sixteen) == pytest.approx(1.875 * GRADIENT_BYTES / 10e9)


def test_a_step_is_its_longest_part():
    # 800 segments at 4,000/s a host are 0.2 s, 100 a GPU at 1,000/s 0.1 s.
    its = Plan(
        clips=25_000, gpus=8, batch_size=800, gpu_rate=1000.0, input_rate=4000.0, gpu_memory=1.0
    )
    parts = step_times(its)
    assert parts["GPU"] == pytest.approx(0.1)
    assert parts["input"] == pytest.approx(0.2)
    assert parts["PCIe"] == pytest.approx(100 * 236_196 / 50e9)
    assert parts["storage"] == 0  # 49 GB stay in memory
    found = reckon_training(its)
    assert found["step_seconds"] == pytest.approx(0.2)
    assert found["bottleneck"] == "input"
    assert found["gpu_busy"] == pytest.approx(0.5)
    assert found["train_rate"] == pytest.approx(4000)
    assert found["steps"] == 187_500 // 800


def test_storage_holds_up_what_memory_does_not_hold():
    its = Plan(clips=250_000, gpus=1, batch_size=100, storage_rate=0.1, host_memory=100.0)
    assert step_times(its)["storage"] == pytest.approx(100 * 236_196 / 0.1e9)
    assert reckon_training(its)["bottleneck"] == "storage"
    assert step_times(replace(its, encoding="int16"))["storage"] == pytest.approx(
        100 * 118_098 / 0.1e9
    )
    assert step_times(replace(its, host_memory=1000.0))["storage"] == 0


def test_segments_on_the_device_cost_no_reading():
    # 158,332 segments are 37.4 GB: they fit 0.45 of 84 GB, not of 83, and only of one host.
    on_device = Plan(gpus=1)
    assert reckon_training(on_device)["segments_from"] == "GPU memory"
    assert step_times(on_device)["input"] == 0
    assert reckon_training(replace(on_device, gpu_memory=83.0))["segments_from"] == "page cache"
    two_hosts = replace(on_device, gpus=2, gpus_per_host=1)
    assert reckon_training(two_hosts)["segments_from"] == "page cache"


def test_an_epoch_and_the_whole_by_hand():
    its = Plan(
        clips=25_000, gpus=1, gpu_rate=1000.0, input_rate=2000.0, sequential_rate=2500.0, epochs=3,
        stages=2, gpu_memory=100.0,
    )  # fmt: skip
    found = reckon_training(its)
    # 20,000 segments of validation: read in 8 s, predicted at three times the rate, 2,000 scores.
    validation = 8 + 20_000 / 3000 + 2000 * 2e-5
    assert found["epoch_validation_seconds"] == pytest.approx(validation)
    steps = 187_500 // 64 * 64 / 1000
    assert found["epoch_seconds"] == pytest.approx(steps + validation + 1.4)
    testing = 42_500 / 2500 + 42_500 / 3000 + 4250 * 2e-5
    start = 187_500 / 900_000 + 187_500 / 2000
    assert found["total_seconds"] == pytest.approx(start + 3 * found["epoch_seconds"] + 2 * testing)
    assert found["bottleneck"] == "GPU"


def test_turning_points_are_where_the_bottleneck_changes():
    its = Plan(clips=250_000, gpus=16, gpu_rate=5000.0, host_memory=1e6, input_rate=1e9)
    batch = turning_points(its)["batch_a_gpu_that_outweighs_exchange"]
    for factor, expected in ((0.8, "exchange"), (1.25, "GPU")):
        moved = replace(its, batch_size=16 * round(factor * batch))
        assert reckon_training(moved)["bottleneck"] == expected

    fed = replace(its, gpus=4, input_rate=10_000.0, **FREE_EXCHANGE)
    assert turning_points(fed)["gpus_a_host_feeds"] == 2
    assert reckon_training(replace(fed, gpus=1))["bottleneck"] == "GPU"
    assert reckon_training(fed)["bottleneck"] == "input"

    stored = replace(its, gpus=8, host_memory=1.0, storage_rate=5.0, **FREE_EXCHANGE)
    assert turning_points(stored)["gpus_the_storage_feeds"] == pytest.approx(5e9 / 236_196 / 5000)
    assert reckon_training(replace(stored, gpus=4))["bottleneck"] == "GPU"
    assert reckon_training(stored)["bottleneck"] == "storage"


def test_validation_is_shared_out_by_shards():
    its = Plan(
        clips=10_000, gpus=1, gpus_per_host=1, gpu_rate=1e9, host_memory=1e6,
        sequential_rate=5000.0, **FREE_EXCHANGE,
    )  # fmt: skip
    # 8,000 segments in 8 shards: read in 1.6 s by one host, by 8 in an eighth, by 16 no faster.
    assert turning_points(its)["hosts_with_a_shard_of_validation"] == 8
    for gpus, reading in ((1, 1.6), (8, 0.2), (16, 0.2)):
        found = reckon_training(replace(its, gpus=gpus))["epoch_validation_seconds"]
        assert found == pytest.approx(reading + 800 * 2e-5, rel=1e-3)


# --- What must hold for any numbers --------------------------------------------------------------

PLANS = st.builds(
    Plan,
    clips=st.integers(20_000, 10**7),
    gpus=st.sampled_from([1, 2, 4, 8, 16, 64, 128]),
    batch_size=st.sampled_from([None, 1024, 4096]),
    encoding=st.sampled_from(["float32", "int16"]),
    precision=st.sampled_from(["float32", "tf32", "bfloat16"]),
    gpu_rate=st.none() | st.floats(100, 1e5),
    input_rate=st.floats(100, 1e6),
    storage_rate=st.floats(0.01, 100),
    network=st.floats(1, 1000),
    pcie=st.floats(0.1, 100),
    overlap=st.floats(0, 0.9),
)


@given(PLANS, st.floats(1, 100))
def test_a_faster_part_never_makes_training_longer(its, factor):
    before = reckon_training(its)
    for name in (
        "input_rate", "sequential_rate", "storage_rate", "network", "gpu_link", "pcie",
        "gpu_share", "gpu_bandwidth",
    ):  # fmt: skip
        faster = reckon_training(replace(its, **{name: getattr(its, name) * factor}))
        assert faster["total_seconds"] <= before["total_seconds"] * (1 + 1e-9), name
    # To fill a memory may cost a short training more than it saves: an epoch is never longer.
    for name in ("gpu_memory", "host_memory"):
        larger = reckon_training(replace(its, **{name: getattr(its, name) * factor}))
        assert larger["epoch_seconds"] <= before["epoch_seconds"] * (1 + 1e-9), name


@given(PLANS)
def test_more_gpus_never_slow_the_steps_where_exchange_is_free(its):
    rates = []
    for gpus in (1, 2, 4, 8, 16, 64):
        more = replace(its, gpus=gpus, batch_size=64 * gpus, gpu_memory=1e-9, **FREE_EXCHANGE)
        rates.append(reckon_training(more)["train_rate"])
    assert all(later >= earlier * (1 - 1e-9) for earlier, later in itertools.pairwise(rates))


def test_a_slow_network_makes_two_hosts_slower_than_one():
    one = reckon_training(Plan(gpus=8, batch_size=512))
    two = reckon_training(Plan(gpus=16, batch_size=1024, input_rate=1e9))
    assert two["train_rate"] < one["train_rate"]
    assert two["bottleneck"] == "exchange"


@given(PLANS)
def test_more_clips_never_take_less(its):
    more = replace(its, clips=2 * its.clips, gpu_memory=1e-9)
    its = replace(its, gpu_memory=1e-9)
    assert reckon_training(more)["total_seconds"] > reckon_training(its)["total_seconds"]
    assert reckon_build(more)["build_seconds"] > reckon_build(its)["build_seconds"]


@given(PLANS)
def test_parts_of_the_rate_agree(its):
    found = reckon_training(its)
    assert 0 < found["gpu_busy"] <= 1
    assert found["train_rate"] <= its.gpus * gpu_rate(its) * (1 + 1e-9)
    assert found["epoch_seconds"] >= found["steps"] * found["step_seconds"]


# --- The command ---------------------------------------------------------------------------------


def test_json_says_every_quantity():
    done = run_plan("--clips", "250000", "--gpus", "8", "64", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == ["250,000 clips on 8 GPUs", "250,000 clips on 64 GPUs"]
    assert found["250,000 clips on 64 GPUs"]["hosts"] == 8
    expected = reckon_training(Plan(clips=250_000, gpus=8))
    eight = found["250,000 clips on 8 GPUs"]
    assert eight["total_seconds"] == pytest.approx(expected["total_seconds"])


def test_a_measured_rate_replaces_the_guess():
    done = run_plan("--gpus", "1", "--gpu-rate", "5000", "10000", "--json")
    slow, fast = json.loads(done.stdout).values()
    assert slow["epoch_steps_seconds"] == pytest.approx(2 * fast["epoch_steps_seconds"])


def test_tables_are_markdown_of_equal_columns():
    done = run_plan("--dataset", "magnatagatune", "jamendo")
    assert done.returncode == 0, done.stderr
    tables = [table.splitlines() for table in done.stdout.strip().split("\n\n")]
    assert [table[0].split("|")[1].strip() for table in tables] == [
        "building", "training", "where it turns",
    ]  # fmt: skip
    for table in tables:
        assert {row.count("|") for row in table} == {4}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "12"], "--gpus 12: no multiple of --gpus-per-host 8"),
        (["--batch-size", "23"], "--batch-size 23: cannot be shared out evenly among 8 GPUs"),
        (["--stop", "2"], "--stop 2: less than one segment of 2.68 s"),
        (["--clips", "20"], "--batch-size 512: more than the 150 training segments"),
    ],
)
def test_numbers_that_do_not_fit_are_one_line(arguments, said):
    done = run_plan(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"plan.py: error: {said}")
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_calibration_refuses_a_batch_that_no_epoch_fills(tiny_dataset):
    done = run_plan("calibrate", "--data-dir", str(tiny_dataset), "--batch-size", "999")
    assert done.returncode == 2
    assert "--batch-size 999: more than the 21 training segments" in done.stderr


def test_gpus_must_share_batches_in_python_too():
    with pytest.raises(UsageError):
        Plan(gpus=8, batch_size=12)


@pytest.mark.slow
def test_the_figure_is_drawn(tmp_path):
    done = run_plan("figure", "--out", str(tmp_path / "scaling.png"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_tables_of_the_document_are_the_commands_output():
    text = (ROOT / "docs/scaling.md").read_text()
    commands = re.findall(r"```sh\n(python plan\.py[^\n]*)\n```\n(.*?)(?=\n```|\n#|\Z)", text, re.S)
    checked = 0
    for command, rest in commands:
        arguments = command.split()[2:]
        if arguments[:1] in (["calibrate"], ["figure"]):
            continue
        printed = run_plan(*arguments).stdout
        tables = re.findall(r"(?:^\|.*\n?)+", rest, re.M)
        assert tables, command
        for table in tables:
            assert table.strip() in printed, command
            checked += 1
    assert checked >= 8
