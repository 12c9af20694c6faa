"""MagnaTagATune's table: rows, order, splits and shards as published; invalid tables."""

import gzip
import os
from pathlib import Path

from toolkit.data.annotations import (
    ANNOTATIONS_NAME,
    MTT_TOP_TAGS,
    SPLITS,
    assign_shards,
    read_mtt,
    top_tags,
    with_suffix,
)
from toolkit.errors import AnnotationsError, BuildError

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

HEADER = "clip_id\trock\tpop\tmp3_path\n"
ROWS = "2\t1\t0\t0/a.mp3\n6\t0\t1\tc/b.mp3\n10\t1\t1\tf/c.mp3\n"


def write(folder, content):
    path = folder / ANNOTATIONS_NAME
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- The published program's table ---------------------------------------------------------------


def test_table_equals_that_of_the_published_program(golden):
    clips, tags = read_mtt(golden / "annotations" / "small.csv")
    clips = assign_shards(clips, num_audios_per_shard=10)
    expected = pd.read_csv(golden / "annotations" / "expected.csv", dtype={"clip_id": str})
    assert tags == MTT_TOP_TAGS
    assert list(clips.columns) == list(expected.columns)
    pd.testing.assert_frame_equal(clips, expected, check_dtype=False)


@pytest.mark.skipif("GOLDEN_MTT_DIR" not in os.environ, reason="GOLDEN_MTT_DIR is not set")
def test_magnatagatune_has_the_published_splits_and_shards(tmp_path):
    folder = Path(os.environ["GOLDEN_MTT_DIR"])
    content = gzip.decompress((folder / "annotations_final.csv.gz").read_bytes())
    clips, tags = read_mtt(write(tmp_path, content))
    clips = assign_shards(clips, num_audios_per_shard=100)
    assert tags == MTT_TOP_TAGS
    expected = pd.read_csv(folder / "expected.csv.gz", dtype={"clip_id": str})
    pd.testing.assert_frame_equal(clips[list(expected.columns)], expected)
    counts = clips.groupby("split")
    assert counts.size().to_dict() == {"train": 15250, "val": 1529, "test": 4332}
    assert counts["shard"].nunique().to_dict() == {"train": 152, "val": 15, "test": 43}


# --- Order of the tags ---------------------------------------------------------------------------


@st.composite
def tied_magnatagatune_counts(draw):
    """Draw counts with many ties in which MagnaTagATune's 50 tags are the most frequent."""
    others = [f"other {number}" for number in range(draw(st.integers(0, 30)))]
    least = draw(st.integers(1, 5))
    counts = {tag: least + draw(st.integers(0, 3)) for tag in MTT_TOP_TAGS}
    tied_tag = draw(st.sampled_from(MTT_TOP_TAGS))
    counts[tied_tag] = least
    counts |= {tag: draw(st.integers(0, least)) for tag in others}
    names = draw(st.permutations(list(counts)))
    return np.array([counts[name] for name in names]), names


@given(tied_magnatagatune_counts())
def test_published_order_does_not_depend_on_ties(table):
    assert top_tags(*table) == MTT_TOP_TAGS


@given(tied_magnatagatune_counts(), st.integers(1, 3))
def test_a_more_frequent_tag_replaces_a_published_one(table, lead):
    counts, names = table
    least = min(count for count, name in zip(counts, names, strict=True) if name in MTT_TOP_TAGS)
    tags = top_tags(np.append(counts, least + lead), [*names, "newcomer"])
    assert len(tags) == 50
    assert "newcomer" in tags
    assert tags != MTT_TOP_TAGS


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=80),
    st.integers(1, 60),
    st.data(),
)
def test_other_tags_are_ordered_by_count_then_column(counts, num_tags, data):
    names = [f"tag {number}" for number in data.draw(st.permutations(range(len(counts))))]
    tags = top_tags(np.array(counts), names, num_tags)
    place = {name: (counts[column], column) for column, name in enumerate(names)}
    assert len(tags) == min(num_tags, len(names))
    places = [place[tag] for tag in tags]
    assert places == sorted(places)
    left_out = [place[name] for name in names if name not in tags]
    assert not left_out or max(left_out) < min(places)


# --- Splits and shards ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "split"),
    [(folder, "train") for folder in "0123456789ab"] + [("c", "val")]
    + [(folder, "test") for folder in "def"],
)  # fmt: skip
def test_folder_determines_the_split(tmp_path, folder, split):
    clips, _ = read_mtt(write(tmp_path, f"{HEADER}1\t1\t0\t{folder}/a.mp3\n"))
    assert clips["split"].tolist() == [split]


@given(
    st.lists(st.sampled_from(SPLITS), min_size=1, max_size=300),
    st.integers(1, 40),
)
def test_shards_are_full_and_even(splits, num_audios_per_shard):
    clips = pd.DataFrame({"split": splits})
    dealt = assign_shards(clips, num_audios_per_shard)
    pd.testing.assert_frame_equal(dealt, assign_shards(clips, num_audios_per_shard))
    for _, shards in dealt.groupby("split")["shard"]:
        sizes = np.bincount(shards)
        assert len(sizes) == max(1, len(shards) // num_audios_per_shard)
        assert sizes.max() - sizes.min() <= 1
        assert len(sizes) == 1 or sizes.min() >= num_audios_per_shard


# --- Variants and invalid tables -----------------------------------------------------------------


def test_clips_without_a_kept_tag_are_left_out(tmp_path):
    table = f"{HEADER}{ROWS}11\t0\t0\t0/d.mp3\n12\t1\t0\t0/e.mp3\n"
    clips, tags = read_mtt(write(tmp_path, table))
    assert tags == ("pop", "rock")
    assert clips["clip_id"].tolist() == ["2", "6", "10", "12"]
    assert clips[["pop", "rock"]].to_numpy().tolist() == [[0, 1], [1, 0], [1, 1], [0, 1]]
    clips, tags = read_mtt(write(tmp_path, table), num_tags=1)
    assert tags == ("rock",)
    assert clips["clip_id"].tolist() == ["2", "10", "12"]


@pytest.mark.parametrize(
    "content",
    [
        ("\ufeff" + HEADER + ROWS).encode(),
        (HEADER + ROWS).replace("\n", "\r\n").encode(),
        ("\ufeff" + HEADER + ROWS).replace("\n", "\r\n").encode() + b"\r\n",
        "".join(
            "\t".join(f'"{field}"' for field in line.split("\t")) + "\n"
            for line in (HEADER + ROWS).splitlines()
        ).encode(),
        (HEADER + ROWS).rstrip("\n").encode(),
    ],
    ids=["byte order mark", "CRLF", "both", "quoted", "no last newline"],
)
def test_variants_of_the_table_are_read_alike(tmp_path, content):
    expected, expected_tags = read_mtt(write(tmp_path, HEADER + ROWS))
    clips, tags = read_mtt(write(tmp_path, content))
    assert tags == expected_tags
    pd.testing.assert_frame_equal(clips, expected)


def test_identities_are_kept_as_written(tmp_path):
    clips, _ = read_mtt(write(tmp_path, f"{HEADER}007\t1\t0\t0/NA.mp3\nNA\t0\t1\t0/ü ö.mp3\n"))
    assert clips["clip_id"].tolist() == ["007", "NA"]
    assert clips["mp3_path"].tolist() == ["0/NA.mp3", "0/ü ö.mp3"]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "not a tab-separated UTF-8 table"),
        (b"\n\n", "not a tab-separated UTF-8 table"),
        (np.random.default_rng(0).bytes(9999), "not a tab-separated UTF-8 table"),
        (bytes(9999), "no column 'clip_id'"),
        ((HEADER + ROWS).encode("utf-16"), "not a tab-separated UTF-8 table"),
        ((HEADER + ROWS).replace("\t", ","), "separated by commas: expected tabs"),
        (HEADER, "the table has no rows"),
        ("id\trock\tmp3_path\n1\t1\t0/a.mp3\n", "no column 'clip_id'"),
        ("clip_id\trock\tpath\n1\t1\t0/a.mp3\n", "no column 'mp3_path'"),
        ("clip_id\tmp3_path\n1\t0/a.mp3\n", "no tag columns"),
        ("clip_id\trock\trock\tmp3_path\n1\t1\t0\t0/a.mp3\n", "row 1, column 'rock'"),
        ("clip_id\trock\tsplit\tmp3_path\n1\t1\t0\t0/a.mp3\n", "row 1, column 'split'"),
        (HEADER + ROWS + "2\t1\t0\t0/z.mp3\n", "row 5, column 'clip_id': '2'"),
        (HEADER + ROWS + "3\t1\t0\t0/a.mp3\n", "row 5, column 'mp3_path': '0/a.mp3'"),
        (HEADER + ROWS + "\t1\t0\t0/z.mp3\n", "row 5, column 'clip_id'"),
        (HEADER + ROWS + "3\t2\t0\t0/z.mp3\n", "row 5, column 'rock': found '2', expected 0 or 1"),
        (HEADER + ROWS + "3\t1\t\t0/z.mp3\n", "row 5, column 'pop': found '', expected 0 or 1"),
        (HEADER + ROWS + "3\t1\n", "row 5, column 'pop': found ''"),
        (HEADER + ROWS + "3\t1\t0\n", "row 5, column 'mp3_path'"),
        (HEADER + ROWS + "3\t1\t0\t0/z.mp3\tmore\n", "line 5"),
        (HEADER + '3\t"1\t0\t0/z.mp3\n', "not a tab-separated UTF-8 table"),
        (HEADER + "3\t0\t0\t0/z.mp3\n", "every label is 0"),
    ],
)
def test_error_of_an_invalid_table_names_row_and_column(tmp_path, content, found):
    path = write(tmp_path, content)
    with pytest.raises(AnnotationsError) as caught:
        read_mtt(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert found in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300


@pytest.mark.parametrize(
    "mp3_path",
    ["../../etc/passwd", "0/../../a.mp3", "0/..", "/etc/passwd", "/0/a.mp3", "..\\a.mp3",
     "0\\a.mp3", "C:\\a.mp3", "0/a\0.mp3", "", ".", "a.mp3", "0", "g/a.mp3", "00/a.mp3",
     "mp3/0/a.mp3"],
)  # fmt: skip
def test_path_outside_the_folders_is_refused(tmp_path, mp3_path):
    path = write(tmp_path, HEADER + ROWS + f"11\t1\t0\t{mp3_path}\n")
    with pytest.raises(AnnotationsError) as caught:
        read_mtt(path)
    assert str(caught.value).startswith(f"{path}: row 5, column 'mp3_path': {mp3_path!r} is not ")


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_missing_table_is_named(tmp_path, kind):
    path = tmp_path if kind == "folder" else tmp_path / ANNOTATIONS_NAME
    with pytest.raises(AnnotationsError, match=str(path)):
        read_mtt(path)


@given(st.binary(max_size=60), st.integers(0, len(HEADER + ROWS)))
def test_any_content_is_read_or_refused_in_one_line(tmp_path_factory, noise, place):
    whole = (HEADER + ROWS).encode()
    path = write(
        tmp_path_factory.getbasetemp(), whole[:place] + noise + whole[place + len(noise) :]
    )
    try:
        clips, tags = read_mtt(path)
    except AnnotationsError as error:
        assert str(error).startswith(str(path))
        assert "\n" not in str(error)
    else:
        assert set(np.unique(clips[list(tags)])) <= {0, 1}
        assert set(clips["split"]) <= set(SPLITS)


@pytest.mark.parametrize(
    ("paths", "suffix", "found"),
    [
        (["a.mp3", "a.wav"], ".low.mp3", "'.low.mp3': two clips become a.low.mp3"),
        (["b/a.mp3"], "/../../a", "b/a.mp3 becomes 'b/a/../../a', which is not a path inside"),
    ],
)
def test_suffix_that_gives_no_paths_is_refused(paths, suffix, found):
    with pytest.raises(BuildError) as caught:
        with_suffix(paths, suffix)
    assert found in str(caught.value)
