"""Evaluate a model on the test split, or compare several.

    python eval.py log/4 --data-dir ./dataset
    python eval.py se-multi-auc_0.9111-tfrmodel.hdf5 --report ./report
    python eval.py log/4 log-rese/4 --report ./report

A clip's prediction is the mean of its segments'; scores are the averages over tags. A report says
how far they can be trusted: 95 % intervals by bootstrap over the test clips, and of the
differences between models on the same clips.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from input_data import Clip, open_dataset, read_clips
from toolkit import backend, cli, figures, messages
from toolkit.errors import CheckpointError, UsageError
from toolkit.evaluation import (
    CONFIDENCE,
    DEFAULT_BATCH_SIZE,
    NUM_RESAMPLES,
    Resamples,
    Scores,
    bootstrap,
    check_fits,
    clip_mean,
    interval,
    predict_clips,
    score,
)

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
    from toolkit.backend import choose_jit
    from toolkit.models import checkpoints

    dataset = open_dataset(data_dir)
    test = dataset.splits["test"]
    if not test.num_clips:
        raise UsageError(f"{data_dir}: no test clips to evaluate on")
    checkpoint = checkpoints.load(model_path)
    check_fits(dataset, checkpoint)
    network = checkpoint.network
    network.compile(jit_compile=choose_jit("auto", checkpoint.config.block))

    clips, predictions = [], []
    read = read_clips(test.shards, dataset.num_samples, len(dataset.tags))
    shown = messages.progress(
        predict_clips(network, read, batch_size),
        total=test.num_clips, unit="clip", desc="evaluating",
    )  # fmt: skip
    for clip, (outputs,) in shown:
        clips.append(clip)
        predictions.append(clip_mean(outputs))
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
    seed: int = 0,
) -> Resamples:
    """Write ``metrics.json``, ``per_tag.csv``, ``per_tag.png`` and ``predictions.csv``.

    Parameters
    ----------
    folder : str or Path
        Made if need be.
    tags, clips, predictions, scores
        As `evaluate` returns them.
    seed : int
        Of the bootstrap that gives the intervals.

    Returns
    -------
    Resamples
        What the intervals were taken of.
    """
    import pandas as pd

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    resamples = bootstrap(np.array([clip.labels for clip in clips]), predictions, seed=seed)
    roc_auc_interval = interval(resamples.roc_auc)
    pr_auc_interval = interval(resamples.pr_auc)
    metrics = {
        "roc_auc": _or_none(scores.macro_roc_auc),
        "roc_auc_interval": _ends(resamples.macro_roc_auc),
        "pr_auc": _or_none(scores.macro_pr_auc),
        "pr_auc_interval": _ends(resamples.macro_pr_auc),
        "intervals": _method(seed),
        "num_clips": len(clips),
        "num_tags": len(tags),
        "num_tags_scored": int((~np.isnan(scores.roc_auc)).sum()),
        "tags_not_scored": unscored(tags, scores),
    }
    _write_json(folder / "metrics.json", metrics)
    per_tag = pd.DataFrame(
        {
            "tag": tags,
            "positives": scores.positives,
            "roc_auc": scores.roc_auc,
            "roc_auc_low": roc_auc_interval[0],
            "roc_auc_high": roc_auc_interval[1],
            "pr_auc": scores.pr_auc,
            "pr_auc_low": pr_auc_interval[0],
            "pr_auc_high": pr_auc_interval[1],
        }
    )
    per_tag.to_csv(folder / "per_tag.csv", index=False, float_format="%.6f")
    table = pd.DataFrame(predictions, columns=list(tags))
    # Tags may have these names, too.
    table.insert(0, "clip_id", [clip.clip_id for clip in clips], allow_duplicates=True)
    table.insert(1, "mp3_path", [clip.mp3_path for clip in clips], allow_duplicates=True)
    table.to_csv(folder / "predictions.csv", index=False, float_format="%.8f")
    figures.plot_tags(folder / "per_tag.png", tags, len(clips), scores, resamples)
    return resamples


def write_comparison(
    folder: str | Path,
    tags: tuple[str, ...],
    names: Sequence[str],
    scores: Sequence[Scores],
    resamples: Sequence[Resamples],
    seed: int = 0,
) -> dict:
    """Write ``comparison.json``, ``comparison.csv`` and ``comparison.png``.

    Parameters
    ----------
    folder : str or Path
        Made if need be.
    tags : tuple of str
        In model order.
    names, scores, resamples
        Of each model, the first being the one that the others are compared with; resamples of the
        same clips (see `evaluation.bootstrap`).
    seed : int
        The bootstrap's.

    Returns
    -------
    dict
        What ``comparison.json`` holds.
    """
    import pandas as pd

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables, comparisons = [], []
    for name, its_scores, its_resamples in zip(names, scores, resamples, strict=True):
        comparison = {"model": name}
        for metric in ("roc_auc", "pr_auc"):
            macro, macros = (getattr(its, f"macro_{metric}") for its in (its_scores, its_resamples))
            first, firsts = (getattr(its[0], f"macro_{metric}") for its in (scores, resamples))
            comparison |= {
                metric: _or_none(macro),
                f"{metric}_interval": _ends(macros),
                f"{metric}_difference": _or_none(macro - first),
                f"{metric}_difference_interval": _ends(macros - firsts),
            }
        comparisons.append(comparison)
        if its_scores is scores[0]:
            continue
        low, high = interval(its_resamples.roc_auc - resamples[0].roc_auc)
        tables.append(
            pd.DataFrame(
                {
                    "tag": tags,
                    "positives": its_scores.positives,
                    "model": name,
                    "roc_auc": its_scores.roc_auc,
                    "baseline": names[0],
                    "baseline_roc_auc": scores[0].roc_auc,
                    "difference": its_scores.roc_auc - scores[0].roc_auc,
                    "difference_low": low,
                    "difference_high": high,
                }
            )
        )
    found = {"baseline": names[0], "models": comparisons, "intervals": _method(seed)}
    _write_json(folder / "comparison.json", found)
    pd.concat(tables).to_csv(folder / "comparison.csv", index=False, float_format="%.6f")
    figures.plot_comparison(folder / "comparison.png", tags, names, scores, resamples)
    return found


def unscored(tags: tuple[str, ...], scores: Scores) -> list[str]:
    """Name the tags that the test clips all carry or all lack."""
    return [tag for tag, value in zip(tags, scores.roc_auc, strict=True) if np.isnan(value)]


def model_names(paths: Sequence[str | Path]) -> list[str]:
    """Name models by as much of the ends of their paths as tells them apart.

    A stage's folder is a number, so its parent is always named too: ``log/1`` is ``log-1``.
    """
    parts = {}
    for path in paths:
        absolute = Path(path).absolute()
        if absolute.suffix in (".keras", ".hdf5", ".h5"):
            absolute = absolute.with_suffix("")
        parts[path] = absolute.parts[1:] or ("root",)
    lengths = {path: 1 + part[-1].isdigit() for path, part in parts.items()}
    while True:
        names = {path: "-".join(part[-lengths[path] :]) for path, part in parts.items()}
        taken = Counter(names.values())
        longer = {
            path: lengths[path] + (taken[names[path]] > 1 and lengths[path] < len(part))
            for path, part in parts.items()
        }
        if longer == lengths:
            break
        lengths = longer
    result = []
    for path in paths:
        repeats = result.count(names[path])  # of one model given twice
        result.append(names[path] + (f"-{len(result) + 1}" if repeats else ""))
    return result


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _ends(values: np.ndarray) -> list[float | None]:
    return [_or_none(end) for end in interval(values)]


def _method(seed: int) -> dict:
    return {
        "confidence": CONFIDENCE,
        "method": "percentiles of bootstrap resamples of the clips",
        "resamples": NUM_RESAMPLES,
        "seed": seed,
    }


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
        "a .keras, .hdf5 or .h5 file, or a stage's folder for its best checkpoint; several are "
        "compared with the first",
        nargs="+",
    )
    cli.add_data_dir(data)
    machine = parser.add_argument_group("machine")
    cli.add_batch_size(machine, DEFAULT_BATCH_SIZE)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--report",
        metavar="DIR",
        default=None,
        help="write metrics.json, per_tag.csv, per_tag.png and predictions.csv here, those of "
        "several models in a folder each, beside comparison.json, .csv and .png (default: no)",
    )
    output.add_argument(
        "--seed",
        metavar="N",
        type=cli.non_negative_int,
        default=0,
        help="seed of the bootstrap, which gives the intervals (default: 0)",
    )
    return cli.add_general(parser)


def main(argv: list[str] | None = None) -> int:
    return cli.run(_evaluate, build_parser().parse_args(argv))


def _evaluate(arguments: argparse.Namespace) -> None:
    for model_path in arguments.model_paths:
        cli.check_model(model_path)
    open_dataset(arguments.data_dir)  # say what is wrong with it before the slow imports
    backend.import_keras()
    names = model_names(arguments.model_paths)
    is_alone = len(names) == 1
    all_scores, all_resamples = [], []
    for name, model_path in zip(names, arguments.model_paths, strict=True):
        tags, clips, predictions, scores = evaluate(
            model_path, arguments.data_dir, arguments.batch_size
        )
        if (left_out := unscored(tags, scores)) and not all_scores:
            messages.say(
                f"{messages.count(len(left_out), 'tag')} without both classes in the test clips left "
                f"out of the averages: {', '.join(left_out)}"
            )
        whose = "" if is_alone else f" ({name})"
        print(f"=> @ ROC AUC score: {scores.macro_roc_auc:.4f}{whose}")
        print(f"=> @ PR AUC score: {scores.macro_pr_auc:.4f}{whose}", flush=True)
        all_scores.append(scores)
        if arguments.report:
            folder = Path(arguments.report) / ("" if is_alone else name)
            all_resamples.append(
                write_report(folder, tags, clips, predictions, scores, arguments.seed)
            )
            messages.say(f"{folder}: metrics.json, per_tag.csv, per_tag.png, predictions.csv")
        elif not is_alone:
            labels = np.array([clip.labels for clip in clips])
            all_resamples.append(bootstrap(labels, predictions, seed=arguments.seed))
    if is_alone:
        return
    for name, scores, resamples in zip(names[1:], all_scores[1:], all_resamples[1:], strict=True):
        difference = scores.macro_roc_auc - all_scores[0].macro_roc_auc
        low, high = interval(resamples.macro_roc_auc - all_resamples[0].macro_roc_auc)
        print(
            f"=> @ ROC AUC difference: {difference:+.4f}, {100 * CONFIDENCE:g} % interval "
            f"{low:+.4f} to {high:+.4f} ({name} - {names[0]})"
        )
    if arguments.report:
        write_comparison(arguments.report, tags, names, all_scores, all_resamples, arguments.seed)
        messages.say(f"{arguments.report}: comparison.json, comparison.csv, comparison.png")


if __name__ == "__main__":
    sys.exit(main())
