"""Building shards: what comes out, what is skipped and said, and the same bytes after any end."""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import build_mtt
from input_data import open_dataset, read_clips
from toolkit.data.audio import cut_segments, decode
from toolkit.data.records import index_records, read_records, write_records
from toolkit.errors import ShardError

import numpy as np
import pytest
from conftest import (
    TAGS,
    encode_audio,
    encode_float,
    opened,
    synthesise,
    write_annotations,
    write_dataset,
)

SCRIPT = Path(build_mtt.__file__)
# Half-second segments of quick clips, in 12 shards.
OPTIONS = ["--sample-rate", "8000", "--num-samples", "4000", "--num-audios-per-shard", "2"]
OPTIONS += ["--max-skipped", "20"]  # 3 of 24 are
SHARDS = {
    *(f"train-{shard:04d}-of-0006.tfrecord" for shard in range(6)),
    *(f"val-{shard:04d}-of-0003.tfrecord" for shard in range(3)),
    *(f"test-{shard:04d}-of-0003.seq.tfrecord" for shard in range(3)),
}


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A dataset of 24 clips, three of which are no audio or too short."""
    data_dir = write_dataset(tmp_path_factory.mktemp("source"), seconds=(1, 2, 1.2, 3))
    clips = sorted((data_dir / "mp3").rglob("*.mp3"))
    by_number = {int(clip.name.split("-")[1]): clip for clip in clips}
    by_number[3].write_bytes(b"")
    by_number[13].write_text("This is no music.\n" * 100)
    encode_audio(by_number[20], synthesise(0.2))
    return data_dir


@pytest.fixture
def data_dir(source, tmp_path):
    """A copy of the dataset that a test may build in."""
    return Path(shutil.copytree(source, tmp_path / "dataset"))


def command(data_dir, *options):
    return [sys.executable, str(SCRIPT), "--data-dir", str(data_dir), *OPTIONS, *options]


def build(data_dir, *options):
    """Build by the command line: exit status, standard output, standard error."""
    done = subprocess.run(
        command(data_dir, *options), capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout, done.stderr


def start(data_dir, *options):
    """Start a build of its own session, that can be killed with all that it started."""
    return subprocess.Popen(
        command(data_dir, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Whoever runs the tests in the background may have had SIGINT ignored, which is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def contents(data_dir):
    """All that a finished build leaves, by name."""
    folder = data_dir / "tfrecord"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture(scope="session")
def finished(source, tmp_path_factory):
    """An uninterrupted build: its folder and what it said."""
    data_dir = Path(shutil.copytree(source, tmp_path_factory.mktemp("finished") / "dataset"))
    status, out, err = build(data_dir, "--num-workers", "2")
    assert (status, out) == (0, ""), err
    return data_dir, err


# --- What comes out -------------------------------------------------------------------------------


def test_shards_and_manifest(finished):
    data_dir, _ = finished
    assert contents(data_dir).keys() == SHARDS | {"manifest.json"}
    manifest = json.loads((data_dir / "tfrecord" / "manifest.json").read_text())
    assert sorted(manifest["tags"]) == sorted(TAGS)
    assert (manifest["sample_rate"], manifest["num_samples"]) == (8000, 4000)
    assert manifest["versions"].keys() >= {"python", "av", "numpy"}
    assert manifest["options"]["num_audios_per_shard"] == 2
    assert manifest["options"]["decoder"] == "av"
    splits = manifest["splits"]
    assert {name: split["clips"] for name, split in splits.items()} == {
        "train": 11, "val": 5, "test": 5,
    }  # fmt: skip
    assert {shard["name"] for split in splits.values() for shard in split["shards"]} == SHARDS
    for split in splits.values():
        for count in ("clips", "segments"):
            assert split[count] == sum(shard[count] for shard in split["shards"])


def test_shards_hold_each_clips_segments_and_labels(finished):
    data_dir, _ = finished
    dataset = open_dataset(data_dir)
    rows = (data_dir / "annotations_final.csv").read_text().replace('"', "").splitlines()
    header, *rows = [row.split("\t") for row in rows]
    row_of = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    found = {
        split: list(read_clips(described.shards)) for split, described in dataset.splits.items()
    }
    for split, clips in found.items():
        assert len(clips) == dataset.splits[split].num_clips
        assert sum(len(clip.segments) for clip in clips) == dataset.splits[split].num_segments
        for clip in clips:
            row = row_of[clip.clip_id]
            assert clip.mp3_path == row["mp3_path"]
            assert clip.mp3_path[0] in {"train": "0123456789ab", "val": "c", "test": "def"}[split]
            assert clip.labels.tolist() == [int(row[tag]) for tag in dataset.tags]
            samples = decode(data_dir / "mp3" / clip.mp3_path, sample_rate=8000)
            np.testing.assert_array_equal(clip.segments, cut_segments(samples, 4000))
    identities = [clip.clip_id for clips in found.values() for clip in clips]
    skipped = [str(number + 2) for number in (3, 13, 20)]
    assert sorted(identities + skipped) == sorted(row_of)


def test_skipped_clips_are_named_with_reasons(finished):
    data_dir, err = finished
    manifest = json.loads((data_dir / "tfrecord" / "manifest.json").read_text())
    skipped = {row["clip_id"]: row for row in manifest["skipped"]}
    assert skipped.keys() == {"5", "15", "22"}
    for clip_id, reason in [
        ("5", "the file is empty"),
        ("15", "cannot be decoded: Invalid data found when processing input"),
        ("22", "samples are less than one segment of 4000"),
    ]:
        row = skipped[clip_id]
        assert reason in row["reason"]
        assert row["reason"].startswith(f"{row['mp3_path']}: ")
        assert f"skipped clip {clip_id}: {row['reason']}\n" in err
    assert "train: 11 clips" in err
    assert "3 clips skipped" in err


# --- The same bytes -------------------------------------------------------------------------------


def test_building_again_does_nothing(finished, data_dir):
    expected = contents(finished[0])
    shutil.copytree(finished[0] / "tfrecord", data_dir / "tfrecord")
    shutil.rmtree(data_dir / "mp3")
    # The one clip that is left stands for the rest: none is decoded.
    (data_dir / "mp3" / "0").mkdir(parents=True)
    (data_dir / "mp3" / "0" / "clip-00-0-1.mp3").touch()
    before = {path.name: path.stat().st_mtime_ns for path in (data_dir / "tfrecord").iterdir()}
    assert build_mtt.main(command(data_dir)[2:]) == 0
    assert contents(data_dir) == expected
    after = {path.name: path.stat().st_mtime_ns for path in (data_dir / "tfrecord").iterdir()}
    assert {name for name in SHARDS if before[name] == after[name]} == SHARDS


@pytest.mark.parametrize("num_workers", ["1", "3"])
def test_number_of_workers_does_not_matter(finished, data_dir, num_workers):
    assert build_mtt.main([*command(data_dir)[2:], "--num-workers", num_workers]) == 0
    assert contents(data_dir) == contents(finished[0])


def test_deleted_shards_are_made_again(finished, data_dir):
    shutil.copytree(finished[0] / "tfrecord", data_dir / "tfrecord")
    gone = ["train-0003-of-0006.tfrecord", "test-0001-of-0003.seq.tfrecord"]
    for name in gone:
        (data_dir / "tfrecord" / name).unlink()
    kept = data_dir / "tfrecord" / "train-0000-of-0006.tfrecord"
    written = kept.stat().st_mtime_ns
    assert build_mtt.main(command(data_dir)[2:]) == 0
    assert contents(data_dir) == contents(finished[0])
    assert kept.stat().st_mtime_ns == written


def wait_until(is_true, process, seconds=30):
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        if process.poll() is not None:
            return
        time.sleep(0.002)


def kill_and_go_on(data_dir, moment, expected):
    """Kill a build, its parent process only, at a moment; build again; compare."""
    process = start(data_dir, "--num-workers", "2")
    moment(process)
    process.kill()
    process.communicate()
    status, _, err = build(data_dir, "--num-workers", "2")
    assert status == 0, err
    assert contents(data_dir) == expected


@pytest.mark.parametrize("num_shards", [0, 1, 5])
def test_killed_build_goes_on_to_the_same_bytes(finished, data_dir, num_shards):
    folder = data_dir / "tfrecord"

    def moment(process):
        wait_until(folder.is_dir, process)
        wait_until(lambda: len(list(folder.glob("*.tfrecord"))) >= num_shards, process)

    kill_and_go_on(data_dir, moment, contents(finished[0]))


def test_leftovers_of_a_killed_build_are_cleared(finished, data_dir):
    (data_dir / "tfrecord").mkdir()
    leftover = ".train-0000-of-0006.tfrecord.node1.123.0badcafe.tmp"
    (data_dir / "tfrecord" / leftover).write_bytes(b"half")
    assert build_mtt.main(command(data_dir)[2:]) == 0
    assert contents(data_dir) == contents(finished[0])


def test_two_that_write_one_shard_at_once_do_not_meet(tmp_path):
    """As a worker does that was given up, beside the one in its place; they may share a pid."""
    path = tmp_path / "train-0000-of-0001.tfrecord"
    records = [bytes([number]) * 100_000 for number in range(3)]

    def interrupted():
        yield records[0]
        write_records(path, records)
        yield from records[1:]

    write_records(path, interrupted())
    assert list(read_records(path)) == records
    assert list(tmp_path.iterdir()) == [path]


# --- Workers --------------------------------------------------------------------------------------


def workers_of(process):
    """List the process ids of a build's workers."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    with contextlib.suppress(OSError):
        return [
            int(child)
            for child in children.read_text().split()
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]
    return []


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("seed", range(45))
def test_build_killed_at_a_random_moment_goes_on(finished, data_dir, seed):
    """A worker, the parent, or all of them, by SIGKILL; from first imports past the end."""
    random = np.random.default_rng(seed)
    whom = ("worker", "parent", "all")[seed % 3]
    # Half while workers start, half while shards are written, which takes them little.
    num_shards, seconds = random.choice([(0, 0.8), (1, 0.1)])
    seconds = random.uniform(0, seconds)
    folder = data_dir / "tfrecord"
    process = start(data_dir, "--num-workers", "2")
    if whom == "worker" or random.random() < 0.8:
        wait_until(lambda: workers_of(process), process)
    wait_until(lambda: len(list(folder.glob("*.tfrecord"))) >= num_shards, process)
    time.sleep(seconds)
    if whom == "parent":
        process.kill()
    elif whom == "all":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        for worker in workers_of(process)[:1]:
            os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=60)  # a build without its worker ends, too
    killed = process.returncode in (1, -signal.SIGKILL)
    assert killed or process.returncode == 0, err
    if whom == "worker" and killed:
        assert "error: a worker process died (" in err.splitlines()[-1]
    print(f"seed {seed}: {whom}, {'killed' if killed else 'too late'}")  # shown by pytest -rP
    for path in folder.glob("*.tfrecord"):
        assert path.read_bytes() == (finished[0] / "tfrecord" / path.name).read_bytes()
    status, _, err = build(data_dir, "--num-workers", "2")
    assert status == 0, err
    assert contents(data_dir) == contents(finished[0])


@needs_proc
def test_death_of_a_worker_is_said_and_ends_the_build(data_dir):
    process = start(data_dir, "--num-workers", "2")
    wait_until(lambda: len(workers_of(process)) == 2, process)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in err
    *_, last = err.strip().splitlines()
    assert last.startswith("build_mtt.py: error: a worker process died (")
    assert "run the same command again" in last


def run_program(program, data_dir):
    """Build with two workers by a program that changes something first."""
    return subprocess.run(
        [sys.executable, "-c", program, *command(data_dir, "--num-workers", "2")[2:]],
        cwd=SCRIPT.parent, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_death_of_a_worker_while_another_is_started_ends_the_build(data_dir):
    """The moment at which pools of processes are known to wait for ever."""
    program = """if True:
        import multiprocessing.context, sys, time
        start = multiprocessing.context.SpawnProcess.start
        started = []

        def start_when_the_first_is_dead(process):
            if started:
                started[0].kill()
                time.sleep(0.5)
            start(process)
            started.append(process)

        multiprocessing.context.SpawnProcess.start = start_when_the_first_is_dead
        import build_mtt
        sys.exit(build_mtt.main(sys.argv[1:]))
    """
    done = run_program(program, data_dir)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: a worker process died (" in done.stderr.splitlines()[-1]


def test_too_few_processes_are_one_line_that_names_the_option(data_dir):
    """RLIMIT_NPROC does not bind root, so that the second worker's start does what it would."""
    program = """if True:
        import errno, multiprocessing.context, os, sys
        start = multiprocessing.context.SpawnProcess.start
        started = []

        def start_one(process):
            if started:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            start(process)
            started.append(process)

        multiprocessing.context.SpawnProcess.start = start_one
        import build_mtt
        sys.exit(build_mtt.main(sys.argv[1:]))
    """
    done = run_program(program, data_dir)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert "no more processes or threads can be started (" in done.stderr
    assert "Resource temporarily unavailable" in done.stderr
    assert "with fewer --num-workers" in done.stderr


@pytest.mark.parametrize("lock", ["threading.Lock()", "None"])
def test_error_that_cannot_be_sent_is_told_by_its_own_words(data_dir, tmp_path, lock):
    """One that cannot be pickled, for its lock, and one that cannot be made again of its pickle."""
    script = tmp_path / "raising.py"  # each worker runs it too, up to its last lines
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
    done = subprocess.run(
        [sys.executable, str(script), *command(data_dir, "--num-workers", "1")[2:]],
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "RuntimeError: OddError: utterly odd\n" in done.stderr
    assert "in make_shard" in done.stderr  # where it was raised
    assert "worker process died" not in done.stderr


def test_many_workers_under_a_low_limit_of_open_files(finished, data_dir):
    def limit():
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, hard))

    done = subprocess.run(
        command(data_dir, "--num-workers", "4"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=limit,
    )
    assert done.returncode == 0, done.stderr
    assert contents(data_dir) == contents(finished[0])


@needs_proc
@pytest.mark.parametrize("num_shards", [0, 1])
def test_workers_end_with_a_killed_parent(data_dir, num_shards):
    process = start(data_dir, "--num-workers", "2")
    wait_until(lambda: len(workers_of(process)) == 2, process)
    workers = workers_of(process)
    assert len(workers) == 2
    wait_until(lambda: len([*data_dir.glob("tfrecord/*.tfrecord")]) >= num_shards, process)
    process.kill()
    process.communicate(timeout=10)
    deadline = time.monotonic() + 10
    while alive := [worker for worker in workers if is_running(worker)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)


def is_running(process_id):
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@needs_proc
@pytest.mark.parametrize("num_shards", [0, 1])
def test_interrupt_is_one_line(data_dir, num_shards):
    process = start(data_dir, "--num-workers", "2")
    wait_until(lambda: len(workers_of(process)) == 2, process)
    wait_until(lambda: len([*data_dir.glob("tfrecord/*.tfrecord")]) >= num_shards, process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.endswith("build_mtt.py: error: interrupted\n")


@needs_proc
def test_sigterm_ends_workers_leaves_nothing_and_is_one_line(finished, data_dir):
    process = start(data_dir, "--num-workers", "2")
    wait_until(lambda: len(workers_of(process)) == 2, process)
    workers = workers_of(process)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    last = "build_mtt.py: error: terminated: run the same command again to go on\n"
    assert err.endswith(last)
    assert err.count("\n") == 1
    assert not [worker for worker in workers if is_running(worker)]
    assert not list((data_dir / "tfrecord").glob(".*.tmp"))
    assert build_mtt.main(command(data_dir)[2:]) == 0
    assert contents(data_dir) == contents(finished[0])


def test_error_in_a_worker_is_one_line(data_dir):
    # A folder stands where the shard should, so that the file cannot be given its name.
    blocked = data_dir / "tfrecord" / "train-0002-of-0006.tfrecord"
    (blocked / "in the way").mkdir(parents=True)
    status, _, err = build(data_dir)
    assert status == 1
    assert "Traceback" not in err
    assert "train-0002-of-0006.tfrecord" in err.splitlines()[-1]
    assert "directory" in err.splitlines()[-1]


# --- Clips that are skipped -----------------------------------------------------------------------


def as_user():
    """Take from root, where the tests run as root, the right to read what no one may."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def broken_files(folder):
    """Make each kind of file that is met, and say what must become of it: segments, or a reason."""
    sound = encode_audio(folder / "sound.mp3", synthesise(2)).read_bytes()
    hours = encode_audio(folder / "ten-seconds.mp3", synthesise(10)).read_bytes() * 1080
    video = encode_float(folder / "video.mp4", "aac", layout="mono").read_bytes()

    def wav(samples, sample_rate):
        path = folder / "a.wav"
        return encode_audio(path, samples, sample_rate, "pcm_s16le", None).read_bytes()

    return {
        "zero bytes": (b"", "the file is empty"),
        "truncated": (sound[: len(sound) * 2 // 3], 2),
        "random bytes": (np.random.default_rng(0).bytes(20_000), "cannot be decoded: "),
        "text as MP3": (b"No music.\n" * 500, "cannot be decoded: "),
        "missing": (None, "no such file"),
        "unreadable": (sound, "cannot be decoded: Permission denied"),
        "video with audio": (video, 8),
        "8 kHz": (wav(synthesise(1.2, 8000), 8000), 2),
        "96 kHz, 6 channels": (wav(synthesise(1.2, 96000, 6), 96000), 2),
        "silent": (wav(np.zeros((9600, 1), np.int16), 8000), 2),
        "one sample": (wav(np.ones((1, 1), np.int16), 8000), "1 samples are less than one segment"),
        "three hours": (hours, 58),  # of its first 29 s
    }  # fmt: skip


def test_every_kind_of_broken_file_is_skipped_with_its_reason_or_handled(source, tmp_path):
    data_dir = Path(shutil.copytree(source, tmp_path / "dataset"))
    clips = [f"{folder}/{path.name}" for folder in "0123456789ab"
             for path in (data_dir / "mp3" / folder).iterdir()]  # fmt: skip
    kinds = broken_files(tmp_path)
    of_clip = dict(zip(clips, kinds, strict=True))
    for clip, kind in of_clip.items():
        path = data_dir / "mp3" / clip
        path.unlink()
        if kinds[kind][0] is not None:
            path.write_bytes(kinds[kind][0])
        if kind == "unreadable":
            path.chmod(0)
    done = subprocess.run(
        command(data_dir, "--max-skipped", "40"), capture_output=True, text=True, timeout=120,
        preexec_fn=as_user if os.geteuid() == 0 else None,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dataset = open_dataset(data_dir)
    found = {
        clip.mp3_path: len(clip.segments) for clip in read_clips(dataset.splits["train"].shards)
    }
    manifest = json.loads((data_dir / "tfrecord" / "manifest.json").read_text())
    skipped = {row["mp3_path"]: row["reason"] for row in manifest["skipped"]}
    for clip, kind in of_clip.items():
        expected = kinds[kind][1]
        if isinstance(expected, str):
            assert expected in skipped[clip], kind
            assert clip not in found
            assert f": {skipped[clip]}\n" in done.stderr
        else:
            assert found[clip] == expected, kind
            assert clip not in skipped
    assert f"{len(skipped)} clips skipped" in done.stderr


def test_name_too_long_for_the_file_system_is_skipped_with_its_reason(capsys, data_dir):
    name = f"0/{'n' * 300}.mp3"
    path = data_dir / "annotations_final.csv"
    header, *rows = path.read_text().splitlines()
    long = "\t".join(["1", *["1"] * len(TAGS), name])
    path.write_text("\n".join([header, long, *rows]) + "\n")
    assert build_mtt.main(command(data_dir)[2:]) == 0
    assert f"skipped clip 1: {name}: " in capsys.readouterr().err
    manifest = json.loads((data_dir / "tfrecord" / "manifest.json").read_text())
    (row,) = (row for row in manifest["skipped"] if row["clip_id"] == "1")
    assert "File name too long" in row["reason"]
    assert len(manifest["skipped"]) == 4
    assert sum(split["clips"] for split in manifest["splits"].values()) == 21


@pytest.mark.parametrize(("percent", "status"), [("12", 1), ("12.5", 0), ("0", 1), ("100", 0)])
def test_too_many_skipped_clips_end_in_status_1_with_all_shards(
    capsys, finished, data_dir, percent, status
):
    shutil.copytree(finished[0] / "tfrecord", data_dir / "tfrecord")
    assert build_mtt.main([*command(data_dir)[2:], "--max-skipped", percent]) == status
    assert contents(data_dir) == contents(finished[0])
    last = capsys.readouterr().err.splitlines()[-1]
    refused = f"error: 3 of 24 clips (12.5 %) were skipped, more than --max-skipped {percent}: "
    assert (refused in last) == bool(status)


def test_at_most_5_percent_may_be_skipped_by_default(data_dir):
    status, _, err = build(data_dir, "--max-skipped", "5")
    assert build_mtt.build_parser().parse_args([]).max_skipped == 5
    assert status == 1
    assert "3 of 24 clips (12.5 %) were skipped" in err.splitlines()[-1]
    assert contents(data_dir).keys() == SHARDS | {"manifest.json"}


def test_skipped_clips_are_tried_again(finished, data_dir, tmp_path, capsys):
    """A clip that was mended gets into its shard, and all ends as if it had been sound."""
    shutil.copytree(finished[0] / "tfrecord", data_dir / "tfrecord")
    (empty,) = data_dir.glob("mp3/3/*.mp3")
    encode_audio(empty, synthesise(1.2))
    assert build_mtt.main(command(data_dir)[2:]) == 0
    assert f"made again, for 3/{empty.name} can be decoded now\n" in capsys.readouterr().err
    afresh = tmp_path / "afresh"
    afresh.mkdir()
    shutil.copy(data_dir / "annotations_final.csv", afresh)
    shutil.copytree(data_dir / "mp3", afresh / "mp3")
    assert build_mtt.main(command(afresh)[2:]) == 0
    assert contents(data_dir) == contents(afresh) != contents(finished[0])


def test_mended_clip_costs_no_clip_that_is_gone(finished, data_dir):
    shutil.copytree(finished[0] / "tfrecord", data_dir / "tfrecord")
    manifest = json.loads((data_dir / "tfrecord" / "manifest.json").read_text())
    (empty,) = data_dir.glob("mp3/3/*.mp3")
    encode_audio(empty, synthesise(1.2))
    for path in data_dir.glob("mp3/*/*.mp3"):
        if path != empty:
            path.unlink()
    assert build_mtt.main(command(data_dir)[2:]) == 0
    assert json.loads((data_dir / "tfrecord" / "manifest.json").read_text()) == manifest


def test_shard_cut_short_is_made_again(finished, data_dir):
    folder = shutil.copytree(finished[0] / "tfrecord", data_dir / "tfrecord")
    path = folder / "train-0003-of-0006.tfrecord"
    start_of_last, _ = index_records(path)[-1]
    path.write_bytes(path.read_bytes()[: start_of_last - 12])
    with pytest.raises(ShardError, match=r"train-0003.*truncated.*run build_mtt\.py again"):
        open_dataset(data_dir)
    assert build_mtt.main(command(data_dir)[2:]) == 0
    assert contents(data_dir) == contents(finished[0])


# --- Links ----------------------------------------------------------------------------------------


def links_out(kind, data_dir, outside):
    """Let a link lead a clip's path out of mp3/."""
    clip = data_dir / "mp3" / "4" / "clip-04-0-1.mp3"
    shutil.copytree(clip.parent, outside)
    if kind == "folder":
        shutil.rmtree(clip.parent)
        clip.parent.symlink_to(outside)
    elif kind == "chain":
        (data_dir / "mp3" / "way").symlink_to(outside)
        clip.unlink()
        clip.symlink_to(f"../way/{clip.name}")
    else:
        clip.unlink()
        target = outside / clip.name
        clip.symlink_to(target if kind == "absolute" else os.path.relpath(target, clip.parent))


@pytest.mark.parametrize("kind", ["absolute", "relative", "folder", "chain"])
def test_link_that_leads_out_is_refused_with_row_and_column(capsys, data_dir, tmp_path, kind):
    links_out(kind, data_dir, tmp_path / "outside")
    with opened(tmp_path / "outside" / "clip-04-0-1.mp3") as was_opened:
        line = refusal(capsys, data_dir)
        assert not was_opened()
    place = f"{data_dir / 'annotations_final.csv'}: row 6, column 'mp3_path': a link takes "
    assert f"{place}4/clip-04-0-1.mp3 out of {data_dir / 'mp3'}, to {tmp_path / 'outside'}" in line
    assert not (data_dir / "tfrecord").exists()


def test_links_that_stay_inside_and_a_linked_folder_of_audio_are_read(finished, data_dir, tmp_path):
    (data_dir / "mp3").rename(tmp_path / "elsewhere")
    (data_dir / "mp3").symlink_to(tmp_path / "elsewhere")
    clip = data_dir / "mp3" / "4" / "clip-04-0-1.mp3"
    clip.rename(data_dir / "mp3" / "moved.mp3")
    clip.symlink_to("../moved.mp3")
    assert build_mtt.main(command(data_dir)[2:]) == 0
    assert contents(data_dir) == contents(finished[0])


# --- Names that are no UTF-8 ----------------------------------------------------------------------


def test_folder_of_audio_whose_name_is_no_utf_8(data_dir, tmp_path):
    music = tmp_path / os.fsdecode(b"Musik_\xe4")
    try:
        (data_dir / "mp3").rename(music)
    except OSError as error:
        pytest.skip(f"no such name here: {error}")
    arguments = [*command(data_dir)[2:], "--audio-dir", str(music)]
    assert build_mtt.main(arguments) == 0
    manifest = json.loads((data_dir / "tfrecord" / "manifest.json").read_bytes())
    assert manifest["options"]["audio_dir"] == os.path.relpath(music, data_dir)
    shards = sorted((data_dir / "tfrecord").glob("*.tfrecord"))
    assert {path.name for path in shards} == SHARDS
    before = [path.stat().st_mtime_ns for path in shards]
    assert build_mtt.main(arguments) == 0
    assert [path.stat().st_mtime_ns for path in shards] == before


# --- A full disk ----------------------------------------------------------------------------------


def test_full_disk_is_one_line_and_the_build_goes_on(finished, data_dir, small_disk):
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb") as file:
        while True:
            file.write(bytes(1 << 16))
    os.truncate(filler, filler.stat().st_size - 300_000)  # room for some of the shards
    (data_dir / "tfrecord").symlink_to(small_disk / "tfrecord")
    (small_disk / "tfrecord").mkdir()
    status, _, err = build(data_dir, "--num-workers", "2")
    assert status == 1
    assert err.count("\n") == 1 and "Traceback" not in err
    assert ".tfrecord: No space left on device (" in err
    assert "make space and run the same command again" in err
    left = list((small_disk / "tfrecord").glob("*.tfrecord"))
    assert 0 < len(left) < len(SHARDS)
    for path in left:
        assert path.read_bytes() == (finished[0] / "tfrecord" / path.name).read_bytes()
    assert not list((small_disk / "tfrecord").glob("*.tmp"))
    assert not list((small_disk / "tfrecord").glob(".*.tmp"))
    filler.unlink()
    status, _, err = build(data_dir, "--num-workers", "2")
    assert status == 0, err
    assert contents(data_dir) == contents(finished[0])


def test_file_size_limit_is_one_line_and_the_build_goes_on(finished, data_dir):
    """What a quota does, where no disk may be mounted."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    done = subprocess.run(
        command(data_dir), capture_output=True, text=True, timeout=60, preexec_fn=limit
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert ".tfrecord: File too large (" in done.stderr
    folder = data_dir / "tfrecord"
    for path in folder.glob("*.tfrecord"):
        assert path.read_bytes() == (finished[0] / "tfrecord" / path.name).read_bytes()
    assert not list(folder.glob(".*.tmp"))
    assert build_mtt.main(command(data_dir)[2:]) == 0
    assert contents(data_dir) == contents(finished[0])


# --- What is refused ------------------------------------------------------------------------------


def refusal(capsys, data_dir, *options):
    """Run in this process, expect a refusal, and return its line."""
    status = build_mtt.main(["--data-dir", str(data_dir), *OPTIONS, *options])
    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--num-samples", "4001"], "--num-samples was 4000, now 4001"),
        (["--sample-rate", "16000"], "--sample-rate was 8000, now 16000"),
        (["--num-audios-per-shard", "3"], "--num-audios-per-shard was 2, now 3"),
    ],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_other_options_are_refused(capsys, finished, data_dir, options, found, is_finished):
    folder = shutil.copytree(finished[0] / "tfrecord", data_dir / "tfrecord")
    if not is_finished:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / ".progress").mkdir()
        (folder / ".progress" / "options.json").write_text(json.dumps(manifest["options"]))
        (folder / "manifest.json").unlink()
    before = contents_of_files(folder)
    line = refusal(capsys, data_dir, *options)
    assert found in line
    assert "use the same options, or delete this folder" in line
    assert contents_of_files(folder) == before


def contents_of_files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_changed_annotations_are_refused(capsys, finished, data_dir):
    shutil.copytree(finished[0] / "tfrecord", data_dir / "tfrecord")
    with open(data_dir / "annotations_final.csv", "a") as file:
        file.write("\t".join(["999", *["1"] * len(TAGS), "0/new.mp3"]) + "\n")
    assert "annotations_final.csv has changed since" in refusal(capsys, data_dir)


def test_second_build_at_once_is_refused(capsys, data_dir):
    (data_dir / "tfrecord").mkdir()
    with open(data_dir / "tfrecord" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = refusal(capsys, data_dir)
    assert f"{data_dir / 'tfrecord'}: another build is at work here" in line


def test_folder_that_has_no_locks_is_built_in_all_the_same(capsys, monkeypatch, finished, data_dir):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert build_mtt.main(command(data_dir)[2:]) == 0
    said = f"{data_dir / 'tfrecord'}: cannot be locked (No locks available): start no second build"
    assert said in capsys.readouterr().err
    assert contents(data_dir) == contents(finished[0])


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--num-workers", "2"], "--num-workers is of this machine's processes, with --scheduler "),
        ([], "--scheduler: distributed is not installed: python -m pip install -r requirements/"),
    ],
)
def test_scheduler_that_cannot_be_used_is_refused(capsys, monkeypatch, data_dir, options, found):
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "cluster", raising=False)
    options = ["--scheduler", "tcp://127.0.0.1:8786", *options]
    assert build_mtt.main([*command(data_dir)[2:], *options]) == 2
    err = capsys.readouterr().err
    assert f"error: {found}" in err
    assert err.count("\n") == 1
    assert not (data_dir / "tfrecord").exists()


def test_no_dataset_says_what_to_download(capsys, tmp_path):
    for data_dir in (tmp_path / "nowhere", tmp_path):
        line = refusal(capsys, data_dir)
        assert line.startswith(f"{Path(sys.argv[0]).name}: error: {data_dir}: no dataset here: ")
        assert "download annotations_final.csv and mp3.zip.001-003 from " in line


def test_clips_in_another_folder_are_not_all_skipped(capsys, data_dir):
    (data_dir / "mp3" / "unpacked").mkdir()
    for folder in "0123456789abcdef":
        (data_dir / "mp3" / folder).rename(data_dir / "mp3" / "unpacked" / folder)
    line = refusal(capsys, data_dir)
    assert f"{data_dir / 'mp3'}: none of the 24 clips is here" in line
    assert f"{data_dir / 'mp3' / '0' / 'clip-00-0-1.mp3'}" in line


def test_broken_annotations_are_refused(capsys, data_dir):
    path = data_dir / "annotations_final.csv"
    write_annotations(path, [["1", *[2] * len(TAGS), "0/clip-00-0-1.mp3"]])
    assert f"{path}: row 2, column '{TAGS[0]}': found '2'" in refusal(capsys, data_dir)


@pytest.mark.parametrize(
    "options",
    [["--num-samples", "0"], ["--sample-rate", "x"], ["--num-workers", "0"], ["--decoder", "sox"],
     ["--num-audios-per-shard", "-1"], ["--unknown"], ["stray"]],
)  # fmt: skip
def test_bad_options_are_usage_errors(capsys, data_dir, options):
    with pytest.raises(SystemExit) as caught:
        build_mtt.main(["--data-dir", str(data_dir), *options])
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err
    assert not (data_dir / "tfrecord").exists()


# --- Help -----------------------------------------------------------------------------------------


def test_help_ends_with_examples():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True
    )
    examples = done.stdout.partition("examples:\n")[2].splitlines()
    assert len(examples) >= 2
    assert all(line.startswith("  python build_mtt.py --data-dir ") for line in examples)
    for option in ("--sample-rate HZ", "--num-samples N", "--num-workers N", "--verbose"):
        assert option in done.stdout
    num_options = len(re.findall(r"^  --", done.stdout, re.MULTILINE))
    assert " ".join(done.stdout.split()).count("(default: ") == num_options


def test_building_needs_no_deep_learning_library_and_no_cluster():
    run = [sys.executable, "-c", "import sys, build_mtt; print(*sys.modules)"]
    done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=SCRIPT.parent)
    modules = set(done.stdout.split())
    assert "build_mtt" in modules
    assert not modules & {"tensorflow", "keras", "torch", "jax", "distributed", "cluster"}
