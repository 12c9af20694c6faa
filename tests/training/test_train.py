"""train.py: the arithmetic of a step, stages and their files, resuming, and errors."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import train
from input_data import open_dataset
from model import build_network
from toolkit import figures, files
from toolkit.data.annotations import MTT_TOP_TAGS
from toolkit.errors import TrainingError, UsageError
from toolkit.models import checkpoints
from toolkit.models.checkpoints import Checkpoint, checkpoint_name, find_best, save
from toolkit.models.config import NetworkConfig
from toolkit.provenance import describe
from toolkit.training import history
from toolkit.training.loop import compile_trainer
from toolkit.training.options import TrainingOptions
from toolkit.training.state import StageState

import matplotlib.image
import numpy as np
import pytest
from conftest import run_python
from shards import published_shards, remove_split
from training_runs import (
    COLUMNS,
    ONE_EPOCH,
    TWO_STAGES,
    arguments,
    assert_same_weights,
    edit_state,
    history_of,
    names_in,
    predict_validation,
    validation_loss_of,
    weights_of,
)

# --- The arithmetic ------------------------------------------------------------------------------


@pytest.mark.parametrize(("momentum", "stage"), [(0.0, 0), (0.9, 0), (0.9, 2)])
def test_steps_follow_the_published_formula(stage, momentum):
    """Keras 2's SGD: v = m v - lr_t g, then w += m v - lr_t g, with a decreasing learning rate."""
    import keras

    options = TrainingOptions(lr=0.3, lr_decay=0.5, momentum=momentum)
    random = np.random.default_rng(stage)
    w, b = random.standard_normal((3, 2)), np.zeros(2)
    v_w, v_b = np.zeros_like(w), np.zeros_like(b)

    inputs = keras.Input((3,))
    layer = keras.layers.Dense(2, activation="sigmoid")
    network = keras.Model(inputs, layer(inputs))
    layer.set_weights([w, b])
    trainer = compile_trainer(network, options, stage, jit=False)
    for step in range(20):
        x = random.standard_normal((4, 3))
        y = (random.uniform(size=(4, 2)) < 0.5).astype(float)
        trainer.train_on_batch(x.astype("f"), y.astype("f"))
        p = 1 / (1 + np.exp(-(x @ w + b)))
        slope = (p - y) / y.size
        lr = 0.3 * 0.5**stage / (1 + 1e-6 * step)
        for value, velocity, gradient in ((w, v_w, x.T @ slope), (b, v_b, slope.sum(axis=0))):
            velocity *= momentum
            velocity -= lr * gradient
            value += momentum * velocity - lr * gradient
    np.testing.assert_allclose(layer.get_weights()[0], w, atol=3e-6)
    np.testing.assert_allclose(layer.get_weights()[1], b, atol=3e-6)


def test_stored_int16_samples_train_like_their_float32_values():
    import keras

    stored = np.random.default_rng(0).integers(-32768, 32768, (4, 3), np.int16)
    labels = np.eye(4, 2, dtype=np.float32)
    weights = []
    for samples in (stored, stored.astype(np.float32) / 32768):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((3,))
        network = keras.Model(inputs, keras.layers.Dense(2, activation="sigmoid")(inputs))
        trainer = compile_trainer(network, TrainingOptions(lr=0.3), stage=0, jit=False)
        trainer.fit(
            ((samples, labels) for _ in range(5)), steps_per_epoch=5, shuffle=False, verbose=0
        )
        weights.append(network.get_weights())
    np.testing.assert_array_equal(weights[0][0], weights[1][0])
    np.testing.assert_array_equal(weights[0][1], weights[1][1])


@pytest.mark.parametrize(
    ("losses", "patience", "max_epochs", "finished_at"),
    [
        ([0.5, 0.4, 0.3], 2, 100, None),
        ([0.5, 0.5, 0.5], 1, 100, 2),  # an equal loss is not an improvement
        ([0.5, 0.6, 0.7, 0.8], 2, 100, 3),
        ([0.5, 0.6, 0.4, 0.41, 0.42, 0.43, 0.44], 3, 100, 6),
        ([0.5, 0.4, 0.3], 2, 3, 2),
    ],
)
def test_stage_state(losses, patience, max_epochs, finished_at):
    options = TrainingOptions(patience=patience, max_epochs=max_epochs)
    state = StageState()
    for epoch, loss in enumerate(losses):
        improved = loss < state.best_loss
        assert state.update(epoch, loss, options) == improved
        assert (state.epoch, state.best_loss) == (epoch, min(losses[: epoch + 1]))
        assert state.finished == (epoch == finished_at)


# --- The files of a stage ------------------------------------------------------------------------


def test_files_and_history(trained):
    assert names_in(trained) == [".lock", "0", "1", "run.json", "training.png"]
    for stage in (0, 1):
        rows = history_of(trained / str(stage))
        assert [row["epoch"] for row in rows] == [0, 1]
        best = float("inf")
        expected = ["resume.keras", "test.json", "training.csv"]
        for row in rows:
            steps = 5 * (row["epoch"] + 1)  # 21 segments in batches of 4
            assert row["learning_rate"] == pytest.approx(
                0.05 * 0.2**stage / (1 + 1e-6 * steps), rel=1e-6
            )
            assert row["loss"] > 0 and row["seconds"] > 0
            assert 0 <= row["val_roc_auc"] <= 1 and 0 <= row["val_pr_auc"] <= 1
            if row["val_loss"] < best:
                best = row["val_loss"]
                expected.append(checkpoint_name(int(row["epoch"]), best))
        assert names_in(trained / str(stage)) == sorted(expected)
        checkpoint = checkpoints.load(find_best(trained / str(stage)))
        assert checkpoint.training["stage"] == stage
        assert checkpoint.training["state"]["best_loss"] == pytest.approx(best, rel=1e-7)


def test_validation_columns_are_those_of_the_checkpoint(tiny_dataset, trained):
    """Evaluated by other code, the best checkpoint has the scores of its row."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    path = find_best(trained / "1")
    row = history_of(trained / "1")[int(path.name[6:9])]
    labels, outputs = predict_validation(path, tiny_dataset)
    means = np.array([output.mean(axis=0) for output in outputs])
    known = [len(set(column)) == 2 for column in labels.T]
    labels, means = labels[:, known], means[:, known]
    # The compiled network's predictions may differ by 1e-5, which can exchange the ranks of two.
    for name, score in (("roc", roc_auc_score), ("pr", average_precision_score)):
        lowest, highest = (score(labels, means + sign * 1e-5 * labels) for sign in (-1, 1))
        assert lowest - 1e-6 <= row[f"val_{name}_auc"] <= highest + 1e-6
    assert row["val_loss"] == pytest.approx(validation_loss_of(path, tiny_dataset), abs=1e-6)
    assert path.name == checkpoint_name(int(row["epoch"]), row["val_loss"])


@pytest.fixture(scope="module")
def penalised(tiny_dataset, tmp_path_factory):
    """Train an epoch with weight decay; return the folder, the pictures, and the messages."""
    log, drawn, said = tmp_path_factory.mktemp("penalised"), [], io.StringIO()

    def plot(path, provenance, histories):
        drawn.append({stage: len(rows) for stage, rows in histories.items()})
        raise ValueError("no colours")

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(figures, "plot_training", plot)
        assert train.main(arguments(tiny_dataset, log, *ONE_EPOCH, "--weight-decay", 0.1)) == 0
    return log, drawn, said.getvalue()


def test_validation_loss_includes_the_l2_penalty(tiny_dataset, penalised):
    assert_validation_loss(penalised[0] / "0", tiny_dataset)


@pytest.mark.slow
def test_validation_loss_of_pytorch_includes_the_l2_penalty(tiny_dataset, tmp_path):
    pytest.importorskip("torch")
    options = arguments(tiny_dataset, tmp_path, *ONE_EPOCH, "--weight-decay", 0.1)
    assert run_python("train.py", *options, KERAS_BACKEND="torch").returncode == 0
    assert_validation_loss(tmp_path / "0", tiny_dataset)


def assert_validation_loss(stage_dir, data_dir):
    (row,) = history_of(stage_dir)
    best = find_best(stage_dir)
    assert row["val_loss"] == pytest.approx(validation_loss_of(best, data_dir, 0.1), abs=1e-5)
    assert row["val_loss"] > validation_loss_of(best, data_dir) + 0.1


def test_tensorboard_reads_the_events(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for stage in ("0", "1"):
        events = EventAccumulator(str(trained / stage))
        events.Reload()
        assert sorted(events.Tags()["scalars"]) == sorted(COLUMNS[1:])
        rows = history_of(trained / stage)
        for tag in COLUMNS[1:]:
            points = events.Scalars(tag)
            assert [point.step for point in points] == [row["epoch"] for row in rows]
            for point, row in zip(points, rows, strict=True):
                assert point.value == pytest.approx(row[tag], rel=1e-5)


def test_missing_events_are_written_when_a_stage_resumes(tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    rows = [{"epoch": epoch, "loss": 0.5 - 0.1 * epoch} for epoch in range(3)]
    for earlier, row in ((rows[:0], rows[0]), (rows[:1], rows[1]), (rows[:3], None)):
        events = history.EventLog(tmp_path, earlier)
        if row:
            events.write(row)
        events.close()
    steps = sorted(
        event.step
        for path in tmp_path.glob("events.out.tfevents.*")
        for event in EventFileLoader(str(path)).Load()
        if event.HasField("summary")
    )
    assert steps == [0, 1, 2]


def test_picture_is_drawn_from_the_histories_of_all_stages(tiny_dataset, trained, log):
    picture = matplotlib.image.imread(trained / "training.png")
    assert picture.shape == (520, 830, 4)
    assert picture.std() > 0.01  # not blank
    drawn = (log / "training.png").read_bytes()
    dataset = open_dataset(tiny_dataset)
    provenance = describe(trained / "1", tiny_dataset, dataset.tags, 6)
    assert history.plot_training(log, provenance) == log / "training.png"
    assert (log / "training.png").read_bytes() == drawn
    shutil.rmtree(log / "1")
    history.plot_training(log, provenance)
    assert (log / "training.png").read_bytes() != drawn


def test_picture_is_drawn_after_every_epoch_and_may_fail(penalised):
    log, drawn, said = penalised
    assert drawn == [{0: 1}]
    assert said.count(f"{log / 'training.png'}: cannot be drawn: no colours\n") == 1


def test_published_shards(tmp_path):
    """Shards without a manifest can be trained on, and the result can be evaluated."""
    import eval as eval_script

    published_shards(tmp_path / "data")
    assert train.main(arguments(tmp_path / "data", tmp_path / "log", *ONE_EPOCH)) == 0
    (row,) = history_of(tmp_path / "log" / "0")
    assert np.isfinite(row["val_loss"])
    best = find_best(tmp_path / "log" / "0")
    tags, clips, _, _ = eval_script.evaluate(best, tmp_path / "data")
    assert (len(tags), len(clips)) == (50, 1)
    # A single clip does not have both classes of a tag, so the scores are NaN.
    tested = json.loads((tmp_path / "log" / "0" / "test.json").read_text())
    assert (tested["checkpoint"], tested["num_clips"]) == (best.name, 1)
    assert (tested["roc_auc"], tested["pr_auc"]) == (None, None)


def test_without_test_shards_no_stage_is_tested(tiny_dataset, log, tmp_path, capsys):
    data_dir = Path(shutil.copytree(tiny_dataset, tmp_path / "data"))
    remove_split(data_dir, "test")
    (log / "0" / "test.json").unlink()
    (log / "run.json").unlink()  # the record of a training with test shards
    config = NetworkConfig(block="basic", init_features=2)
    options = TrainingOptions(4, lr=0.05, seed=3, num_lr_decays=1, max_epochs=2, jit="off")
    assert train.train(data_dir, log, config, options) == {}
    assert "stage 0: no test shards: test skipped" in capsys.readouterr().err
    assert not (log / "0" / "test.json").exists()


# --- Where a stage starts ------------------------------------------------------------------------


def start(tiny_dataset, train_dir, stage, *more, max_epochs=3):
    """Train one stage for up to `max_epochs` epochs, with the options of `trained`."""
    stages = ("--num-lr-decays", stage + 1, "--initial-stage", stage, "--max-epochs", max_epochs)
    options = (*stages, "--lr", 0.05, "--seed", 3, *more)
    return train.main(arguments(tiny_dataset, train_dir, *options))


@pytest.mark.slow
def test_first_stage_starts_from_weights_that_depend_on_the_seed(tiny_dataset, trained, tmp_path):
    assert start(tiny_dataset, tmp_path / "same", 0, max_epochs=1) == 0
    assert start(tiny_dataset, tmp_path / "other", 0, "--seed", 2**40, max_epochs=1) == 0
    (path,) = (tmp_path / "same" / "0").glob("ckpt-*.keras")
    assert_same_weights(path, trained / "0" / path.name)
    kernel, other = (weights_of(tmp_path / log / "0")[0] for log in ("same", "other"))
    assert np.abs(kernel - other).max() > 0.01


@pytest.mark.slow
def test_a_stage_without_resume_file_continues_from_its_best_checkpoint(
    tiny_dataset, trained, log, capsys
):
    (log / "1" / "resume.keras").unlink()
    for path in (log / "1").glob("ckpt-e001-*"):
        path.unlink()  # now epoch 0 is the best, and epoch 1 is trained again
    assert start(tiny_dataset, log, 1, max_epochs=2) == 0
    assert "stage 1: learning rate 0.01, from epoch 1\n" in capsys.readouterr().err
    rows = history_of(log / "1")
    assert [row["epoch"] for row in rows] == [0, 1]
    assert rows[0] == history_of(trained / "1")[0]


@pytest.mark.slow
def test_a_stage_starts_from_the_best_checkpoint_of_the_previous_one(
    tiny_dataset, trained, tmp_path, capsys
):
    """A stage that is started separately gives the same result as in an uninterrupted run."""
    shutil.copytree(trained / "0", tmp_path / "log" / "0")
    assert start(tiny_dataset, tmp_path / "log", 1, max_epochs=2) == 0
    assert "stage 1: learning rate 0.01, from epoch 0\n" in capsys.readouterr().err
    assert_same_weights(tmp_path / "log" / "1" / "resume.keras", trained / "1" / "resume.keras")


def test_a_stage_without_a_previous_checkpoint_is_refused(tiny_dataset, tmp_path, capsys):
    assert start(tiny_dataset, tmp_path / "log", 2) == 2
    message = capsys.readouterr().err
    assert f"{tmp_path / 'log' / '1'} has none" in message
    assert "--initial-stage 1" in message


def test_finished_stages_are_skipped_and_a_history_cut_short_is_completed(
    tiny_dataset, trained, log, capsys
):
    """A run killed between the checkpoint and training.csv leaves one row too few."""
    for stage in ("0", "1"):
        path = log / stage / "training.csv"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    before = {path: path.stat().st_mtime_ns for path in log.rglob("*.keras")}
    assert train.main(arguments(tiny_dataset, log, *TWO_STAGES)) == 0
    assert capsys.readouterr().err.count("already finished") == 2
    assert {path: path.stat().st_mtime_ns for path in log.rglob("*.keras")} == before
    for stage in ("0", "1"):
        assert history_of(log / stage) == history_of(trained / stage)


@pytest.mark.slow
def test_dropout_and_weight_decay_may_change(tiny_dataset, trained, log, capsys):
    """When a stage resumes and when the next one starts; the new values are used and stored."""
    edit_state(log, finished=False)
    changed = ("--dropout", 0, "--weight-decay", 0.1)
    assert start(tiny_dataset, log, 0, *changed) == 0
    resumed = capsys.readouterr().err
    shutil.rmtree(log)
    shutil.copytree(trained, log)
    shutil.rmtree(log / "1")
    assert start(tiny_dataset, log, 1, *changed, max_epochs=1) == 0
    started = capsys.readouterr().err
    for said in (resumed, started):
        assert "--dropout was 0.5, now 0: used from the next epoch\n" in said
        assert "--weight-decay was 0, now 0.1: used from the next epoch; losses before" in said
    assert "stage 0: learning rate 0.05, from epoch 2\n" in resumed
    best = find_best(log / "1")
    config = checkpoints.load(best).config
    assert (config.dropout, config.weight_decay) == (0, 0.1)
    (row,) = history_of(log / "1")
    expected = validation_loss_of(best, tiny_dataset, 0.1)
    assert row["val_loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_published_log_folder(golden, tmp_path, capsys):
    """The next stage starts from a published checkpoint; its own stage continues from it."""
    published_shards(tmp_path / "data")
    log = tmp_path / "log"
    (log / "0").mkdir(parents=True)
    published = log / "0" / "ckpt-e003-l0.1234.hdf5"
    shutil.copy(golden / "checkpoints" / "basic-multi.hdf5", published)
    shutil.copy(published, log / "0" / "ckpt-e002-l0.2.hdf5")  # not the best one
    options = ("--init-features", 4, "--max-epochs", 1, "--lr", 1e-30)

    more = ("--initial-stage", 1, "--num-lr-decays", 2)
    assert train.main(arguments(tmp_path / "data", log, *options, *more)) == 0
    said = capsys.readouterr().err
    assert (
        f"{published}: the file contains no tag names: using those of {tmp_path / 'data'}\n" in said
    )
    assert "stage 1: learning rate 2e-31, from epoch 0\n" in said
    kernel, expected = (weights_of(path)[0] for path in (log / "1" / "resume.keras", published))
    np.testing.assert_array_equal(kernel, expected)
    assert checkpoints.load(log / "1").tags == MTT_TOP_TAGS

    assert train.main(arguments(tmp_path / "data", log, *options, "--num-lr-decays", 1)) == 0
    said = capsys.readouterr().err
    assert (
        f"stage 0: {log / '0'} has no resume.keras: continuing from {published.name} at epoch 4, "
        "with zero momentum\n"
    ) in said
    (row,) = history_of(log / "0")
    assert row["epoch"] == 4 and row["val_loss"] > 0
    np.testing.assert_array_equal(weights_of(log / "0" / "resume.keras")[0], expected)


def test_a_converted_model_cannot_resume_its_stage(tiny_dataset, tmp_path, capsys):
    """A model file without training state starts only the next stage."""
    dataset = open_dataset(tiny_dataset)
    config = NetworkConfig(block="basic", init_features=2, num_tags=len(dataset.tags))
    (tmp_path / "log" / "0").mkdir(parents=True)
    path = tmp_path / "log" / "0" / checkpoint_name(0, 0.5)
    save(path, Checkpoint(build_network(config), config, dataset.tags, dataset.sample_rate))
    assert start(tiny_dataset, tmp_path / "log", 0) == 1
    assert f"{path}: has no training state" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("state", "options"),
    [
        # Options that are stricter than those of the earlier run.
        ({"finished": False}, ("--max-epochs", 1)),
        ({"finished": False, "epoch": 3, "epochs_without_improvement": 2}, ("--patience", 1)),
        # Finished by a version whose --patience 2 ended a stage one epoch earlier.
        ({"finished": True, "epoch": 3, "epochs_without_improvement": 2}, ("--patience", 2)),
    ],
)
def test_a_stage_that_is_over_trains_no_more(tiny_dataset, trained, log, capsys, state, options):
    edit_state(log, max_epochs=9, **state)
    options = ("--num-lr-decays", 1, "--max-epochs", 9, "--lr", 0.05, "--seed", 3, *options)
    assert train.main(arguments(tiny_dataset, log, *options)) == 0
    assert "stage 0: already finished" in capsys.readouterr().err
    assert history_of(log / "0") == history_of(trained / "0")


def test_resuming_without_the_earlier_momentum_is_refused(tiny_dataset, log, capsys):
    edit_state(log, finished=False)
    assert start(tiny_dataset, log, 0, "--momentum", 0) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "--momentum was 0.9, now 0: without momentum, Keras stores no velocities: use" in last


# --- Errors and options --------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_training(tiny_dataset, log, capsys):
    best = find_best(log / "1").read_bytes()
    more = ("--lr", 1e30, "--num-lr-decays", 3, "--max-epochs", 2)
    assert train.main(arguments(tiny_dataset, log, *more)) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"error: the loss is (nan|inf) at step \d+ of epoch 0", message)
    assert "--lr" in message
    assert find_best(log / "1").read_bytes() == best
    assert not list(log.glob("2/*.keras"))


def test_a_damaged_shard_stops_training(tiny_dataset, tmp_path, capsys):
    """Errors of the reading threads are reported in one line."""
    data_dir = Path(shutil.copytree(tiny_dataset, tmp_path / "data"))
    shard = sorted((data_dir / "tfrecord").glob("train-*"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    assert train.main(arguments(data_dir, tmp_path / "log", *ONE_EPOCH)) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "build_mtt.py" in message
    assert f"error: {shard}: record " in message


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (("--batch-size", 22), "--batch-size 22: more than the 21 training segments"),
        (("--initial-stage", 5), "--initial-stage 5: expected a stage from 0 to 4"),
        (("--block", "se", "--alpha", 0.1), "alpha 0.1"),
    ],
)
def test_options_that_do_not_fit_are_refused(tiny_dataset, tmp_path, capsys, more, part):
    assert train.main(arguments(tiny_dataset, tmp_path / "log", *more)) == 2
    assert part in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "log").exists()


def test_errors_are_exceptions_in_python(tiny_dataset, tmp_path):
    config = NetworkConfig(block="basic", init_features=2)
    with pytest.raises(UsageError, match="batch-size 99"):
        train.train(tiny_dataset, tmp_path, config, TrainingOptions(batch_size=99))
    with pytest.raises(UsageError, match="--device-cache on: needs KERAS_BACKEND=jax"):
        train.train(
            tiny_dataset, tmp_path, config, TrainingOptions(4, device_cache="on", jit="off")
        )


def test_a_second_training_is_refused(tiny_dataset, log, capsys):
    options = arguments(tiny_dataset, log, *TWO_STAGES)
    leftover = log / "0" / ".resume.keras.node1.123.0badcafe.tmp.keras"
    leftover.touch()
    with files.only_run(log, "training", TrainingError):
        assert train.main(options) == 1
    assert f"error: {log}: another training is " in capsys.readouterr().err.splitlines()[-1]
    assert leftover.exists(), "the other training may be writing it"
    assert train.main(options) == 0
    assert not leftover.exists()


def test_ignored_options_that_differ_from_the_shards_are_reported(tiny_dataset, log, capsys):
    """The dataset has shards of 4 or 6 clips, and clips of 1 to 3 segments."""
    for given, expected in (
        (("--num-audios-per-shard", 4), []),
        (
            ("--num-audios-per-shard", 100, "--num-segments-per-audio", 10),
            ["--num-segments-per-audio 10: ignored", "--num-audios-per-shard 100: ignored"],
        ),
    ):
        assert train.main(arguments(tiny_dataset, log, *TWO_STAGES, *given)) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--num")]
        assert len(lines) == len(expected)
        for line, part in zip(lines, expected, strict=True):
            assert line.startswith(part)


def test_the_options_of_the_published_program_have_its_defaults():
    published = """--data-dir ./dataset --train-dir ./log --block se --alpha 16 --batch-size 23
        --momentum 0.9 --lr 0.01 --lr-decay 0.2 --dropout 0.5 --weight-decay 0 --initial-stage 0
        --patience 2 --num-lr-decays 5 --num-audios-per-shard 100 --num-segments-per-audio 10
        --num-read-threads 8"""
    parser = train.build_parser()
    assert parser.parse_args(published.split()) == parser.parse_args([])
    assert not parser.parse_args(["--no-multi"]).multi
