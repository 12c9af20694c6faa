"""Tags from folders: builds, splits, and folders that cannot be read as tags."""

import json
from collections import Counter
from unicodedata import normalize

import build_mtt
from input_data import open_dataset, read_clips
from toolkit.data.folders import read_folders
from toolkit.data.tables import TableForm
from toolkit.errors import AnnotationsError, ToolkitError

import pytest
from conftest import encode_audio, synthesise

# Files per tag.
GENRES = {"재즈": 4, 'the "blues"': 3, "🎷, <café>": 3}


@pytest.fixture
def genres(tmp_path):
    """Write short audio files in a folder per tag, and files that are not audio."""
    for place, (genre, count) in enumerate(GENRES.items()):
        folder = tmp_path / "genres" / genre
        folder.mkdir(parents=True)
        for number in range(count):
            path = folder / f"곡 {number}.{'WAV' if number else 'flac'}"
            codec = "pcm_s16le" if number else "flac"
            samples = synthesise(0.6, tags=[place], seed=number)
            encode_audio(path, samples, codec=codec, bit_rate=0)
        (folder / "cover.jpg").touch()
        (folder / "._곡 1.WAV").touch()  # as macOS writes
    return tmp_path / "genres"


def build(capsys, tmp_path, *options, status=0):
    command = ["--data-dir", tmp_path / "new" / "data", "--audio-dir", tmp_path / "genres"]
    command += ["--tags-from", "folders", "--sample-rate", 8000, "--num-samples", 4000]
    assert build_mtt.main(list(map(str, [*command, "--num-workers", 1, *options]))) == status
    return capsys.readouterr().err.splitlines()


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def splits_of(root, **form):
    """Return the split of each file."""
    clips, _, _ = read_folders(root, form=TableForm(tags_from="folders", **form))
    return dict(zip(clips.paths, clips.splits, strict=True))


def test_folders_are_built_and_resumed_or_refused(genres, tmp_path, capsys):
    said = build(capsys, tmp_path)
    assert said[0].startswith(f"{genres}: 10 audio files; tags are the first folders")
    assert said[1].endswith(': 재즈 (4), 🎷, <café> (3), the "blues" (3)')
    assert "6 files without the name of an audio file, or hidden: " in said[2]
    assert "cover.jpg'" in said[2]
    dataset = open_dataset(tmp_path / "new" / "data")
    assert dataset.tags == ('the "blues"', "🎷, <café>", "재즈")
    found = {}
    for split, described in dataset.splits.items():
        for clip in read_clips(described.shards, dataset.num_samples):
            (tag,) = (dataset.tags[number] for number in clip.labels.nonzero()[0])
            assert clip.mp3_path.startswith(f"{tag}/곡 ")
            found[clip.mp3_path] = (tag, split)
    assert Counter(found.values()) == {
        (tag, split): 1 + (tag == "재즈" and split == "train")
        for tag in GENRES
        for split in ("train", "val", "test")
    }

    manifest = json.loads((tmp_path / "new/data/tfrecord/manifest.json").read_text("utf-8"))
    assert manifest["options"]["files"] == sorted(found)
    assert manifest["options"]["tags_from"] == "folders"
    shards = list((tmp_path / "new/data/tfrecord").glob("*.tfrecord"))
    before = [path.stat().st_mtime_ns for path in shards]
    (genres / "more.txt").touch()
    build(capsys, tmp_path)
    assert [path.stat().st_mtime_ns for path in shards] == before
    assert "--split-seed was 0, now 1" in build(capsys, tmp_path, "--split-seed", 1, status=1)[-1]
    touch(genres, "재즈/new.mp3")
    error = build(capsys, tmp_path, status=1)[-1]
    assert "new or missing audio files: '재즈/new.mp3': use the same files, or " in error


@pytest.mark.parametrize("seed", [0, 3])
def test_every_folder_is_divided_in_the_same_shares(tmp_path, seed):
    sizes = {"a": 100, "b": 40, "c": 3, "d": 2, "e": 1}
    root = touch(
        tmp_path, *(f"{tag}/{n:03}.au" for tag, size in sizes.items() for n in range(size))
    )
    splits = splits_of(root, split_seed=seed)
    counts = Counter((path[0], split) for path, split in splits.items())
    expected = {"a": (75, 8, 17), "b": (30, 3, 7), "c": (1, 1, 1), "d": (1, 0, 1), "e": (1, 0, 0)}
    assert {
        tag: tuple(counts[tag, split] for split in ("train", "val", "test")) for tag in sizes
    } == expected
    assert splits_of(root, split_seed=seed) == splits != splits_of(root, split_seed=seed + 1)
    _, notes, _ = read_folders(root)
    assert "tags without clips in every split: 'd', 'e'" in notes


def test_files_of_a_second_folder_stay_in_one_split(tmp_path):
    artists = [("blues", artist) for artist in range(8)]
    artists += [("jazz", artist) for artist in range(5, 14)]
    paths = [f"{tag}/{one}/{song}.mp3" for tag, one in artists for song in range(1 + one % 3)]
    splits = splits_of(touch(tmp_path, *paths), split_by="folder")
    artists = {(path.split("/")[1], split) for path, split in splits.items()}
    assert len(artists) == 14
    for genre in ("blues", "jazz"):
        assert len({split for path, split in splits.items() if path.startswith(genre)}) == 3


def test_files_in_no_folder_are_left_out_and_forms_of_a_name_are_one_tag(tmp_path):
    names = [f"{normalize(form, 'é')}/{form}.ogg" for form in ("NFC", "NFD")] + [" é /a.ogg"]
    clips, notes, files = read_folders(touch(tmp_path, "a.mp3", *names))
    assert clips.tags == ("é",) and sorted(clips.paths) == sorted(names)
    assert files == sorted(["a.mp3", *names])
    assert "audio files in no folder: 'a.mp3'" in notes


def test_broken_links_are_clips_and_folders_without_clips_are_named(tmp_path):
    touch(tmp_path, "blues/a.mp3", "jazz/cover.jpg")
    (tmp_path / "rock").mkdir()
    (tmp_path / "delta").symlink_to("blues")
    (tmp_path / "blues" / "gone.mp3").symlink_to("nowhere.mp3")
    clips, notes, _ = read_folders(tmp_path)
    assert clips.paths == ["blues/a.mp3", "blues/gone.mp3"]
    said = "folders without audio files, or links to other folders: 'delta', 'jazz', 'rock'"
    assert notes[-1] == said


@pytest.mark.parametrize(
    ("path", "form", "found"),
    [
        ("a.mp3", {}, "no audio files in folders: expected files such as blues/a.wav"),
        ("rock/a.txt", {}, "no audio files in folders"),
        ("depth/a.mp3", {}, "'depth' cannot be the name of a tag"),
        (" /a.mp3", {}, "'' cannot be the name of a tag"),
        ("rock/a\\b.mp3", {}, "names must be UTF-8 without control characters"),
        ("rock\n/b.mp3", {}, "names must be UTF-8 without control characters"),
        ("rock/caf\udce9.mp3", {}, "'rock/caf\\udce9.mp3': names must be UTF-8"),
        ("rock/a.mp3", {"split_by": "folder"}, "the path has no second folder"),
        ("rock/a.mp3", {"split_by": "artist"}, "--split-by artist: with --tags-from folders"),
    ],
)
def test_folders_that_are_no_tags_are_refused(tmp_path, path, form, found):
    try:
        touch(tmp_path, path)
    except OSError:
        pytest.skip("this file system accepts only UTF-8 names")
    with pytest.raises(ToolkitError) as caught:
        read_folders(tmp_path, form=TableForm(tags_from="folders", **form))
    assert found in str(caught.value) and "\n" not in str(caught.value)
    is_of_folder = isinstance(caught.value, AnnotationsError)
    assert str(caught.value).startswith(f"{tmp_path}: ") == is_of_folder


def test_options_of_tables_are_refused(genres, tmp_path, capsys):
    for options in (["--annotations", "t.csv"], ["--tags-column", "x"], ["--audio-suffix", ".au"]):
        said = build(capsys, tmp_path, *options, status=2)[-1]
        assert f"error: {options[0]}: is for tables" in said
    assert not (tmp_path / "new").exists()
