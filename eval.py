"""Evaluate a model on the test split.

    python eval.py log/4 --data-dir ./dataset
    python eval.py se-multi-auc_0.9111-tfrmodel.hdf5 --report ./report

A clip's prediction is the mean of its segments'; scores are the averages over tags.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import cli
from errors import CheckpointError, UsageError
from evaluation import DEFAULT_BATCH_SIZE, Scores, check_fits, predict_clips, score
from input_data import Clip, open_dataset, read_clips

import numpy as np


def evaluate(
    model_path: str | Path, data_dir: str | Path, batch_size: int = DEFAULT_BATCH_SIZE
) -> tuple[tuple[str, ...], list[Clip], np.ndarray, Scores]:
    """Predict the test clips' tags and score them.

    Parameters
    ----------
    model_path : str or Path
        A model file (see `checkpoints.load`).
    data_dir : str or Path
        The dataset's folder.
    batch_size : int
        Segments a batch.

    Returns
    -------
    tags : tuple of str
        In model order.
    clips : list of Clip
        The test clips, without their segments.
    predictions : np.ndarray [shape=(n_clips, n_tags), dtype=float64]
        Mean of each clip's segments.
    scores : Scores
        Tag by tag.
    """
    import checkpoints
    from model import compiles_faster

    dataset = open_dataset(data_dir)
    test = dataset.splits["test"]
    if not test.num_clips:
        raise UsageError(f"{data_dir}: no test clips to evaluate on")
    checkpoint = checkpoints.load(model_path)
    check_fits(dataset, checkpoint)
    network = checkpoint.network
    network.compile(jit_compile=compiles_faster(checkpoint.config.block))

    clips, predictions = [], []
    shown = cli.progress(
        read_clips(test.shards, dataset.num_samples),
        total=test.num_clips, unit="clip", desc="evaluating",
    )  # fmt: skip
    for clip, (outputs,) in predict_clips(network, shown, batch_size):
        clip.segments = clip.segments[:0].copy()  # a view would keep all the test audio
        clips.append(clip)
        predictions.append(outputs.mean(axis=0, dtype=np.float64))
    predictions = np.array(predictions)
    if not np.isfinite(predictions).all():
        raise CheckpointError(f"{model_path}: predicts values that are no numbers")
    labels = np.array([clip.labels for clip in clips])
    return dataset.tags, clips, predictions, score(labels, predictions)


def write_report(
    folder: str | Path,
    tags: tuple[str, ...],
    clips: list[Clip],
    predictions: np.ndarray,
    scores: Scores,
) -> None:
    """Write ``metrics.json``, ``per_tag.csv``, ``per_tag.png`` and ``predictions.csv``.

    Parameters
    ----------
    folder : str or Path
        Made if need be.
    tags, clips, predictions, scores
        As `evaluate` returns them.
    """
    import pandas as pd

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {
        "roc_auc": _or_none(scores.macro_roc_auc),
        "pr_auc": _or_none(scores.macro_pr_auc),
        "num_clips": len(clips),
        "num_tags": len(tags),
        "num_tags_scored": int((~np.isnan(scores.roc_auc)).sum()),
        "tags_not_scored": unscored(tags, scores),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    per_tag = pd.DataFrame(
        {
            "tag": tags,
            "positives": scores.positives,
            "roc_auc": scores.roc_auc,
            "pr_auc": scores.pr_auc,
        }
    )
    per_tag.to_csv(folder / "per_tag.csv", index=False, float_format="%.6f")
    table = pd.DataFrame(predictions, columns=list(tags))
    table.insert(0, "clip_id", [clip.clip_id for clip in clips])
    table.insert(1, "mp3_path", [clip.mp3_path for clip in clips])
    table.to_csv(folder / "predictions.csv", index=False, float_format="%.8f")
    _plot_tags(folder / "per_tag.png", tags, scores)


def unscored(tags: tuple[str, ...], scores: Scores) -> list[str]:
    """Name the tags that the test clips all carry or all lack."""
    return [tag for tag, value in zip(tags, scores.roc_auc, strict=True) if np.isnan(value)]


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _plot_tags(path: Path, tags: tuple[str, ...], scores: Scores) -> None:
    from matplotlib.figure import Figure

    known = np.flatnonzero(~np.isnan(scores.roc_auc))
    order = known[np.argsort(scores.roc_auc[known])]
    rows = np.arange(len(order))
    figure = Figure(figsize=(7, max(2.5, 1.3 + 0.2 * len(order))), layout="constrained")
    axes = figure.subplots()
    axes.hlines(rows, 0.5, scores.roc_auc[order], color="0.8", linewidth=1)
    axes.plot(scores.roc_auc[order], rows, "o", color="#0072B2", label="ROC AUC")
    axes.plot(scores.pr_auc[order], rows, "D", color="#D55E00", markersize=4, label="PR AUC")
    axes.set_yticks(rows, [f"{tags[tag]} ({scores.positives[tag]})" for tag in order], fontsize=8)
    axes.set_ylim(-1, max(len(order), 1))
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("area under the curve (chance: ROC AUC 0.5, PR AUC the tag's share)")
    axes.set_ylabel("tag (positive test clips)")
    axes.axvline(0.5, color="0.5", linestyle=":", linewidth=1)
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(path, dpi=120)


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Evaluate a model on the test split.",
        "  python eval.py se-multi-auc_0.9111-tfrmodel.hdf5 --data-dir ./dataset\n"
        "  python eval.py log/4 --report ./report",
    )
    parser.add_argument(
        "model_path",
        metavar="MODEL_PATH",
        help="a .keras, .hdf5 or .h5 file, or a stage's folder for its best checkpoint",
    )
    parser.add_argument(
        "--data-dir",
        metavar="PATH",
        default="./dataset",
        help="folder of the dataset, which holds tfrecord/ (default: ./dataset)",
    )
    parser.add_argument(
        "--report",
        metavar="DIR",
        default=None,
        help="write metrics.json, per_tag.csv, per_tag.png and predictions.csv here (default: no)",
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=cli.positive_int,
        default=DEFAULT_BATCH_SIZE,
        help=f"segments a batch (default: {DEFAULT_BATCH_SIZE})",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    return cli.run(_evaluate, build_parser().parse_args(argv))


def _evaluate(arguments: argparse.Namespace) -> None:
    if not Path(arguments.model_path).exists():
        raise UsageError(f"{arguments.model_path}: no such model file")
    open_dataset(arguments.data_dir)  # say what is wrong with it before the slow imports
    cli.import_quietly("keras")
    tags, clips, predictions, scores = evaluate(
        arguments.model_path, arguments.data_dir, arguments.batch_size
    )
    if names := unscored(tags, scores):
        cli.say(
            f"{len(names)} tags without both classes in the test clips are left out of the "
            f"averages: {', '.join(names)}"
        )
    print(f"=> @ ROC AUC score: {scores.macro_roc_auc:.4f}")
    print(f"=> @ PR AUC score: {scores.macro_pr_auc:.4f}")
    if arguments.report:
        write_report(arguments.report, tags, clips, predictions, scores)
        cli.say(f"{arguments.report}: metrics.json, per_tag.csv, per_tag.png, predictions.csv")


if __name__ == "__main__":
    sys.exit(main())
