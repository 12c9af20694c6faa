"""Validation after an epoch, and the test of a stage's best checkpoint."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from input_data import hash_dataset
from toolkit.errors import TrainingError
from toolkit.evaluation import Scores, binary_crossentropy, score
from toolkit.files import write_atomically
from toolkit.models import checkpoints
from toolkit.prediction import clip_mean, predict_split
from toolkit.provenance import describe
from toolkit.training.stage import Run
from toolkit.training.state import TEST_NAME, StageState, best_checkpoint

import numpy as np

if TYPE_CHECKING:
    import keras


def make_predictor(run: Run, network: "keras.Model"):
    """Return an object that predicts batches: the network, or with `job.mesh` a `JaxPredictor`."""
    if run.job.mesh:
        from toolkit.training.jax_loop import JaxPredictor

        return JaxPredictor(network)
    return network


def validate(run: Run, network: "keras.Model", predictor) -> tuple[float, Scores]:
    """Compute the validation loss over segments and the scores over clips.

    As in the published program, the loss includes the L2 penalty of the convolution kernels.

    Parameters
    ----------
    run : Run
        The training.
    network : keras.Model
        Network that is being trained.
    predictor : object
        Result of `make_predictor` for the network.

    Raises
    ------
    TrainingError
        The loss is NaN or infinite.
    """
    labels, predictions = _predict_split(run, predictor, "val", "validating")
    num_segments = [len(of_clip) for of_clip in predictions]
    loss = binary_crossentropy(np.repeat(labels, num_segments, axis=0), np.concatenate(predictions))
    loss += _l2_penalty(network)
    if not math.isfinite(loss):
        raise TrainingError(
            f"the validation loss is {loss}: a lower --lr may help; the best checkpoint is kept"
        )
    # Rounding differs between hosts, but all hosts must stop after the same epoch.
    return run.job.of_first(loss), _score_clips(labels, predictions)


def test_best(run: Run, stage: int, state: StageState) -> Scores | None:
    """Score a stage's best checkpoint on the test clips and write ``test.json``.

    Returns
    -------
    Scores or None
        None if this checkpoint was tested before, or if the dataset has no test shards.

    Raises
    ------
    TrainingError
        The best checkpoint is missing.
    """
    job, path = run.job, run.stage_dir(stage) / TEST_NAME
    run.check_folder()  # wait until all hosts see the best checkpoint
    if job.of_first(state.is_best(_tested_checkpoint(path))):
        return None
    if not run.dataset.splits["test"].shards:
        job.say(f"stage {stage}: no test shards: test skipped")
        return None
    best = best_checkpoint(run.stage_dir(stage), state)
    network = checkpoints.load(best).network
    network.compile(jit_compile=run.jit)
    labels, predictions = _predict_split(run, make_predictor(run, network), "test", "testing")
    scores = _score_clips(labels, predictions)
    data, test_hash = run.dataset, hash_dataset(run.dataset, ["test"])
    provenance = describe(run.stage_dir(stage), data.path, data.tags, len(labels), test_hash)
    result = provenance.to_json() | {
        "checkpoint": best.name,
        "roc_auc": _or_null(scores.macro_roc_auc),
        "pr_auc": _or_null(scores.macro_pr_auc),
    }
    job.write(network, lambda: write_atomically(path, json.dumps(result).encode() + b"\n"))
    job.say(
        f"stage {stage}: best checkpoint on test: ROC AUC {scores.macro_roc_auc:.4f}, "
        f"PR AUC {scores.macro_pr_auc:.4f}"
    )
    return scores


def _tested_checkpoint(path: Path) -> str:
    try:
        return str(json.loads(path.read_text())["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _or_null(value: float) -> float | None:
    """Replace NaN, which JSON does not support."""
    return None if math.isnan(value) else value


def _l2_penalty(network: "keras.Model") -> float:
    """Return the L2 penalty of the convolution kernels, in float64."""
    import keras

    penalty = 0.0
    for layer in network.layers:
        if getattr(layer, "kernel_regularizer", None):
            kernel = keras.ops.convert_to_numpy(layer.kernel)
            penalty += float(layer.kernel_regularizer.l2) * float(
                np.square(kernel, dtype=float).sum()
            )
    return penalty


def _score_clips(labels: np.ndarray, predictions: list[np.ndarray]) -> Scores:
    return score(labels, np.array([clip_mean(of_clip) for of_clip in predictions]))


def _predict_split(
    run: Run, predictor, split: str, doing: str
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Predict a split: each process predicts some of the shards and receives all results.

    Returns
    -------
    labels : np.ndarray [shape=(n_clips, n_tags), dtype=uint8]
    predictions : list of np.ndarray [shape=(n_segments, n_tags), dtype=float32]
        One array per clip.
    """
    job, num_tags = run.job, len(run.dataset.tags)
    labels, num_segments = [np.zeros((0, num_tags), np.uint8)], []
    predictions = [np.zeros((0, num_tags), np.float32)]
    share = job.process, job.num_processes
    batch_size = run.options.batch_size
    for prediction in predict_split(
        predictor, run.dataset, split, batch_size, doing, share, run.stop.check, is_repeated=True
    ):
        (probabilities,) = prediction.outputs
        labels.append(prediction.clip.labels[np.newaxis])
        num_segments.append(len(probabilities))
        predictions.append(probabilities)
    labels, num_segments, predictions = (
        job.gather(part)
        for part in (
            np.concatenate(labels),
            np.array(num_segments, np.int32),
            np.concatenate(predictions),
        )
    )
    by_clip = np.split(predictions, np.cumsum(num_segments)[:-1])
    return labels, by_clip[: len(num_segments)]  # np.split returns one part even for no clips
