"""Trainings that are killed or fail to write can be resumed and give the same weights."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import train
from toolkit.models import checkpoints

import numpy as np
import pytest
from conftest import ROOT
from training_runs import (
    TWO_STAGES,
    arguments,
    assert_same_runs,
    assert_same_weights,
    history_of,
)


class TrainingProcess:
    """A training in its own process, whose messages are read as they appear."""

    def __init__(self, *options):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *options],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.messages = ""

    def read_until(self, words):
        """Read messages until these words appear, for at most two minutes."""
        deadline = time.monotonic() + 120
        while words not in self.messages:
            character = self.process.stderr.read(1)
            assert character and time.monotonic() < deadline, self.messages
            self.messages += character

    def end(self, signal_number=None):
        """Send a signal, wait for the end, and return the exit status."""
        if signal_number is not None:
            self.process.send_signal(signal_number)
        output, messages = self.process.communicate(timeout=120)
        self.messages += messages
        assert output == ""
        return self.process.returncode


FAILING = [("ckpt-e000", 0), ("resume.keras", 0), ("ckpt-e001", 1), ("resume.keras", 1)]
FAILING += [("training.csv", 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("failing", "epoch"), FAILING)
def test_a_write_that_fails_loses_nothing(
    tiny_dataset, trained, tmp_path, capsys, monkeypatch, failing, epoch
):
    """The disk is full when a file of an epoch is written; the epoch is the best so far."""
    log = tmp_path / "log" / "0"
    options = arguments(tiny_dataset, tmp_path / "log", *TWO_STAGES)
    rename = os.replace
    num_renamed = Counter()

    def replace(source, target):
        name = Path(target).name
        if name.startswith(failing) and num_renamed[name] == (0 if "ckpt" in name else epoch):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        num_renamed[name] += 1
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        assert train.main(options) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {log / failing}" in last and last.endswith(": No space left on device")
    for path in log.glob("*.keras"):
        checkpoints.load(path)
        if path.name.startswith("ckpt"):
            assert_same_weights(path, trained / "0" / path.name)
    assert not [path for path in log.iterdir() if ".tmp" in path.name]
    assert train.main(options) == 0
    for path in (trained / "0").glob("ckpt-*"):
        assert_same_weights(log / path.name, path)
    assert_same_runs(tmp_path / "log", trained)


@pytest.mark.slow
def test_runs_killed_at_random_moments_resume_to_the_same_weights(tiny_dataset, trained, tmp_path):
    """The environment variable TRAINING_KILLS sets the number of kills."""
    options = arguments(tiny_dataset, tmp_path / "log", *TWO_STAGES)
    random = np.random.default_rng(0)
    ends = Counter()
    for number in range(int(os.environ.get("TRAINING_KILLS", "4"))):
        if number % 4 == 0:
            shutil.rmtree(tmp_path / "log", ignore_errors=True)
        run = TrainingProcess(*options)
        run.read_until(" backend on ")
        time.sleep(random.uniform(0, 6))
        name = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT")[number % 4]
        status = run.end(signal.Signals[name])
        ends[name if status else "too late"] += 1
        assert status in (0, {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130}[name]), run.messages
        for path in (tmp_path / "log").rglob("*.keras"):
            if not path.name.startswith("."):
                checkpoints.load(path)
        for stage in ("0", "1"):
            for path in (tmp_path / "log" / stage).glob("ckpt-*"):
                assert_same_weights(path, trained / stage / path.name)
        if number % 4 == 3:
            assert train.main(options) == 0
            assert_same_runs(tmp_path / "log", trained)
    print(dict(ends))  # shown by pytest -rP


@pytest.mark.slow
def test_interrupted_runs_resume_to_the_same_weights(tiny_dataset, trained, tmp_path):
    """Interrupt with SIGTERM, SIGINT and SIGKILL within an epoch, then finish."""
    options = arguments(tiny_dataset, tmp_path / "log", *TWO_STAGES)
    log = tmp_path / "log"

    run = TrainingProcess(*options)
    run.read_until("stage 0: learning rate")
    assert run.end(signal.SIGTERM) == 143
    assert run.messages.splitlines()[-1].endswith(
        "train.py: error: stopped by SIGTERM: run the same command again"
    )
    assert not list(log.rglob("*.keras")), "no epoch was finished"

    run = TrainingProcess(*options)
    run.read_until("stage 0 epoch 0: loss")
    assert run.end(signal.SIGINT) == 130
    assert "stopped by SIGINT: run the same command again" in run.messages.splitlines()[-1]
    assert "Traceback" not in run.messages
    assert len(history_of(log / "0")) == 1

    run = TrainingProcess(*options)
    run.read_until("stage 0: learning rate 0.05, from epoch 1")
    run.read_until("stage 1 epoch 0: loss")
    assert run.end(signal.SIGKILL) == -signal.SIGKILL

    run = TrainingProcess(*options)
    assert run.end() == 0, run.messages
    assert "stage 0: already finished" in run.messages
    assert "stage 1: learning rate 0.01, from epoch 1" in run.messages
    assert run.messages.endswith("log: finished after 2 stages\n")

    assert_same_runs(log, trained)
