"""Failures of workers or scheduler in a cluster: one error line, and a build that resumes."""

import signal

import pytest
from builds import build, contents, run, shards_in, wait_until

pytest.importorskip("distributed")

from clusters import SLOW, line_of, start_cluster, started, written_by

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(tmp_path):
    """Start a scheduler without workers."""
    with start_cluster(tmp_path) as cluster:
        yield cluster


def test_killed_worker_does_not_change_the_shards(cluster, data_dir, finished):
    workers = [cluster.add_worker(SLOW.format(seconds=0.3)) for _ in range(3)]
    with started(data_dir, cluster) as process:
        wait_until(lambda: written_by(data_dir, workers[1]))
        workers[1].kill()
        workers[1].wait()
        assert written_by(data_dir, workers[1])  # the worker was killed while it wrote a shard
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert contents(data_dir) == contents(finished[0])
    assert err.splitlines()[-1].endswith("3 clips skipped")


def test_workers_may_join_late_and_leave(cluster, data_dir, finished):
    with started(data_dir, cluster) as process:
        line = f"{cluster.address}: no workers: waiting for workers to join\n"
        assert line in iter(process.stderr.readline, "")
        first = cluster.add_worker(SLOW.format(seconds=2))
        wait_until(lambda: shards_in(data_dir))
        late = cluster.add_worker(SLOW.format(seconds=0.3))
        wait_until(lambda: written_by(data_dir, late))
        first.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert contents(data_dir) == contents(finished[0])


def test_stopped_worker_that_continues_later_changes_nothing(cluster, data_dir, finished):
    stopped = cluster.add_worker(SLOW.format(seconds=0.3))
    with started(data_dir, cluster) as process:
        wait_until(lambda: written_by(data_dir, stopped))
        stopped.send_signal(signal.SIGSTOP)
        half_written = written_by(data_dir, stopped)
        cluster.add_worker()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert half_written
    assert contents(data_dir) == contents(finished[0])
    stopped.send_signal(signal.SIGCONT)
    stopped.wait(timeout=60)  # the worker finishes its shard; then the scheduler stops it
    assert contents(data_dir) == contents(finished[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_build_resumes(cluster, data_dir, finished, number):
    cluster.add_worker(SLOW.format(seconds=0.3))
    with started(data_dir, cluster) as process:
        wait_until(lambda: shards_in(data_dir))
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    line = line_of(err)
    assert line.startswith(f"build_mtt.py: error: stopped by {number.name}: run the same command")
    assert not list((data_dir / "tfrecord").glob(".*.tmp"))
    assert 0 < len(shards_in(data_dir)) < 12
    done = run(data_dir, "--scheduler", cluster.address)
    assert done.returncode == 0, done.stderr
    assert contents(data_dir) == contents(finished[0])


def test_build_that_lost_its_scheduler_resumes_locally(cluster, data_dir, finished):
    cluster.add_worker(SLOW.format(seconds=0.3))
    with started(data_dir, cluster) as process:
        wait_until(lambda: shards_in(data_dir))
        cluster.scheduler.kill()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    line = line_of(err)
    assert line.startswith(f"build_mtt.py: error: {cluster.address}: the scheduler was lost or")
    assert line.endswith(" of 12 shards are complete): run the same command again to resume\n")
    assert build(data_dir) == 0
    assert contents(data_dir) == contents(finished[0])


def test_shard_that_kills_its_workers_ends_the_build(cluster, data_dir):
    with started(data_dir, cluster, "--num-audios-per-shard", "24") as process:
        while process.poll() is None:
            worker = cluster.add_worker("import os\nos.replace = lambda *paths: os._exit(9)\n")
            wait_until(lambda worker=worker: {worker.poll(), process.poll()} != {None})
        _, err = process.communicate()
    assert process.returncode == 1
    line = line_of(err)
    assert "error: 4 workers died one after another with the same shard, the last was tcp" in line
    assert "(0 of 3 shards are complete), possibly out of memory: run the same" in line
