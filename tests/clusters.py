"""Dask clusters on this machine: the scheduler runs without the toolkit, workers in a checkout."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

from builds import SCRIPT, start, wait_until

# A preload module of workers, which delays the flush of each file.
SLOW = """
import os, time
def fsync(file, flush=os.fsync):
    time.sleep({seconds})
    flush(file)
os.fsync = fsync
"""


class Cluster:
    """A scheduler, to which tests add workers."""

    def __init__(self, folder, stack):
        self.folder = folder
        self.stack = stack
        (folder / "elsewhere").mkdir()
        where = folder / "scheduler.json"
        options = ["--port", "0", "--scheduler-file", str(where)]
        # The scheduler considers workers dead after 4 s without a heartbeat.
        before = ["env", "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL=4s"]
        self.scheduler = self.start("scheduler", *options, "--no-dashboard", before=before)
        # The scheduler creates the file before it writes the content.
        wait_until(lambda: where.exists() and where.read_text())
        self.address = json.loads(where.read_text())["address"]

    def start(self, kind, *options, before=(), checkout=None):
        command = [*before, sys.executable, "-m", "dask", kind, *options, "--host", "127.0.0.1"]
        environment = {key: os.environ[key] for key in os.environ if key != "PYTHONPATH"}
        folder = checkout or self.folder / "elsewhere"
        with open(self.folder / f"{kind}.log", "a") as log:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        self.stack.callback(kill, process)
        return process

    def add_worker(self, preload="", before=(), num_threads=1, checkout=SCRIPT.parent):
        """Start a worker that first runs the code `preload`; `before` precedes its command."""
        path = self.folder / f"preload_{time.monotonic_ns()}.py"
        path.write_text(preload)
        options = ["--nthreads", str(num_threads), "--no-nanny", "--no-dashboard"]
        options += ["--local-directory", str(self.folder), "--preload", str(path)]
        return self.start("worker", self.address, *options, before=before, checkout=checkout)

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


def kill(process):
    process.kill()
    process.wait()


@contextmanager
def started(data_dir, cluster, *options):
    """Start a build on a cluster."""
    process = start(data_dir, "--scheduler", cluster.address, *options)
    try:
        yield process
    finally:
        kill(process)


def written_by(data_dir, worker):
    """List the temporary files of shards that a worker of this machine is writing."""
    return list((data_dir / "tfrecord").glob(f".*.{socket.gethostname()}.{worker.pid}.*.tmp"))


def line_of(messages):
    """Return the only line of messages, except those about tables, waiting and progress."""
    others = r"annotations_final\.csv: |building: |.*waiting for workers to join"
    (line,) = [line for line in messages.splitlines(True) if not re.match(others, line)]
    return line


def refusal_of(done):
    """Run a build that fails, and return its error line."""
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    line = line_of(done.stderr)
    assert line.startswith("build_mtt.py: error: ")
    return line
