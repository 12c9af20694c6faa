"""Builds that are killed, stopped or out of space end with one line and can be resumed."""

import errno
import os
import resource
import shutil
import signal
import time
from multiprocessing.context import SpawnProcess
from pathlib import Path

from input_data import open_dataset
from toolkit.data.records import index_records
from toolkit.errors import ShardError

import numpy as np
import pytest
from builds import (
    SHARDS,
    arguments,
    build,
    contents,
    fill_disk,
    is_running,
    refusal,
    run,
    shards_in,
    start,
    wait_until,
    workers_of,
)
from conftest import needs_proc, run_python

TWO_WORKERS = ("--num-workers", "2")


def assert_complete_shards(data_dir, finished):
    """Check that all existing shards equal those of an uninterrupted build."""
    for path in shards_in(data_dir):
        assert path.read_bytes() == (finished[0] / "tfrecord" / path.name).read_bytes()


def assert_resumes(data_dir, finished):
    """Build again in this process and compare with an uninterrupted build."""
    assert build(data_dir, *TWO_WORKERS) == 0
    assert contents(data_dir) == contents(finished[0])


# --- Kills ----------------------------------------------------------------------------------------


def test_killed_build_resumes_to_the_same_bytes(finished, data_dir):
    process = start(data_dir, *TWO_WORKERS)
    wait_until(lambda: len(shards_in(data_dir)) >= 3, process)
    process.kill()
    process.communicate()
    leftover = ".train-0000-of-0006.tfrecord.node1.123.0badcafe.tmp"
    (data_dir / "tfrecord" / leftover).write_bytes(b"half")
    assert_resumes(data_dir, finished)


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("seed", range(45))
def test_build_killed_at_a_random_moment_resumes(finished, data_dir, seed):
    """Send SIGKILL to a worker, the parent or all, between the first imports and the end."""
    random = np.random.default_rng(seed)
    whom = ("worker", "parent", "all")[seed % 3]
    # Half of the kills are while workers start, half are while shards are written.
    num_shards, seconds = random.choice([(0, 0.8), (1, 0.1)])
    seconds = random.uniform(0, seconds)
    process = start(data_dir, *TWO_WORKERS)
    if whom == "worker" or random.random() < 0.8:
        wait_until(lambda: workers_of(process), process)
    wait_until(lambda: len(shards_in(data_dir)) >= num_shards, process)
    time.sleep(seconds)
    if whom == "parent":
        process.kill()
    elif whom == "all":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        for worker in workers_of(process)[:1]:
            os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=60)  # the parent must not wait for the dead worker
    killed = process.returncode in (1, -signal.SIGKILL)
    assert killed or process.returncode == 0, err
    if whom == "worker" and killed:
        assert "error: a worker process died (" in err.splitlines()[-1]
    print(f"seed {seed}: {whom}, {'killed' if killed else 'too late'}")  # shown by pytest -rP
    assert_complete_shards(data_dir, finished)
    assert_resumes(data_dir, finished)


@needs_proc
def test_death_of_a_worker_ends_the_build_with_one_line(data_dir):
    process = start(data_dir, *TWO_WORKERS)
    wait_until(lambda: len(workers_of(process)) == 2, process)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in err
    *_, last = err.strip().splitlines()
    assert last.startswith("build_mtt.py: error: a worker process died (")
    assert "run the same command again" in last


@needs_proc
@pytest.mark.parametrize("num_shards", [0, 1])
def test_workers_exit_when_their_parent_is_killed(data_dir, num_shards):
    process = start(data_dir, *TWO_WORKERS)
    wait_until(lambda: len(workers_of(process)) == 2, process)
    workers = workers_of(process)
    assert len(workers) == 2
    wait_until(lambda: len(shards_in(data_dir)) >= num_shards, process)
    process.kill()
    process.communicate(timeout=10)
    deadline = time.monotonic() + 10
    while alive := [worker for worker in workers if is_running(worker)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_the_build_with_one_line_and_without_leftovers(finished, data_dir, number):
    process = start(data_dir, *TWO_WORKERS)
    wait_until(lambda: len(workers_of(process)) == 2, process)
    workers = workers_of(process)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    expected = f"stopped by {number.name}: run the same command again"
    assert err.splitlines()[-1] == f"build_mtt.py: error: {expected}"
    assert not [worker for worker in workers if is_running(worker)]
    assert not list((data_dir / "tfrecord").glob(".*.tmp"))
    assert_resumes(data_dir, finished)


# --- Workers that cannot start or report ----------------------------------------------------------


def fail_at_the_second_start(capsys, monkeypatch, data_dir, fail):
    """Build with two workers and call `fail` with the first before the second starts."""
    started = []
    start = SpawnProcess.start

    def start_next(process):
        if started:
            fail(started[0])
        start(process)
        started.append(process)

    monkeypatch.setattr(SpawnProcess, "start", start_next)
    return refusal(capsys, data_dir, *TWO_WORKERS)


def test_death_of_a_worker_while_another_starts_ends_the_build(capsys, monkeypatch, data_dir):
    """Python 3.11's ProcessPoolExecutor can hang here."""

    def kill(worker):
        worker.kill()
        time.sleep(0.5)

    line = fail_at_the_second_start(capsys, monkeypatch, data_dir, kill)
    assert "error: a worker process died (" in line


def test_too_few_processes_are_one_line_that_names_the_option(capsys, monkeypatch, data_dir):
    """RLIMIT_NPROC does not apply to root, so the second start raises the error of this limit."""

    def refuse(worker):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    line = fail_at_the_second_start(capsys, monkeypatch, data_dir, refuse)
    assert "no more processes or threads can be started (" in line
    assert "Resource temporarily unavailable" in line and "with fewer --num-workers" in line


@pytest.mark.parametrize("lock", ["threading.Lock()", "None"])
def test_error_that_cannot_be_pickled_or_unpickled_keeps_its_message(data_dir, tmp_path, lock):
    script = tmp_path / "raising.py"  # workers also import the script, but not as __main__
    script.write_text(f"""if True:
        import sys, threading
        import build_mtt

        class OddError(Exception):
            def __init__(self, one, other):
                super().__init__(f"{{one}} {{other}}")
                self.lock = {lock}

        def make_shard(task, on_clip):
            raise OddError("utterly", "odd")

        build_mtt.make_shard = make_shard
        if __name__ == "__main__":
            sys.exit(build_mtt.main(sys.argv[1:]))
    """)
    done = run_python(script, *arguments(data_dir, "--num-workers", "1"), timeout=60)
    assert done.returncode == 1
    assert "RuntimeError: OddError: utterly odd\n" in done.stderr
    assert "in make_shard" in done.stderr  # the worker's traceback
    assert "worker process died" not in done.stderr


def test_many_workers_start_under_a_low_limit_of_open_files(finished, data_dir):
    def limit():
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, hard))

    done = run(data_dir, "--num-workers", "4", preexec_fn=limit)
    assert done.returncode == 0, done.stderr
    assert contents(data_dir) == contents(finished[0])


# --- Files that cannot be written or are damaged --------------------------------------------------


def test_file_that_cannot_be_written_is_named_in_one_line(capsys, data_dir):
    # The path of the shard is a folder.
    blocked = data_dir / "tfrecord" / "train-0002-of-0006.tfrecord"
    (blocked / "in the way").mkdir(parents=True)
    line = refusal(capsys, data_dir)
    assert "train-0002-of-0006.tfrecord" in line
    assert "directory" in line


def test_full_disk_is_one_line_and_the_build_resumes(capsys, finished, data_dir, small_disk):
    filler = fill_disk(small_disk, room=300_000)  # enough for some of the shards
    (small_disk / "tfrecord").mkdir()
    (data_dir / "tfrecord").symlink_to(small_disk / "tfrecord")
    line = refusal(capsys, data_dir, *TWO_WORKERS)
    assert ".tfrecord: No space left on device (" in line
    assert "free some space and run the same command again" in line
    assert 0 < len(shards_in(data_dir)) < len(SHARDS)
    assert_complete_shards(data_dir, finished)
    assert not list((small_disk / "tfrecord").glob(".*.tmp"))
    filler.unlink()
    assert_resumes(data_dir, finished)


def test_truncated_shard_is_built_again(finished, data_dir):
    folder = Path(shutil.copytree(finished[0] / "tfrecord", data_dir / "tfrecord"))
    path = folder / "train-0003-of-0006.tfrecord"
    start_of_last, _ = index_records(path)[-1]
    path.write_bytes(path.read_bytes()[: start_of_last - 12])
    with pytest.raises(ShardError, match=r"train-0003.*truncated.*run build_mtt\.py again"):
        open_dataset(data_dir)
    assert_resumes(data_dir, finished)
