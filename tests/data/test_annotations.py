"""MagnaTagATune's table: rows, order, splits and shards as published; invalid tables."""

import gzip
import os
from pathlib import Path

from toolkit.data.annotations import (
    ANNOTATIONS_NAME,
    MTT_TOP_TAGS,
    SPLITS,
    assign_shards,
    top_tags,
)
from toolkit.data.tables import read_tables
from toolkit.errors import AnnotationsError

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


def read(path, num_tags=50):
    return read_tables([path], num_tags)[0]


def as_frame(clips, num_audios_per_shard):
    """Return clips as the published program's table."""
    shards = assign_shards(clips.splits, num_audios_per_shard)
    columns = {"clip_id": clips.clip_ids, "mp3_path": clips.paths, "split": clips.splits}
    return pd.DataFrame(clips.labels, columns=clips.tags).assign(**columns, shard=shards)


# --- The published program's table ---------------------------------------------------------------


def test_table_equals_that_of_the_published_program(golden):
    clips = read(golden / "annotations" / "small.csv")
    expected = pd.read_csv(golden / "annotations" / "expected.csv", dtype={"clip_id": str})
    assert clips.tags == MTT_TOP_TAGS
    pd.testing.assert_frame_equal(as_frame(clips, 10), expected, check_dtype=False)


@pytest.mark.skipif("GOLDEN_MTT_DIR" not in os.environ, reason="GOLDEN_MTT_DIR is not set")
def test_magnatagatune_has_the_published_splits_and_shards(tmp_path):
    folder = Path(os.environ["GOLDEN_MTT_DIR"])
    content = gzip.decompress((folder / "annotations_final.csv.gz").read_bytes())
    clips = read(write(tmp_path, content))
    assert clips.tags == MTT_TOP_TAGS
    expected = pd.read_csv(folder / "expected.csv.gz", dtype={"clip_id": str})
    frame = as_frame(clips, num_audios_per_shard=100)
    pd.testing.assert_frame_equal(frame[list(expected.columns)], expected)
    counts = frame.groupby("split")
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


def test_folder_determines_the_split(tmp_path):
    rows = "".join(f"{n}\t1\t0\t{folder}/a.mp3\n" for n, folder in enumerate("0123456789abcdef"))
    expected = ["train"] * 12 + ["val"] + ["test"] * 3
    assert read(write(tmp_path, HEADER + rows)).splits == expected


@given(
    st.lists(st.sampled_from(SPLITS), min_size=1, max_size=300),
    st.integers(1, 40),
)
def test_shards_are_full_and_even(splits, num_audios_per_shard):
    dealt = assign_shards(splits, num_audios_per_shard)
    assert np.array_equal(dealt, assign_shards(splits, num_audios_per_shard))
    for split in set(splits):
        sizes = np.bincount(dealt[np.array(splits) == split])
        assert len(sizes) == max(1, splits.count(split) // num_audios_per_shard)
        assert sizes.max() - sizes.min() <= 1
        assert len(sizes) == 1 or sizes.min() >= num_audios_per_shard


# --- Invalid tables; further errors are in test_tables.py ----------------------------------------


def test_other_columns_than_labels_are_refused(tmp_path):
    path = write(tmp_path, "clip_id\trock\tlike\tmp3_path\n1\t1\tx\t0/a.mp3\n")
    with pytest.raises(AnnotationsError, match=f"{path}: row 2, column 'like': found 'x', expecte"):
        read(path)


OUTSIDE = "../../etc/passwd 0/../../a.mp3 0/.. 0/a\1.mp3 . a.mp3 0 g/a.mp3 00/a.mp3 mp3/0/a.mp3"


@pytest.mark.parametrize("mp3_path", OUTSIDE.split(" "))
def test_path_outside_the_folders_is_refused(tmp_path, mp3_path):
    path = write(tmp_path, HEADER + ROWS + f"11\t1\t0\t{mp3_path}\n")
    with pytest.raises(AnnotationsError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: row 5, column 'mp3_path': {mp3_path!r} is ")
