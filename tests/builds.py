"""Start builds of a small dataset, in this process or in a new one, and inspect the results."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import build_mtt

from conftest import encode_audio, synthesise, write_dataset

SCRIPT = Path(build_mtt.__file__)
# The segments are half a second long. There are 12 shards; 3 of the 24 clips are skipped.
OPTIONS = ["--sample-rate", "8000", "--num-samples", "4000", "--num-audios-per-shard", "2"]
OPTIONS += ["--max-skipped", "20"]
SHARDS = {
    *(f"train-{shard:04d}-of-0006.tfrecord" for shard in range(6)),
    *(f"val-{shard:04d}-of-0003.tfrecord" for shard in range(3)),
    *(f"test-{shard:04d}-of-0003.seq.tfrecord" for shard in range(3)),
}


def write_source(data_dir):
    """Write a dataset of 24 clips; clips 3, 13 and 20 are not audio or too short."""
    write_dataset(data_dir, seconds=(1, 2, 1.2, 3))
    by_number = {int(clip.name.split("-")[1]): clip for clip in (data_dir / "mp3").rglob("*.mp3")}
    by_number[3].write_bytes(b"")
    by_number[13].write_text("This is no music.\n" * 100)
    encode_audio(by_number[20], synthesise(0.2))
    return data_dir


def arguments(data_dir, *options):
    return ["--data-dir", str(data_dir), *OPTIONS, *options]


def command(data_dir, *options):
    return [sys.executable, str(SCRIPT), *arguments(data_dir, *options)]


def build(data_dir, *options):
    """Build in this process and return the exit status."""
    return build_mtt.main(arguments(data_dir, *options))


def run(data_dir, *options, **how):
    """Build in a new process."""
    return subprocess.run(
        command(data_dir, *options), capture_output=True, text=True, timeout=120, **how
    )


def start(data_dir, *options):
    """Start a build in a new session, so that all of its processes can be killed."""
    how = {"text": True, "start_new_session": True}
    how |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command(data_dir, *options), **how)


def refusal(capsys, data_dir, *options, status=1):
    """Build in this process, expect an error, and return its line."""
    assert build(data_dir, *options) == status
    out, err = capsys.readouterr()
    assert out == ""
    *notes, line = err.splitlines()
    places = ("annotations_final.csv: ", f"{data_dir / 'tfrecord'}: ")
    assert all(note.startswith(places) for note in notes), err
    return line


def contents(data_dir):
    """Return the content of all files that a finished build leaves, by name."""
    folder = data_dir / "tfrecord"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def shards_in(data_dir):
    return sorted((data_dir / "tfrecord").glob("*.tfrecord"))


def fill_disk(disk, room):
    """Fill a disk except for `room` bytes; return the file that takes the space."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb") as file:
        while True:
            file.write(bytes(1 << 16))
    os.truncate(filler, filler.stat().st_size - room)
    return filler


def wait_until(is_true, process=None, seconds=60):
    """Wait for a condition or for the end of a process."""
    deadline = time.monotonic() + seconds
    while not is_true() and (process is None or process.poll() is None):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def workers_of(process):
    """List the process ids of the workers of a process."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    with contextlib.suppress(OSError):
        found = children.read_text().split()
        return [int(c) for c in found if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return []


def is_running(process_id):
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
