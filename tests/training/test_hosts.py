"""Training on several hosts, simulated on one CPU: hosts that are lost, stopped, or differ."""

import signal
import time

import build_mtt
import train
from toolkit.training import hosts

import pytest
from conftest import write_dataset
from training_jobs import (
    LONG,
    OPTIONS,
    finish,
    read_losses,
    start_job,
    start_training,
    wait_for_epochs,
)

TWO = {"KERAS_DISTRIBUTION_NUM_PROCESSES": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"KERAS_DISTRIBUTION_NUM_PROCESSES": "two"}, "NUM_PROCESSES=two: expected an integer"),
        (
            {"KERAS_DISTRIBUTION_JOB_ADDRESSES": "node1:9331"},
            "NUM_PROCESSES=: expected the number of processes that train together",
        ),
        (TWO, "PROCESS_ID=: expected the number of this process"),
        (TWO | {"KERAS_DISTRIBUTION_PROCESS_ID": "2"}, "PROCESS_ID=2: expected 0 to 1"),
    ],
)
def test_invalid_environment_is_refused(
    tiny_dataset, tmp_path, monkeypatch, capsys, environment, expected
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    folders = ("--data-dir", str(tiny_dataset), "--train-dir", str(tmp_path))
    assert train.main([*folders, *OPTIONS, "--distribute"]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.slow
def test_environment_and_options_that_the_backend_does_not_support_are_refused(
    tiny_dataset, tmp_path
):
    pytest.importorskip("jax")
    first = TWO | {"KERAS_DISTRIBUTION_PROCESS_ID": "0"}
    three = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    refused = (
        (first, (), "JOB_ADDRESSES=: expected host:port of the first process"),
        (first | {"KERAS_BACKEND": "tensorflow"}, (), "several hosts need KERAS_BACKEND=jax"),
        ({"KERAS_BACKEND": "torch"}, (), "--distribute: needs KERAS_BACKEND=jax"),
        (three, (), "--batch-size 4: cannot be divided evenly among 3 devices: use 3 or 6"),
        ({}, ("--jit", "off"), "--jit off: --distribute with JAX needs a compiled network"),
    )
    trainings = [
        start_training(tiny_dataset, tmp_path / "log", "--distribute", *options, **environment)
        for environment, options, _ in refused
    ]
    for training, (_, _, expected) in zip(trainings, refused, strict=True):
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
    program = """
        import sys
        import train
        from toolkit.training import devices
        devices._FOLDER_SECONDS = 6  # instead of 90
        sys.exit(train.main(sys.argv[1:]))
    """
    run = (tiny_dataset, log)
    for first, second, expected in (
        (run, (other, log), "not the same on all hosts: use the same dataset"),
        (run, (*run, "--lr", "0.02"), "options: not the same on all hosts: run the same command"),
        (run, (tiny_dataset, tmp_path / "there"), "not the same on all hosts: use a folder"),
    ):
        job = start_job(first, second, program=program)
        for training, run in zip(job, (first, second), strict=True):
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


def test_each_process_takes_all_devices_of_its_host_under_slurm(monkeypatch):
    jax = pytest.importorskip("jax")
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: given.update(options))
    monkeypatch.setenv(hosts.ADDRESSES, "node1:9331")
    with hosts.connected(2, 0, lambda: None):
        pass
    # By default, JAX would use one device per process.
    assert given["cluster_detection_method"] == "deactivate"
