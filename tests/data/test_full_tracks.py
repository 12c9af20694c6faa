"""Whole tracks: the same segments at any length, in bounded memory, in every stage."""

import ast
import importlib
import json
import textwrap

from input_data import open_dataset, read_clips
from toolkit import tagging
from toolkit.data import audio, shards
from toolkit.data.audio import cut_segments, decode
from toolkit.data.manifest import read_manifest, shard_name
from toolkit.data.shards import ShardTask, make_shard

import numpy as np
import pytest
from builds import build, refusal
from conftest import (
    ROOT,
    encode_audio,
    needs_proc,
    run_python,
    synthesise,
    wrecked,
    write_dataset,
)
from shards import add_manifest

SPLITS = ("train", "test")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Write audio files: a short one, long ones, and one whose later part is damaged."""
    folder = tmp_path_factory.mktemp("clips")
    sound = encode_audio(folder / "sound.mp3", synthesise(3)).read_bytes()
    encode_audio(folder / "long.mp3", synthesise(40, seed=1))
    encode_audio(folder / "short.mp3", synthesise(0.3))
    (folder / "breaks.mp3").write_bytes(sound * 10 + wrecked(sound) * 30)
    return folder


def task_of(path, audio_dir, names, split):
    members = [(str(number), name, bytes([number % 2, 1])) for number, name in enumerate(names)]
    sizes = {"sample_rate": 8000, "num_samples": 4000, "stop": None}
    where = {"path": path, "split": split, "audio_dir": audio_dir, "clips": members}
    return ShardTask(**where, **sizes, decoder="av", encoding="float32")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("part_samples", [1, 30_000])
def test_segments_are_those_of_the_whole_file(tmp_path, clips, monkeypatch, split, part_samples):
    monkeypatch.setattr(audio, "PART_SAMPLES", part_samples)
    monkeypatch.setattr(audio, "_GATHERED_SAMPLES", 10_000)
    names = ["sound.mp3", "long.mp3", "sound.mp3"]
    path = tmp_path / shard_name(split, 0, 1)
    entry = make_shard(task_of(path, clips, names, split))
    found = {}
    for clip in read_clips([path]):
        assert clip.segments.size <= max(part_samples, 4000)
        assert clip.part == len(found.setdefault(clip.clip_id, []))
        found[clip.clip_id].append(clip.segments)
    for (_, parts), name in zip(found.items(), names, strict=True):
        expected = cut_segments(decode(clips / name, 8000, stop=None), 4000)
        np.testing.assert_array_equal(np.concatenate(parts), expected)
    assert entry["clips"] == 3
    assert entry["segments"] == sum(len(part) for parts in found.values() for part in parts)


@pytest.mark.parametrize("split", SPLITS)
def test_clip_whose_later_part_is_damaged_is_removed_completely(
    tmp_path, clips, monkeypatch, split
):
    names = ["sound.mp3", "breaks.mp3", "long.mp3", "short.mp3", "breaks.mp3"]
    monkeypatch.setattr(audio, "PART_SAMPLES", 30_000)
    written = []
    append = shards.append_records
    monkeypatch.setattr(
        shards, "append_records", lambda *given: (written.append(1), append(*given))
    )
    (tmp_path / "all").mkdir()
    path = tmp_path / "all" / shard_name(split, 0, 1)
    task = task_of(path, clips, names, split)
    entry = make_shard(task)
    num_parts = len(written)
    sound = task_of(tmp_path / path.name, clips, names, split)
    sound.clips[:] = [clip for clip in task.clips if clip[1] in ("sound.mp3", "long.mp3")]
    expected = make_shard(sound)
    assert num_parts > len(written) - num_parts, "no part had to be removed"
    assert path.read_bytes() == sound.path.read_bytes()
    skipped = entry.pop("skipped")
    assert expected.pop("skipped") == []
    assert entry == expected
    assert [row["mp3_path"] for row in skipped] == ["breaks.mp3", "short.mp3", "breaks.mp3"]
    assert "audio packets are damaged" in skipped[0]["reason"] == skipped[2]["reason"]
    assert "samples are less than one segment of 4000" in skipped[1]["reason"]


@pytest.mark.parametrize("hop", [None, 1500])
def test_tags_of_a_file_in_parts_are_those_of_the_whole_file(clips, monkeypatch, hop):
    checkpoint, refused = Levels(), []
    files = [clips / name for name in ("long.mp3", "breaks.mp3", "sound.mp3", "breaks.mp3")]

    def tagged():
        refused.clear()
        found = tagging.tag_files(
            checkpoint, files, hop, batch_size=7, refused=lambda *what: refused.append(what)
        )
        return list(found)

    whole = tagged()
    monkeypatch.setattr(audio, "PART_SAMPLES", 30_000)
    parts = tagged()
    assert [path.name for path, _ in parts] == [path.name for path, _ in whole]
    assert [path.name for path, _ in whole] == ["long.mp3", "sound.mp3"]
    assert [path.name for path, _ in refused] == ["breaks.mp3"] * 2
    for (_, one), (_, other), path in zip(parts, whole, (files[0], files[2]), strict=True):
        segments = cut_segments(decode(path, 8000, stop=None), 4000, hop)
        np.testing.assert_array_equal(one, segments[:, :3])
        np.testing.assert_array_equal(other, segments[:, :3])


class Levels:
    """A checkpoint whose network returns the first three samples of each segment."""

    sample_rate = 8000
    input_shape = (None, 4000)

    class config:
        num_samples, block = 4000, "se"

    @property
    def network(self):
        return self

    def compile(self, jit_compile):
        pass

    def predict_on_batch(self, batch):
        return batch[:, :3].copy()


def test_notebook_measures_the_level_of_a_long_clip_over_its_parts(tmp_path, clips, monkeypatch):
    cells = json.loads((ROOT / "excitation_analysis.ipynb").read_text())["cells"]
    (source,) = [
        "".join(cell["source"]) for cell in cells if "def measure_levels" in "".join(cell["source"])
    ]
    body = ast.parse(source).body
    (function,) = [one for one in body if getattr(one, "name", None) == "measure_levels"]
    names = ["sound.mp3", "long.mp3", "sound.mp3"]
    monkeypatch.setattr(audio, "PART_SAMPLES", 30_000)
    path = tmp_path / "tfrecord" / shard_name("test", 0, 1)
    path.parent.mkdir()
    make_shard(task_of(path, clips, names, "test"))
    add_manifest(tmp_path, num_tags=2, num_samples=4000)
    known = {"np": np}
    exec(compile(ast.Module([function], []), "notebook", "exec"), known)
    expected = []
    for name in names:
        segments = cut_segments(decode(clips / name, 8000, stop=None), 4000)
        expected.append(10 * np.log10(np.mean(np.square(segments, dtype=np.float64))))
    levels, labels = known["measure_levels"](tmp_path)
    np.testing.assert_allclose(levels, expected, rtol=1e-9)
    assert np.array_equal(labels, [[0, 1], [1, 1], [0, 1]])


# --- The option -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Write a dataset of 24 clips, some of them longer than 29 s."""
    return write_dataset(tmp_path_factory.mktemp("source"), seconds=(3, 32, 3, 31, 3))


def test_stop_is_29_s_by_default(data_dir, capsys):
    assert build(data_dir) == 0
    manifest_path = data_dir / "tfrecord" / "manifest.json"
    manifest = read_manifest(manifest_path)
    assert manifest["options"]["stop"] == 29
    paths = [path for split in open_dataset(data_dir).splits.values() for path in split.shards]
    assert max(len(clip.segments) for clip in read_clips(paths)) == 58
    expected = manifest_path.read_bytes()

    # A build of an earlier version, which did not record the option, can be resumed.
    del manifest["options"]["stop"]
    manifest_path.write_text(json.dumps(manifest))
    assert build(data_dir, "--stop", "29") == 0
    assert manifest_path.read_bytes() == expected
    capsys.readouterr()
    line = refusal(capsys, data_dir, "--stop", "none")
    assert "--stop was 29, now none: use the same options" in line


@pytest.mark.parametrize("stop", ["none", "2.25"])
def test_audio_is_cut_at_stop(data_dir, stop):
    assert build(data_dir, "--stop", stop) == 0
    dataset = open_dataset(data_dir)
    seconds = None if stop == "none" else float(stop)
    lengths = set()
    for split in dataset.splits.values():
        clips = list(read_clips(split.shards))
        assert len(clips) == split.num_clips
        assert sum(len(clip.segments) for clip in clips) == split.num_segments
        for clip in clips:
            lengths.add(len(clip.segments))
            samples = decode(data_dir / "mp3" / clip.mp3_path, 8000, stop=seconds)
            np.testing.assert_array_equal(clip.segments, cut_segments(samples, 4000))
    assert max(lengths) == {"none": 64, "2.25": 4}[stop]


def test_stop_that_leaves_no_segment_is_refused(data_dir, capsys):
    line = refusal(capsys, data_dir, "--stop", "0.4", status=2)
    assert "--stop 0.4: shorter than one segment of 4000 samples, 0.5 s at 8000 Hz" in line
    assert not (data_dir / "tfrecord").exists()


# --- Every stage ----------------------------------------------------------------------------------


def run(script, *arguments):
    assert importlib.import_module(script).main(list(map(str, arguments))) == 0


@pytest.mark.slow
def test_whole_tracks_go_through_every_stage(tmp_path, capsys):
    import pandas as pd

    data_dir = write_dataset(tmp_path, seconds=(4, 6, 33, 9))
    for split in ("c", "d"):
        path = sorted((data_dir / "mp3" / split).iterdir())[0]
        path.write_bytes(encode_audio(tmp_path / "a.mp3", synthesise(10)).read_bytes() * 41)
    run("build_mtt", "--data-dir", data_dir, "--stop", "none", "--num-workers", "2")
    dataset = open_dataset(data_dir)
    found = {name: list(read_clips(split.shards)) for name, split in dataset.splits.items()}
    for name, split in dataset.splits.items():
        assert sum(clip.part == 0 for clip in found[name]) == split.num_clips
        assert sum(len(clip.segments) for clip in found[name]) == split.num_segments
        assert max(clip.part for clip in found[name]) == (name != "train")
        assert max(len(clip.segments) for clip in found[name]) == (12 if name == "train" else 142)

    network = ["--block", "se", "--init-features", "2", "--alpha", "2"]
    length = ["--num-lr-decays", "1", "--max-epochs", "1", "--batch-size", "8"]
    log = tmp_path / "log"
    run("train", "--data-dir", data_dir, "--train-dir", log, *network, *length)
    report = tmp_path / "report"
    run("eval", log / "0", "--data-dir", data_dir, "--report", report)
    num_clips = dataset.splits["test"].num_clips
    assert json.loads((report / "metrics.json").read_text())["num_clips"] == num_clips
    predictions = pd.read_csv(report / "predictions.csv", dtype={"clip_id": str})
    excitations = tmp_path / "excitations.parquet"
    run("extract_excitations", log / "0", "--data-dir", data_dir, "--out", excitations)
    table = pd.read_parquet(excitations)
    clip_ids = [clip.clip_id for clip in found["test"] if clip.part == 0]
    assert list(predictions["clip_id"]) == clip_ids
    first_block = table[table["depth"] == 0]
    assert list(first_block.index.get_level_values("clip_id")) == clip_ids

    # The prediction of a long clip is the mean over all its parts, as tag.py computes it.
    (long,) = [clip for clip in found["test"] if clip.part == 1]
    capsys.readouterr()
    run("tag", log / "0", data_dir / "mp3" / long.mp3_path, "--json")
    tagged = json.loads(capsys.readouterr().out)
    assert tagged["segments"] == 142 + len(long.segments)
    row = predictions[predictions["clip_id"] == long.clip_id].iloc[0]
    for name, value in tagged["tags"].items():
        assert row[name] == pytest.approx(value, abs=1e-5)


# --- Memory ---------------------------------------------------------------------------------------

_MEASURED = """
    import sys
    from pathlib import Path
    from toolkit import tagging
    from toolkit.data.shards import ShardTask, make_shard
    from toolkit.prediction import predict_clips
    from input_data import open_dataset, read_clips

    what, path, split, shard = sys.argv[1], Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])

    class Network:
        input_shape = (None, 59049)
        sample_rate = 22050
        network = property(lambda self: self)
        class config:
            num_samples, block = 59049, "se"
        def compile(self, jit_compile):
            pass
        def predict_on_batch(self, batch):
            return batch[:, :50].copy()

    def held():
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10

    if what == "build":
        before = held()
        task = ShardTask(
            path=shard, split=split, audio_dir=path.parent, clips=[("1", path.name, bytes(50))],
            sample_rate=22050, num_samples=59049, stop=None, decoder="av", encoding="float32",
        )
        num_segments = make_shard(task)["segments"]
    elif what == "read":
        before = held()
        ((outputs,),) = (p.outputs for p in predict_clips(Network(), read_clips([shard])))
        num_segments = len(outputs)
    else:
        import model
        before = held()
        ((_, outputs),) = tagging.tag_files(Network(), [path])
        num_segments = len(outputs)
    print(num_segments, held() - before)
"""


def measure(what, path, split="none", shard="none"):
    """Return the number of segments that a process handled, and the MiB of memory it added."""
    done = run_python("-c", textwrap.dedent(_MEASURED), what, path, split, shard)
    assert done.returncode == 0, done.stderr
    return tuple(map(int, done.stdout.split()))


@pytest.fixture(scope="module")
def tracks(tmp_path_factory):
    """Write tracks of two minutes and of an hour, with 10 and 318 MB of samples."""
    folder = tmp_path_factory.mktemp("tracks")
    minute = encode_audio(folder / "minute.mp3", synthesise(60)).read_bytes()
    (folder / "minutes.mp3").write_bytes(2 * minute)
    (folder / "hour.mp3").write_bytes(60 * minute)
    return folder / "minutes.mp3", folder / "hour.mp3"


def assert_bounded(of_minutes, of_hour):
    print(f"2 and 60 minutes: {of_minutes} and {of_hour} (segments, MiB)")
    assert of_hour[0] > 29 * of_minutes[0] > 29 * 40
    # The limit is a few times the 32 MiB of a part, and less than the samples of an hour.
    assert of_hour[1] - of_minutes[1] < 280


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("split", SPLITS)
def test_an_hour_is_built_and_read_in_bounded_memory(tmp_path, tracks, split):
    paths = [tmp_path / path.stem / shard_name(split, 0, 1) for path in tracks]
    for path in paths:
        path.parent.mkdir()
    pairs = list(zip(tracks, paths, strict=True))
    assert_bounded(*(measure("build", path, split, shard) for path, shard in pairs))
    assert_bounded(*(measure("read", path, split, shard) for path, shard in pairs))


@pytest.mark.slow
@needs_proc
def test_an_hour_is_tagged_in_bounded_memory(tracks):
    assert_bounded(*(measure("tag", path) for path in tracks))
