"""Files of eval.py's reports: scores of one model, and comparisons of several."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from input_data import Clip
from toolkit import figures
from toolkit.evaluation import CONFIDENCE, NUM_RESAMPLES, Resamples, Scores, bootstrap, interval

import numpy as np


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
        Folder to write to; created if it does not exist.
    tags : tuple of str
        Names of the tags, in the model's order.
    clips : list of Clip
        Test clips with their labels.
    predictions : np.ndarray [shape=(n_clips, n_tags)]
        Probabilities of the clips.
    scores : Scores
        Scores of the predictions.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    Resamples
        Resampled scores, from which the intervals are computed.
    """
    import pandas as pd

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    resamples = bootstrap(np.array([clip.labels for clip in clips]), predictions, seed=seed)
    metrics = {
        "roc_auc": _or_none(scores.macro_roc_auc),
        "roc_auc_interval": _ends(resamples.macro_roc_auc),
        "pr_auc": _or_none(scores.macro_pr_auc),
        "pr_auc_interval": _ends(resamples.macro_pr_auc),
        "intervals": _method(seed),
        "num_clips": len(clips),
        "num_tags": len(tags),
        "num_tags_scored": int((~np.isnan(scores.roc_auc)).sum()),
        "tags_not_scored": tags_without_score(tags, scores),
    }
    _write_json(folder / "metrics.json", metrics)
    columns = {"tag": tags, "positives": scores.positives}
    for metric in ("roc_auc", "pr_auc"):
        low, high = interval(getattr(resamples, metric))
        columns[metric] = getattr(scores, metric)
        columns |= {f"{metric}_low": low, f"{metric}_high": high}
    pd.DataFrame(columns).to_csv(folder / "per_tag.csv", index=False, float_format="%.6f")
    table = pd.DataFrame(predictions, columns=list(tags))
    # Duplicates are allowed because a tag may have one of these names.
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
) -> None:
    """Write ``comparison.json``, ``comparison.csv`` and ``comparison.png``.

    Parameters
    ----------
    folder : str or Path
        Folder to write to; created if it does not exist.
    tags : tuple of str
        Names of the tags, in the models' order.
    names : sequence of str
        Names of the models. The others are compared with the first.
    scores : sequence of Scores
        Scores of each model.
    resamples : sequence of Resamples
        Resampled scores of each model, on the same clips and with the same seed.
    seed : int
        Seed of the bootstrap.
    """
    import pandas as pd

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables, comparisons = [], []
    for number, name in enumerate(names):
        comparison = {"model": name}
        for metric in ("roc_auc", "pr_auc"):
            value, first = (getattr(scores[i], f"macro_{metric}") for i in (number, 0))
            drawn, drawn_first = (getattr(resamples[i], f"macro_{metric}") for i in (number, 0))
            comparison |= {
                metric: _or_none(value),
                f"{metric}_interval": _ends(drawn),
                f"{metric}_difference": _or_none(value - first),
                f"{metric}_difference_interval": _ends(drawn - drawn_first),
            }
        comparisons.append(comparison)
        if number == 0:
            continue
        low, high = interval(resamples[number].roc_auc - resamples[0].roc_auc)
        tables.append(
            pd.DataFrame(
                {
                    "tag": tags,
                    "positives": scores[number].positives,
                    "model": name,
                    "roc_auc": scores[number].roc_auc,
                    "baseline": names[0],
                    "baseline_roc_auc": scores[0].roc_auc,
                    "difference": scores[number].roc_auc - scores[0].roc_auc,
                    "difference_low": low,
                    "difference_high": high,
                }
            )
        )
    found = {"baseline": names[0], "models": comparisons, "intervals": _method(seed)}
    _write_json(folder / "comparison.json", found)
    pd.concat(tables).to_csv(folder / "comparison.csv", index=False, float_format="%.6f")
    figures.plot_comparison(folder / "comparison.png", tags, names, scores, resamples)


def tags_without_score(tags: tuple[str, ...], scores: Scores) -> list[str]:
    """Return the tags without ROC AUC: those that all clips carry or that no clip carries."""
    return [tag for tag, value in zip(tags, scores.roc_auc, strict=True) if np.isnan(value)]


def model_names(paths: Sequence[str | Path]) -> list[str]:
    """Name models by the last parts of their paths, with as many parts as make the names unique.

    A stage's folder is a number, so its parent is always part of the name: ``log/1`` is ``log-1``.
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
        repeats = result.count(names[path])  # the same model is given twice
        result.append(names[path] + (f"-{len(result) + 1}" if repeats else ""))
    return result


def _or_none(value: float) -> float | None:
    """Replace NaN, which JSON does not support."""
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
