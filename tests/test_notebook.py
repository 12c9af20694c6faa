"""The analysis notebook: it runs on any set of tags, and is committed executed and clean."""

import base64
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).resolve().parents[1] / "excitation_analysis.ipynb"
TAGS = ["$loss in $profit", "ex", "loud", "quiet", "bells & whistles", "très doux", "never"]
WIDTHS = [4, 4, 8, 8, 8, 8, 8, 8, 16]
NUM_CLIPS = 24
# Three curves, the first block, the spread, three heat maps, loud and quiet, every depth.
NUM_FIGURES = 8


def make_labels(tags, rng):
    labels = (rng.random((NUM_CLIPS, len(tags))) < 0.4).astype(np.uint8)
    labels[: len(tags), :] |= np.eye(len(tags), dtype=np.uint8)  # every tag has a clip
    if "never" in tags:
        labels[:, tags.index("never")] = 0
    return labels


def write_excitations(path, tags=TAGS, labels=None):
    rng = np.random.default_rng(7)
    labels = make_labels(tags, rng) if labels is None else labels
    rows = [
        (rng.uniform(0.2, 0.8, width).astype(np.float32), depth)
        for _ in range(NUM_CLIPS)
        for depth, width in enumerate(WIDTHS)
    ]
    per_row = np.repeat(np.arange(NUM_CLIPS), len(WIDTHS))
    pd.concat(
        [
            pd.DataFrame(rows, columns=["ex", "depth"]),
            pd.DataFrame(labels[per_row], columns=tags),
            pd.DataFrame({"clip_id": [str(clip) for clip in per_row], "mp3_path": "0/a.mp3"}),
        ],
        axis=1,
    ).to_pickle(path)


def write_test_shard(data_dir, tags, labels):
    """Write the clips as noise whose level rises from clip to clip."""
    import input_data

    rng = np.random.default_rng(3)
    name = input_data.shard_name("test", 0, 1)
    clips = [
        input_data.Clip(
            (rng.choice([-1, 1], (2, 90)) * 10 ** (clip / 20 - 2)).astype(np.float32),
            labels[clip],
            str(clip),
            "0/a.mp3",
        )
        for clip in range(NUM_CLIPS)
    ]
    folder = data_dir / input_data.SHARD_FOLDER
    folder.mkdir(parents=True)
    records = [record for clip in clips for record in input_data.encode_clip(clip, "test")]
    input_data.write_records(folder / name, records)
    listed = {"clips": NUM_CLIPS, "segments": 2 * NUM_CLIPS, "shards": [{"name": name}]}
    manifest = {"tags": tags, "sample_rate": 22050, "num_samples": 90, "splits": {"test": listed}}
    input_data.write_manifest(folder, manifest)


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Execute the notebook in an empty folder with the given environment."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("EXCITATIONS", "DATA_DIR", "FIGURES_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))

    def run(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbclient.NotebookClient(
            notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": folder}}
        ).execute()
        assert not errors_of(notebook)
        return notebook

    return run


def outputs_of(notebook):
    return [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]


def errors_of(notebook):
    return [
        output
        for output in outputs_of(notebook)
        if output.output_type == "error" or output.get("name") == "stderr"
    ]


def images_of(notebook):
    return [
        base64.b64decode(output.data["image/png"])
        for output in outputs_of(notebook)
        if "image/png" in output.get("data", {})
    ]


def text_of(notebook):
    return "".join(output.get("text", "") for output in outputs_of(notebook))


def size_of(image):
    assert image.startswith(b"\x89PNG\r\n")
    return struct.unpack(">II", image[16:24])


def test_prefers_parquet_and_then_reads_no_pickle(execute, tmp_path):
    """What a pickle would run does not, where a Parquet file of its name is there."""
    import extract_excitations

    write_excitations(tmp_path / "some.pkl", ["loud" if tag == "ex" else tag for tag in TAGS[:2]])
    table = pd.read_pickle(tmp_path / "some.pkl")
    extract_excitations.write(tmp_path / "some.parquet", table)
    ran = tmp_path / "ran"
    (tmp_path / "some.pkl").write_bytes(b"cbuiltins\nopen\n(V%s\nVw\ntR." % str(ran).encode())
    notebook = execute(EXCITATIONS=tmp_path / "some.pkl")
    assert "some.parquet: clips 24, tags 2, depths 9" in text_of(notebook)
    assert not ran.exists()
    pickle.loads((tmp_path / "some.pkl").read_bytes()).close()
    assert ran.exists(), "the pickle would have told"


def test_runs_on_any_tags(execute, tmp_path):
    write_excitations(tmp_path / "some.pkl")
    figures = tmp_path / "figures"
    notebook = execute(EXCITATIONS=tmp_path / "some.pkl", FIGURES_DIR=figures)

    images = images_of(notebook)
    assert len(images) == NUM_FIGURES
    assert {size_of(image)[0] for image in images} == {830}
    text = text_of(notebook)
    assert "some.pkl: clips 24, tags 6, depths 9" in text
    assert "left out, carried by no clip: never" in text
    assert "DATA_DIR is not set" in text
    assert [path.name for path in figures.iterdir()] == ["first_block_excitations.png"]
    assert size_of((figures / "first_block_excitations.png").read_bytes())[0] == 830
    widgets = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    names = {widget["model_name"] for widget in widgets.values()}
    assert {"SelectionSliderModel", "SelectMultipleModel", "DropdownModel", "ImageModel"} <= names
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.slow
def test_runs_without_ipywidgets_and_measures_levels(execute, tmp_path, monkeypatch):
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "ipywidgets.py").write_text("raise ImportError('blocked')\n")
    monkeypatch.setenv("PYTHONPATH", f"{blocked}:{NOTEBOOK.parent}")
    labels = make_labels(TAGS, np.random.default_rng(7))
    write_excitations(tmp_path / "some.pkl", labels=labels)
    write_test_shard(tmp_path / "dataset", TAGS, labels)
    notebook = execute(EXCITATIONS=tmp_path / "some.pkl", DATA_DIR=tmp_path / "dataset")

    assert len(images_of(notebook)) == NUM_FIGURES + 1
    text = text_of(notebook)
    assert "ipywidgets is not installed" in text
    assert "level of 24 of 24 clips found" in text
    assert "median |r| over channels: depth 0 0." in text


@pytest.mark.slow
def test_runs_on_a_single_tag(execute, tmp_path):
    write_excitations(tmp_path / "one.pkl", tags=["alone"])
    notebook = execute(EXCITATIONS=tmp_path / "one.pkl", DATA_DIR=tmp_path / "nowhere")
    assert len(images_of(notebook)) == NUM_FIGURES - 1
    text = text_of(notebook)
    assert "it needs clips of both a tag 'loud' and a tag 'quiet'" in text
    assert "DATA_DIR names no folder" in text


def test_committed_notebook_is_executed_and_clean():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # Controls without a kernel are only an error message, so that cell's output is not stored.
    assert not code_cells[-1].outputs
    counts = [cell.execution_count for cell in code_cells[:-1]]
    assert counts == list(range(1, len(code_cells)))
    assert not any("execution" in cell.metadata for cell in code_cells)
    assert len(images_of(notebook)) >= NUM_FIGURES - 1
    assert not errors_of(notebook)
    for output in outputs_of(notebook):
        for text in [output.get("text", ""), *output.get("data", {}).values()]:
            if not text.startswith("iVBOR"):
                assert not re.search(r"(?<![\w<.])/\w+/|[A-Z]:\\", text)
    assert NOTEBOOK.stat().st_size < 2_000_000
