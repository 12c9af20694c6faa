"""The analysis notebook reads every form of the table and draws the published figures."""

import re
from pathlib import Path

from input_data import open_dataset, read_clips

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipywidgets")

NOTEBOOK = Path(__file__).resolve().parents[1] / "excitation_analysis.ipynb"
TAGS = ["$loss in $profit", "loud", "quiet", "bells & whistles", "très doux", "never"]
CHANNELS = [4, 4, 8, 8, 8, 8, 8, 8, 16]
NUM_CLIPS = 24
# One figure per depth; chosen tags; standard deviation; chance; two heat maps; loud and quiet.
NUM_FIGURES = len(CHANNELS) + 6


def make_table(form="current", tags=TAGS):
    """Return a table of random excitations; no clip carries the tag "never"."""
    rng = np.random.default_rng(7)
    labels = (rng.random((NUM_CLIPS, len(tags))) < 0.4).astype(np.uint8)
    labels[: len(tags)] |= np.eye(len(tags), dtype=np.uint8)  # every tag has a clip
    labels[:, [tag == "never" for tag in tags]] = 0
    rows = [
        (rng.uniform(0.2, 0.8, channels).astype(np.float32), depth)
        for _ in range(NUM_CLIPS)
        for depth, channels in enumerate(CHANNELS)
    ]
    clip_of_row = np.repeat(np.arange(NUM_CLIPS), len(CHANNELS))
    columns = [
        pd.DataFrame(rows, columns=["ex", "depth"]),
        pd.DataFrame(labels[clip_of_row], columns=tags),
    ]
    clips = pd.DataFrame({"clip_id": [f"{clip}" for clip in clip_of_row], "mp3_path": "0/a.mp3"})
    if form == "published":
        return pd.concat(columns, axis=1)
    if form == "previous":
        return pd.concat([*columns, clips], axis=1)
    table = pd.concat(columns, axis=1).set_index(pd.MultiIndex.from_frame(clips))
    return table.reset_index() if form == "reset" else table


def write_table(path, table):
    (table.to_parquet if path.suffix.lower() == ".parquet" else table.to_pickle)(path)
    return path


def expected_mean(table, depth, tag):
    """Return the mean excitation of a tag, whose column is selected by position."""
    if table.columns[0] == "clip_id":
        table = table.iloc[:, 2:]
    column = 2 + list(table.columns[2:]).index(tag)
    rows = [row for row in table.itertuples(index=False) if row[1] == depth and row[column]]
    return np.mean([row[0] for row in rows], axis=0)


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Return a function that sets the variables of the notebook and clears the others."""

    def set_variables(**variables):
        for name in ("EXCITATIONS", "EXCITATIONS_SEGMENTS", "DATA_DIR", "FIGURES_DIR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_variables


@pytest.fixture
def run_until(environment, monkeypatch):
    """Return a function that runs the code cells up to one of them and returns their variables."""
    monkeypatch.setattr(plt, "show", lambda: None)

    def run(last_cell, **variables):
        environment(**variables)
        namespace = {}
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, cell.id, "exec"), namespace)
                if cell.id == last_cell:
                    return namespace
        raise AssertionError(f"no cell {last_cell}")

    with plt.rc_context({"backend": "agg"}):
        yield run
    plt.close("all")


def curves_of(figure):
    return np.array([line.get_ydata() for line in figure.axes[0].lines])


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


# --- Reading tables ------------------------------------------------------------------------------


FORMS = [("current", ".pkl"), ("current", ".parquet"), ("published", ".pkl")]
FORMS += [("previous", ".pkl"), ("reset", ".parquet")]


@pytest.mark.parametrize(("form", "suffix"), FORMS)
def test_reads_exactly_the_named_file_in_every_form(run_until, tmp_path, capsys, form, suffix):
    table = make_table(form)
    path = write_table(tmp_path / f"some{suffix}", table)
    other = path.with_suffix({".pkl": ".parquet", ".parquet": ".pkl"}[suffix])
    other.write_bytes(b"not a table")
    variables = run_until("stddev", EXCITATIONS=path)

    assert f"some{suffix}: 24 clips, 5 tags, 9 depths" in capsys.readouterr().out
    assert variables["all_tags"] == TAGS[:-1]
    for depth, channels in enumerate(CHANNELS):
        means = variables["means"][depth]
        assert means.shape == (5, channels)
        for tag in TAGS[:-1]:
            np.testing.assert_allclose(means.loc[tag], expected_mean(table, depth, tag), rtol=1e-5)
    assert variables["ex_stddev"].index.tolist() == list(range(9))
    np.testing.assert_allclose(
        variables["ex_stddev"], [np.std(variables["means"][d], axis=0).mean() for d in range(9)]
    )


def test_reads_earlier_tables_with_tags_named_like_columns(run_until, tmp_path):
    table = make_table("previous", ["ex", "depth", "loud"])
    variables = run_until("chosen", EXCITATIONS=write_table(tmp_path / "some.pkl", table))
    means = variables["means"][8]
    assert list(means.index) == ["ex", "depth", "loud"]
    np.testing.assert_allclose(means.loc["depth"], expected_mean(table, 8, "depth"), rtol=1e-5)


def test_another_table_is_refused_by_name(run_until, tmp_path):
    path = write_table(tmp_path / "some.pkl", make_table().drop(columns="depth"))
    with pytest.raises(ValueError, match=r"some\.pkl: expected the columns ex and depth, then one"):
        run_until("load", EXCITATIONS=path)
    (tmp_path / "some.pkl").write_text("clip_id,mp3_path,ex,depth\n")
    with pytest.raises(ValueError, match=r"some\.pkl: not a table of excitations: "):
        run_until("load", EXCITATIONS=path)


def test_a_missing_table_is_named(run_until, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^excitations\.pkl does not exist: create it"):
        run_until("load")


# --- The published figures -----------------------------------------------------------------------


def test_plot_ex_draws_a_curve_for_every_tag(run_until, tmp_path):
    tags = [f"tag {number}" for number in range(50)]
    rng = np.random.default_rng(0)
    excitations = pd.DataFrame({"ex": [*rng.random((20, 16))], "depth": 0})
    labels = pd.DataFrame(rng.random((20, 50)) < 0.5, columns=tags)
    table = pd.concat([excitations, labels], axis=1)
    variables = run_until("all-depths", EXCITATIONS=write_table(tmp_path / "some.pkl", table))
    means = variables["means"][0].to_numpy()
    figure = plt.figure(plt.get_fignums()[-1])
    assert len(plt.get_fignums()) == 1  # one depth, one figure
    np.testing.assert_array_equal(curves_of(figure), means[:, np.argsort(means.mean(axis=0))])
    assert legend_of(figure) == tags
    assert figure.axes[0].get_ylim() == (0, 1)
    colors = [tuple(line.get_color()) for line in figure.axes[0].lines]
    assert len(set(colors)) == 50
    assert [line.get_color() for line in figure.legends[0].get_lines()] == [
        line.get_color() for line in figure.axes[0].lines
    ]


def test_plot_ex_sorts_by_the_mean_of_the_tags_shown(run_until, tmp_path):
    table = make_table(tags=["classical", "metal", "rock", "dance"])
    path = write_table(tmp_path / "some.pkl", table)
    variables = run_until("chosen", EXCITATIONS=path)
    means = variables["means"]
    figure = plt.figure(plt.get_fignums()[-1])
    for axes, depth in zip(figure.axes, [0, 4, 8], strict=True):
        chosen = means[depth].loc[["classical", "metal", "dance"]].to_numpy()
        curves = [line.get_ydata() for line in axes.lines]
        by_channel = chosen.mean(axis=0)
        np.testing.assert_array_equal(curves, chosen[:, np.argsort(by_channel)])
        assert axes.get_title() == f"depth {depth}"
        below, above = sum(by_channel < 0.5), sum(by_channel > 0.5)
        assert axes.get_xlabel().endswith(f"\n{below} below 0.5, {above} above")
    assert legend_of(figure) == ["classical", "metal", "dance"]

    variables["plot_ex"](4, sort=False, tags=["rock"])
    figure = plt.gcf()
    np.testing.assert_array_equal(curves_of(figure), means[4].loc[["rock"]])
    assert legend_of(figure) == ["rock"]


def test_missing_chosen_tags_are_named_and_replaced(run_until, tmp_path, capsys):
    table = make_table(tags=["metal", "rock", "rare", "never"])
    table["rock"], table["rare"] = 1, table["metal"] & table["rare"]
    run_until("chosen", EXCITATIONS=write_table(tmp_path / "some.pkl", table))
    assert (
        "The table has no clips of classical, dance. Shown: metal, rock, rare."
        in capsys.readouterr().out
    )
    assert legend_of(plt.figure(plt.get_fignums()[-1])) == ["metal", "rock", "rare"]


def test_excitations_of_segments_are_compared_with_loudness(run_until, tmp_path):
    rms = np.linspace(0.1, 0.5, 30)
    noise = np.tile([0.01, -0.02, 0.01], 10)  # uncorrelated with a straight line
    slopes, intercepts = np.array([0.3, -0.5, 0.02, -0.1]), np.array([0.2, 0.8, 0.4, 0.6])
    channels = np.outer(rms, slopes) + intercepts + np.outer(noise, [1, 1, 1, 0])
    segments = pd.DataFrame(
        {"ex": [*channels.astype(np.float32), *channels], "depth": [0] * 30 + [8] * 30},
        index=pd.MultiIndex.from_product(
            [["1", "2"], ["a.mp3"], range(30)], names=["clip_id", "mp3_path", "segment"]
        ),
    ).assign(rock=1, rms=[*rms, *rms])
    segments.attrs = {"model": "of segments", "dataset": "d", "num_clips": 2}
    variables = run_until(
        "segments",
        EXCITATIONS=write_table(tmp_path / "some.pkl", make_table()),
        EXCITATIONS_SEGMENTS=write_table(tmp_path / "segments.PARQUET", segments),
    )
    expected = [np.polyfit(rms, channel, 1, full=True)[:2] for channel in channels.T]
    lines = variables["lines"]
    np.testing.assert_allclose(lines[["slope", "intercept"]], [e[0] for e in expected], atol=1e-6)
    np.testing.assert_allclose(lines["error"], [e[1][0] / 30 for e in expected], atol=1e-8)
    figure = plt.figure(plt.get_fignums()[-1])
    assert figure.get_suptitle() == "depth 0, 30 segments (of segments: d, 2 clips)"
    shown = [axes.get_title().split("\n")[0] for axes in figure.axes]
    assert shown[0] == "mean of 4 channels"
    names = ("most positive", "most negative", "most neutral", "least error")
    assert shown[1:5] == [f"{name}: channel {channel}" for channel, name in enumerate(names)]
    assert shown[5] == "channels with positive slope: 2"
    assert figure.axes[5].get_title().endswith("negative: 2")
    for axes, values in zip(figure.axes, [channels.mean(axis=1), *channels.T], strict=False):
        points = np.column_stack([rms, values])
        np.testing.assert_allclose(axes.collections[0].get_offsets(), points, atol=1e-6)


def test_without_a_table_per_segment_its_command_is_printed(run_until, tmp_path, capsys):
    table = make_table()
    table.attrs = {"model": "m", "checkpoint": "a/b.keras", "dataset": "d", "num_clips": 24}
    path = write_table(tmp_path / "some.parquet", table)
    for variables in ({}, {"EXCITATIONS_SEGMENTS": path}):
        run_until("segments", EXCITATIONS=path, **variables)
        command = "python extract_excitations.py a/b.keras --data-dir d --segments --depths 0"
        assert command in capsys.readouterr().out

    segments = table.set_index(pd.Index(range(len(table)), name="segment"), append=True)
    write_table(path, segments)
    with pytest.raises(ValueError, match=r"per segment: name it in EXCITATIONS_SEGMENTS"):
        run_until("load", EXCITATIONS=path)


# --- Additional analyses and the whole notebook ---------------------------------------------------


def test_levels_of_the_dataset_are_compared_with_excitations(run_until, tiny_dataset, tmp_path):
    dataset = open_dataset(tiny_dataset)
    clips = list(read_clips(dataset.splits["test"].shards))
    levels = [10 * np.log10(np.mean(np.square(clip.segments, dtype=float))) for clip in clips]
    rows = [(np.float32([0.5, 0.5 - level / 100]), d) for level in levels for d in (0, 1)]
    labels = np.repeat([clip.labels for clip in clips], 2, axis=0)
    table = pd.DataFrame(rows, columns=["ex", "depth"]).join(
        pd.DataFrame(labels, columns=dataset.tags)
    )
    path = write_table(tmp_path / "some.pkl", table)
    variables = run_until("level", EXCITATIONS=path, DATA_DIR=tiny_dataset)
    np.testing.assert_allclose(variables["level"], levels)
    np.testing.assert_allclose([r[1] for r in variables["correlations"]], -1, atol=1e-5)

    table.iloc[:2, 2] = 1 - table.iloc[:2, 2]  # labels of other clips
    variables = run_until("level", EXCITATIONS=write_table(path, table), DATA_DIR=tiny_dataset)
    assert variables["level"] is None


def test_runs_in_a_kernel_and_its_controls_redraw_the_picture(environment, tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    folder, figures = tmp_path / "run", tmp_path / "figures"
    folder.mkdir()
    figures.mkdir()
    path = write_table(tmp_path / "some.parquet", make_table())
    environment(EXCITATIONS=path, FIGURES_DIR=figures)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    use_controls = (
        "drawn = [picture.value]\n"
        "for control, value in ((depth, 5), (tags, ['loud']), (tags, []), (sort, False)):\n"
        "    control.value = value\n"
        "    drawn.append(picture.value)\n"
        "print('pictures:', len(set(drawn)))"
    )
    notebook.cells.append(nbformat.v4.new_code_cell(use_controls))
    options = {"kernel_name": "python3", "resources": {"metadata": {"path": folder}}}
    nbclient.NotebookClient(notebook, timeout=60, **options).execute()

    assert not errors_of(notebook)
    assert len(images_of(notebook)) == NUM_FIGURES
    assert "pictures: 5" in text_of(notebook)
    assert "DATA_DIR is not set" in text_of(notebook)
    names = "chosen_tags first_block_excitations first_block_heat_map standard_deviation"
    assert sorted(path.stem for path in figures.iterdir()) == names.split()
    assert not list(folder.iterdir())
    widgets = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    names = {widget["model_name"] for widget in widgets.values()}
    assert {"SelectionSliderModel", "SelectMultipleModel", "CheckboxModel", "ImageModel"} <= names


def test_committed_notebook_is_executed_and_clean():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # Without a kernel the controls show an error message, so their output is not stored.
    assert not code_cells[-1].outputs
    counts = [cell.execution_count for cell in code_cells[:-1]]
    assert counts == list(range(1, len(code_cells)))
    assert not any("execution" in cell.metadata for cell in code_cells)
    assert len(images_of(notebook)) >= NUM_FIGURES - 1
    assert not errors_of(notebook)
    for output in outputs_of(notebook):
        for text in [output.get("text", ""), *output.get("data", {}).values()]:
            if not text.startswith("iVBOR"):
                assert not re.search(r"(?<![\w<.])/\w+/|[A-Z]:\\", text)  # paths of one machine
    assert NOTEBOOK.stat().st_size < 3_000_000


def outputs_of(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def errors_of(notebook):
    outputs = outputs_of(notebook)
    return [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def images_of(notebook):
    return [output for output in outputs_of(notebook) if "image/png" in output.get("data", {})]


def text_of(notebook):
    return "".join(output.get("text", "") for output in outputs_of(notebook))
