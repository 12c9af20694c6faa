"""Building shards: content, skipped clips, resuming, links, and refused options."""

import ctypes
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import build_mtt
from input_data import open_dataset, read_clips
from toolkit.data.audio import cut_segments, decode

import numpy as np
import pytest
from builds import SCRIPT, SHARDS, build, contents, refusal, run, shards_in
from conftest import TAGS, deny, encode_audio, encode_float, opened, synthesise


def read_json(data_dir):
    return json.loads((data_dir / "tfrecord" / "manifest.json").read_text())


# --- Content --------------------------------------------------------------------------------------


def test_manifest_describes_the_shards(finished):
    data_dir, _ = finished
    assert contents(data_dir).keys() == SHARDS | {"manifest.json"}
    manifest = read_json(data_dir)
    assert sorted(manifest["tags"]) == sorted(TAGS)
    assert (manifest["sample_rate"], manifest["num_samples"]) == (8000, 4000)
    assert manifest["versions"].keys() >= {"python", "av", "numpy"}
    assert manifest["options"]["num_audios_per_shard"] == 2
    assert manifest["options"]["decoder"] == "av"
    splits = manifest["splits"]
    assert [splits[name]["clips"] for name in ("train", "val", "test")] == [11, 5, 5]
    assert {shard["name"] for split in splits.values() for shard in split["shards"]} == SHARDS
    for split in splits.values():
        for count in ("clips", "segments"):
            assert split[count] == sum(shard[count] for shard in split["shards"])


def test_shards_contain_the_segments_and_labels_of_each_clip(finished):
    data_dir, _ = finished
    dataset = open_dataset(data_dir)
    rows = (data_dir / "annotations_final.csv").read_text().replace('"', "").splitlines()
    header, *rows = [row.split("\t") for row in rows]
    row_of = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    found = {name: list(read_clips(split.shards)) for name, split in dataset.splits.items()}
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


def test_number_of_workers_does_not_matter(finished, data_dir):
    assert build(data_dir, "--num-workers", "3") == 0
    assert contents(data_dir) == contents(finished[0])


def test_building_again_decodes_and_writes_nothing(finished, data_dir):
    shutil.copytree(finished[0] / "tfrecord", data_dir / "tfrecord")
    shutil.rmtree(data_dir / "mp3")
    # Keep one empty file, because a folder with none of the clips is refused.
    (data_dir / "mp3" / "0").mkdir(parents=True)
    (data_dir / "mp3" / "0" / "clip-00-0-1.mp3").touch()
    before = {path: path.stat().st_mtime_ns for path in shards_in(data_dir)}
    assert build(data_dir) == 0
    assert contents(data_dir) == contents(finished[0])
    assert before == {path: path.stat().st_mtime_ns for path in shards_in(data_dir)}


def test_deleted_shards_are_built_again(finished, data_dir):
    folder = shutil.copytree(finished[0] / "tfrecord", data_dir / "tfrecord")
    (folder / "train-0003-of-0006.tfrecord").unlink()
    (folder / "test-0001-of-0003.seq.tfrecord").unlink()
    before = {path: path.stat().st_mtime_ns for path in shards_in(data_dir)}
    assert build(data_dir) == 0
    assert contents(data_dir) == contents(finished[0])
    assert before == {path: path.stat().st_mtime_ns for path in before}


# --- Skipped clips --------------------------------------------------------------------------------


def test_skipped_clips_are_named_with_reasons(finished):
    data_dir, err = finished
    skipped = {row["clip_id"]: row for row in read_json(data_dir)["skipped"]}
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


def as_user():
    """If the tests run as root, drop the right to read every file."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def broken_files(folder):
    """Return files of several kinds, each with its number of segments or the expected reason."""
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
        "three hours": (hours, 58),  # of the first 29 s
    }


def test_every_kind_of_broken_file_is_decoded_or_skipped_with_its_reason(data_dir, tmp_path):
    clips = [str(p.relative_to(data_dir / "mp3")) for p in data_dir.glob("mp3/[0-9ab]/*.mp3")]
    kinds = broken_files(tmp_path)
    of_clip = dict(zip(clips, kinds, strict=True))
    for clip, kind in of_clip.items():
        path = data_dir / "mp3" / clip
        path.unlink()
        if kinds[kind][0] is not None:
            path.write_bytes(kinds[kind][0])
        if kind == "unreadable":
            path.chmod(0)
    done = run(data_dir, "--max-skipped", "40", preexec_fn=as_user if os.geteuid() == 0 else None)
    assert done.returncode == 0, done.stderr
    dataset = open_dataset(data_dir)
    read = read_clips(dataset.splits["train"].shards)
    found = {clip.mp3_path: len(clip.segments) for clip in read}
    skipped = {row["mp3_path"]: row["reason"] for row in read_json(data_dir)["skipped"]}
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
    assert build(data_dir) == 0
    assert f"skipped clip 1: {name}: " in capsys.readouterr().err
    manifest = read_json(data_dir)
    (row,) = (row for row in manifest["skipped"] if row["clip_id"] == "1")
    assert "File name too long" in row["reason"]
    assert len(manifest["skipped"]) == 4
    assert sum(split["clips"] for split in manifest["splits"].values()) == 21


@pytest.mark.parametrize(("percent", "status"), [("12", 1), ("12.5", 0), (None, 1)])
def test_too_many_skipped_clips_exit_with_status_1_and_all_shards(
    capsys, finished, data_dir, percent, status
):
    shutil.copytree(finished[0] / "tfrecord", data_dir / "tfrecord")
    percent = percent or str(build_mtt.build_parser().get_default("max_skipped"))
    assert build(data_dir, "--max-skipped", percent) == status
    assert contents(data_dir) == contents(finished[0])
    last = capsys.readouterr().err.splitlines()[-1]
    refused = f"3 of 24 clips (12.5 %) were skipped, more than --max-skipped {float(percent):g}: "
    assert (f"error: {refused}" in last) == bool(status)


def test_repaired_clip_gives_the_shards_of_a_build_that_had_the_clip(
    finished, data_dir, tmp_path, capsys
):
    shutil.copytree(finished[0] / "tfrecord", data_dir / "tfrecord")
    (empty,) = data_dir.glob("mp3/3/*.mp3")
    encode_audio(empty, synthesise(1.2))
    assert build(data_dir) == 0
    assert f"rebuilt, since 3/{empty.name} can be decoded now\n" in capsys.readouterr().err
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    shutil.copy(data_dir / "annotations_final.csv", scratch)
    shutil.copytree(data_dir / "mp3", scratch / "mp3")
    assert build(scratch) == 0
    assert contents(data_dir) == contents(scratch) != contents(finished[0])


def test_repaired_clip_does_not_remove_clips_whose_audio_is_gone(finished, data_dir):
    shutil.copytree(finished[0] / "tfrecord", data_dir / "tfrecord")
    manifest = read_json(data_dir)
    (empty,) = data_dir.glob("mp3/3/*.mp3")
    encode_audio(empty, synthesise(1.2))
    for path in data_dir.glob("mp3/*/*.mp3"):
        if path != empty:
            path.unlink()
    assert build(data_dir) == 0
    assert read_json(data_dir) == manifest


# --- Links and names ------------------------------------------------------------------------------


def link_out(kind, data_dir, outside):
    """Replace a clip by a link to a file outside mp3/."""
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
        clip.symlink_to(outside / clip.name)


@pytest.mark.parametrize("kind", ["file", "folder", "chain"])
def test_link_that_leads_out_is_refused_with_row_and_column(capsys, data_dir, tmp_path, kind):
    link_out(kind, data_dir, tmp_path / "outside")
    with opened(tmp_path / "outside" / "clip-04-0-1.mp3") as was_opened:
        line = refusal(capsys, data_dir)
        assert not was_opened()
    place = f"{data_dir / 'annotations_final.csv'}: row 6, column 'mp3_path': a link leads from "
    assert f"{place}4/clip-04-0-1.mp3 out of {data_dir / 'mp3'}, to {tmp_path / 'outside'}" in line
    assert not (data_dir / "tfrecord").exists()


def test_links_that_stay_inside_and_a_linked_audio_folder_are_read(finished, data_dir, tmp_path):
    (data_dir / "mp3").rename(tmp_path / "elsewhere")
    (data_dir / "mp3").symlink_to(tmp_path / "elsewhere")
    clip = data_dir / "mp3" / "4" / "clip-04-0-1.mp3"
    clip.rename(data_dir / "mp3" / "moved.mp3")
    clip.symlink_to("../moved.mp3")
    assert build(data_dir) == 0
    assert contents(data_dir) == contents(finished[0])


def test_audio_folder_whose_name_is_not_utf_8_is_read_and_resumed(data_dir, tmp_path):
    music = tmp_path / os.fsdecode(b"Musik_\xe4")
    try:
        (data_dir / "mp3").rename(music)
    except OSError as error:
        pytest.skip(f"the file system refuses the name: {error}")
    assert build(data_dir, "--audio-dir", str(music)) == 0
    assert read_json(data_dir)["options"]["audio_dir"] == os.path.relpath(music, data_dir)
    shards = shards_in(data_dir)
    assert {path.name for path in shards} == SHARDS
    before = [path.stat().st_mtime_ns for path in shards]
    assert build(data_dir, "--audio-dir", str(music)) == 0
    assert [path.stat().st_mtime_ns for path in shards] == before


# --- Refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_finished", [True, False])
def test_other_options_are_refused(capsys, finished, data_dir, is_finished):
    folder = shutil.copytree(finished[0] / "tfrecord", data_dir / "tfrecord")
    if not is_finished:
        recorded = read_json(data_dir)["options"]
        (folder / ".progress").mkdir()
        (folder / ".progress" / "options.json").write_text(json.dumps(recorded))
        (folder / "manifest.json").unlink()

    def files():
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = files()
    line = refusal(capsys, data_dir, "--num-samples", "4001")
    assert "--num-samples was 4000, now 4001: use the same options, or delete this folder" in line
    assert files() == before


def test_damaged_progress_is_refused_and_without_options_ignored(capsys, finished, data_dir):
    shutil.copytree(finished[0] / "tfrecord", data_dir / "tfrecord")
    progress = data_dir / "tfrecord" / ".progress"
    progress.mkdir()
    (progress / "options.json").write_text("{")
    assert f"delete {progress} and build the shards again" in refusal(capsys, data_dir)
    (progress / "options.json").rename(progress / "val-0000-of-0001.tfrecord.json")
    assert build(data_dir) == 0


def test_changed_annotations_are_refused(capsys, finished, data_dir):
    shutil.copytree(finished[0] / "tfrecord", data_dir / "tfrecord")
    with open(data_dir / "annotations_final.csv", "a") as file:
        file.write("\t".join(["999", *["1"] * len(TAGS), "0/new.mp3"]) + "\n")
    assert "annotations_final.csv has changed since" in refusal(capsys, data_dir)


def forget_reading(folder):
    """Make a manifest that of an earlier version, which did not record how tables were read."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["options"]["clips_sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("is_recorded", [True, False])
@pytest.mark.parametrize("change", ["label", "split", "tag"])
def test_table_that_is_read_differently_is_refused(
    capsys, monkeypatch, finished, data_dir, change, is_recorded
):
    read_tables = build_mtt.read_tables

    def read_differently(*given):
        clips, notes = read_tables(*given)
        if change == "label":
            clips.labels[5, 0] = 1 - clips.labels[5, 0]
        elif change == "split":
            clips.splits[5] = "val"
        else:
            clips.tags = ("other", *clips.tags[1:])
        return clips, notes

    folder = shutil.copytree(finished[0] / "tfrecord", data_dir / "tfrecord")
    if not is_recorded:
        forget_reading(folder)
    before = contents(data_dir)
    monkeypatch.setattr(build_mtt, "read_tables", read_differently)
    line = refusal(capsys, data_dir)
    assert "this version of the toolkit reads " in line
    assert "use the other version, or delete this folder to build from scratch" in line
    assert contents(data_dir) == before


def test_build_of_an_earlier_version_is_resumed(finished, data_dir):
    folder = shutil.copytree(finished[0] / "tfrecord", data_dir / "tfrecord")
    forget_reading(folder)
    (folder / "val-0001-of-0003.tfrecord").unlink()
    assert build(data_dir) == 0
    assert contents(data_dir) == contents(finished[0])


@pytest.mark.parametrize("is_moved", [True, False])
def test_audio_of_other_sizes_is_refused_elsewhere_and_rebuilt_here(
    capsys, finished, data_dir, tmp_path, is_moved
):
    shutil.copytree(finished[0] / "tfrecord", data_dir / "tfrecord")
    options = []
    if is_moved:
        (data_dir / "mp3").rename(tmp_path / "music")
        (data_dir / "mp3").mkdir()
        options = ["--audio-dir", str(tmp_path / "music")]
    before = [path.stat().st_mtime_ns for path in shards_in(data_dir)]
    assert build(data_dir, *options) == 0  # the same files at another place
    assert [path.stat().st_mtime_ns for path in shards_in(data_dir)] == before
    capsys.readouterr()
    (clip,) = tmp_path.glob("music/4/*.mp3" if is_moved else "dataset/mp3/4/*.mp3")
    encode_audio(clip, synthesise(1.4))
    if is_moved:
        options = ["--audio-dir", str(shutil.copytree(tmp_path / "music", tmp_path / "other"))]
        line = refusal(capsys, data_dir, *options)
        assert "--audio-dir was ../music, now ../other, where the files of train-" in line
        return
    assert build(data_dir, *options) == 0
    assert capsys.readouterr().err.count("rebuilt, since its audio files have other sizes") == 1
    assert [path.stat().st_mtime_ns for path in shards_in(data_dir)] != before


def test_folders_that_cannot_be_read_are_named(capsys, monkeypatch, data_dir):
    deny(monkeypatch, data_dir / "mp3" / "0")
    (data_dir / "mp3" / "1").rename(data_dir / "elsewhere")
    table = data_dir / "annotations_final.csv"
    header, first, *_ = table.read_text().splitlines()
    table.write_text(f"{header}\n{first}\n")
    line = refusal(capsys, data_dir)
    assert f"{data_dir / 'mp3' / '0'}/clip-00-0-1.mp3: Permission denied" in line
    deny(monkeypatch, data_dir)
    assert f"{data_dir}: Permission denied" in refusal(capsys, data_dir)


def test_folder_of_the_shards_is_refused(capsys, finished):
    line = refusal(capsys, finished[0] / "tfrecord", status=2)
    assert f"give the folder above, --data-dir {finished[0]}" in line


def test_second_build_in_the_same_folder_is_refused(capsys, data_dir):
    (data_dir / "tfrecord").mkdir()
    with open(data_dir / "tfrecord" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = refusal(capsys, data_dir)
    assert f"{data_dir / 'tfrecord'}: another build is " in line


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--num-workers", "2"], "--num-workers sets the processes of this machine, but with "),
        ([], "--scheduler: distributed is not installed: python -m pip install -r requirements/"),
    ],
)
def test_unusable_scheduler_is_refused(capsys, monkeypatch, data_dir, options, found):
    if not options:
        monkeypatch.setitem(sys.modules, "distributed", None)
        monkeypatch.delitem(sys.modules, "toolkit.data.dask_cluster", raising=False)
        monkeypatch.delattr("toolkit.data.dask_cluster", raising=False)
    line = refusal(capsys, data_dir, "--scheduler", "tcp://127.0.0.1:8786", *options, status=2)
    assert f"error: {found}" in line
    assert not (data_dir / "tfrecord").exists()


def test_missing_dataset_says_what_to_download(capsys, tmp_path):
    for data_dir in (tmp_path / "nowhere", tmp_path):
        line = refusal(capsys, data_dir, status=2)
        assert line.startswith(f"{Path(sys.argv[0]).name}: error: {data_dir}: no dataset found: ")
        assert "download annotations_final.csv and mp3.zip.001-003 from " in line


def test_folder_with_none_of_the_clips_is_refused(capsys, data_dir):
    (data_dir / "mp3" / "unpacked").mkdir()
    for folder in "0123456789abcdef":
        (data_dir / "mp3" / folder).rename(data_dir / "mp3" / "unpacked" / folder)
    line = refusal(capsys, data_dir)
    assert f"{data_dir / 'mp3'}: contains none of the 24 clips" in line
    assert f"{data_dir / 'mp3' / '0' / 'clip-00-0-1.mp3'}" in line


BAD_OPTIONS = ("--num-samples 0", "--sample-rate x", "--num-workers 0", "--decoder sox")
BAD_OPTIONS += ("--num-audios-per-shard -1", "--unknown", "stray", "--stop 0", "--stop -3")
BAD_OPTIONS += ("--stop nan", "--stop inf", "--stop all")


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_are_usage_errors(capsys, data_dir, options):
    with pytest.raises(SystemExit, match="2"):
        build_mtt.main(["--data-dir", str(data_dir), *options.split()])
    assert options.split()[0] in capsys.readouterr().err
    assert not (data_dir / "tfrecord").exists()


def test_building_imports_no_deep_learning_library_and_no_cluster():
    program = [sys.executable, "-c", "import sys, build_mtt; print(*sys.modules)"]
    done = subprocess.run(program, capture_output=True, text=True, check=True, cwd=SCRIPT.parent)
    modules = set(done.stdout.split())
    assert "build_mtt" in modules
    assert not modules & {"tensorflow", "keras", "torch", "jax", "distributed"}
