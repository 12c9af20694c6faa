"""The synthetic dataset: MagnaTagATune's shape, rules on tags, and the same bytes every time."""

import collections
import contextlib
import csv
import hashlib
import os
import signal
import subprocess
import sys
import time

from toolkit.data.annotations import MTT_TOP_TAGS, read_mtt
from tools import make_demo_dataset
from tools.make_demo_dataset import MTT_TAGS, RECIPES, plan_clips

import av
import numpy as np
import pytest
from builds import is_running, needs_proc, wait_until, workers_of

NUM_CLIPS = 16
# Of the tag columns of MagnaTagATune's annotations_final.csv, joined by tabs.
MTT_TAGS_SHA256 = "3dd7db8cf6a028433e11b2f692652234bed2637f82f9d35275c725f988d3f3ea"
SPLIT_FOLDERS = {"train": "0123456789ab", "val": "c", "test": "def"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Make a dataset of one clip a folder by the command line."""
    out = tmp_path_factory.mktemp("demo") / "dataset"
    arguments = ["--out", str(out), "--clips", str(NUM_CLIPS), "--num-workers", "1"]
    assert make_demo_dataset.main(arguments) == 0
    return out


@pytest.fixture
def working(tmp_path):
    """A running command of its own session whose two workers have begun to write clips."""
    arguments = ["--out", str(tmp_path), "--num-workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.make_demo_dataset", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: len(workers_of(process)) == 2 and [*tmp_path.rglob("*.mp3")], process)
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.*")}


def decode(path):
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        form = (stream.rate, stream.layout.name, stream.codec_context.bit_rate)
        return form, np.concatenate([frame.to_ndarray()[0] for frame in container.decode(stream)])


def positives(clips, folders="0123456789abcdef"):
    return collections.Counter(
        tag for clip in clips if clip.mp3_path[0] in folders for tag in clip.tags
    )


def test_table_has_the_form_of_magnatagatunes(dataset):
    text = (dataset / "annotations_final.csv").read_bytes().decode("ascii")
    lines = text.split("\r\n")
    assert len(lines) == NUM_CLIPS + 2
    assert lines.pop() == ""
    for line in lines:
        fields = line.split("\t")
        assert len(fields) == 190
        assert all(field[0] == field[-1] == '"' and len(field) > 2 for field in fields)

    header, *rows = csv.reader(lines, delimiter="\t")
    assert header == ["clip_id", *MTT_TAGS, "mp3_path"]
    assert len(set(MTT_TAGS)) == 188
    digest = hashlib.sha256("\t".join(MTT_TAGS).encode()).hexdigest()
    assert digest == MTT_TAGS_SHA256
    assert set(MTT_TOP_TAGS) < set(MTT_TAGS)
    assert {value for row in rows for value in row[1:-1]} == {"0", "1"}
    clip_ids = [int(row[0]) for row in rows]
    assert clip_ids == sorted(set(clip_ids))
    assert clip_ids[-1] - clip_ids[0] > NUM_CLIPS


def test_every_row_has_its_file_and_every_folder_a_clip(dataset):
    with open(dataset / "annotations_final.csv", newline="") as file:
        paths = [row["mp3_path"] for row in csv.DictReader(file, delimiter="\t")]
    found = [path.relative_to(dataset / "mp3").as_posix() for path in dataset.rglob("*.mp3")]
    assert sorted(paths) == sorted(found)
    assert {path[0] for path in paths} == set("0123456789abcdef")
    for path in paths:
        artist, album, track, title, start, stop = path[2:].removesuffix(".mp3").split("-")
        assert artist and album and track.isdigit() and title
        assert int(stop) - int(start) == 29
    assert sorted(path.name for path in dataset.iterdir()) == ["annotations_final.csv", "mp3"]


def test_clips_are_16_khz_mono_32_kbps_mp3s_of_a_little_over_29_s(dataset):
    rms = {}
    for path in sorted(dataset.rglob("*.mp3")):
        form, samples = decode(path)
        assert form == (16_000, "mono", 32_000)
        assert 29.0 < len(samples) / 16_000 < 29.5
        assert path.stat().st_size == pytest.approx(117_009, abs=200)
        assert np.abs(samples).max() < 1.0
        rms[f"{path.parent.name}/{path.name}"] = np.sqrt(np.mean(samples**2))
    clips = plan_clips(NUM_CLIPS)
    quiet = [rms[clip.mp3_path] for clip in clips if clip.level == "quiet"]
    loud = [rms[clip.mp3_path] for clip in clips if clip.level == "loud"]
    assert quiet and loud
    assert 3 * max(quiet) < min(loud)


def test_two_workers_and_a_second_run_write_the_same_bytes(dataset):
    before = contents(dataset)
    arguments = ["--out", str(dataset), "--clips", str(NUM_CLIPS), "--num-workers", "2"]
    assert make_demo_dataset.main(arguments) == 0
    assert contents(dataset) == before


def test_another_seed_makes_other_clips():
    clips, others = plan_clips(NUM_CLIPS, 0), plan_clips(NUM_CLIPS, 1)
    assert clips == plan_clips(NUM_CLIPS, 0)
    assert [clip.mp3_path for clip in clips] != [clip.mp3_path for clip in others]
    same_recipe = [clip for clip in plan_clips() if clip.recipe.title == "toccata"][:2]
    first, second = (make_demo_dataset.synthesize(clip) for clip in same_recipe)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.5


@pytest.mark.parametrize("num_clips", [160, make_demo_dataset.DEFAULT_CLIPS])
@pytest.mark.parametrize("seed", range(5))
def test_top_50_by_count_are_magnatagatunes(num_clips, seed):
    count = positives(plan_clips(num_clips, seed))
    rare = [count[tag] for tag in MTT_TAGS if tag not in MTT_TOP_TAGS]
    assert max(rare) < min(count[tag] for tag in MTT_TOP_TAGS)
    assert sum(map(bool, rare)) >= 5
    assert max(rare) <= 2


@pytest.mark.parametrize("seed", range(5))
def test_default_size_has_positives_in_each_split_and_untagged_clips(seed):
    clips = plan_clips(seed=seed)
    per_split = {split: positives(clips, folders) for split, folders in SPLIT_FOLDERS.items()}
    covered = [tag for tag in MTT_TOP_TAGS if all(count[tag] >= 3 for count in per_split.values())]
    assert len(covered) >= 30
    assert 5 <= sum(not clip.tags & set(MTT_TOP_TAGS) for clip in clips) <= 8
    assert 220 <= len(clips) <= 260
    per_folder = collections.Counter(clip.mp3_path[0] for clip in clips)
    del per_folder["c"]
    assert max(per_folder.values()) - min(per_folder.values()) <= 1


def test_no_tag_contradicts_what_is_in_the_clip():
    singers = {"man", "woman", "opera man", "opera woman", "choir"}
    for clip in plan_clips():
        layers = set(clip.recipe.layers)
        if clip.tags & {"vocal", "vocals", "voice", "singing", "male", "female", "choir"}:
            assert layers & singers
        if clip.tags & {"no vocal", "no vocals", "no voice"}:
            assert not layers & singers
        if "guitar" in clip.tags:
            assert any("guitar" in layer for layer in layers)
        if "solo" in clip.tags:
            assert len(layers) == 1
        for tag in ("slow", "fast"):
            assert tag not in clip.tags or clip.tempo == tag
        for tag in ("quiet", "loud"):
            assert tag not in clip.tags or clip.level == tag


def test_synonyms_are_not_always_all_given():
    voiced = [clip.tags for clip in plan_clips() if "man" in clip.recipe.layers]
    given = [len(tags & {"male", "male vocal", "male voice", "man"}) for tags in voiced]
    assert set(given) >= {3, 4}


def test_every_recipe_is_used():
    used = {clip.recipe.title for clip in plan_clips()}
    assert used >= {recipe.title for recipe in RECIPES}


def test_the_builder_reads_the_table(dataset):
    clips, _ = read_mtt(dataset / "annotations_final.csv")
    assert set(clips["split"]) == {"train", "val", "test"}


@pytest.mark.parametrize("option", [["--clips", "15"], ["--clips", "x"], ["--seed", "-1"]])
def test_wrong_numbers_are_usage_errors(tmp_path, capsys, option):
    try:
        status = make_demo_dataset.main(["--out", str(tmp_path / "out"), *option])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert make_demo_dataset.main(["--out", str(tmp_path / "file"), "--clips", "16"]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


# --- Workers --------------------------------------------------------------------------------------


@needs_proc
def test_workers_end_with_a_terminated_parent(working):
    workers = workers_of(working)
    working.terminate()
    working.wait(timeout=10)
    assert working.returncode in (143, -signal.SIGTERM)
    deadline = time.monotonic() + 10
    while alive := [worker for worker in workers if is_running(worker)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)


@needs_proc
def test_death_of_a_worker_is_one_line(working, tmp_path):
    os.kill(workers_of(working)[0], signal.SIGKILL)
    out, err = working.communicate(timeout=30)
    assert (working.returncode, out) == (1, "")
    assert err.count("\n") == 1, err
    assert "error: a worker process died: " in err
    assert not (tmp_path / "annotations_final.csv").exists()
