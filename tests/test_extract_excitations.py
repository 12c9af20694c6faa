"""extract_excitations.py: the table of excitations, and errors."""

import errno
import os
import pickle
import re
import shutil
from pathlib import Path

import extract_excitations
from input_data import open_dataset, read_clips
from toolkit.data.annotations import MTT_TOP_TAGS

import numpy as np
import pandas as pd
import pytest
import test_eval
from pyarrow.parquet import ParquetFile
from shards import edited_manifest, published_shards
from test_eval import make_model, published_stage


@pytest.mark.parametrize("name", ["se-multi", "rese-nomulti"])
def test_excitations_equal_the_published_ones(golden, tmp_path, name):
    data_dir = published_shards(tmp_path / "data")
    stage_dir = published_stage(golden, tmp_path / "log" / "0", name)
    table = extract_excitations.extract(stage_dir, data_dir)
    assert list(table.columns) == ["ex", "depth", *MTT_TOP_TAGS]
    assert table["depth"].tolist() == list(range(9))
    expected = np.load(golden / "expected.npz")
    worst = 0
    for depth in range(9):
        mean = expected[f"{name}/excitations_{depth}"][10:].mean(axis=0)
        found = table["ex"].iloc[depth]
        assert found.dtype == np.float32 and found.shape == mean.shape
        np.testing.assert_allclose(found, mean, atol=1e-5)
        worst = max(worst, np.abs(found - mean).max())
    print(f"{name}: largest difference of mean excitations {worst:.1e}")
    (clip,) = read_clips([data_dir / "tfrecord" / "test-0000-of-0001.seq.tfrecord"])
    for row in range(9):
        assert table.iloc[row, 2:].tolist() == clip.labels.tolist()


def test_the_script_writes_a_pickle(tiny_dataset, tmp_path, capsys, monkeypatch):
    dataset = open_dataset(tiny_dataset)
    model = make_model(tmp_path / "se.keras", dataset)
    monkeypatch.chdir(tmp_path)
    assert extract_excitations.main([str(model), "--data-dir", str(tiny_dataset)]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["excitations.pkl", "se.keras"]
    table = pd.read_pickle(tmp_path / "excitations.pkl")
    clips = list(read_clips(dataset.splits["test"].shards))
    assert len(table) == 9 * len(clips)
    assert "54 rows, 6 clips at 9 depths" in printed.err
    assert list(table.columns) == ["ex", "depth", *dataset.tags]
    assert table.index.names == ["clip_id", "mp3_path"]
    by_clip = table.groupby(level=[0, 1], sort=False)
    for clip, (identity, rows) in zip(clips, by_clip, strict=True):
        assert identity == (clip.clip_id, clip.mp3_path)
        assert rows["depth"].tolist() == list(range(9))
        assert [len(ex) for ex in rows["ex"]] == [2, 2, 4, 4, 4, 4, 4, 4, 8]
        assert (rows[list(dataset.tags)].to_numpy() == clip.labels).all()
    assert (table.attrs["model"], table.attrs["checkpoint"]) == ("se", str(model))
    assert (table.attrs["dataset"], table.attrs["num_clips"]) == (str(tiny_dataset), 6)
    # Arrays of NumPy 2 in a pickle of protocol 5 cannot be read by NumPy 1.26.
    assert (tmp_path / "excitations.pkl").read_bytes()[:2] == b"\x80\x04"
    with open(tmp_path / "excitations.pkl", "rb") as file:
        assert pickle.load(file).equals(table)
    # The pickle can be read without pyarrow, as the published notebook does.
    assert b"arrow" not in (tmp_path / "excitations.pkl").read_bytes().lower()


def test_parquet_file_contains_the_same_table(tiny_dataset, tmp_path, capsys):
    model = make_model(tmp_path / "se.keras", open_dataset(tiny_dataset))
    expected = extract_excitations.extract(model, tiny_dataset)
    path = tmp_path / "excitations.PARQUET"  # the case is ignored
    arguments = [str(model), "--data-dir", str(tiny_dataset), "--out", str(path)]
    assert extract_excitations.main(arguments) == 0
    assert f"{path}: 54 rows, 6 clips at 9 depths" in capsys.readouterr().err
    assert path.read_bytes()[:4] == b"PAR1"
    extract_excitations.write(tmp_path / "excitations.pkl", expected)
    for table in (pd.read_parquet(path), pd.read_pickle(tmp_path / "excitations.pkl")):
        assert list(table.columns) == list(expected.columns)
        assert table.index.names == ["clip_id", "mp3_path"]
        assert table.attrs == expected.attrs
        assert table.index.tolist() == expected.index.tolist()
        for one, other in zip(table["ex"], expected["ex"], strict=True):
            assert one.dtype == np.float32
            np.testing.assert_array_equal(one, other)
        for column in expected.columns[1:]:
            assert table[column].tolist() == expected[column].tolist()
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["excitations.PARQUET", "excitations.pkl", "se.keras"]


def test_a_tag_with_the_name_of_a_column_is_refused(tiny_dataset, tmp_path, capsys):
    data_dir = Path(shutil.copytree(tiny_dataset, tmp_path / "data"))
    with edited_manifest(data_dir) as manifest:
        manifest["tags"][3] = "rms"
    model, output = make_model(tmp_path / "se.keras", open_dataset(data_dir)), tmp_path / "x.pkl"
    message = refused(capsys, 2, model, "--data-dir", data_dir, "--out", output)
    assert "tag 'rms' has a reserved name (clip_id, mp3_path, segment, ex, depth, rms)" in message
    assert not output.exists()


def test_segments_have_their_own_excitations_and_levels(tiny_dataset, tmp_path, monkeypatch):
    dataset = open_dataset(tiny_dataset)
    model, path = make_model(tmp_path / "rese.keras", dataset, block="rese"), tmp_path / "x.parquet"
    monkeypatch.setattr(extract_excitations, "_ROWS_PER_PART", 20)
    arguments = [str(model), "--data-dir", str(tiny_dataset), "--out", str(path)]
    assert extract_excitations.main([*arguments, "--segments"]) == 0
    assert ParquetFile(path).num_row_groups > 2
    table, by_clip = pd.read_parquet(path), extract_excitations.extract(model, tiny_dataset)
    assert list(table.columns) == [*by_clip.columns, "rms"]
    assert table.index.names == ["clip_id", "mp3_path", "segment"]
    assert table.attrs == by_clip.attrs
    clips = list(read_clips(dataset.splits["test"].shards))
    expected = [(c.clip_id, c.mp3_path, n) for c in clips for n in range(len(c.segments))]
    levels = np.concatenate([np.sqrt(np.mean(c.segments.astype(float) ** 2, 1)) for c in clips])
    for depth in range(9):
        rows = table[table["depth"] == depth]
        assert rows.index.tolist() == expected
        np.testing.assert_allclose(rows["rms"], levels, rtol=1e-12)
        for identity, mean in by_clip[by_clip["depth"] == depth]["ex"].items():
            of_clip = np.stack(rows.loc[identity, "ex"])
            np.testing.assert_allclose(of_clip.mean(axis=0), mean, atol=1e-6)
    for clip in clips:
        assert (table.loc[clip.clip_id, list(dataset.tags)].to_numpy() == clip.labels).all()


def test_chosen_depths_are_those_of_the_whole_table(tiny_dataset, tmp_path, capsys):
    model, path = make_model(tmp_path / "se.keras", open_dataset(tiny_dataset)), tmp_path / "x.pkl"
    arguments = [str(model), "--data-dir", str(tiny_dataset), "--out", str(path), "--depths"]
    assert extract_excitations.main([*arguments, "5", "0", "5", "--segments"]) == 0
    assert "segments at 2 depths" in capsys.readouterr().err
    whole = extract_excitations.extract(model, tiny_dataset, per_segment=True)
    expected = whole[whole["depth"].isin([0, 5])]
    table = pd.read_pickle(path)
    np.testing.assert_allclose(
        np.concatenate([*table["ex"]]), np.concatenate([*expected["ex"]]), atol=1e-6
    )
    assert table.drop(columns="ex").equals(expected.drop(columns="ex"))
    with pytest.raises(SystemExit, match="2"):
        extract_excitations.main([*arguments, "9"])
    assert "--depths: invalid choice: 9 (choose from 0, 1" in capsys.readouterr().err


def test_a_large_pickle_of_segments_is_refused(tiny_dataset, tmp_path, capsys, monkeypatch):
    model, path = make_model(tmp_path / "se.keras", open_dataset(tiny_dataset)), tmp_path / "x.pkl"
    # The first of 6 clips has one segment, with 36 channels of float32.
    monkeypatch.setattr(extract_excitations, "_MAX_PICKLE", 800)
    monkeypatch.setattr(extract_excitations, "_ROWS_PER_PART", 1)
    arguments = [model, "--data-dir", tiny_dataset, "--out", path]
    assert refused(capsys, 2, *arguments, "--segments").endswith(
        f"error: --out {path}: about 864 bytes of excitations, but at most 800 bytes fit into a "
        "pickle: write .parquet, or fewer --depths"
    )
    assert not path.exists()
    assert extract_excitations.main([*map(str, arguments)]) == 0


def test_a_failure_leaves_the_earlier_file(tiny_dataset, tmp_path, capsys, monkeypatch):
    model = make_model(tmp_path / "se.keras", open_dataset(tiny_dataset))
    path = tmp_path / "x.parquet"
    path.write_text("earlier")
    monkeypatch.setattr(extract_excitations, "_ROWS_PER_PART", 1)
    reads = 0

    def pread(*arguments):
        nonlocal reads
        reads += arguments[1] > 1000  # samples
        if reads == 4:
            raise OSError(errno.EIO, "Input/output error")
        return os_pread(*arguments)

    os_pread = os.pread
    monkeypatch.setattr(os, "pread", pread)
    arguments = [model, "--data-dir", tiny_dataset, "--out", path, "--batch-size", 1]
    message = refused(capsys, 1, *arguments)
    assert re.search(r"tfrecord/test-\S+: Input/output error$", message)
    assert path.read_text() == "earlier"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["se.keras", "x.parquet"]


def refused(capsys, status, *arguments):
    return test_eval.refused(capsys, status, *arguments, script=extract_excitations)


def test_models_without_excitations_are_refused(golden, tmp_path, capsys):
    data_dir = published_shards(tmp_path / "data")
    model, out = golden / "checkpoints" / "res-multi.hdf5", tmp_path / "x.pkl"
    message = refused(capsys, 2, model, "--data-dir", data_dir, "--out", out)
    assert "res blocks has no excitations" in message and "se or rese" in message
    assert not out.exists()


def test_missing_files_and_folders_are_errors_of_one_line(tiny_dataset, golden, tmp_path, capsys):
    model = golden / "checkpoints" / "se-multi.hdf5"

    out = tmp_path / "x.csv"
    message = refused(capsys, 2, model, "--data-dir", tiny_dataset, "--out", out)
    assert message.endswith(f"--out {out}: expected a name that ends in .pkl or .parquet")
    out = tmp_path / "no" / "x.pkl"
    assert str(out) in refused(capsys, 2, model, "--data-dir", tiny_dataset, "--out", out)
    assert not list(tmp_path.glob("*.pkl"))
