"""Building on a Dask cluster gives the same bytes; errors name the worker."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import build_mtt

import pytest
from builds import SCRIPT, contents, fill_disk, refusal, run, shards_in, wait_until

pytest.importorskip("distributed")

from clusters import SLOW, kill, refusal_of, start_cluster, started


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Start a scheduler and two workers, which tests must not change."""
    with start_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.add_worker()
        cluster.add_worker(num_threads=2)
        yield cluster


@pytest.fixture
def own_cluster(tmp_path):
    """Start a scheduler without workers."""
    with start_cluster(tmp_path) as cluster:
        yield cluster


# --- The same bytes -------------------------------------------------------------------------------


def test_shards_and_messages_are_those_of_a_local_build(cluster, data_dir, finished):
    # The folder is relative to the working directory of the build, not to that of the worker.
    done = run(Path(data_dir.name), "--scheduler", cluster.address, cwd=data_dir.parent)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert contents(data_dir) == contents(finished[0])

    def without_time(messages):
        # The workers may still be starting.
        lines = [line for line in messages.splitlines() if "waiting for workers" not in line]
        return [*lines[:-1], lines[-1].partition(": ")[2].partition(", ")[2]]

    assert without_time(done.stderr) == without_time(finished[1])
    assert done.stderr.count("skipped clip ") == 3


@pytest.mark.slow
def test_progress_counts_single_clips(own_cluster, data_dir, monkeypatch):
    own_cluster.add_worker(
        "import os, time\n"
        "def exists(path, exists=os.path.exists):\n"
        "    time.sleep('.build.' in str(path) and 0.1)\n"
        "    return exists(path)\n"
        "os.path.exists = exists\n"
    )
    shown = []
    bar = build_mtt.messages.progress

    def progress(**options):
        made = bar(**options)
        update = made.update
        made.update = lambda n: (update(n), shown.append(made.n))
        return made

    monkeypatch.setattr(build_mtt.messages, "progress", progress)
    options = {"sample_rate": 8000, "num_samples": 4000, "num_audios_per_shard": 24}
    build_mtt.build(data_dir, scheduler=own_cluster.address, **options)
    assert shown == sorted(shown)
    assert shown[-1] <= 24
    assert any(count % 6 for count in shown)  # shards have 12, 6 and 6 clips


# --- Unsuitable workers and addresses -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("joins_late", [False, True])
@pytest.mark.parametrize(
    ("hidden", "named"),
    [(".", "mp3"), ("mp3", "mp3/0/clip-00-0-1.mp3"), ("tfrecord", "tfrecord")],
)
def test_worker_that_does_not_see_a_folder_is_named(
    own_cluster, data_dir, hidden, named, joins_late
):
    (data_dir / "tfrecord").mkdir()
    # The worker has an empty file system mounted over the folder.
    mount = f'mount -t tmpfs tmpfs "{data_dir / hidden}" && exec "$@"'
    before = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    tried = subprocess.run([*before, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"cannot hide a folder from a process: {tried.stderr.strip()}")
    if joins_late:
        own_cluster.add_worker(SLOW.format(seconds=2))
        with started(data_dir, own_cluster) as process:
            wait_until(lambda: shards_in(data_dir))
            own_cluster.add_worker(before=before)
            out, err = process.communicate(timeout=60)
        done = subprocess.CompletedProcess([], process.returncode, out, err)
    else:
        own_cluster.add_worker(before=before)
        done = run(data_dir, "--scheduler", own_cluster.address)
    line = refusal_of(done).removeprefix("build_mtt.py: error: worker tcp://127.0.0.1:")
    assert f" on {socket.gethostname()} cannot access {data_dir / named} as this " in line


VERSION = """
import sys
class Version(tuple):
    major, minor = 3, {minor}
sys.version_info = Version((3, {minor}, 0, "final", 0))
"""
MINOR = sys.version_info.minor
OTHER = MINOR - 1 if MINOR > 11 else 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preload", "what"),
    [
        (VERSION.format(minor=OTHER), f"has python 3.{OTHER}, the build has 3.{MINOR}"),
        (VERSION.format(minor=99), "cannot import the toolkit (Python 3.11 to 3.14 is required, t"),
        ("m.version = lambda name, f=m.version: f(name) if name != 'av' else '0'", "has av 0, the"),
        ("m.distribution = lambda n, f=m.distribution: f(n.replace('av', '0'))", "lacks av, the "),
        ("sys.modules['crc32c'] = None", "cannot import the toolkit (import of crc32c halted"),
    ],
)
def test_worker_that_lacks_a_package_is_named(own_cluster, data_dir, preload, what):
    own_cluster.add_worker(f"import sys, importlib.metadata as m\n{preload}\n")
    line = refusal_of(run(data_dir, "--scheduler", own_cluster.address))
    assert f" on {socket.gethostname()} {what}" in line
    assert how_to_start(own_cluster) in line


def how_to_start(cluster):
    command = f"cd {SCRIPT.parent} && python -m dask worker {cluster.address}"
    return f": start it with `{command}` and the packages of requirements/cluster.txt, or stop it"


@pytest.mark.slow
def test_worker_outside_a_checkout_is_named(own_cluster, data_dir, tmp_path):
    own_cluster.add_worker(checkout=tmp_path)
    line = refusal_of(run(data_dir, "--scheduler", own_cluster.address))
    reason = "cannot import the toolkit (No module named 'toolkit')"
    assert f" on {socket.gethostname()} {reason}{how_to_start(own_cluster)}" in line


@pytest.mark.slow
def test_worker_with_other_code_is_named_by_what_it_has_imported(own_cluster, data_dir, tmp_path):
    shutil.copytree(SCRIPT.parent / "toolkit", tmp_path / "toolkit")
    worker = own_cluster.add_worker(checkout=tmp_path)
    assert run(data_dir, "--scheduler", own_cluster.address).returncode == 0
    # Changing a file changes nothing for the worker that has imported the earlier one.
    with open(tmp_path / "toolkit" / "data" / "shards.py", "a") as module:
        module.write("# changed\n")
    shards_in(data_dir)[0].unlink()
    done = run(data_dir, "--scheduler", own_cluster.address)
    assert done.returncode == 0, done.stderr
    kill(worker)
    own_cluster.add_worker(checkout=tmp_path)
    shards_in(data_dir)[0].unlink()
    line = refusal_of(run(data_dir, "--scheduler", own_cluster.address))
    assert f" on {socket.gethostname()} has toolkit code " in line
    assert how_to_start(own_cluster) in line


@pytest.mark.slow
@pytest.mark.parametrize("is_silent", [False, True])
def test_missing_scheduler_is_one_line(capsys, data_dir, is_silent):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if is_silent:
            listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        line = refusal_of(run(data_dir, "--scheduler", address))
    assert f"--scheduler {address}: no scheduler answers: Timed out " in line


def test_invalid_address_is_one_line(capsys, data_dir):
    line = refusal(capsys, data_dir, "--scheduler", "http://127.0.0.1:8786")
    assert "--scheduler http://127.0.0.1:8786: no scheduler answers: " in line


# --- Failures to write ----------------------------------------------------------------------------


def test_full_disk_of_a_worker_is_one_line_and_the_build_resumes(
    cluster, data_dir, finished, small_disk
):
    filler = fill_disk(small_disk, room=300_000)  # enough for some of the shards
    (data_dir / "tfrecord").symlink_to(small_disk / "tfrecord")
    (small_disk / "tfrecord").mkdir()
    line = refusal_of(run(data_dir, "--scheduler", cluster.address))
    assert ": No space left on device (" in line
    assert "free some space and run the same command again to resume" in line
    filler.unlink()
    done = run(data_dir, "--scheduler", cluster.address)
    assert done.returncode == 0, done.stderr
    assert contents(data_dir) == contents(finished[0])


def test_file_that_a_worker_cannot_write_is_named_with_the_worker(cluster, data_dir):
    # A folder has the name of the shard.
    blocked = data_dir / "tfrecord" / "train-0002-of-0006.tfrecord"
    (blocked / "in the way").mkdir(parents=True)
    line = refusal_of(run(data_dir, "--scheduler", cluster.address))
    assert f"{blocked} (worker tcp://127.0.0.1:" in line
    assert line.endswith(f" on {socket.gethostname()}): Is a directory\n")
