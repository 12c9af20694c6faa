"""The benchmark: what it counts, that its stages run, and that what fails of them is said."""

import json
import os
import subprocess
import sys
from pathlib import Path

from model import NetworkConfig, build_network
from toolkit.training.options import TrainingOptions
from tools import benchmark

import pytest

ROOT = Path(__file__).resolve().parents[2]


# Python runs this at its start from a folder in PYTHONPATH; it hides one library.
WITHOUT_TENSORFLOW = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
def find_others(name, *arguments):
    return None if name.split(".")[0] == "tensorflow" else find_spec(name, *arguments)
PathFinder.find_spec = find_others
"""


def run(*options, backend="tensorflow", **environment):
    return subprocess.run(
        [sys.executable, "-m", "tools.benchmark", *options],
        env=os.environ | {"KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def figure(stage, what, median, **options):
    return benchmark.Figure(stage, what, "", median, median, median, **options)


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


def test_the_floor_that_binds_is_the_longest():
    ceilings = [
        figure("machine", "matrix product, float32", 1000.0),
        figure("machine", "matrix product, bfloat16", 4000.0, precision="bfloat16"),
        figure("machine", "copy in memory", 50.0),
    ]
    trained = figure("train", "se", 2.0, flops=100.0, bytes=10.0, precision="bfloat16")
    benchmark.enter_floors(trained, ceilings)
    assert trained.floors == {"FLOP/s": 0.025, "B/s": 0.2}
    assert trained.reached == 0.4
    assert "5% FLOP/s, 40% B/s" in benchmark.format_table([*ceilings, trained])
    decoded = figure("decode", "av", 2.0)
    benchmark.enter_floors(decoded, ceilings)
    assert decoded.floors == {}
    assert decoded.reached is None


def test_backends_are_compared_where_both_were_measured():
    def trained(backend, batch_size, rate):
        setting = {"backend": backend, "batch_size": batch_size, "compiled": backend == "jax"}
        return figure("train", "", rate, setting=setting)

    figures = [trained("torch", 23, 4.0), trained("jax", 23, 10.0), trained("jax", 1024, 20.0)]
    assert benchmark.compare_backends([figure("machine", "", 1.0), *figures]) == [
        {"stage": "train", "batch_size": 23, "jax_over_torch": 2.5}
    ]


def test_what_fails_of_a_network_leaves_the_rest(monkeypatch):
    def fail(*arguments):
        raise MemoryError("in a layer:\n\n\x1b[1mout of memory\x1b[0m")

    monkeypatch.setattr(benchmark, "_SECONDS_A_REPEAT", 0)
    monkeypatch.setattr(benchmark, "_train_call", fail)
    predicted, failed = benchmark.measure_model(
        ["train", "predict"], 1, NetworkConfig("basic", init_features=2), 2, TrainingOptions()
    )
    assert predicted.stage == "predict"
    assert predicted.setting["batch_size"] == 2
    assert failed.stage == "train"
    assert "basic, 2 features, batch 2" in failed.what
    assert failed.reason == "MemoryError: in a layer: out of memory"


def test_what_fails_of_a_sweep_leaves_the_rest(monkeypatch):
    find_spec = benchmark.importlib.util.find_spec
    monkeypatch.setattr(
        benchmark.importlib.util,
        "find_spec",
        lambda name: find_spec("json") if name == "jax" else None,
    )
    monkeypatch.setattr(benchmark, "PRECISIONS", {"float8": ["--no-such-option"]})
    arguments = benchmark.build_parser().parse_args(["sweep"])
    failures = list(benchmark.measure_sweep(arguments, {}))
    assert [(failure.what, failure.reason) for failure in failures] == [
        ("jax, float8", "its process ended with status 2"),
        ("torch", "it is not installed"),
    ]


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
    imports, first_batch = (each["median"] for each in figures if each["stage"] == "start")
    assert imports < first_batch


@pytest.mark.slow
def test_growth_builds_trains_and_evaluates(tiny_dataset, tmp_path):
    path = tmp_path / "figures.json"
    finished = run(
        "growth", "--data-dir", str(tiny_dataset), "--clips", "48", "--repeats", "1",
        "--json", str(path),
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(path.read_text())["figures"]
    assert [(figure["what"], figure["unit"]) for figure in figures] == [
        (f"48 clips: {what}{memory}", unit)
        for what in ("build", "an epoch", "evaluation")
        for memory, unit in (("", "s"), (", memory", "MB"))
    ]
    assert all(figure["median"] > 0 for figure in figures)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_sweep_runs_every_precision_without_tensorflow(tmp_path, backend):
    pytest.importorskip(backend)
    path = tmp_path / "figures.json"
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TENSORFLOW)
    finished = run(
        "sweep", "--backend", backend, "--init-features", "2", "--batch-size", "4",
        "--repeats", "1", "--profile", "--json", str(path), PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    found = json.loads(path.read_text())
    assert found["machine"]["accelerator"] == "none"
    assert found["failures"] == []
    for stage in ("train", "predict"):
        of_stage = [figure for figure in found["figures"] if figure["stage"] == stage]
        assert [figure["setting"]["precision"] for figure in of_stage] == [*benchmark.PRECISIONS]
        for figure in of_stage:
            assert figure["what"].startswith(f"{backend}, {figure['setting']['precision']}: ")
            assert figure["reached"] == max(figure["floors"].values()) * figure["median"]
            assert bool(figure["profile"]) == (stage == "train")


def test_what_cannot_be_measured_is_said(tmp_path):
    finished = run("decode", "--data-dir", str(tmp_path / "nowhere"))
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1
    assert "nowhere: no dataset for decode" in finished.stderr
    assert run("sweep", "train").returncode == 2
    assert run("train", "--profile").returncode == 2


@pytest.mark.slow
def test_hosts_compares_processes_and_says_what_the_exchange_takes(tmp_path):
    pytest.importorskip("jax")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    path = tmp_path / "figures.json"
    finished = run(
        "hosts", "--block", "basic", "--init-features", "2", "--batch-size", "4", "--repeats", "1",
        "--json", str(path),
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(path.read_text())["figures"]
    assert [figure["what"] for figure in figures] == [
        "1 process on 1 core", "1 process on 2 cores", "2 processes of 1 core",
        "2 processes of 1 core: gradients exchanged",
    ]  # fmt: skip
    assert all(figure["median"] > 0 for figure in figures)
