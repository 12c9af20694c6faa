"""Audio and datasets for several tests, made once per session; nothing is downloaded."""

import csv
import ctypes
import errno
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if importlib.util.find_spec("tensorflow") is None:
    os.environ.setdefault("KERAS_BACKEND", "jax")  # modules that import Keras directly need this
# On JAX, many processes compile the same small networks.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import build_mtt

import av
import numpy as np
import pytest

# Background processes of a shell ignore Ctrl-C, and so would the processes that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
TAGS = ("guitar", "slow", "techno", "strings", "drums", "electronic")
TAGS += ("rock", "fast", "piano", "ambient", "beat", "violin")
# Folder of each clip, which selects its split: 12 train, 6 val, 6 test.
FOLDERS = "0123456789ab" + "cccccc" + "ddeeff"
CLIP_SECONDS = (4, 6, 4, 9)  # 1, 2, 1 and 3 segments of 59,049 samples at 22,050 Hz


def synthesise(seconds, sample_rate=16000, channels=1, tags=(0,), seed=0):
    """Mix one tone per tag with noise; return int16 samples [shape=(n_samples, channels)]."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    mix = random.normal(0, 0.02, (len(time), channels))
    for tag in tags:
        phase = random.uniform(0, 2 * np.pi, channels)
        mix += 0.08 * np.sin(2 * np.pi * 220 * 1.3**tag * time[:, np.newaxis] + phase)
    return np.round(mix * 32767).clip(-32768, 32767).astype(np.int16)


def encode_audio(path, samples, sample_rate=16000, codec="libmp3lame", bit_rate=32000, **options):
    """Encode int16 samples [shape=(n_samples, channels)] in the format of the file name."""
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[samples.shape[1]]
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=sample_rate, layout=layout)
        if bit_rate:
            stream.bit_rate = bit_rate
        packed = np.ascontiguousarray(samples).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format="s16", layout=layout)
        frame.sample_rate = sample_rate
        for resampled in stream.codec_context.encode(frame), stream.codec_context.encode(None):
            for packet in resampled:
                packet.stream = stream
                container.mux(packet)
    return path


def encode_float(path, codec, sample_rate=44100, layout="stereo", seconds=4):
    """Write an audio file with a codec that takes planar float32 frames."""
    channels = {"mono": 1, "stereo": 2}[layout]
    mono = synthesise(seconds, sample_rate, seed=3).T / np.float32(32768)
    samples = np.repeat(mono.astype(np.float32), channels, axis=0)  # (channels, n_samples)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=sample_rate, layout=layout)
        stream.codec_context.options = {"strict": "experimental"}
        stream.codec_context.open()
        if path.suffix in (".mp4", ".mkv"):
            add_picture(container)
        for start in range(0, samples.shape[1], stream.codec_context.frame_size):
            block = samples[:, start : start + stream.codec_context.frame_size]
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), "fltp", layout)
            frame.sample_rate, frame.pts = sample_rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def wrecked(content):
    """Overwrite all frames of an MP3 except the first five, but not their headers."""
    content = bytearray(content)
    frames = [at for at in range(len(content) - 1) if content[at : at + 2] == b"\xff\xf3"]
    for start in frames[5:]:
        content[start + 4 : start + 40] = b"\xff" * 36
    return bytes(content)


def add_picture(container):
    """Add a video stream of one second."""
    stream = container.add_stream("mpeg4", rate=10, width=32, height=32, pix_fmt="yuv420p")
    for brightness in range(10):
        pixels = np.full((32, 32, 3), 10 * brightness, np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
    container.mux(stream.encode(None))


def write_dataset(data_dir, num_clips=24, seconds=CLIP_SECONDS):
    """Write annotations_final.csv and mp3/ with short clips, in which each tag is a tone."""
    rows = []
    for clip in range(num_clips):
        folder = FOLDERS[clip]
        # Every second clip has tags 0 to 2, every third has tags 3 to 5, and so on. Only training
        # clips have the last tag.
        tags = [tag for tag in range(len(TAGS)) if (clip + tag) % (tag // 3 + 2) == 0]
        if folder not in "0123456789ab":
            tags = [tag for tag in tags if tag != len(TAGS) - 1]
        mp3_path = f"{folder}/clip-{clip:02d}-0-{seconds[clip % len(seconds)]}.mp3"
        (data_dir / "mp3" / folder).mkdir(parents=True, exist_ok=True)
        samples = synthesise(seconds[clip % len(seconds)], tags=tags, seed=clip)
        encode_audio(data_dir / "mp3" / mp3_path, samples)
        rows.append([clip + 2, *(int(tag in tags) for tag in range(len(TAGS))), mp3_path])
    write_annotations(data_dir / "annotations_final.csv", rows)
    return data_dir


def write_annotations(path, rows, tags=TAGS):
    """Write rows of clip_id, labels, mp3_path in MagnaTagATune's format."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL)
        writer.writerow(["clip_id", *tags, "mp3_path"])
        writer.writerows(rows)


def write_other_tags(data_dir):
    """Write annotations from which shards without a manifest get 50 tags; return the tags."""
    tags = tuple(f"mood {number}" for number in range(50))
    labels = np.eye(len(tags), dtype=int)
    rows = [[number, *row, f"0/{number}.mp3"] for number, row in enumerate(labels, start=2)]
    write_annotations(data_dir / "annotations_final.csv", rows, tags)
    return tags


def run_python(*command, timeout=300, **variables):
    """Run Python with the toolkit in a new process, on CPUs; return it with its output."""
    python_path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    environment = os.environ | {"PYTHONPATH": python_path, "CUDA_VISIBLE_DEVICES": ""} | variables
    how = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, *map(str, command)], timeout=timeout, **how)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def deny(monkeypatch, folder):
    """Refuse to list a folder and to find what is in it, as without permission; root may do all."""

    def refuse(call):
        def checked(path=".", *args, **options):
            place = Path(path) if isinstance(path, str | os.PathLike) else Path("/")
            if folder in place.parents or (call is not os.stat and place == folder):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return call(path, *args, **options)

        return checked

    for name in ("listdir", "scandir", "stat"):
        monkeypatch.setattr(os, name, refuse(getattr(os, name)))


@contextmanager
def opened(path):
    """Yield a function that returns whether any process opened a file since its last call."""
    if sys.platform != "linux":
        pytest.skip("needs inotify")
    libc = ctypes.CDLL(None)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    try:
        assert watch >= 0
        assert libc.inotify_add_watch(watch, os.fsencode(path), 0x20) >= 0  # IN_OPEN

        def was_opened():
            try:
                return bool(os.read(watch, 4096))
            except BlockingIOError:
                return False

        with open(path, "rb"):
            assert was_opened(), "inotify does not work"
        yield was_opened
    finally:
        os.close(watch)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 3 MB for tests of full disks; needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(str(error))
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture
def browser(tmp_path):
    """Start Chromium, which logs its requests."""
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not (driver and program):
        pytest.skip("Chromium and its driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    names = (
        "headless=new no-sandbox disable-gpu disable-dev-shm-usage no-first-run disable-sync "
        "disable-background-networking disable-component-update window-size=1400,2400"
    )
    for name in (*names.split(), f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{name}")
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="session")
def golden() -> Path:
    """Return the folder with output of the published program."""
    return GOLDEN


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Path:
    """Build a dataset of 24 clips of 1 to 3 segments with 12 tags; tests must not change it."""
    data_dir = write_dataset(tmp_path_factory.mktemp("tiny"))
    build_mtt.build(data_dir, num_audios_per_shard=4, num_workers=2)
    return data_dir


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """Write 24 short clips, three of which are skipped, without shards (see `builds`)."""
    from builds import write_source

    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture
def data_dir(source, tmp_path) -> Path:
    """Copy `source` for a test that builds or changes the dataset."""
    return Path(shutil.copytree(source, tmp_path / "dataset"))


@pytest.fixture(scope="session")
def finished(source, tmp_path_factory):
    """Build `source` without interruption; return the folder and the messages."""
    from builds import run

    data_dir = Path(shutil.copytree(source, tmp_path_factory.mktemp("finished") / "dataset"))
    done = run(data_dir, "--num-workers", "2")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return data_dir, done.stderr


@pytest.fixture(scope="session")
def trained(tiny_dataset, tmp_path_factory) -> Path:
    """Train two stages of two epochs on `tiny_dataset`; do not change the folder."""
    from training_runs import train_two_stages

    return train_two_stages(tiny_dataset, tmp_path_factory.mktemp("trained") / "log")


@pytest.fixture
def log(trained, tmp_path):
    """Copy `trained` for a test that changes the folder."""
    return Path(shutil.copytree(trained, tmp_path / "log"))
