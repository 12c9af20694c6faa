"""The record of a training, changed options, and folders that were changed by hand."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import toolkit
import train
from input_data import open_dataset, read_clips
from toolkit.models import checkpoints
from toolkit.models.checkpoints import find_best
from toolkit.models.config import NetworkConfig
from toolkit.training.history import write_history
from toolkit.training.options import TrainingOptions
from toolkit.training.run import CHANGES

import numpy as np
import pytest
from conftest import ROOT
from model_files import rewrite_member
from shards import write_shard
from training_runs import ONE_EPOCH, TWO_STAGES, arguments, edit_state, history_of, names_in

THREE_EPOCHS = ("--num-lr-decays", 2, "--max-epochs", 3, "--lr", 0.05, "--seed", 3)


def record_of(log):
    return json.loads((log / "run.json").read_text())


# --- The record ----------------------------------------------------------------------------------


def test_record_describes_the_training_and_each_call(tiny_dataset, log, capsys):
    record = record_of(log)
    record["calls"][0]["device"] = "JAX backend on H200"
    (log / "run.json").write_text(json.dumps(record))
    assert train.main(arguments(tiny_dataset, log, *TWO_STAGES, "--num-read-threads", 2)) == 0
    record = record_of(log)
    assert record["dataset"]["path"] == str(tiny_dataset)
    assert (record["network"]["block"], record["options"]["lr"]) == ("basic", 0.05)
    first, second = record["calls"]
    assert "the last call used JAX backend on H200: results differ" in capsys.readouterr().err
    assert first["changes"] == []
    assert second["changes"] == [
        "--num-read-threads was 8, now 2: used from now on; results stay the same"
    ]
    assert second["started"] > first["started"]
    assert second["toolkit"] == toolkit.__version__
    assert " backend on " in second["device"]
    assert {"python", "keras"} < set(second["versions"])


def test_every_option_is_in_the_table_of_changes():
    options = [field for cls in (NetworkConfig, TrainingOptions) for field in fields(cls)]
    names = {field.name for field in options if field.metadata}
    assert names == {*CHANGES, "initial_stage"}
    text = (ROOT / "docs" / "contributing.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `--")]
    for field in options:
        if field.metadata:
            flag = field.metadata["flag"] or f"--{field.name.replace('_', '-')}"
            assert any(f"`{flag}`" in row for row in rows), flag


def test_another_dataset_is_refused_and_a_moved_one_is_not(tiny_dataset, log, tmp_path, capsys):
    moved = Path(shutil.copytree(tiny_dataset / "tfrecord", tmp_path / "moved" / "tfrecord")).parent
    path = moved / "tfrecord" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["versions"] = {"av": "1.0"}
    path.write_text(json.dumps(manifest))
    assert train.main(arguments(moved, log, *TWO_STAGES)) == 0
    other = Path(shutil.copytree(moved, tmp_path / "other"))
    shard = open_dataset(other).splits["train"].shards[0]
    clips = list(read_clips([shard]))
    clips[0].segments = -clips[0].segments  # the same table and lengths, another sound
    write_shard(shard, clips)
    capsys.readouterr()
    assert train.main(arguments(other, log, *TWO_STAGES)) == 2
    said = capsys.readouterr().err
    assert f"{log}: was trained on another dataset: {moved} (12 tags, SHA-256 " in said
    assert f"now {other} (12 tags, SHA-256 " in said
    assert "another --train-dir" in said


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--lr", 0.3), "--lr was 0.05, now 0.3: all stages are finished, so no stage would use"),
        (("--seed", 4), "--seed was 3, now 4: all stages are finished"),
        (("--mixed-precision",), "--mixed-precision was off, now on: all stages are finished"),
        (("--block", "se"), "--block was basic, now se: "),
    ],
)
@pytest.mark.parametrize("has_record", [True, False])
def test_changes_that_would_have_no_effect_are_refused(
    tiny_dataset, log, capsys, more, expected, has_record
):
    if not has_record:  # as in folders of earlier versions
        (log / "run.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in log.rglob("*")}
    assert train.main(arguments(tiny_dataset, log, *TWO_STAGES, *more)) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1
    assert "use the same value or another --train-dir" in said
    assert {path: path.stat().st_mtime_ns for path in log.rglob("*")} == before


def test_a_lowered_limit_leaves_finished_stages_as_they_are(tiny_dataset, log, capsys):
    assert train.main(arguments(tiny_dataset, log, *TWO_STAGES, "--max-epochs", 1)) == 0
    said = capsys.readouterr().err
    assert "--max-epochs was 2, now 1: finished stages stay as they are\n" in said
    assert said.count("already finished") == 2


def test_folder_without_a_finished_epoch_accepts_any_options(
    tiny_dataset, log, capsys, monkeypatch
):
    for path in (*log.rglob("*.keras"), *log.rglob("test.json")):
        path.unlink()
    trained = []
    monkeypatch.setattr(train, "train_stage", lambda run, stage, *_: trained.append(stage))
    monkeypatch.setattr(train, "test_best", lambda *_: None)
    assert train.main(arguments(tiny_dataset, log, *ONE_EPOCH, "--no-multi", "--lr", 0.3)) == 0
    assert trained == [0]
    assert " was " not in capsys.readouterr().err
    assert record_of(log)["options"]["lr"] == 0.3


@pytest.mark.parametrize("content", ["{", "[]", '{"options": {}}'])
def test_damaged_record_is_refused(tiny_dataset, log, capsys, content):
    (log / "run.json").write_text(content)
    assert train.main(arguments(tiny_dataset, log, *TWO_STAGES)) == 2
    assert f"{log / 'run.json'}: not a record of a training" in capsys.readouterr().err


# --- Going on ------------------------------------------------------------------------------------


def test_finished_training_goes_on_and_later_stages_are_trained_again(tiny_dataset, log, capsys):
    (log / "1" / "notes.txt").write_text("mine")
    tested = (log / "1" / "test.json").read_text()
    assert train.main(arguments(tiny_dataset, log, *THREE_EPOCHS, "--dropout", 0)) == 0
    said = capsys.readouterr().err
    assert "--max-epochs was 2, now 3: used from now on\n" in said
    assert "--dropout was 0.5, now 0: used from the next epoch\n" in said
    later = f"deleting {log / '1'}, trained from its earlier best checkpoint\n"
    assert f"stage 0: training continues: {later}" in said
    assert said.index(later) < said.index("stage 0: learning rate 0.05, from epoch 2\n")
    assert [len(history_of(log / stage)) for stage in "01"] == [3, 3]
    assert (log / "1" / "notes.txt").exists()
    assert (log / "1" / "test.json").read_text() != tested
    for stage in "01":
        best = json.loads((log / stage / "test.json").read_text())["checkpoint"]
        assert best == find_best(log / stage).name
    assert checkpoints.load(log / "1").config.dropout == 0


# --- Folders changed by hand ---------------------------------------------------------------------


def test_missing_earlier_stage_is_refused(tiny_dataset, log, capsys):
    shutil.rmtree(log / "0")
    assert train.main(arguments(tiny_dataset, log, *TWO_STAGES)) == 2
    said = capsys.readouterr().err
    assert f"{log / '0'}: no resume.keras and no checkpoint, but {log / '1'} was trained" in said
    assert "--initial-stage 1" in said
    assert train.main(arguments(tiny_dataset, log, *TWO_STAGES, "--initial-stage", 1)) == 0


def test_stage_of_another_training_is_refused(tiny_dataset, log, capsys):
    path = log / "0" / "resume.keras"
    description = checkpoints.read_description(path)
    description["training"]["state"]["best_loss"] += 0.01
    rewrite_member(path, "network.json", json.dumps(description))
    assert train.main(arguments(tiny_dataset, log, *TWO_STAGES)) == 2
    assert f"{log / '1'}: was trained from a checkpoint with validation" in capsys.readouterr().err
    shutil.rmtree(log / "0")
    (log / "1").rename(log / "0")
    assert train.main(arguments(tiny_dataset, log, *TWO_STAGES)) == 2
    assert "resume.keras: is a file of stage 1: restore" in capsys.readouterr().err


def test_deleting_what_is_no_longer_needed_is_harmless(tiny_dataset, trained, log, capsys):
    for path in [*(log / "0").glob("ckpt-*"), log / "1" / "resume.keras"]:
        path.unlink()
    names = names_in(log / "1")
    assert train.main(arguments(tiny_dataset, log, *TWO_STAGES)) == 0
    assert capsys.readouterr().err.count("already finished") == 2
    assert names_in(log / "1") == names
    assert history_of(log / "1") == history_of(trained / "1")


def make_first_epoch_best(log):
    """Change stage 0 as if its second epoch had not improved, and delete stage 1."""
    path = log / "0" / "resume.keras"
    rows = checkpoints.load(path).training["state"]["history"]
    (improved,) = (log / "0").glob("ckpt-e001-*")
    improved.unlink()
    rows[1]["val_loss"] = 0.99
    write_history(log / "0" / "training.csv", rows)
    edit_state(log, best_loss=rows[0]["val_loss"], epochs_without_improvement=1, history=rows)


def test_missing_best_checkpoint_is_named(tiny_dataset, log, capsys):
    make_first_epoch_best(log)
    for path in [*(log / "0").glob("ckpt-*"), log / "0" / "test.json"]:
        path.unlink()
    expected = f"{log / '0'}: the best checkpoint of epoch 0, val_loss "
    for options in (TWO_STAGES, THREE_EPOCHS):
        assert train.main(arguments(tiny_dataset, log, *options)) == 1
        said = capsys.readouterr().err
        assert expected in said and "resume.keras contains only the last epoch" in said


def test_without_resume_file_a_stage_that_had_ended_stays_finished(tiny_dataset, log, capsys):
    make_first_epoch_best(log)
    (log / "0" / "resume.keras").unlink()
    options = ("--num-lr-decays", 1, "--max-epochs", 2, "--lr", 0.05, "--seed", 3)
    assert train.main(arguments(tiny_dataset, log, *options)) == 0
    assert "stage 0: already finished" in capsys.readouterr().err
    assert len(history_of(log / "0")) == 2


def test_another_best_checkpoint_is_tested(tiny_dataset, log):
    path = log / "0" / "test.json"
    tested = path.read_text()
    path.write_text('{"checkpoint": "ckpt-e000-l0.9999.keras", "roc_auc": 1, "pr_auc": 1}')
    assert train.main(arguments(tiny_dataset, log, *TWO_STAGES)) == 0
    assert path.read_text() == tested


def test_weights_that_are_not_finite_are_not_saved(tiny_dataset, log, capsys, monkeypatch):
    validate = train.validate

    def validate_and_damage(run, trainer, predictor):
        result = validate(run, trainer, predictor)
        trainer.layers[2].set_weights([w * np.inf for w in trainer.layers[2].get_weights()])
        return result

    monkeypatch.setattr(train, "validate", validate_and_damage)
    before = {path: path.read_bytes() for path in (log / "1").glob("*.keras")}
    more = ("--num-lr-decays", 3, "--max-epochs", 2, "--lr", 0.05, "--seed", 3)
    assert train.main(arguments(tiny_dataset, log, *more)) == 1
    assert "weights are NaN or infinite after epoch 0: a lower --lr" in capsys.readouterr().err
    assert not list((log / "2").glob("*.keras"))
    assert {path: path.read_bytes() for path in (log / "1").glob("*.keras")} == before
