"""Train on several devices and hosts, simulated by processes and devices of one CPU."""

import csv
import os
import socket
import subprocess
import sys
import textwrap
import time

from conftest import ROOT

TRAIN = "import sys, train; sys.exit(train.main(sys.argv[1:]))"
# Without LLVM's expensive passes, XLA compiles faster, and the networks compute the same.
XLA_FLAGS = "--xla_llvm_disable_expensive_passes=true"
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(ROOT),
}
# With a higher learning rate, rounding differences grow tenfold from step to step.
OPTIONS = ("--block", "basic", "--init-features", "2", "--batch-size", "4", "--lr", "0.001")
OPTIONS += ("--weight-decay", "0.001", "--num-lr-decays", "1", "--max-epochs", "2")
LONG = ("--max-epochs", "500", "--patience", "500")


def start_training(data_dir, train_dir, *options, devices=1, program=TRAIN, **environment):
    """Start train.py on JAX."""
    folders = ("--data-dir", str(data_dir), "--train-dir", str(train_dir))
    jax = {
        "KERAS_BACKEND": "jax",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {XLA_FLAGS}",
    }
    command = [sys.executable, "-c", textwrap.dedent(program), *folders, *OPTIONS, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT | jax | environment, cwd=ROOT, **pipes)


def start_job(*runs, **more):
    """Start one process per run (data_dir, train_dir, *options), which train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more |= {
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"127.0.0.1:{port}",
        "KERAS_DISTRIBUTION_NUM_PROCESSES": str(len(runs)),
    }
    return [
        start_training(*run, "--distribute", KERAS_DISTRIBUTION_PROCESS_ID=str(process), **more)
        for process, run in enumerate(runs)
    ]


def finish(*trainings):
    """Wait until all processes have succeeded; return the messages of each."""
    written = [training.communicate(timeout=300) for training in trainings]
    said = [errors for _, errors in written]
    assert [training.returncode for training in trainings] == [0] * len(trainings), said
    assert [output for output, _ in written] == [""] * len(trainings)
    return said


def read_losses(train_dir):
    with open(train_dir / "0" / "training.csv") as file:
        rows = list(csv.DictReader(file))
    return [float(row[name]) for row in rows for name in ("loss", "val_loss", "val_roc_auc")]


def wait_for_epochs(train_dir, num_epochs, job):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        exists = (train_dir / "0" / "training.csv").exists()
        if exists and len(read_losses(train_dir)) // 3 >= num_epochs:
            return
        assert all(training.poll() is None for training in job)
        time.sleep(0.1)
    raise AssertionError(f"no {num_epochs} epochs in two minutes")
