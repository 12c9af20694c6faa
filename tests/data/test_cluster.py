"""Building on a Dask cluster: the same bytes whatever workers do, and one line for what ends it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import build_mtt

import pytest
from conftest import encode_audio, synthesise, write_dataset

pytest.importorskip("distributed")

SCRIPT = Path(build_mtt.__file__)
# Half-second segments of quick clips, in 12 shards.
OPTIONS = ["--sample-rate", "8000", "--num-samples", "4000", "--num-audios-per-shard", "2"]
OPTIONS += ["--max-skipped", "20"]  # 3 of 24 are
# A worker that takes time to write, so that it can be met at it.
SLOW = """
import os, time
def fsync(file, flush=os.fsync):
    time.sleep({seconds})
    flush(file)
os.fsync = fsync
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A dataset of 24 clips, three of which are no audio or too short."""
    data_dir = write_dataset(tmp_path_factory.mktemp("source"), seconds=(1, 2, 1.2, 3))
    by_number = {int(clip.name.split("-")[1]): clip for clip in (data_dir / "mp3").rglob("*.mp3")}
    by_number[3].write_bytes(b"")
    by_number[13].write_text("This is no music.\n" * 100)
    encode_audio(by_number[20], synthesise(0.2))
    return data_dir


@pytest.fixture(scope="module")
def local(source, tmp_path_factory):
    """A build on local processes: what it left and what it said."""
    data_dir = Path(shutil.copytree(source, tmp_path_factory.mktemp("local") / "dataset"))
    done = build(data_dir, "--num-workers", "2")
    assert done.returncode == 0, done.stderr
    return contents(data_dir), done.stderr


@pytest.fixture
def data_dir(source, tmp_path):
    """A copy of the dataset that a test may build in."""
    return Path(shutil.copytree(source, tmp_path / "dataset"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A scheduler and two workers that must be left as they are."""
    with start_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.add_worker()
        cluster.add_worker(num_threads=2)
        yield cluster


@pytest.fixture
def own_cluster(tmp_path):
    """A scheduler whose workers a test adds and kills."""
    with start_cluster(tmp_path) as cluster:
        yield cluster


class Cluster:
    """A scheduler and workers of this machine, started where no toolkit is."""

    def __init__(self, folder, stack):
        self.folder = folder
        self.stack = stack
        (folder / "elsewhere").mkdir()
        where = folder / "scheduler.json"
        options = ["--port", "0", "--host", "127.0.0.1", "--scheduler-file", str(where)]
        # A worker that says nothing for so long is taken for dead.
        self.scheduler = self.start(
            "scheduler", *options, "--no-dashboard", DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL="4s"
        )
        wait_until(where.exists)
        self.address = json.loads(where.read_text())["address"]

    def start(self, kind, *options, before=(), **environment):
        module = [sys.executable, "-m", f"distributed.cli.dask_{kind}"]
        environment = os.environ | environment
        environment.pop("PYTHONPATH", None)
        with open(self.folder / f"{kind}.log", "a") as log:
            process = subprocess.Popen(
                [*before, *module, *options],
                cwd=self.folder / "elsewhere", env=environment, stdout=log, stderr=log,
            )  # fmt: skip
        self.stack.callback(end, process)
        return process

    def add_worker(self, preload="", before=(), num_threads=1):
        """Start a worker, by another command perhaps, that runs some code first."""
        path = self.folder / f"preload_{time.monotonic_ns()}.py"
        path.write_text(preload)
        return self.start(
            "worker", self.address, "--nthreads", str(num_threads), "--no-nanny", "--no-dashboard",
            "--host", "127.0.0.1", "--local-directory", str(self.folder), "--preload", str(path),
            before=before,
        )  # fmt: skip

    def log(self):
        return "".join(path.read_text() for path in self.folder.glob("*.log"))


@contextmanager
def start_cluster(folder):
    with ExitStack() as stack:
        cluster = Cluster(folder, stack)
        try:
            yield cluster
        except BaseException:
            print(cluster.log())
            raise


def end(process):
    process.kill()
    process.wait()


def wait_until(is_true, seconds=60):
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def command(data_dir, *options):
    return [sys.executable, str(SCRIPT), "--data-dir", str(data_dir), *OPTIONS, *options]


def build(data_dir, *options, **how):
    """Build by the command line, from another folder than the toolkit's."""
    return subprocess.run(
        command(data_dir, *options), capture_output=True, text=True, timeout=120,
        **({"cwd": data_dir.parent} | how),
    )  # fmt: skip


@contextmanager
def started(data_dir, cluster, *options):
    """Start a build on a cluster."""
    process = subprocess.Popen(
        command(data_dir, "--scheduler", cluster.address, *options),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Whoever runs the tests in the background may have had SIGINT ignored, which is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        yield process
    finally:
        end(process)


def contents(data_dir):
    """All that a finished build leaves, by name."""
    folder = data_dir / "tfrecord"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def shards(data_dir):
    return list((data_dir / "tfrecord").glob("*.tfrecord"))


def written_by(data_dir, worker):
    """Shards that a worker of this machine is writing, which their temporary names say."""
    return list((data_dir / "tfrecord").glob(f".*.{socket.gethostname()}.{worker.pid}.*.tmp"))


# --- The same bytes -------------------------------------------------------------------------------


def test_shards_manifest_and_talk_are_those_of_a_local_build(cluster, data_dir, local):
    # A relative folder is the build's, not one below the working directory of a worker.
    done = build(Path(data_dir.name), "--scheduler", cluster.address, cwd=data_dir.parent)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert contents(data_dir) == local[0]

    def talk(said):
        *lines, last = said.splitlines()
        return [*lines, last.partition(": ")[2].partition(", ")[2]]

    assert talk(done.stderr) == talk(local[1])
    assert done.stderr.count("skipped clip ") == 3


@pytest.mark.slow
def test_workers_run_the_toolkit_of_the_build_whatever_came_before(own_cluster, source, tmp_path):
    own_cluster.add_worker()
    plain, marked = tmp_path / "plain", tmp_path / "marked"
    for folder in (plain, marked):
        folder.mkdir()
        for module in SCRIPT.parent.glob("*.py"):
            shutil.copy(module, folder)
    code = (marked / "build_mtt.py").read_text()
    entry = 'return {"name": task.path.name, '
    assert entry in code
    (marked / "build_mtt.py").write_text(code.replace(entry, f'{entry}"by": "marked", '))
    for number, toolkit in enumerate((plain, marked, plain, marked)):
        data_dir = Path(shutil.copytree(source, tmp_path / str(number)))
        done = subprocess.run(
            [
                sys.executable, str(toolkit / "build_mtt.py"), "--data-dir", str(data_dir),
                *OPTIONS, "--scheduler", own_cluster.address,
            ],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        manifest = json.loads((data_dir / "tfrecord" / "manifest.json").read_text())
        entries = [entry for split in manifest["splits"].values() for entry in split["shards"]]
        assert {"by" in entry for entry in entries} == {toolkit == marked}, number


@pytest.mark.slow
def test_progress_is_counted_by_the_clip(own_cluster, data_dir, monkeypatch):
    own_cluster.add_worker(
        "import os, time\n"
        "def exists(path, is_there=os.path.exists):\n"
        "    time.sleep('.build.' in str(path) and 0.1)\n"
        "    return is_there(path)\n"
        "os.path.exists = exists\n"
    )
    shown = []
    bar = build_mtt.cli.progress

    def progress(**options):
        made = bar(**options)
        update = made.update
        made.update = lambda n: (update(n), shown.append(made.n))
        return made

    monkeypatch.setattr(build_mtt.cli, "progress", progress)
    build_mtt.build(data_dir, 8000, 4000, num_audios_per_shard=24, scheduler=own_cluster.address)
    assert shown == sorted(shown)
    assert shown[-1] <= 24
    assert any(count % 6 for count in shown)  # shards are of 12, 6 and 6 clips


@pytest.mark.slow
def test_worker_that_is_killed_at_work_costs_nothing(own_cluster, data_dir, local):
    workers = [own_cluster.add_worker(SLOW.format(seconds=0.3)) for _ in range(3)]
    with started(data_dir, own_cluster) as process:
        wait_until(lambda: written_by(data_dir, workers[1]))
        workers[1].kill()
        workers[1].wait()
        assert written_by(data_dir, workers[1])  # it died while it wrote
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert contents(data_dir) == local[0]
    assert err.splitlines()[-1].endswith("3 clips skipped")


@pytest.mark.slow
def test_workers_may_join_late_and_leave(own_cluster, data_dir, local):
    with started(data_dir, own_cluster) as process:
        line = process.stderr.readline()
        assert line == f"{own_cluster.address}: no workers here: waiting for some to join\n"
        first = own_cluster.add_worker(SLOW.format(seconds=0.3))
        wait_until(lambda: shards(data_dir))
        late = own_cluster.add_worker(SLOW.format(seconds=0.3))
        wait_until(lambda: written_by(data_dir, late))
        first.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert contents(data_dir) == local[0]


@pytest.mark.slow
def test_worker_that_was_taken_for_dead_changes_nothing(own_cluster, data_dir, local):
    sleeper = own_cluster.add_worker(SLOW.format(seconds=0.3))
    with started(data_dir, own_cluster) as process:
        wait_until(lambda: written_by(data_dir, sleeper))
        sleeper.send_signal(signal.SIGSTOP)
        half_written = written_by(data_dir, sleeper)
        own_cluster.add_worker()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert half_written
    assert contents(data_dir) == local[0]
    sleeper.send_signal(signal.SIGCONT)
    sleeper.wait(timeout=60)  # it comes to the end of its shard, and hears that it is dead
    assert contents(data_dir) == local[0]


# --- What ends a build ----------------------------------------------------------------------------


def refusal(done):
    """The one line of a build that was refused."""
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("build_mtt.py: error: ")
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "line"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated: run the same")],
)
def test_interrupted_build_goes_on(own_cluster, data_dir, local, number, status, line):
    own_cluster.add_worker(SLOW.format(seconds=0.3))
    with started(data_dir, own_cluster) as process:
        wait_until(lambda: shards(data_dir))
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert err.startswith(f"build_mtt.py: error: {line}")
    assert err.count("\n") == 1
    assert not list((data_dir / "tfrecord").glob(".*.tmp"))
    assert 0 < len(shards(data_dir)) < 12
    done = build(data_dir, "--scheduler", own_cluster.address)
    assert done.returncode == 0, done.stderr
    assert contents(data_dir) == local[0]


@pytest.mark.slow
def test_build_whose_scheduler_is_lost_goes_on_locally(own_cluster, data_dir, local):
    own_cluster.add_worker(SLOW.format(seconds=0.3))
    with started(data_dir, own_cluster) as process:
        wait_until(lambda: shards(data_dir))
        own_cluster.scheduler.kill()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith(f"build_mtt.py: error: {own_cluster.address}: the scheduler was lost, or")
    assert " of 12 shards are complete): run the same command again to go on\n" in err
    assert err.count("\n") == 1
    done = build(data_dir)
    assert done.returncode == 0, done.stderr
    assert contents(data_dir) == local[0]


def test_full_disk_of_a_worker_is_one_line_and_the_build_goes_on(
    cluster, data_dir, local, small_disk
):
    filler = small_disk / "filler"
    with suppress(OSError), open(filler, "wb") as file:
        while True:
            file.write(bytes(1 << 16))
    os.truncate(filler, filler.stat().st_size - 300_000)  # room for some of the shards
    (data_dir / "tfrecord").symlink_to(small_disk / "tfrecord")
    (small_disk / "tfrecord").mkdir()
    line = refusal(build(data_dir, "--scheduler", cluster.address))
    assert ": No space left on device (" in line
    assert "make space and run the same command again to go on" in line
    filler.unlink()
    done = build(data_dir, "--scheduler", cluster.address)
    assert done.returncode == 0, done.stderr
    assert contents(data_dir) == local[0]


def test_error_in_a_worker_is_one_line_that_names_it(cluster, data_dir):
    # A folder stands where the shard should, so that the file cannot be given its name.
    blocked = data_dir / "tfrecord" / "train-0002-of-0006.tfrecord"
    (blocked / "in the way").mkdir(parents=True)
    line = refusal(build(data_dir, "--scheduler", cluster.address))
    assert f"{blocked} (worker tcp://" in line
    assert " (worker tcp://127.0.0.1:" in line
    assert line.endswith(f" on {socket.gethostname()}): Is a directory\n")


@pytest.mark.slow
def test_shard_that_kills_its_workers_ends_the_build(own_cluster, data_dir):
    with started(data_dir, own_cluster, "--num-audios-per-shard", "24") as process:
        while process.poll() is None:
            worker = own_cluster.add_worker("import os\nos.replace = lambda *paths: os._exit(9)\n")
            wait_until(lambda worker=worker: {worker.poll(), process.poll()} != {None})
        _, err = process.communicate()
    assert process.returncode == 1
    *waiting, line = err.splitlines()
    assert all("no workers here: waiting for some to join" in said for said in waiting)
    assert "error: 4 workers died one after another with the same shard, the last was tcp" in line
    assert "(0 of 3 shards are complete): perhaps for lack of memory; run the same" in line


@pytest.mark.slow
@pytest.mark.parametrize("joins_late", [False, True])
@pytest.mark.parametrize(
    ("hidden", "named"),
    [(".", "mp3"), ("mp3", "mp3/0/clip-00-0-1.mp3"), ("tfrecord", "tfrecord")],
)
def test_worker_that_does_not_see_a_folder_says_so(
    own_cluster, data_dir, hidden, named, joins_late
):
    (data_dir / "tfrecord").mkdir()
    # A file system that only this worker sees lies over the folder.
    mount = f'mount -t tmpfs tmpfs "{data_dir / hidden}" && exec "$@"'
    before = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    tried = subprocess.run([*before, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"nothing can be hidden from a process: {tried.stderr.strip()}")
    if joins_late:
        own_cluster.add_worker(SLOW.format(seconds=0.5))
        with started(data_dir, own_cluster) as process:
            wait_until(lambda: shards(data_dir))
            own_cluster.add_worker(before=before)
            out, err = process.communicate(timeout=60)
        done = subprocess.CompletedProcess([], process.returncode, out, err)
    else:
        own_cluster.add_worker(before=before)
        done = build(data_dir, "--scheduler", own_cluster.address)
    line = refusal(done).removeprefix("build_mtt.py: error: worker tcp://127.0.0.1:")
    assert f" on {socket.gethostname()} does not see {data_dir / named} as this " in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preload", "what"),
    [
        (
            "import sys\nclass Version(tuple):\n    major, minor = 3, 99\n"
            "sys.version_info = Version((3, 99, 0, 'final', 0))\n",
            f"has python 3.99, the build has 3.{sys.version_info.minor}",
        ),
        (
            "import importlib.metadata as m\n"
            "m.version = lambda name, find=m.version: '0.1' if name == 'av' else find(name)\n",
            "has av 0.1, the build has ",
        ),
        (
            "import importlib.metadata as m\n"
            "m.distribution = lambda name, find=m.distribution: find(name.replace('av', 'none'))\n",
            "lacks av, the build has ",
        ),
        ("import sys\nsys.modules['google_crc32c'] = None\n", "lacks what the toolkit needs (imp"),
    ],
)
def test_worker_that_lacks_something_says_so(own_cluster, data_dir, preload, what):
    own_cluster.add_worker(preload)
    line = refusal(build(data_dir, "--scheduler", own_cluster.address))
    assert f" on {socket.gethostname()} {what}" in line
    assert "install there what requirements/cluster.txt names" in line


@pytest.mark.slow
@pytest.mark.parametrize("is_silent", [False, True])
def test_scheduler_that_is_not_there_is_one_line(data_dir, is_silent):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if is_silent:
            listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        line = refusal(build(data_dir, "--scheduler", address))
    assert f"--scheduler {address}: no scheduler answers there: Timed out " in line


@pytest.mark.parametrize("address", ["http://127.0.0.1:8786", "tcp://127.0.0.1:port", ""])
def test_address_that_is_none_is_one_line(data_dir, address):
    line = refusal(build(data_dir, "--scheduler", address))
    assert f"--scheduler {address}: no scheduler answers there: " in line
