"""Your own tables: builds from every form, variants of a table, and invalid tables."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from unicodedata import normalize

import build_mtt
from input_data import open_dataset, read_clips
from toolkit.cli import read_options
from toolkit.data.annotations import MTT_TOP_TAGS, SPLIT_SHARES, SPLITS, draw_splits
from toolkit.data.tables import TableForm, read_tables
from toolkit.errors import AnnotationsError, BuildError, ToolkitError, UsageError

import numpy as np
import pytest
from conftest import encode_audio, synthesise
from hypothesis import given, settings
from hypothesis import strategies as st

# The segments are half a second long.
OPTIONS = ["--sample-rate", "8000", "--num-samples", "4000", "--num-workers", "1"]
# Path, artist and tags of the audio files.
SONGS = [
    ("nina/sunrise.mp3", "Nina", ("folk", "guitar")),
    ("nina/sunset.flac", "Nina", ("folk",)),
    ("otis/stomp.wav", "Otis", ("blues", "guitar", "loud")),
    ("otis/walk.mp3", "Otis", ("blues",)),
    ("rita/waltz.mp3", "Rita", ("guitar",)),
    ("rita/tango, slow.mp3", "Rita", ("loud", "guitar")),
    ("sol/ü ö.mp3", "Sol", ("folk", "blues")),
]
TAGS = ("loud", "blues", "folk", "guitar")  # of 2, 3, 3 and 4 clips; ties are sorted by name


@pytest.fixture(scope="session")
def songs(tmp_path_factory):
    """Write audio files in three formats and four folders."""
    folder = tmp_path_factory.mktemp("songs")
    for number, (path, _, tags) in enumerate(SONGS):
        (folder / path).parent.mkdir(exist_ok=True)
        samples = synthesise(1.1, tags=[TAGS.index(tag) for tag in tags], seed=number)
        codec = {"mp3": "libmp3lame", "flac": "flac", "wav": "pcm_s16le"}[path.rpartition(".")[2]]
        encode_audio(folder / path, samples, codec=codec, bit_rate=32000 * (codec[0] == "l"))
    return folder


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def quoted(*fields):
    return ",".join(f'"{field}"' for field in fields)


def as_columns(folder):
    """Write two CSVs with tag columns of 0 and 1, and two other columns."""
    rows = [
        quoted(artist, path, *(int(tag in tags) for tag in TAGS), 1999 + number, "")
        for number, (path, artist, tags) in enumerate(SONGS)
    ]
    header = quoted("Artist", "File", *TAGS, "year", "comment")
    tables = [write(folder / f"columns-{part}.csv", header, *rows[part::2]) for part in (0, 1)]
    return tables, ["--split-by", "Artist"]


def as_lists(folder):
    """Write a TSV with a column of tag lists, delimited by semicolons, and one of the split."""
    words = ("train", "TRAIN", "valid", "test")
    rows = [
        f"{path}\t{'; '.join(tags)}\t{words[number % 4]}"
        for number, (path, _, tags) in enumerate(SONGS)
    ]
    options = ["--tags-column", "genres", "--tags-delimiter", ";", "--split-column", "Part"]
    return [write(folder / "lists.tsv", "path\tgenres\tPart", *rows)], options


def as_jamendo(folder):
    """Write three tables in MTG-Jamendo's form: one tag per column, to the end of the row."""
    written = {split: [] for split in ("train", "validation", "test")}
    for number, (path, artist, tags) in enumerate(SONGS):
        row = [f"track_{number:07}", f"artist_{artist}", "album_1", path, "124.6", *tags]
        written[("train", "train", "validation", "test")[number % 4]].append("\t".join(row))
    header = "TRACK_ID\tARTIST_ID\tALBUM_ID\tPATH\tDURATION\tTAGS"
    paths = [
        write(folder / f"autotagging_top50tags-{split}.tsv", header, *rows)
        for split, rows in written.items()
    ]
    return paths, []


@pytest.mark.parametrize("form", [as_lists, as_jamendo])
def test_every_form_of_table_is_read(tmp_path, form):
    tables, options = form(tmp_path)
    parser = build_mtt.build_parser()
    clips, notes = read_tables(tables, form=read_options(TableForm, parser.parse_args(options)))
    assert "7 of 7 clips carry one or more of the 4 most frequent of 4 tags" in notes[1]
    assert clips.tags == TAGS
    labels = {path: [tag in tags for tag in TAGS] for path, _, tags in SONGS}
    assert dict(zip(clips.paths, clips.labels.tolist(), strict=True)) == labels
    split_of = dict(zip(clips.paths, clips.splits, strict=True))
    splits = [split_of[path] for path, _, _ in SONGS]
    assert splits == ["train", "train", "val", "test", "train", "train", "val"]


def test_table_is_built_and_resumed(songs, tmp_path, capsys):
    tables, options = as_columns(tmp_path)
    data_dir = tmp_path / "new" / "mine"
    command = ["--data-dir", str(data_dir), "--annotations", *map(str, tables)]
    command += ["--audio-dir", str(songs), *OPTIONS, *options]
    assert build_mtt.main(command) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert said.out == ""
    assert "7 of 7 clips carry one or more of the 4 most frequent of 4 tags" in said.err

    dataset = open_dataset(data_dir)
    assert dataset.tags == TAGS
    found = {}
    for split, described in dataset.splits.items():
        for clip in read_clips(described.shards, dataset.num_samples):
            assert clip.segments.shape == (2, 4000)
            tags = {tag for tag, label in zip(TAGS, clip.labels, strict=True) if label}
            found[clip.mp3_path] = (split, tags)
            assert clip.clip_id == clip.mp3_path
    assert {path: tags for path, (_, tags) in found.items()} == {
        path: set(tags) for path, _, tags in SONGS
    }
    assert len({(artist, found[path][0]) for path, artist, _ in SONGS}) == 4
    assert {split for split, _ in found.values()} == set(SPLITS)

    # The same command builds nothing when repeated; other options are refused.
    before = {path: path.stat().st_mtime_ns for path in (data_dir / "tfrecord").glob("*.tfrecord")}
    assert build_mtt.main(command) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    capsys.readouterr()
    assert build_mtt.main([*command, "--num-tags", "3"]) == 1
    assert "--num-tags was 50, now 3" in capsys.readouterr().err
    assert build_mtt.main([*command, "--split-seed", "1"]) == 1
    assert "--split-seed was 0, now 1" in capsys.readouterr().err
    assert build_mtt.main([*command, "--annotations", *map(str, tables[::-1])]) == 1
    assert "the tables or their order have changed since" in capsys.readouterr().err


def test_audio_suffix_replaces_the_extension(songs, tmp_path, capsys):
    audio = shutil.copytree(songs, tmp_path / "audio")
    for path in list(audio.glob("*/*.*")):
        path.rename(path.with_suffix(".low.mp3"))
    tables, _ = as_jamendo(tmp_path)
    command = ["--data-dir", str(tmp_path / "mine"), "--annotations", *map(str, tables), *OPTIONS]
    command += ["--audio-dir", str(audio)]
    assert build_mtt.main([*command, "--audio-suffix", ".low.mp3"]) == 0, capsys.readouterr().err
    manifest = json.loads((tmp_path / "mine" / "tfrecord" / "manifest.json").read_text())
    assert manifest["skipped"] == []
    assert manifest["options"]["audio_suffix"] == ".low.mp3"
    assert sum(split["clips"] for split in manifest["splits"].values()) == 7


def test_table_of_magnatagatune_is_recognised(golden):
    path = golden / "annotations" / "small.csv"
    clips, notes = read_tables([path])
    assert "the split is that of MagnaTagATune's folders" in notes[0]
    # With another split, the tags and their order are the same.
    other, _ = read_tables([path], form=TableForm(split_by="folder"))
    assert other.splits != clips.splits
    assert other.tags == clips.tags == MTT_TOP_TAGS
    assert np.array_equal(other.labels, clips.labels)


# --- Variants of a table -------------------------------------------------------------------------

HEADER = "path,split,rock,slow\n"
ROWS = "a.mp3,train,1,0\nb.mp3,val,1,1\nc.mp3,test,0,1\n"


VARIANTS = {
    "byte order mark": "\ufeff" + HEADER + ROWS,
    "CRLF": (HEADER + ROWS).replace("\n", "\r\n"),
    "tabs": (HEADER + ROWS).replace(",", "\t"),
    "semicolons": (HEADER + ROWS).replace(",", ";"),
    "blank line": (HEADER + ROWS).rstrip("\n") + "\n\n",
    "spread": "path,split,tags\na.mp3,train,rock\nb.mp3,validation,rock,slow\nc.mp3,test,slow\n",
    "list": 'path,split,Tags\na.mp3,train,rock\nb.mp3,val,"slow, rock, "\nc.mp3,test,slow\n',
    "UTF-16": ("\ufeff" + HEADER + ROWS).encode("utf-16-le"),
    "CR": (HEADER + ROWS).replace("\n", "\r"),
    "pipes": (HEADER + ROWS).replace(",", "|"),
    "empty fields": (HEADER + ROWS).replace("\n", ",,\n") + ",,,,,\n",
    "spaces": 'path, split, tags\na.mp3, train, rock\nb.mp3, val, "slow, rock"\nc.mp3, test, slow',
    "True and False": (HEADER + ROWS).replace("1", "True").replace("0", "FALSE"),
    "1e+00 and 0.0": (HEADER + ROWS).replace("0", "0.0").replace("1", "1e+00"),
    "decimal commas": (HEADER + ROWS).replace(",", ";").replace("0", "0,0").replace("1", "1,0"),
    "yes and no": (HEADER + ROWS).replace("1", "yes").replace("0", "no"),
    "other words": (HEADER + ROWS).replace("train", "Training").replace("val", "dev"),
    "list with pipes": "path,split,tags\na.mp3,train,rock\nb.mp3,val,slow | rock\n"
    "c.mp3,test,slow\n",
    "list with semicolons": 'path,split,tags\na.mp3,train,"rock;"\nb.mp3,val,slow; rock\n'
    "c.mp3,test,slow\n",
    "another order": "split,filename,rock,slow,plays\n"
    "train,a.mp3,1,0,7\nval,b.mp3,1,1,9\ntest,c.mp3,0,1,1\n",
    "index column": ",PATH,Split,rock,slow,never\n"
    "0,a.mp3,train,1,0,0\n1,b.mp3,val,1,1,0\n2,c.mp3,test,0,1,0\n",
}


@pytest.mark.parametrize("content", VARIANTS.values(), ids=VARIANTS)
def test_variants_of_a_table_are_read_alike(tmp_path, content):
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    clips, _ = read_tables([path])
    assert clips.tags == ("rock", "slow")
    assert clips.labels.tolist() == [[1, 0], [1, 1], [0, 1]]
    assert clips.paths == clips.clip_ids == ["a.mp3", "b.mp3", "c.mp3"]
    assert clips.splits == ["train", "val", "test"]


def test_clips_without_a_kept_tag_are_left_out_with_a_note(tmp_path):
    path = write(
        tmp_path / "t.csv", "path,split,tags", "a,train,x|y", "b,train,", "c,val,x", "d,test,z"
    )
    form = TableForm(tags_delimiter="|", tags_column="tags")
    clips, found = read_tables([path], num_tags=1, form=form)
    assert clips.tags == ("x",)
    assert clips.paths == ["a", "c"]
    assert any(
        "2 of 4 clips carry one or more of the 1 most frequent of 3 tags" in s for s in found
    )
    clips, found = read_tables([path], form=form)
    assert clips.tags == ("y", "z", "x")
    assert "tags without training clips: z" in found


def test_clip_ids_are_kept(tmp_path):
    path = write(tmp_path / "t.csv", "clip_id,path,split,x", "007,a,train,1", "NA,b,val,1")
    clips, _ = read_tables([path])
    assert clips.clip_ids == ["007", "NA"]


def test_tags_may_have_the_names_of_columns_of_the_clips(tmp_path):
    path = write(tmp_path / "t.csv", "path,split,tags", 'a,train,"split,shard"', "b,val,path")
    clips, _ = read_tables([path])
    assert clips.tags == ("path", "shard", "split")
    assert clips.labels.tolist() == [[0, 1, 1], [1, 0, 0]]


# --- What a table was read as ---------------------------------------------------------------------


def test_first_lines_name_columns_split_delimiter_and_tags_with_counts(tmp_path):
    rows = ["a,train,x;y", "b,val,x", "c,test,x"]
    _, notes = read_tables([write(tmp_path / "t.csv", "path,split,tags", *rows)])
    assert notes[0] == (
        "paths are in column 'path', tags are in column 'tags' with delimiter ';', the split is in "
        "column 'split'"
    )
    assert notes[1].endswith(": x (3), y (1)")
    tags = ";".join(f"t{number:02}" for number in range(40))
    _, notes = read_tables([write(tmp_path / "t.csv", "path,split,tags", f"a,train,{tags}")])
    assert ": t39 (1), t38 (1), t37 (1), " in notes[1]
    assert ", …, " in notes[1]
    assert notes[1].endswith(", t01 (1), t00 (1)")


def test_columns_that_are_not_tags_can_be_excluded(tmp_path):
    rows = ["a,train,1,1,no", "b,val,1,0,no", "c,test,1,0,yes"]
    path = write(tmp_path / "t.csv", "path,split,rock,is_train,live", *rows)
    clips, notes = read_tables([path])
    assert clips.tags == ("is_train", "rock")
    assert notes[1].endswith(": rock (3), is_train (1)")
    assert "columns that are not tags: 'live'" in notes  # another notation than that of the others
    clips, _ = read_tables([path], form=TableForm(exclude_columns=["is_train"]))
    assert clips.tags == ("rock",)


def test_a_pipe_is_refused():
    end, start = os.pipe()
    os.write(start, (HEADER + ROWS).encode())
    os.close(start)
    with pytest.raises(AnnotationsError, match=f"/dev/fd/{end}: is a pipe: save the table as"):
        read_tables([f"/dev/fd/{end}"])
    os.close(end)


def test_odd_tags_are_noted(tmp_path):
    rows = ['"a",train,"Rock|x;|y ""z"""', "b,val,rock|hip hop", "c,test,hip\u200b  hop|'x'"]
    path = write(tmp_path / "t.csv", "path,split,tags", *rows)
    form = TableForm(tags_column="tags", tags_delimiter="|")
    _, notes = read_tables([path], form=form)
    assert "tags that contain a delimiter or a quote: \"'x'\", 'x;', 'y \"z\"'" in notes
    alike = "'Rock', 'rock', 'hip hop', 'hip\\u200b  hop'"
    assert f"tags that differ only in case or spaces: {alike}" in notes
    _, notes = read_tables([write(tmp_path / "t.csv", "path,split,tags", "a,train,rock / loud")])
    assert "tags are in column 'tags', one per clip" in notes[0]


def test_backslashes_are_read_as_slashes(tmp_path):
    clips, notes = read_tables([write(tmp_path / "t.csv", "path,split,x", "a\\b.mp3,train,1")])
    assert "paths are read with / for \\" in notes
    assert clips.paths == clips.clip_ids == ["a/b.mp3"]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_unicode_forms_of_the_same_text_are_equal(tmp_path, forms):
    """Macs may write "é" as "e" and an accent."""
    in_table, on_disk = (normalize(form, "é") for form in forms)
    rows = [f"{in_table}.mp3,train,{in_table}", f"b.mp3,val,{on_disk}"]
    path = write(tmp_path / "t.csv", "path,split,tags", *rows)
    clips, _ = read_tables([path])
    clips.shards = np.zeros(2, int)
    before = clips.sha256()
    assert clips.tags == (normalize("NFC", "é"),)
    (tmp_path / f"{on_disk}.mp3").touch()
    clips.match_files(tmp_path)
    assert (tmp_path / clips.paths[0]).exists()
    assert clips.sha256() == before
    path = write(tmp_path / "t.csv", "path,split,x", f"{in_table},train,1", f"{on_disk},val,1")
    with pytest.raises(AnnotationsError, match=r"row 3, column .path.: .* is also in row 2"):
        read_tables([path])


# --- Splits --------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.dictionaries(st.text(min_size=1, max_size=4), st.integers(1, 30), min_size=3, max_size=60),
    st.integers(0, 2**31 - 1),
    st.randoms(use_true_random=False),
)
def test_each_group_stays_in_one_split_and_the_splits_have_their_shares(sizes, seed, random):
    split_of = draw_splits(sizes, seed)
    assert split_of.keys() == sizes.keys()
    assert set(split_of.values()) == set(SPLITS)
    shuffled = list(sizes.items())
    random.shuffle(shuffled)
    assert draw_splits(dict(shuffled), seed) == split_of
    clips = Counter()
    for group, split in split_of.items():
        clips[split] += sizes[group]
    # No split differs from its share by more than two of the largest groups.
    for split, share in SPLIT_SHARES.items():
        assert abs(clips[split] - share * sum(sizes.values())) <= 2 * max(sizes.values())


def test_split_does_not_depend_on_the_number_of_tags(tmp_path):
    rows = [f"{number},artist {number % 9},x{number % 4},{number}.mp3" for number in range(40)]
    path = write(tmp_path / "t.csv", "n,artist,tags,path", *rows)
    form = TableForm(split_by="artist", split_seed=1)
    all_clips, _ = read_tables([path], form=form)
    few, _ = read_tables([path], num_tags=1, form=form)
    expected = dict(zip(all_clips.paths, all_clips.splits, strict=True))
    assert few.splits == [expected[path] for path in few.paths]
    artists = {(number % 9, split) for number, split in enumerate(all_clips.splits)}
    assert len(artists) == 9


@pytest.mark.parametrize("seed", range(4))
def test_every_split_has_clips_if_few_groups_carry_a_tag(tmp_path, seed):
    rows = [
        f"artist {number % 10},{'x' if number % 10 < 4 else ''},{number}.mp3"
        for number in range(40)
    ]
    path = write(tmp_path / "t.csv", "artist,tags,path", *rows)
    clips, found = read_tables([path], form=TableForm(split_by="artist", split_seed=seed))
    assert len(clips.paths) == 16
    assert set(clips.splits) == set(SPLITS)
    assert not any("splits without clips" in sentence for sentence in found)


def test_splits_without_clips_are_noted(tmp_path):
    path = write(tmp_path / "t.csv", "path,split,x,y", "a,train,1,1", "b,train,0,1", "c,val,0,0")
    _, found = read_tables([path])
    assert "splits without clips: val, test" in found


# --- Invalid tables ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "the table has no rows"),
        (HEADER, "the table has no rows"),
        ("\n\n", "the table has no rows"),
        ("\n" + HEADER + ROWS, "row 1 is empty"),
        (HEADER + ROWS + 'd.mp3,"train,1,0\n' + ROWS, "row 5: a field that begins with a quote"),
        (HEADER + ROWS + 'd.mp3,"tr"ain,1,0\n', "row 5: a field that begins with a quote must end"),
        (HEADER + ROWS + 'd.mp3,"train\n",1,0\n', "in the same row (it ends in row 6)"),
        (HEADER + ROWS + "d.mp3,tr\0ain,1,0\n", "row 5: contains a NUL byte"),
        (np.random.default_rng(0).bytes(9999), "not UTF-8: save the table as CSV in UTF-8"),
        (HEADER + ROWS + "../a.mp3,train,1,0\n", "row 5, column 'path': '../a.mp3' is not a path"),
        (HEADER + ROWS + "/x/d.mp3,train,1,0\n", "'/x/d.mp3' is an absolute path: write paths re"),
        (HEADER + ROWS + "C:\\d.mp3,train,1,0\n", "with /, such as 'd.mp3'"),
        (HEADER + ROWS + "x/../../a,train,1,0\n", "row 5, column 'path': 'x/../../a' is not"),
        (HEADER + ROWS + "..\\d,train,1,0\n", "row 5, column 'path': '..\\\\d' is not a path"),
        (HEADER + ROWS + ",train,1,0\n", "row 5, column 'path': '' is not a path"),
        (HEADER + ROWS + "./a.mp3,train,1,0\n", "row 5, column 'path': 'a.mp3' is also in row 2"),
        (HEADER + ROWS + "d.mp3,train,2,0\n", "row 5, column 'rock': found '2', expected 0 or 1"),
        (HEADER + ROWS + "d.mp3,train,,0\n", "row 5, column 'rock': found '', expected 0 or 1"),
        (HEADER + ROWS + "d.mp3,other,1,0\n", "row 5, column 'split': found 'other', expected one"),
        (HEADER + ROWS + "d.mp3,train,1\n", "row 5: 3 fields, row 1 has 4"),
        (HEADER + ROWS + "d.mp3,train,1,0,0\n", "row 5: 5 fields, row 1 has 4"),
        ("path,split,rock,rock\na.mp3,train,1,0\n", "row 1, column 'rock': the name appears twice"),
        (",set,set,track\n,split,subset,path\n", "join the rows of a header that has several, su"),
        ("path,split,depth\na,train,1\n", "row 1, column 'depth': 'depth' cannot be the name"),
        ('path,split,tags\na,train,x;y\nb,val,"x,y"\n', "(';' in row 2, ',' in row 3): name the "),
        ("path,split,clip_id\na.mp3,train,1\n", "no column contains only 0 and 1"),
        ("path,split,rock\na.mp3,train,0\n", "no clip carries a tag"),
        ("path,split,tags\na,train,\"['rock']\"\n", "row 2, column 'tags': found \"['rock']\""),
        ("path,split,tags\na,train,\"{'x', 'y'}\"\n", "row 2, column 'tags': found \"{'x'"),
        ("path,split,tags\na,train,x\ty\n", "'x\\ty' cannot be the name of a tag (it is empty or"),
        ("path,split,tags\na,train,clip_id\n", "row 2, column 'tags': 'clip_id' cannot be"),
        ('path,split,tags\na,train,"x,y"\nb,val,x,y\n', "row 2, column 'tags': 'x,y' is a list"),
        ("path,file,split,x\na,b,train,1\n", "several columns of paths in 'path', 'file'"),
        ("song,split,x\na,train,1\n", "no column of paths in 'song', 'split', 'x'"),
        ("path,split,title\na,train,Blue\n", "no column contains only 0 and 1"),
        ("path,x\na,1\n", "the split is unknown"),
        ("clip_id,path,split,x\n1,a,train,1\n1,b,val,1\n", "row 3, column 'clip_id': '1' is also"),
        ("clip_id,path,split,x\n,a,train,1\n", "row 2, column 'clip_id': the field is empty"),
    ],
)
def test_error_of_an_invalid_table_names_row_and_column(tmp_path, content, found):
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((AnnotationsError, UsageError)) as caught:
        read_tables([path])
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and found in message
    assert "\n" not in message and len(message) < len(str(path)) + 300


@pytest.mark.parametrize(
    ("form", "found"),
    [
        ({"path_column": "none"}, "--path-column none: "),
        ({"tags_column": "none"}, "--tags-column none: "),
        ({"split_column": "none"}, "--split-column none: "),
        ({"split_by": "none"}, "--split-by none: "),
        ({"split_by": "folder"}, "row 2, column 'path': the path has no folder"),
        (
            {"split_by": "rock"},
            "column 'rock': 2 groups with tags, too few for train, val, test",
        ),
        ({"split_seed": 1}, "--split-seed: needs --split-by"),
        ({"split_by": "rock", "split_seed": 5_000_000_000}, "--split-seed: must be less than 2^32"),
        ({"tags_delimiter": "|"}, "--tags-delimiter: name the column"),
        ({"tags_delimiter": ""}, "--tags-delimiter: must not be empty"),
        ({"split_by": "rock", "split_column": "split"}, "--split-column and --split-by"),
    ],
)
def test_options_that_do_not_fit_the_table_are_refused(tmp_path, form, found):
    path = write(tmp_path / "t.csv", *(HEADER + ROWS).splitlines())
    with pytest.raises(ToolkitError) as caught:
        read_tables([path], form=TableForm(**form))
    assert found in str(caught.value)
    assert isinstance(caught.value, UsageError) == found.startswith("--")


def test_tables_that_do_not_belong_together_are_refused(tmp_path):
    one = write(tmp_path / "x-train.csv", "path,x", "a,1")
    for name, lines, found in (
        (
            "x-test.csv",
            ["path,y", "b,1"],
            "x-test.csv: its columns ('path', 'y') differ from those of",
        ),
        ("x-test.csv", ["path,x", "a,1"], f"row 2, column 'path': 'a' is also in row 2 of {one}"),
        ("x-rest.csv", ["path,x", "b,1"], "the split is unknown"),
        ("x-train-test.csv", ["path,x", "b,1"], "the split is unknown"),
    ):
        with pytest.raises(ToolkitError) as caught:
            read_tables([one, write(tmp_path / name, *lines)])
        assert found in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_missing_table_is_named(tmp_path, kind):
    path = tmp_path if kind == "folder" else tmp_path / "none.csv"
    with pytest.raises(AnnotationsError, match=str(path)):
        read_tables([path])


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=60), st.integers(0, len(HEADER + ROWS)))
def test_any_content_is_read_or_refused_in_one_line(tmp_path_factory, noise, place):
    whole = (HEADER + ROWS).encode()
    path = tmp_path_factory.getbasetemp() / "noise.csv"
    path.write_bytes(whole[:place] + noise + whole[place + len(noise) :])
    try:
        clips, _ = read_tables([path])
    except ToolkitError as error:
        assert "\n" not in str(error)
    else:
        assert set(np.unique(clips.labels)) <= {0, 1}
        assert set(clips.splits) <= set(SPLITS)


def test_missing_audio_folder_is_named(tmp_path, capsys):
    tables, options = as_columns(tmp_path)
    command = ["--data-dir", str(tmp_path / "mine"), "--annotations", str(tables[0]), *options]
    assert build_mtt.main(command) == 2
    assert (
        f"{Path('mine') / 'mp3'}: no such folder: give the audio folder" in capsys.readouterr().err
    )
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("paths", "suffix", "found"),
    [
        (["a.mp3", "a.wav"], ".low.mp3", "'.low.mp3': two clips become a.low.mp3"),
        (["b/a.mp3"], "/../../a", "b/a.mp3 becomes 'b/a/../../a', which is not a path inside"),
    ],
)
def test_suffix_that_gives_no_paths_is_refused(tmp_path, paths, suffix, found):
    rows = [f"{path},train,1" for path in paths]
    clips, _ = read_tables([write(tmp_path / "t.csv", "path,split,x", *rows)])
    with pytest.raises(BuildError) as caught:
        clips.replace_suffixes(suffix)
    assert found in str(caught.value)
