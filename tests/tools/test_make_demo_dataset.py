"""The demo dataset: MagnaTagATune's format, consistent tags, reproducible bytes."""

import collections
import csv
import hashlib
import multiprocessing
import os
import signal
import threading
import time

from toolkit.data.annotations import MTT_TOP_TAGS
from toolkit.data.tables import read_tables
from tools import make_demo_dataset
from tools.demo_recipes import SINGERS
from tools.make_demo_dataset import plan_clips, synthesise_clip, tag_columns

import av
import numpy as np
import pytest

NUM_CLIPS = 16
# Hash of the tag columns of MagnaTagATune's annotations_final.csv, joined by tabs.
MTT_TAGS_SHA256 = "3dd7db8cf6a028433e11b2f692652234bed2637f82f9d35275c725f988d3f3ea"
SPLIT_FOLDERS = {"train": "0123456789ab", "val": "c", "test": "def"}


def make(out, *options):
    return make_demo_dataset.main(["--out", str(out), "--clips", str(NUM_CLIPS), *options])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Make a small dataset."""
    out = tmp_path_factory.mktemp("demo") / "dataset"
    assert make(out, "--num-workers", "1") == 0
    return out


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def count_tags(clips, folders="0123456789abcdef"):
    return collections.Counter(
        tag for clip in clips if clip.mp3_path[0] in folders for tag in clip.tags
    )


def test_annotations_have_the_format_of_magnatagatune(dataset):
    text = (dataset / "annotations_final.csv").read_bytes().decode("ascii")
    lines = text.removesuffix("\r\n").split("\r\n")
    assert all(len(line.split('"\t"')) == 190 and line[0] == line[-1] == '"' for line in lines)
    header, *rows = csv.reader(lines, delimiter="\t")
    assert header == ["clip_id", *tag_columns(), "mp3_path"]
    assert hashlib.sha256("\t".join(tag_columns()).encode()).hexdigest() == MTT_TAGS_SHA256
    assert {value for row in rows for value in row[1:-1]} == {"0", "1"}
    clip_ids = [int(row[0]) for row in rows]
    assert clip_ids == sorted(set(clip_ids)) and clip_ids[-1] - clip_ids[0] > len(rows) == NUM_CLIPS
    clips, _ = read_tables([dataset / "annotations_final.csv"])
    assert set(clips.splits) == {"train", "val", "test"}


def test_every_row_has_a_file(dataset):
    with open(dataset / "annotations_final.csv", newline="") as file:
        paths = [row["mp3_path"] for row in csv.DictReader(file, delimiter="\t")]
    found = [path.relative_to(dataset / "mp3").as_posix() for path in dataset.rglob("*.mp3")]
    assert sorted(paths) == sorted(found)
    assert sorted(path.name for path in dataset.iterdir()) == ["annotations_final.csv", "mp3"]


def test_clips_are_29_s_mp3s_of_16_khz_mono_32_kbps_at_their_level(dataset):
    rms = collections.defaultdict(list)
    for clip in plan_clips(NUM_CLIPS):
        with av.open(str(dataset / "mp3" / clip.mp3_path)) as container:
            stream = container.streams.audio[0]
            assert (stream.rate, stream.layout.name) == (16_000, "mono")
            assert stream.codec_context.bit_rate == 32_000
            samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(stream)])
        assert 29.0 < len(samples) / 16_000 < 29.5
        assert np.abs(samples).max() < 1.0
        rms[clip.level].append(np.sqrt(np.mean(samples**2)))
    assert 2 * max(rms["quiet"]) < min(rms["loud"])


def test_two_workers_overwrite_a_dataset_with_the_same_bytes_and_leave_other_files(dataset):
    before = contents(dataset)
    damaged = next(dataset.rglob("*.mp3"))
    damaged.write_bytes(b"")
    other = dataset / "mp3" / "0" / "other.mp3"
    other.touch()
    assert make(dataset, "--num-workers", "2") == 0
    other.unlink()
    assert contents(dataset) == before


def test_seeds_and_clips_of_a_recipe_differ():
    assert plan_clips(NUM_CLIPS, 0) == plan_clips(NUM_CLIPS, 0) != plan_clips(NUM_CLIPS, 1)
    first, second, *_ = (clip for clip in plan_clips() if "toccata" in clip.mp3_path)
    assert abs(np.corrcoef(synthesise_clip(first), synthesise_clip(second))[0, 1]) < 0.5


@pytest.mark.parametrize("num_clips", [160, 240])
@pytest.mark.parametrize("seed", range(5))
def test_the_50_most_frequent_tags_are_magnatagatunes(num_clips, seed):
    count = count_tags(plan_clips(num_clips, seed))
    rare = [count[tag] for tag in tag_columns() if tag not in MTT_TOP_TAGS]
    assert max(rare) < min(count[tag] for tag in MTT_TOP_TAGS)
    assert sum(map(bool, rare)) >= 5


@pytest.mark.parametrize("seed", range(5))
def test_most_tags_have_three_positives_and_negatives_in_every_split(seed):
    clips = plan_clips(seed=seed)
    scored = set(MTT_TOP_TAGS)
    for folders in SPLIT_FOLDERS.values():
        num_clips = sum(clip.mp3_path[0] in folders for clip in clips)
        count = count_tags(clips, folders)
        scored &= {tag for tag in scored if 3 <= count[tag] <= num_clips - 3}
    assert len(scored) >= 40
    assert 3 <= sum(not clip.tags & set(MTT_TOP_TAGS) for clip in clips) <= 8


def test_no_tag_contradicts_its_clip():
    for clip in plan_clips():
        heard = set(clip.instruments)
        if clip.tags & {"vocal", "vocals", "voice", "singing", "male", "female", "choir"}:
            assert heard & SINGERS
        if clip.tags & {"no vocal", "no vocals", "no voice"}:
            assert not heard & SINGERS
        assert "guitar" not in clip.tags or heard & {"guitar", "electric guitar"}
        assert "solo" not in clip.tags or len(heard) == 1
        assert clip.tags & {"slow", "fast"} <= {clip.tempo}
        assert clip.tags & {"quiet", "loud"} <= {clip.level}


@pytest.mark.parametrize("option", [["--clips", "15"], ["--clips", "x"], ["--seed", "-1"]])
def test_invalid_numbers_are_usage_errors(tmp_path, capsys, option):
    try:
        status = make(tmp_path / "out", *option)
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_error_names_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert make(tmp_path / "file") == 2
    said = f"--out {tmp_path / 'file'}: {tmp_path / 'file'} is not a folder"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stop", "status", "error"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "stopped by SIGTERM"),
        (lambda: multiprocessing.active_children()[0].kill(), 1, "a worker process died"),
    ],
)
def test_signal_or_death_of_a_worker_ends_the_program_with_one_line(
    tmp_path, capsys, stop, status, error
):
    def stop_at_first_clip():
        while not [*tmp_path.rglob("*.mp3")]:
            time.sleep(0.02)
        stop()

    threading.Thread(target=stop_at_first_clip, daemon=True).start()
    assert make(tmp_path, "--num-workers", "2") == status
    message = capsys.readouterr().err
    assert error in message and message.count("\n") == 1, message
    assert not multiprocessing.active_children()
    assert not (tmp_path / "annotations_final.csv").exists()
