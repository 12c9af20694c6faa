"""The benchmark: what it counts, and that its stages run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import benchmark
from model import NetworkConfig, build_network

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*options, backend="tensorflow"):
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmark.py"), *options],
        env=os.environ | {"KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_work_is_counted_as_by_hand():
    config = NetworkConfig("basic", False, num_tags=7, init_features=2)
    frames, width, flops, moved = 19683, 2, 2 * 19683 * 3 * 1 * 2, 59049 * 4
    forward, backward = 59049 + 2 * frames * width, 5 * frames * width + 2 * 59049
    moved += 4 * (forward + backward)
    for features in (2, 2, 4, 4, 4, 4, 4, 4, 8):
        flops += 2 * frames * 3 * width * features
        moved += 4 * (frames * width + 2 * frames * features)
        moved += 4 * (5 * frames * features + 2 * frames * width)
        frames, width = frames // 3, features
    flops += 2 * (8 * 8 + 8 * 7)
    network = build_network(config)
    assert benchmark.count_flops(network) == flops
    assert benchmark.count_bytes(network, True, 4) == moved


def test_a_call_is_timed_by_its_work():
    calls = []
    median, lowest, highest = benchmark.measure(lambda: calls.append(0), 3.0, 2)
    assert len(calls) > 4
    assert 0 < lowest <= median <= highest


@pytest.mark.slow
def test_stages_run_and_report(tiny_dataset, tmp_path):
    path = tmp_path / "figures.json"
    finished = run(
        "all", "--data-dir", str(tiny_dataset), "--init-features", "2", "--batch-size", "4",
        "--repeats", "1", "--num-workers", "1", "--json", str(path),
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(path.read_text())["figures"]
    assert {figure["stage"] for figure in figures} == set(benchmark.STAGES)
    assert all(figure["median"] > 0 for figure in figures)
    assert finished.stdout.splitlines()[1].startswith("stage")
    assert len(finished.stdout.splitlines()) == 2 + len(figures)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_sweep_runs_every_precision(tmp_path, backend):
    pytest.importorskip(backend)
    path = tmp_path / "figures.json"
    finished = run(
        "sweep", "--backend", backend, "--init-features", "2", "--batch-size", "4",
        "--repeats", "1", "--profile", "--json", str(path),
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(path.read_text())["figures"]
    trained = [figure["what"] for figure in figures if figure["stage"] == "train"]
    assert [what.split(":")[0] for what in trained] == [
        f"{backend}, {name}" for name in benchmark.PRECISIONS
    ]


def test_what_cannot_be_measured_is_said(tmp_path):
    finished = run("decode", "--data-dir", str(tmp_path / "nowhere"))
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1
    assert "nowhere: no dataset for decode" in finished.stderr
    assert run("sweep", "train").returncode == 2
