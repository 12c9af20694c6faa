"""Evaluate a model on the test split, or compare several.

    python eval.py log/4 --data-dir ./dataset
    python eval.py se-multi-auc_0.9111-tfrmodel.hdf5 --report ./report
    python eval.py log/4 log-rese/4 --report ./report

A clip's prediction is the mean over its segments. A printed score is the mean over tags. A report
contains 95 % bootstrap intervals of the scores and of the differences between models.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from input_data import Clip, Dataset, hash_dataset, open_dataset
from toolkit import cli, messages
from toolkit.errors import CheckpointError, UsageError
from toolkit.evaluation import CONFIDENCE, Resamples, Scores, bootstrap, interval, score
from toolkit.models.checkpoints import Checkpoint
from toolkit.models.tags import read_tags
from toolkit.page import ERRORS_NAME, PAGE_NAME, Result, write_errors, write_page
from toolkit.prediction import (
    DEFAULT_BATCH_SIZE,
    clip_mean,
    compile_for_prediction,
    load_for_dataset,
    predict_split,
)
from toolkit.provenance import describe, model_names
from toolkit.reports import tags_without_score, write_comparison, write_report

import numpy as np


def evaluate(
    model_path: str | Path,
    data_dir: str | Path,
    batch_size: int = DEFAULT_BATCH_SIZE,
    tags_path: str | Path | None = None,
) -> tuple[tuple[str, ...], list[Clip], np.ndarray, Scores]:
    """Predict the tags of the test clips and score the predictions.

    Parameters
    ----------
    model_path : str or Path
        Model file or a stage's folder (see `toolkit.prediction.load`).
    data_dir : str or Path
        Folder of the dataset.
    batch_size : int
        Segments per batch.
    tags_path : str or Path or None
        File that names the tags of the model (see `toolkit.prediction.load_for_dataset`).

    Returns
    -------
    tags : tuple of str
        Names of the tags, in the model's order.
    clips : list of Clip
        Test clips, without their segments.
    predictions : np.ndarray [shape=(n_clips, n_tags), dtype=float64]
        Probabilities of the clips: means over their segments.
    scores : Scores
        Scores of each tag.

    Raises
    ------
    ShardError, UsageError, CheckpointError
        The dataset has no test clips, the model does not fit the dataset, or a file is damaged.
    """
    dataset = open_dataset(data_dir)
    checkpoint = _load(model_path, dataset, tags_path)
    clips, labels, predictions = _predict(model_path, checkpoint, dataset, batch_size, "test")
    return checkpoint.tags, clips, predictions, score(labels, predictions)


def _load(model_path: str | Path, dataset: Dataset, tags_path: str | Path | None) -> Checkpoint:
    if not dataset.splits["test"].num_clips:
        raise UsageError(f"{dataset.path}: no test clips to evaluate on")
    checkpoint = load_for_dataset(model_path, dataset, tags_path=tags_path)
    compile_for_prediction(checkpoint.network, checkpoint.config.block)
    return checkpoint


def _predict(
    model_path: str | Path, checkpoint: Checkpoint, dataset: Dataset, batch_size: int, split: str
) -> tuple[list[Clip], np.ndarray, np.ndarray]:
    """Return the clips of a split, their labels, and the means over their segments."""
    clips, predictions = [], []
    doing = "evaluating" if split == "test" else "thresholds"
    for prediction in predict_split(checkpoint.network, dataset, split, batch_size, doing):
        (probabilities,) = prediction.outputs
        clips.append(prediction.clip)
        predictions.append(clip_mean(probabilities))
    predictions = np.array(predictions)
    if not np.isfinite(predictions).all():
        raise CheckpointError(f"{model_path}: the predictions contain NaN or infinity")
    return clips, np.array([clip.labels for clip in clips]), predictions


# --- Command line --------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Evaluate a model on the test split, or compare several.",
        "  python eval.py se-multi-auc_0.9111-tfrmodel.hdf5 --data-dir ./dataset\n"
        "  python eval.py log/4 --report ./report\n"
        "  python eval.py log/4 log-rese/4 --report ./report",
    )
    data = parser.add_argument_group("model and data")
    cli.add_model(
        data,
        "model_paths",
        "a .keras, .hdf5, .h5 or .onnx file, or a stage's folder (its best checkpoint is used); "
        "several models are compared with the first",
        nargs="+",
    )
    cli.add_data_dir(data)
    cli.add_tags(data)
    machine = parser.add_argument_group("machine")
    cli.add_batch_size(machine, DEFAULT_BATCH_SIZE)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--report",
        metavar="DIR",
        help="folder for report.html, a page with scores, curves and mistakes to listen to, "
        "errors.csv, metrics.json, per_tag.csv, per_tag.png and predictions.csv; with several "
        "models, one folder per model, a page that compares them, and comparison.json, .csv and "
        ".png; other files in the folder are kept (default: none)",
    )
    output.add_argument(
        "--seed",
        metavar="N",
        type=cli.non_negative_int,
        default=0,
        help="random seed of the bootstrap intervals (default: 0)",
    )
    return cli.add_general(parser)


def main(argv: list[str] | None = None) -> int:
    return cli.run(_evaluate, build_parser().parse_args(argv))


def _evaluate(arguments: argparse.Namespace) -> None:
    for model_path in arguments.model_paths:
        cli.check_model(model_path)
    if arguments.report:
        cli.check_output(arguments.report, "--report", is_folder=True)
    dataset = open_dataset(arguments.data_dir)  # report errors before the slow import of Keras
    if arguments.tags:
        read_tags(arguments.tags)
    names = model_names(arguments.model_paths)
    all_resamples, results = [], []
    for name, model_path in zip(names, arguments.model_paths, strict=True):
        checkpoint = _load(model_path, dataset, arguments.tags)
        tags = checkpoint.tags
        predict = partial(_predict, model_path, checkpoint, dataset, arguments.batch_size)
        clips, labels, predictions = predict("test")
        scores = score(labels, predictions)
        unscored = tags_without_score(tags, scores)
        if unscored and name == names[0]:
            messages.say(
                f"{messages.count(len(unscored), 'tag')} excluded from the averages, because "
                f"all test clips or none have the tag: {', '.join(unscored)}"
            )
        suffix = "" if len(names) == 1 else f" ({name})"
        print(f"=> @ ROC AUC score: {scores.macro_roc_auc:.4f}{suffix}")
        print(f"=> @ PR AUC score: {scores.macro_pr_auc:.4f}{suffix}", flush=True)
        if arguments.report:
            test_hash = hash_dataset(dataset, ["test"])
            provenance = describe(model_path, dataset.path, tags, len(clips), test_hash, name)
            validation = _predict_validation(predict, dataset)
            folder = Path(arguments.report) / ("" if len(names) == 1 else name)
            resamples = write_report(
                folder, provenance, tags, clips, predictions, scores, arguments.seed
            )
            results.append(Result(provenance, labels, predictions, scores, resamples, validation))
            write_errors(folder, tags, clips, results[-1])
            write_page(folder, dataset, tags, clips, results[-1:])
            messages.say(
                f"{folder}: metrics.json, per_tag.csv, per_tag.png, predictions.csv, "
                f"{ERRORS_NAME}, {PAGE_NAME}"
            )
        elif len(names) > 1:
            resamples = bootstrap(labels, predictions, seed=arguments.seed)
        if len(names) > 1:
            all_resamples.append(resamples)
    if len(names) > 1:
        _print_differences(names, all_resamples)
        if arguments.report:
            write_comparison(
                arguments.report,
                [result.provenance for result in results],
                tags,
                [result.scores for result in results],
                all_resamples,
                arguments.seed,
            )
            write_page(arguments.report, dataset, tags, clips, results)
            messages.say(
                f"{arguments.report}: comparison.json, comparison.csv, comparison.png, {PAGE_NAME}"
            )


def _predict_validation(predict: Callable, dataset: Dataset) -> tuple | None:
    """Return labels and predictions of the validation clips; None if there are none."""
    # The published program's validation shards do not say which segments are of one clip.
    if not dataset.splits["val"].num_clips:
        what = "names no validation clips: thresholds are chosen on test clips"
        messages.say(f"{dataset.path}: {what}")
        return None
    return predict("val")[1:]


def _print_differences(names: list[str], resamples: list[Resamples]) -> None:
    for name, drawn in zip(names[1:], resamples[1:], strict=True):
        difference = drawn - resamples[0]
        for metric, rows in (
            ("ROC AUC", difference.macro_roc_auc),
            ("PR AUC", difference.macro_pr_auc),
        ):
            low, high = interval(rows, lowest=-1)
            print(
                f"=> @ {metric} difference: {rows[0]:+.4f}, {100 * CONFIDENCE:g} % interval "
                f"{low:+.4f} to {high:+.4f} ({name} - {names[0]})"
            )


if __name__ == "__main__":
    sys.exit(main())
