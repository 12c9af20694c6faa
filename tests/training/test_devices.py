"""Training on several devices and hosts, simulated on one CPU: equal losses, lost hosts."""

import csv
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import build_mtt

import pytest
from conftest import write_dataset
from training_runs import validation_loss_of

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "import sys, train; sys.exit(train.main(sys.argv[1:]))"
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(ROOT),
    # Cache the compiled network, which some thirty processes use.
    "JAX_COMPILATION_CACHE_DIR": tempfile.mkdtemp(prefix="jax-"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
OPTIONS = (
    "--block", "se", "--init-features", "2", "--alpha", "2", "--batch-size", "4",
    "--weight-decay", "0.001", "--num-lr-decays", "1", "--max-epochs", "2",
)  # fmt: skip
LONG = ("--max-epochs", "500", "--patience", "500")


def start_training(data_dir, train_dir, *options, devices=1, program=TRAIN, **environment):
    """Start train.py on JAX."""
    folders = ("--data-dir", str(data_dir), "--train-dir", str(train_dir))
    jax = {
        "KERAS_BACKEND": "jax",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *folders, *OPTIONS, *options],
        env=ENVIRONMENT | jax | environment, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def start_job(*runs, **more):
    """Start one process per run (data_dir, train_dir, *options), which train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start_training(
            run[0], run[1], "--distribute", *run[2:],
            KERAS_DISTRIBUTION_JOB_ADDRESSES=f"127.0.0.1:{port}",
            KERAS_DISTRIBUTION_NUM_PROCESSES=str(len(runs)),
            KERAS_DISTRIBUTION_PROCESS_ID=str(process), **more,
        )
        for process, run in enumerate(runs)
    ]  # fmt: skip


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


@pytest.mark.slow
def test_one_process_two_devices_and_two_processes_have_equal_losses(tiny_dataset, tmp_path):
    pytest.importorskip("jax")
    finish(start_training(tiny_dataset, tmp_path / "alone"))
    (said,) = finish(start_training(tiny_dataset, tmp_path / "devices", "--distribute", devices=2))
    assert "2 devices in 1 process," in said
    cached = ("--distribute", "--device-cache", "on")
    finish(start_training(tiny_dataset, tmp_path / "cached", *cached, devices=2))
    run = (tiny_dataset, tmp_path / "processes")
    first, second = finish(*start_job(run, run))
    assert "2 devices in 2 processes," in first
    assert second == ""  # only the first one prints messages
    both = (tiny_dataset, tmp_path / "both")
    first, _ = finish(*start_job(both, both, devices=2))
    assert "4 devices in 2 processes," in first
    # A second stage, in the folder of a finished job.
    second_stage = (*run, "--num-lr-decays", "2")
    first, _ = finish(*start_job(second_stage, second_stage))
    assert "stage 0: already finished" in first and "stage 1: best checkpoint on test" in first
    expected = read_losses(tmp_path / "alone")
    for name in ("alone", "devices", "cached", "processes", "both"):
        losses = read_losses(tmp_path / name)
        assert losses[:2] == pytest.approx(expected[:2], abs=1e-5), name
        # In later epochs, rounding differences grow.
        assert losses[3:5] == pytest.approx(expected[3:5], abs=1e-3), name
        last = tmp_path / name / "0" / "resume.keras"
        with_l2 = validation_loss_of(last, tiny_dataset, 0.001)
        assert losses[4] == pytest.approx(with_l2, abs=1e-5), name
        files = sorted(path.name for path in (tmp_path / name / "0").iterdir())
        assert [path for path in files if not path.startswith(("ckpt", "events"))] == [
            "resume.keras", "test.json", "training.csv",
        ]  # fmt: skip
        assert len([path for path in files if path.startswith("events")]) == 1


@pytest.mark.slow
def test_validation_segments_may_be_fewer_than_a_batch(tiny_dataset, tmp_path):
    pytest.importorskip("jax")
    options = ("--distribute", "--batch-size", "12", "--max-epochs", "1")
    finish(start_training(tiny_dataset, tmp_path / "log", *options, devices=2))
    assert len(read_losses(tmp_path / "log")) == 3


@pytest.mark.slow
def test_invalid_environment_and_options_are_refused(tiny_dataset, tmp_path):
    pytest.importorskip("jax")
    two = {"KERAS_DISTRIBUTION_NUM_PROCESSES": "2"}
    for environment, options, expected in (
        ({"KERAS_DISTRIBUTION_NUM_PROCESSES": "two"}, (), "NUM_PROCESSES=two: expected an integer"),
        (
            two | {"KERAS_DISTRIBUTION_PROCESS_ID": "2"}, (),
            "PROCESS_ID=2: expected 0 to 1",
        ),
        (
            two | {"KERAS_DISTRIBUTION_PROCESS_ID": "0"}, (),
            "JOB_ADDRESSES=: expected host:port of the first process",
        ),
        (
            two | {"KERAS_DISTRIBUTION_PROCESS_ID": "0", "KERAS_BACKEND": "tensorflow"}, (),
            "several hosts need KERAS_BACKEND=jax",
        ),
        (
            {"KERAS_DISTRIBUTION_JOB_ADDRESSES": "node1:9331"}, (),
            "NUM_PROCESSES=: expected the number of processes that train together",
        ),
        (two, (), "PROCESS_ID=: expected the number of this process"),
        ({"KERAS_BACKEND": "torch"}, (), "--distribute: needs KERAS_BACKEND=jax"),
        (
            {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, (),
            "--batch-size 4: cannot be divided evenly among 3 devices: use 3 or 6",
        ),
        ({}, ("--jit", "off"), "--jit off: --distribute with JAX needs a compiled network"),
    ):  # fmt: skip
        training = start_training(
            tiny_dataset, tmp_path / "log", "--distribute", *options, **environment
        )
        said = training.communicate(timeout=120)[1]
        assert training.returncode == 2, said
        assert expected in said.splitlines()[-1], said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "signal_number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)]
)
def test_a_lost_host_ends_the_others_with_an_error_and_the_job_resumes(
    tiny_dataset, tmp_path, victim, signal_number
):
    """SIGSTOP leaves connections open, like the loss of power or network."""
    pytest.importorskip("jax")
    log = tmp_path / "log"
    job = start_job(*[(tiny_dataset, log, *LONG)] * 2)
    try:
        wait_for_epochs(log, 2, job)
        job[victim].send_signal(signal_number)
        started = time.monotonic()
        said = job[1 - victim].communicate(timeout=100)[1]
        assert time.monotonic() - started < 60
    finally:
        for training in job:
            training.kill()
            training.wait()
    assert job[1 - victim].returncode not in (0, None)
    (line,) = [line for line in said.splitlines() if line.startswith("-c: error: ")]
    assert "another host was lost" in line
    assert "run the same command on all hosts to resume from the last finished epoch" in line

    num_finished = len(read_losses(log)) // 3
    run = (tiny_dataset, log, "--max-epochs", str(num_finished + 2), "--patience", "500")
    first, _ = finish(*start_job(run, run))
    # The job may have stopped after it wrote resume.keras and before training.csv.
    starts = [f"from epoch {num_finished + more}\n" in first for more in (0, 1)]
    assert any(starts), first
    assert len(read_losses(log)) // 3 == num_finished + 2


@pytest.mark.slow
def test_a_job_stopped_by_sigterm_resumes(tiny_dataset, tmp_path):
    pytest.importorskip("jax")
    log = tmp_path / "log"
    job = start_job(*[(tiny_dataset, log, *LONG)] * 2)
    wait_for_epochs(log, 1, job)
    for training in job:
        training.send_signal(signal.SIGTERM)
    said = [training.communicate(timeout=60)[1] for training in job]
    # The second process may be waiting for the first one when the first one ends.
    assert job[0].returncode == 143 and job[1].returncode in (143, 1, 134), said
    run = (tiny_dataset, log, "--max-epochs", str(len(read_losses(log)) // 3 + 1))
    first, _ = finish(*start_job(run, run))
    assert "from epoch" in first


@pytest.mark.slow
def test_hosts_that_differ_are_refused(tiny_dataset, tmp_path, tmp_path_factory):
    pytest.importorskip("jax")
    other = write_dataset(tmp_path_factory.mktemp("other"))
    build_mtt.build(other, num_audios_per_shard=6, num_workers=1)
    log = tmp_path / "log"
    for first, second, expected in (
        ((tiny_dataset, log), (other, log), "not the same on all hosts: use the same dataset"),
        (
            (tiny_dataset, log, "--lr", "0.01"), (tiny_dataset, log, "--lr", "0.02"),
            "options: not the same on all hosts: run the same command",
        ),
        (
            (tiny_dataset, tmp_path / "here"), (tiny_dataset, tmp_path / "there"),
            "not the same on all hosts: use a folder",
        ),
    ):  # fmt: skip
        for training, run in zip(start_job(first, second), (first, second), strict=True):
            said = training.communicate(timeout=200)[1]
            assert training.returncode == 2, said
            assert expected in said, said
            assert "options: " in said or f"{run[0]}: " in said or f"{run[1]}: " in said


@pytest.mark.slow
def test_a_bug_in_one_process_ends_the_others(tiny_dataset, tmp_path):
    pytest.importorskip("jax")
    program = """
        import os, sys
        import train
        if os.environ["KERAS_DISTRIBUTION_PROCESS_ID"] == "1":
            def broken(*_):
                raise ValueError("a bug")
            train.validate = broken
        sys.exit(train.main(sys.argv[1:]))
    """
    job = start_job(*[(tiny_dataset, tmp_path)] * 2, program=program)
    said = [training.communicate(timeout=120)[1] for training in job]
    assert all(training.returncode not in (0, None) for training in job)
    assert "ValueError: a bug" in said[1]
    assert "another host was lost" in said[0]


def test_each_process_takes_all_devices_of_its_host_under_slurm(tiny_dataset, tmp_path):
    pytest.importorskip("jax")
    program = """
        import sys
        import jax, train
        def initialize(*_, **options):
            sys.exit(options["cluster_detection_method"])
        jax.distributed.initialize = initialize
        train.main(sys.argv[1:])
    """
    slurm = {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    }  # fmt: skip
    job = start_job(*[(tiny_dataset, tmp_path)] * 2, program=program, **slurm)
    for training in job:
        # By default, JAX would use one device per process.
        assert training.communicate(timeout=120)[1].splitlines()[-1] == "deactivate"


@pytest.mark.slow
def test_two_devices_of_tensorflow_train_as_one(tiny_dataset, tmp_path):
    pytest.importorskip("tensorflow")
    program = """
        import sys
        import tensorflow as tf
        cpu = tf.config.list_physical_devices("CPU")[0]
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
        import train
        sys.exit(train.main(sys.argv[1:]))
    """
    # Dropout masks differ between devices. Compiled, one device would round differently, by up to
    # 1e-3 on some processors.
    options = ("--dropout", "0", "--jit", "off")
    for name, distribute in (("one", ()), ("two", ("--distribute",))):
        (said,) = finish(
            start_training(
                tiny_dataset, tmp_path / name, *options, *distribute, program=program,
                KERAS_BACKEND="tensorflow",
            )
        )  # fmt: skip
        assert ("2 devices in 1 process," in said) == (name == "two")
    one, two = (read_losses(tmp_path / name) for name in ("one", "two"))
    assert two[:2] == pytest.approx(one[:2], abs=1e-3)
    last = tmp_path / "two" / "0" / "resume.keras"
    assert two[4] == pytest.approx(validation_loss_of(last, tiny_dataset, 0.001), abs=1e-5)
