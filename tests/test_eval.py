"""eval.py: printed scores, reports, comparisons and errors."""

import errno
import json
import os
import re
import shutil

import eval as eval_script
import toolkit
from input_data import Clip, open_dataset, read_clips
from model import NetworkConfig, build_network
from toolkit import figures, reports
from toolkit.evaluation import score
from toolkit.files import write_atomically
from toolkit.models.checkpoints import Checkpoint, save
from toolkit.provenance import describe, model_names

import keras
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from shards import edited_manifest, published_shards, remove_split, write_shard
from sklearn.metrics import average_precision_score, roc_auc_score

PROVENANCE = ["model", "checkpoint", "dataset", "tags_sha256", "num_clips", "test_sha256"]
PROVENANCE += ["toolkit"]


def make_model(path, dataset, seed=0, **options):
    config = NetworkConfig(
        **{"block": "se", "init_features": 2, "alpha": 2, "num_tags": len(dataset.tags)} | options
    )
    network = build_network(config)
    random = np.random.default_rng(seed)
    network.set_weights(
        [random.uniform(-0.5, 1, weight.shape).astype("f") ** 2 for weight in network.get_weights()]
    )
    tags = dataset.tags[: config.num_tags]
    save(path, Checkpoint(network, config, tags, dataset.sample_rate))
    return path


@pytest.fixture(scope="module")
def model_path(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return make_model(folder / "se.keras", open_dataset(tiny_dataset))


def test_scores_are_printed_and_written_to_the_report(tiny_dataset, model_path, tmp_path, capsys):
    report = tmp_path / "deep" / "report"
    command = [str(model_path), "--data-dir", str(tiny_dataset), "--report", str(report)]
    assert eval_script.main(command) == 0
    printed = capsys.readouterr()

    dataset = open_dataset(tiny_dataset)
    clips = list(read_clips(dataset.splits["test"].shards))
    labels = np.array([clip.labels for clip in clips])
    known = [len(set(column)) == 2 for column in labels.T]
    predictions = pd.read_csv(report / "predictions.csv", dtype={"clip_id": str})
    assert list(predictions.columns) == ["clip_id", "mp3_path", *dataset.tags]
    assert predictions["clip_id"].tolist() == [clip.clip_id for clip in clips]
    assert predictions["mp3_path"].tolist() == [clip.mp3_path for clip in clips]
    values = predictions[list(dataset.tags)].to_numpy()
    roc_auc = roc_auc_score(labels[:, known], values[:, known], average="macro")
    pr_auc = average_precision_score(labels[:, known], values[:, known], average="macro")

    assert printed.out == f"=> @ ROC AUC score: {roc_auc:.4f}\n=> @ PR AUC score: {pr_auc:.4f}\n"
    assert re.match(r"=> @ ROC AUC score: 0\.\d{4}\n", printed.out)

    left_out = [tag for tag, is_known in zip(dataset.tags, known, strict=True) if not is_known]
    assert left_out, "the test needs a tag that the test clips lack"
    assert "1 tag excluded from the averages" in printed.err and len(left_out) == 1
    assert ", ".join(left_out) in printed.err

    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["roc_auc"] == pytest.approx(roc_auc, abs=1e-7)
    assert metrics["pr_auc"] == pytest.approx(pr_auc, abs=1e-7)
    provenance = {name: metrics[name] for name in PROVENANCE}
    assert provenance | {"toolkit": toolkit.__version__} == provenance
    assert (metrics["model"], metrics["checkpoint"]) == ("se", str(model_path))
    assert (metrics["dataset"], metrics["num_clips"]) == (str(tiny_dataset), len(clips))
    assert len(metrics["tags_sha256"]) == len(metrics["test_sha256"]) == 64
    assert metrics["num_tags"] == len(dataset.tags)
    assert metrics["num_tags_scored"] == sum(known)
    assert metrics["tags_not_scored"] == left_out

    per_tag = pd.read_csv(report / "per_tag.csv")
    columns = "tag positives roc_auc roc_auc_low roc_auc_high pr_auc pr_auc_low pr_auc_high"
    assert list(per_tag.columns) == columns.split()
    for metric in ("roc_auc", "pr_auc"):
        scored = per_tag[known]
        assert (scored[f"{metric}_low"] <= scored[metric]).all()
        assert (scored[metric] <= scored[f"{metric}_high"]).all()
        assert per_tag[~np.array(known)][f"{metric}_low"].isna().all()
        low, high = metrics[f"{metric}_interval"]
        assert low <= metrics[metric] <= high
    method = "bias-corrected percentiles of bootstrap resamples of the clips"
    expected = {"confidence": 0.95, "method": method, "resamples": 1000, "seed": 0}
    assert metrics["intervals"] == expected
    assert per_tag["tag"].tolist() == list(dataset.tags)
    assert per_tag["positives"].tolist() == labels.sum(axis=0).tolist()
    assert per_tag["roc_auc"].mean() == pytest.approx(roc_auc, abs=1e-6)
    assert per_tag["pr_auc"].mean() == pytest.approx(pr_auc, abs=1e-6)

    assert json.loads(Image.open(report / "per_tag.png").text["Description"]) == [provenance]
    image = matplotlib.image.imread(report / "per_tag.png")
    assert image.shape[0] > 200 and image.shape[1] > 400
    assert image.std() > 0.01  # not blank


def make_untrained_model(path, dataset, seed):
    config = NetworkConfig(block="basic", init_features=2, num_tags=len(dataset.tags))
    path.parent.mkdir()
    save(path, Checkpoint(build_network(config, seed), config, dataset.tags, dataset.sample_rate))
    return path


def test_models_are_compared_with_the_first(tiny_dataset, tmp_path, capsys):
    dataset = open_dataset(tiny_dataset)
    one, other = (
        make_untrained_model(tmp_path / name / "m.keras", dataset, seed)
        for seed, name in enumerate(("one", "other"))
    )
    models = [one, other, one]
    report = tmp_path / "report"
    command = [*map(str, models), "--data-dir", str(tiny_dataset), "--report", str(report)]
    assert eval_script.main(command) == 0
    out = capsys.readouterr().out.splitlines()

    comparison = json.loads((report / "comparison.json").read_text())
    names = [model["model"] for model in comparison["models"]]
    assert names == ["one-m", "other-m", "one-m-3"]
    assert comparison["baseline"] == names[0]
    for name, model in zip(names, comparison["models"], strict=True):
        metrics = json.loads((report / name / "metrics.json").read_text())
        assert model["roc_auc"] == metrics["roc_auc"]
        assert model["roc_auc_interval"] == metrics["roc_auc_interval"]
        assert f"=> @ ROC AUC score: {metrics['roc_auc']:.4f} ({name})" in out
        assert f"=> @ PR AUC score: {metrics['pr_auc']:.4f} ({name})" in out
        for file in ("per_tag.csv", "per_tag.png", "predictions.csv", "errors.csv", "report.html"):
            assert (report / name / file).stat().st_size
    page = (report / "report.html").read_text(encoding="utf-8")
    assert f"{names[1]} − {names[0]}" in page
    first, second, again = comparison["models"]
    for metric in ("roc_auc", "pr_auc"):
        assert second[f"{metric}_difference"] == pytest.approx(second[metric] - first[metric])
        low, high = second[f"{metric}_difference_interval"]
        assert low < high and second[f"{metric}_difference"] != 0
        assert again[f"{metric}_difference"] == 0
        assert again[f"{metric}_difference_interval"] == [0, 0]
    for metric, title in (("roc_auc", "ROC AUC"), ("pr_auc", "PR AUC")):
        low, high = second[f"{metric}_difference_interval"]
        assert (
            f"=> @ {title} difference: {second[f'{metric}_difference']:+.4f}, 95 % interval "
            f"{low:+.4f} to {high:+.4f} ({names[1]} - {names[0]})"
        ) in out

    table = pd.read_csv(report / "comparison.csv")
    assert table["model"].tolist() == names[1:2] * len(dataset.tags) + names[2:] * len(dataset.tags)
    assert table["tag"].tolist() == [*dataset.tags] * 2
    of_second, of_again = (table[table["model"] == name] for name in names[1:])
    for metric, name in (("roc_auc", "difference"), ("pr_auc", "pr_auc_difference")):
        expected = of_second[metric] - of_second[f"baseline_{metric}"]
        np.testing.assert_allclose(of_second[name], expected, atol=2e-6)
    known = of_second["roc_auc"].notna()
    assert (of_second["difference_low"] <= of_second["difference_high"])[known].all()
    assert (of_second["difference_low"] < of_second["difference_high"])[known].any()
    columns = ["difference", "difference_low", "difference_high"]
    assert (of_again[columns].to_numpy()[known] == 0).all()

    drawn = json.loads(Image.open(report / "comparison.png").text["Description"])
    assert drawn == [{name: model[name] for name in PROVENANCE} for model in comparison["models"]]
    image = matplotlib.image.imread(report / "comparison.png")
    assert image.shape[1] == 830 and image.std() > 0.01


def test_thresholds_of_the_page_come_from_the_validation_clips(
    tiny_dataset, model_path, tmp_path, capsys
):
    command = [str(model_path), "--data-dir", str(tiny_dataset), "--report"]
    assert eval_script.main([*command, str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "highest F1 score on the validation clips" in page
    assert f"keras {keras.__version__}" in page and str(model_path) in page
    source = re.search('class="audio" href="([^"]+)"', page)[1]
    assert (tmp_path / "report" / source).samefile(tiny_dataset / "mp3" / source.split("mp3/")[1])

    data_dir = shutil.copytree(tiny_dataset, tmp_path / "data")
    remove_split(data_dir, "val")
    with edited_manifest(data_dir) as manifest:
        manifest["skipped"] = [{"clip_id": "9", "mp3_path": "0/<9>.mp3", "reason": "no audio"}]
    command[2] = str(data_dir)
    assert eval_script.main([*command, str(tmp_path / "other")]) == 0
    page = (tmp_path / "other" / "report.html").read_text(encoding="utf-8")
    assert "highest F1 score on the test clips" in page
    assert "0/&lt;9&gt;.mp3 (clip 9): no audio" in page
    assert "no validation clips: thresholds are chosen on test clips" in capsys.readouterr().err


def test_models_are_also_compared_without_a_report(tiny_dataset, model_path, tmp_path, capsys):
    command = [str(model_path)] * 2 + ["--data-dir", str(tiny_dataset)]
    assert eval_script.main(command) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 6
    for line, metric in zip(out[-2:], ("ROC AUC", "PR AUC"), strict=True):
        assert line.startswith(f"=> @ {metric} difference: +0.0000, 95 % interval +0.0000 to +0.0")


def test_the_report_of_another_model_is_replaced_and_named(
    tiny_dataset, model_path, tmp_path, capsys
):
    dataset = open_dataset(tiny_dataset)
    other = make_model(tmp_path / "other.keras", dataset, seed=1)
    report = tmp_path / "report"
    report.mkdir()
    (report / "notes.txt").write_text("mine\n")
    said = []
    for models in ([other], [other], [model_path, other]):
        options = ["--data-dir", str(tiny_dataset), "--report", str(report)]
        assert eval_script.main([*map(str, models), *options]) == 0
        said.append([line for line in capsys.readouterr().err.splitlines() if "replaces" in line])
    assert said == [[], [], [f"{report}: replaces the report of {other} on {tiny_dataset}"]]
    assert (report / "notes.txt").read_text() == "mine\n"


def test_a_report_on_a_full_disk_names_the_file_and_leaves_no_part(
    tiny_dataset, model_path, tmp_path, capsys, monkeypatch
):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(path, content):  # of the figure, after the other files
        monkeypatch.setattr(os, "fsync", full)
        write_atomically(path, content)

    monkeypatch.setattr(figures, "write_atomically", write)
    report = tmp_path / "report"
    command = [str(model_path), "--data-dir", str(tiny_dataset), "--report", str(report)]
    assert eval_script.main(command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(f"error: {report / 'per_tag.png'}: No space left on device")
    written = sorted(path.name for path in report.iterdir())
    assert written == ["metrics.json", "per_tag.csv", "predictions.csv"]


def test_a_clip_whose_samples_are_not_finite_is_named(tiny_dataset, model_path, tmp_path, capsys):
    data_dir = shutil.copytree(tiny_dataset, tmp_path / "data")
    shard = open_dataset(data_dir).splits["test"].shards[0]
    clips = list(read_clips([shard]))
    clips[1].segments = clips[1].segments.copy()
    clips[1].segments[0, 7] = np.nan
    write_shard(shard, clips, "test")
    message = refused(capsys, 1, model_path, "--data-dir", data_dir)
    assert f"{shard}: record " in message
    assert f"clip {clips[1].clip_id} ({clips[1].mp3_path}): sample 7 is nan" in message


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["log/4"], ["log-4"]),
        (["log/0", "log/1/"], ["log-0", "log-1"]),
        (["log/4", "log-rese/4"], ["log-4", "log-rese-4"]),
        (["se/seed-0/4"], ["se-seed-0-4"]),
        (["x/se.keras", "y/rese.hdf5"], ["se", "rese"]),
        (["x/se.keras", "y/se.keras"], ["x-se", "y-se"]),
        (["a/log/4", "b/log/4", "c/best.h5"], ["a-log-4", "b-log-4", "best"]),
        (["se-auc_0.9111-tfrmodel.hdf5", "../0.9113"], ["se-auc_0.9111-tfrmodel", "0.9113"]),
    ],
)
def test_models_are_named_by_the_parts_of_their_paths_that_differ(paths, names):
    found = model_names(paths)
    assert [name.replace(os.sep, "-") for name in found] == names


def test_the_name_of_a_model_stays_inside_the_report(tmp_path, monkeypatch):
    folder = tmp_path / "a" / "b" / "1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert model_names(["..", "../../0"]) == ["b", "a-0"]
    assert model_names([".", "/"]) == ["b-1", "root"]
    assert len(set(model_names([os.fsdecode(b"\xe8.keras"), os.fsdecode(b"\xe9.keras")]))) == 2


def published_stage(golden, folder, name="se-multi"):
    """Write a published stage folder with two checkpoints; the better one is `name`."""
    folder.mkdir(parents=True)
    shutil.copy(golden / "checkpoints" / "basic-nomulti.hdf5", folder / "ckpt-e009-l0.1611.hdf5")
    shutil.copy(golden / "checkpoints" / f"{name}.hdf5", folder / "ckpt-e012-l0.1538.hdf5")
    return folder


def test_scores_of_one_clip_are_nan(golden, tmp_path, capsys):
    data_dir = published_shards(tmp_path / "data")
    model, report = published_stage(golden, tmp_path / "log" / "0"), tmp_path / "report"
    command = [str(model), "--data-dir", str(data_dir), "--report", str(report)]
    assert eval_script.main(command) == 0
    printed = capsys.readouterr()
    assert f"{model}: the file contains no tag names: using those of {data_dir}" in printed.err
    (row,) = pd.read_csv(report / "predictions.csv").iloc[:, 2:].to_numpy()
    expected = np.load(golden / "expected.npz")["se-multi/predictions"][10:]
    np.testing.assert_allclose(row, expected.mean(axis=0), atol=1e-5)
    assert printed.out.startswith("=> @ ROC AUC score: nan\n")
    assert "50 tags excluded from the averages" in printed.err
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["roc_auc"] is None and metrics["num_tags_scored"] == 0
    assert (report / "per_tag.png").stat().st_size > 0


def refused(capsys, status, *arguments, script=eval_script):
    assert script.main(list(map(str, arguments))) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if "error: " in line]
    assert len(lines) == 1 and "Traceback" not in printed.err
    return lines[0]


def test_missing_and_unsuitable_models_and_datasets_are_refused(
    tiny_dataset, model_path, tmp_path, capsys
):
    message = refused(capsys, 2, tmp_path / "none.keras", "--data-dir", tiny_dataset)
    assert "none.keras" in message
    message = refused(capsys, 2, model_path, "--data-dir", tmp_path / "nowhere")
    assert "nowhere: no dataset found" in message


def test_predictions_with_nan_are_refused(tiny_dataset, model_path, capsys, monkeypatch):
    # Replace the outputs: whether NaN passes TensorFlow's sigmoid depends on the processor.
    predict = keras.Model.predict_on_batch
    monkeypatch.setattr(keras.Model, "predict_on_batch", lambda *a: predict(*a) * np.float32("nan"))
    message = refused(capsys, 1, model_path, "--data-dir", tiny_dataset, "--batch-size", 4)
    assert "the predictions contain NaN or infinity" in message


def test_dataset_without_test_clips_is_refused(tiny_dataset, model_path, tmp_path, capsys):
    data_dir = shutil.copytree(tiny_dataset, tmp_path / "data")
    remove_split(data_dir, "test")
    assert "no test clips" in refused(capsys, 2, model_path, "--data-dir", data_dir)


def test_tags_may_have_the_names_of_columns(tmp_path):
    labels = np.array([[0, 1], [1, 0], [0, 1], [1, 1]], np.uint8)
    clips = [
        Clip(np.zeros((1, 4), np.float32), row, str(number), f"{number}.mp3")
        for number, row in enumerate(labels)
    ]
    predictions = np.linspace(0, 1, labels.size, dtype=np.float32).reshape(labels.shape)
    scores = score(labels, predictions)
    tags = ("clip_id", "mp3_path")
    provenance = describe("m.keras", "data", tags, len(clips))
    reports.write_report(tmp_path, provenance, tags, clips, predictions, scores)
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert lines[0] == "clip_id,mp3_path,clip_id,mp3_path"
    assert lines[1].startswith("0,0.mp3,0.00000000,")
