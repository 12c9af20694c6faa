"""tools.paper trains, tests and compares networks, and continues after an interruption."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import eval as eval_script
import train
from input_data import Dataset, Split, open_dataset, read_clips
from model import build_network
from toolkit.cli import read_options
from toolkit.data.annotations import MTT_TOP_TAGS
from toolkit.data.manifest import write_manifest
from toolkit.evaluation import score
from toolkit.models import checkpoints
from toolkit.models.checkpoints import Checkpoint
from toolkit.models.config import NetworkConfig
from toolkit.provenance import describe
from toolkit.reports import write_report
from toolkit.training.history import write_history
from toolkit.training.options import TrainingOptions
from toolkit.training.state import StageState
from tools import paper, paper_results

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from shards import remove_split

SMALL = ("--init-features", "2", "--alpha", "2", "--batch-size", "4")
SMALL += ("--num-lr-decays", "1", "--max-epochs", "1")
COLUMNS = ["network", "seed", "parameters", "roc_auc", "roc_auc_low", "roc_auc_high"]
COLUMNS += ["pr_auc", "pr_auc_low", "pr_auc_high", "stages", "epochs", "hours"]
COLUMNS += ["published_roc_auc"]


def train_nothing(words):
    """Write the files of one finished epoch with initial weights."""
    arguments = train.build_parser().parse_args(words)
    dataset, options = open_dataset(arguments.data_dir), read_options(TrainingOptions, arguments)
    config = replace(read_options(NetworkConfig, arguments), num_tags=len(dataset.tags))
    row = {"epoch": 0, "loss": 0.6, "val_loss": 0.5, "seconds": 2.0}
    state = StageState(0, 0.5, finished=True, history=[row])
    training = {"stage": 0, "state": asdict(state), "options": asdict(options)}
    stage = Path(arguments.train_dir) / "0"
    stage.mkdir(parents=True)
    network = Checkpoint(build_network(config), config, dataset.tags, training=training)
    checkpoints.save(stage / "ckpt-e000-l0.5000.keras", network)
    write_history(stage / "training.csv", [row])


def report_noise(words):
    """Write a report of random predictions."""
    arguments = eval_script.build_parser().parse_args(words)
    (model_path,), dataset = arguments.model_paths, open_dataset(arguments.data_dir)
    clips = list(read_clips(dataset.splits["test"].shards))
    labels = np.array([clip.labels for clip in clips])
    noise = np.random.default_rng(len(Path(model_path).parts[-3])).random(labels.shape)
    origin = describe(model_path, dataset.path, dataset.tags, len(clips))
    write_report(arguments.report, origin, dataset.tags, clips, noise, score(labels, noise))
    (Path(arguments.report) / "report.html").touch()


@pytest.fixture(scope="module")
def run(tiny_dataset):
    """Return a function that runs tools.paper with simulated commands, and returns these, too.

    A command that contains the word of `fails` is killed.
    """

    def call(out, networks, *options, fails=None):
        commands = []

        def run_command(words, stop, watch=None, **environment):
            script, *rest = map(str, words)
            commands.append((script, *rest))
            if any(fails and fails in word for word in rest):
                return -signal.SIGKILL
            if script == "train.py":
                train_nothing(rest)
            elif script == "eval.py":
                report_noise(rest)
            elif script == "-m":
                (out / rest[rest.index("--output") + 1]).touch()
            else:
                table = pd.DataFrame({"depth": [0]})
                table.attrs = describe(rest[0], tiny_dataset, ()).to_json()
                table.to_parquet(rest[rest.index("--out") + 1])
            return 0

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paper, "run_command", run_command)
            words = ["--data-dir", str(tiny_dataset), "--out", str(out), "--networks", *networks]
            return paper.main([*words, *SMALL, *options]), commands

    return call


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """Return the folder of a run of two networks, after a network that failed."""
    out = tmp_path_factory.mktemp("paper") / "out"
    status, commands = run(out, ["res1", "basic", "se-multi"], fails="res1")
    assert status == 1
    trained = ["train.py", "train.py", "eval.py", "train.py", "eval.py"]
    analysed = ["extract_excitations.py", "extract_excitations.py", "-m"]
    assert [command[0] for command in commands] == trained + analysed
    return out


def test_networks_are_scored_and_compared_although_one_failed(finished):
    table = pd.read_csv(finished / "table.csv")
    assert list(table.columns) == COLUMNS
    assert list(table["network"]) == ["basic", "se-multi"]
    assert list(table["parameters"]) == [792, 1900]
    assert table["published_roc_auc"].isna().all()  # another dataset than MagnaTagATune
    for row in table.itertuples():
        report = finished / row.network / "seed-0" / "report" / "metrics.json"
        assert row.roc_auc == pytest.approx(json.loads(report.read_text())["roc_auc"], abs=1e-6)
        assert row.roc_auc_low <= row.roc_auc <= row.roc_auc_high
    (difference,) = pd.read_csv(finished / "differences.csv").itertuples()
    assert (difference.network, difference.baseline) == ("basic", "se-multi")
    expected = table["roc_auc"][0] - table["roc_auc"][1]
    assert difference.roc_auc_difference == pytest.approx(expected, abs=2e-6)
    assert "| basic | 792 |" in (finished / "table.md").read_text()
    assert (finished / "auc.png").stat().st_size > 10_000
    assert (finished / "excitation_analysis.ipynb").exists()


def test_finished_networks_are_not_trained_again(run, finished, capsys):
    before = (finished / "table.csv").read_text()
    status, commands = run(finished, ["basic", "se-multi"])
    assert (status, commands) == (0, [])
    assert (finished / "table.csv").read_text() == before
    assert "basic, seed 0: finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("basic/seed-0/report/metrics.json", '{"roc_auc": 0.', ["eval.py"]),
        ("basic/seed-0/report/metrics.json", '{"checkpoint": "a/seed-0/1/ckpt"}', ["eval.py"]),
        ("basic/seed-0/report/predictions.csv", "clip_id,mp3_path,a\n1,b,0.3\n", ["eval.py"]),
        ("basic/seed-0/report/predictions.csv", None, ["eval.py"]),
        ("segments.parquet", "PAR1", ["extract_excitations.py", "-m"]),
        ("basic/seed-0", None, ["train.py", "eval.py"]),
    ],
)
def test_missing_damaged_and_other_results_are_computed_again(
    run, finished, tmp_path, name, content, expected
):
    out = tmp_path / "out"
    subprocess.run(["cp", "-a", str(finished), str(out)], check=True)  # with times
    path = out / name
    if path.is_dir():
        shutil.rmtree(path)
    elif content is None:
        path.unlink()
    else:
        path.write_text(content)
    before = (out / "table.csv").read_text()
    (out / ".segments.parquet.host.1.ab.tmp.parquet").touch()
    status, commands = run(out, ["basic", "se-multi"])
    assert (status, [command[0] for command in commands]) == (0, expected)
    assert (out / "table.csv").read_text() == before
    assert not list(out.glob(".*.tmp*"))


def test_a_missing_checkpoint_is_reported_and_the_others_go_on(run, finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "out")
    (checkpoint,) = out.glob("basic/seed-0/0/ckpt-*")
    shutil.copy(checkpoint, checkpoint.with_name("resume.keras"))
    checkpoint.unlink()
    assert run(out, ["basic", "se-multi"])[0] == 1
    said = "failed: basic, seed 0: .*/basic/seed-0/0: the best checkpoint .* is missing"
    assert re.search(said, capsys.readouterr().err)
    assert list(pd.read_csv(out / "table.csv")["network"]) == ["se-multi"]


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_dataset_without_a_split_is_refused_at_once(run, tmp_path, tiny_dataset, split, capsys):
    data_dir = shutil.copytree(tiny_dataset, tmp_path / "data")
    remove_split(data_dir, split)
    assert run(tmp_path / "out", ["basic"], "--data-dir", str(data_dir)) == (2, [])
    assert f"no {split} clips" in capsys.readouterr().err


def test_other_options_than_those_of_an_existing_network_are_refused(run, finished, capsys):
    assert run(finished, ["basic"], "--init-features", "3") == (2, [])
    said = capsys.readouterr().err
    assert "basic, seed 0: --init-features was 2, now 3" in said and "another --out" in said


def test_options_are_passed_to_train(run, tmp_path, capsys):
    options = ("--seeds", "5", "--mixed-precision")
    status, commands = run(tmp_path / "out", ["res"], *options, fails="res")
    assert (status, len(commands)) == (1, 1)
    assert " ".join(commands[0]).endswith(
        " --block res --no-multi --alpha 2.0 --init-features 2 --batch-size 4 --num-lr-decays 1"
        " --max-epochs 1 --seed 5 --mixed-precision"
    )
    said = capsys.readouterr().err
    assert "res, seed 5: to train" in said
    assert "res, seed 5: train.py: ended by SIGKILL, possibly out of memory" in said


def test_the_time_is_estimated_after_the_first_epoch(tmp_path, capsys):
    options = TrainingOptions(num_lr_decays=5, patience=2, max_epochs=100)
    job = paper_results.Job("se", 0, tmp_path, NetworkConfig(), options, False)
    estimate = paper.estimate_of(job)
    estimate()
    (tmp_path / "0").mkdir()
    write_history(tmp_path / "0" / "training.csv", [{"epoch": 0, "seconds": 3600.0}])
    estimate()
    estimate()
    expected = "1 h per epoch: 20 h for 5 stages of 4 epochs, at most 500 h for 100"
    assert capsys.readouterr().err == f"se, seed 0: {expected}\n"


@pytest.mark.parametrize(("skipped", "expected"), [("699c", True), ("69", False), ("6999c", False)])
def test_published_values_belong_to_the_listed_clips_of_magnatagatune(tmp_path, skipped, expected):
    clips = {"train": 15_247, "val": 1_528, "test": 4_332}
    splits = {name: {"clips": num, "segments": 0, "shards": []} for name, num in clips.items()}
    (tmp_path / "tfrecord").mkdir()
    rows = [{"clip_id": "1", "mp3_path": f"{folder}/a.mp3", "reason": ""} for folder in skipped]
    content = {"tags": list(MTT_TOP_TAGS), "sample_rate": 22050, "num_samples": 59049}
    write_manifest(tmp_path / "tfrecord", content | {"splits": splits, "skipped": rows})
    splits = {name: Split([], num) for name, num in clips.items()}
    assert paper.is_magnatagatune(Dataset(tmp_path, MTT_TOP_TAGS, 22050, 59049, splits)) == expected
    other = tuple(reversed(MTT_TOP_TAGS[1:]))
    assert not paper.is_magnatagatune(Dataset(tmp_path, other, 22050, 59049, splits))


def test_several_seeds_are_shown_by_mean_and_range():
    rows = pd.DataFrame({"network": "se", "seed": [0, 1], "roc_auc": [0.75, 0.85]})
    assert paper_results.summary(rows, "roc_auc", True)[-1] == "0.8000 (0.7500–0.8500)"
    # The other seed failed.
    assert paper_results.summary(rows[:1], "roc_auc", True)[-1] == "0.7500 (0.7500–0.7500)"
    nothing = rows.assign(roc_auc=np.nan)  # no tag has a score
    assert paper_results.summary(nothing, "roc_auc", True)[-1] == "–"
    assert paper_results.draw_scores(rows, True, "data").startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_that_is_killed_twice_has_the_result_of_an_uninterrupted_one(tiny_dataset, tmp_path):
    def start(out):
        command = [sys.executable, "-m", "tools.paper", "--data-dir", str(tiny_dataset)]
        command += ["--out", str(out), "--networks", "basic", "basic-multi", *SMALL]
        return subprocess.Popen(
            [*command, "--max-epochs", "3"], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )

    def kill_when(out, network, number):
        """Kill the run after the first epoch of a network."""
        process = start(out)
        deadline = time.monotonic() + 300
        while not (out / network / "seed-0" / "0" / "training.csv").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(process.pid, number)
        assert "basic, seed 0: " in process.communicate(timeout=60)[1]
        assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 143)

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill_when(killed, "basic", signal.SIGKILL)
    kill_when(killed, "basic-multi", signal.SIGTERM)
    said = [start(out).communicate(timeout=600)[1] for out in (killed, whole)]
    assert "basic, seed 0: finished" in said[0]
    tables = [pd.read_csv(out / "table.csv").drop(columns="hours") for out in (killed, whole)]
    pd.testing.assert_frame_equal(*tables)
    predictions = "basic-multi/seed-0/report/predictions.csv"
    assert (killed / predictions).read_text() == (whole / predictions).read_text()
