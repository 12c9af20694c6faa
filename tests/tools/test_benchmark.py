"""Figures of tools.benchmark, and short runs of its stages; no test depends on a speed."""

import json
import os
from types import SimpleNamespace

from model import build_network
from toolkit.models.config import NetworkConfig
from tools import benchmark

import pytest
from conftest import ROOT, run_python

SMALL = ("--block", "basic", "--init-features", "2", "--batch-size", "4", "--repeats", "1")
# Python imports sitecustomize from PYTHONPATH at start-up. This version hides TensorFlow.
SITECUSTOMIZE = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
def find_others(name, *arguments):
    return None if name.split(".")[0] == "tensorflow" else find_spec(name, *arguments)
PathFinder.find_spec = find_others
"""


@pytest.fixture(autouse=True)
def short_repeats(monkeypatch):
    monkeypatch.setattr(benchmark, "_REPEAT_SECONDS", 0)


def read_figures(path):
    return json.loads(path.read_text())["figures"]


def test_number_of_operations_equals_that_computed_by_hand():
    network = build_network(NetworkConfig("basic", False, num_tags=7, init_features=2))
    frames, width = 19683, 2
    flops = 2 * frames * 3 * 1 * 2
    for features in (2, 2, 4, 4, 4, 4, 4, 4, 8):
        flops += 2 * frames * 3 * width * features
        frames, width = frames // 3, features
    flops += 2 * (8 * 8 + 8 * 7)
    assert benchmark.count_flops(network) == flops


def test_a_figure_has_median_range_and_share_of_the_limit(monkeypatch):
    moments = iter([0, 1, 0, 4, 0, 2, 0, 1])  # start and end of the calls after the first
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: next(moments)))
    figure = benchmark.measure("train", "se", "segments/s", lambda: None, 8, repeats=3, limit=16)
    assert (figure.lowest, figure.median, figure.highest, figure.share) == (2, 4, 8, 0.25)


def test_decoding_and_reading_are_measured_and_written_as_json(tiny_dataset, tmp_path, capsys):
    path = tmp_path / "figures.json"
    arguments = ["decode", "input", "--data-dir", str(tiny_dataset)]
    assert benchmark.main([*arguments, *SMALL, "--json", str(path)]) == 0
    figures = read_figures(path)
    assert [(figure["stage"], figure["share"] is not None) for figure in figures] == [
        ("decode", False),
        *[("machine", False), ("input", True), ("input", True)] * 3,  # for each number of threads
    ]
    assert all(0 < figure["lowest"] <= figure["median"] <= figure["highest"] for figure in figures)
    printed = capsys.readouterr().out
    assert all(figure["what"] in printed for figure in figures)


@pytest.mark.slow
def test_a_failure_does_not_end_the_other_measurements(monkeypatch, tmp_path):
    def fail(*arguments):
        raise MemoryError("in a layer:\n\nout of memory")

    monkeypatch.setattr(benchmark, "_train_call", fail)
    path = tmp_path / "figures.json"
    arguments = ["train", "predict", *SMALL, "--jit", "off", "--json", str(path)]
    assert benchmark.main(arguments) == 1
    figures = {figure["stage"]: figure for figure in read_figures(path)}
    assert figures["train"]["error"] == "MemoryError: in a layer: out of memory"
    assert figures["predict"]["share"] > 0


def test_a_sweep_reports_processes_that_fail_and_continues(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "PRECISIONS", {"float8": ({}, ["--no-such-option"])})
    path = tmp_path / "figures.json"
    assert benchmark.main(["sweep", "--json", str(path)]) == 1
    assert [(figure["what"], figure["error"]) for figure in read_figures(path)] == [
        ("jax, float8", "the process ended with status 2"),
        ("torch, float8", "the process ended with status 2"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "--data-dir", "nowhere"], "--data-dir nowhere: no dataset for decode"),
        (["sweep", "train"], "sweep train: run sweep alone"),
    ],
)
def test_invalid_commands_are_an_error_of_one_line(arguments, message, capsys):
    assert benchmark.main(arguments) == 2
    output = capsys.readouterr().err
    assert message in output
    assert output.count("\n") == 1


@pytest.mark.slow
def test_all_stages_are_measured(tiny_dataset, tmp_path):
    path = tmp_path / "figures.json"
    arguments = ["all", "--data-dir", str(tiny_dataset), "--num-workers", "1"]
    assert benchmark.main([*arguments, *SMALL, "--json", str(path)]) == 0
    assert {figure["stage"] for figure in read_figures(path)} == set(benchmark.STAGES)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_sweep_measures_every_precision_without_tensorflow(tmp_path, backend):
    pytest.importorskip(backend)
    path = tmp_path / "figures.json"
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    command = ["-m", "tools.benchmark", "sweep", "--backend", backend, *SMALL, "--json", path]
    done = run_python(*command, timeout=500, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 0, done.stderr
    figures = [figure for figure in read_figures(path) if figure["stage"] in ("train", "predict")]
    whats = [figure["what"].split(", ")[0] for figure in figures]
    assert whats == [f"{each}: {backend}" for each in benchmark.PRECISIONS for _ in range(2)]
    assert all(figure["share"] > 0 for figure in figures)
