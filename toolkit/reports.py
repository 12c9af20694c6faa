"""Files of eval.py's reports: scores of one model, and comparisons of several."""

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from input_data import Clip
from toolkit import figures, messages
from toolkit.evaluation import CONFIDENCE, NUM_RESAMPLES, Resamples, Scores, bootstrap, interval
from toolkit.files import exists, write_atomically
from toolkit.provenance import Provenance

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

# Fields of the provenance that identify what a report is of.
_IDENTITY = ("checkpoint", "dataset", "tags_sha256", "test_sha256")


def write_report(
    folder: str | Path,
    provenance: Provenance,
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
        Folder to write to; created if it does not exist. Other files in the folder are kept. If
        the report of another model or dataset is replaced, a message is printed.
    provenance : Provenance
        Model and dataset.
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
    _say_replaced(folder, [provenance])
    resamples = bootstrap(np.array([clip.labels for clip in clips]), predictions, seed=seed)
    metrics = provenance.to_json() | {
        "roc_auc": _or_none(scores.macro_roc_auc),
        "roc_auc_interval": _ends(resamples.macro_roc_auc),
        "pr_auc": _or_none(scores.macro_pr_auc),
        "pr_auc_interval": _ends(resamples.macro_pr_auc),
        "intervals": _method(seed),
        "num_tags": len(tags),
        "num_tags_scored": int((~np.isnan(scores.roc_auc)).sum()),
        "tags_not_scored": tags_without_score(tags, scores),
    }
    _write_json(folder / "metrics.json", metrics)
    columns = {"tag": tags, "positives": scores.positives}
    for metric in ("roc_auc", "pr_auc"):
        columns[metric] = getattr(scores, metric)
        low, high = interval(getattr(resamples, metric))
        columns |= {f"{metric}_low": low, f"{metric}_high": high}
    _write_csv(folder / "per_tag.csv", pd.DataFrame(columns), "%.6f")
    table = pd.DataFrame(predictions, columns=list(tags))
    # Duplicates are allowed because a tag may have one of these names.
    table.insert(0, "clip_id", [clip.clip_id for clip in clips], allow_duplicates=True)
    table.insert(1, "mp3_path", [clip.mp3_path for clip in clips], allow_duplicates=True)
    _write_csv(folder / "predictions.csv", table, "%.8f")
    figures.plot_tags(folder / "per_tag.png", provenance, tags, scores, resamples)
    return resamples


def write_comparison(
    folder: str | Path,
    provenances: Sequence[Provenance],
    tags: tuple[str, ...],
    scores: Sequence[Scores],
    resamples: Sequence[Resamples],
    seed: int = 0,
) -> None:
    """Write ``comparison.json``, ``comparison.csv`` and ``comparison.png``.

    Parameters
    ----------
    folder : str or Path
        Folder to write to, as for `write_report`.
    provenances : sequence of Provenance
        The models on the same dataset. The others are compared with the first.
    tags : tuple of str
        Names of the tags, in the models' order.
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
    _say_replaced(folder, provenances)
    tables, comparisons = [], []
    for provenance, of_model, drawn in zip(provenances, scores, resamples, strict=True):
        difference = drawn - resamples[0]
        comparison = provenance.to_json()
        columns = {"tag": tags, "positives": of_model.positives}
        columns |= {"model": provenance.model, "baseline": provenances[0].model}
        # The columns of the difference in ROC AUC are older than those in PR AUC.
        for metric, prefix in (("roc_auc", ""), ("pr_auc", "pr_auc_")):
            macro_difference = getattr(difference, f"macro_{metric}")
            comparison |= {
                metric: _or_none(getattr(of_model, f"macro_{metric}")),
                f"{metric}_interval": _ends(getattr(drawn, f"macro_{metric}")),
                f"{metric}_difference": _or_none(macro_difference[0]),
                f"{metric}_difference_interval": _ends(macro_difference, lowest=-1),
            }
            by_tag = getattr(difference, metric)
            low, high = interval(by_tag, lowest=-1)
            columns |= {
                metric: getattr(of_model, metric),
                f"baseline_{metric}": getattr(scores[0], metric),
                f"{prefix}difference": by_tag[0],
                f"{prefix}difference_low": low,
                f"{prefix}difference_high": high,
            }
        comparisons.append(comparison)
        tables.append(pd.DataFrame(columns))
    found = {"baseline": provenances[0].model, "models": comparisons, "intervals": _method(seed)}
    _write_json(folder / "comparison.json", found)
    _write_csv(folder / "comparison.csv", pd.concat(tables[1:]), "%.6f")
    figures.plot_comparison(folder / "comparison.png", provenances, tags, scores, resamples)


def tags_without_score(tags: tuple[str, ...], scores: Scores) -> list[str]:
    """Return the tags without ROC AUC: those that all clips carry or that no clip carries."""
    return [tag for tag, value in zip(tags, scores.roc_auc, strict=True) if np.isnan(value)]


def _say_replaced(folder: Path, provenances: Sequence[Provenance]) -> None:
    """Say that a report is replaced, unless it is one of the same models and dataset."""
    paths = [path for path in (folder / "metrics.json", folder / "comparison.json") if exists(path)]
    if not paths:
        return
    # The report that was written last has the page.
    path = max(paths, key=lambda path: path.stat().st_mtime_ns)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        models = content.get("models", [content])
        before = [tuple(model[name] for name in _IDENTITY) for model in models]
    except (ValueError, AttributeError, KeyError, TypeError):
        messages.say(f"{folder}: replaces a report that does not name its model")
        return
    now = [tuple(getattr(provenance, name) for name in _IDENTITY) for provenance in provenances]
    if before != now:
        models = ", ".join(f"{checkpoint} on {dataset}" for checkpoint, dataset, *_ in before)
        messages.say(f"{folder}: replaces the report of {models}")


def _or_none(value: float) -> float | None:
    """Replace NaN, which JSON does not support."""
    return None if math.isnan(value) else float(value)


def _ends(rows: np.ndarray, lowest: float = 0) -> list[float | None]:
    return [_or_none(end) for end in interval(rows, lowest)]


def _method(seed: int) -> dict:
    return {
        "confidence": CONFIDENCE,
        "method": "bias-corrected percentiles of bootstrap resamples of the clips",
        "resamples": NUM_RESAMPLES,
        "seed": seed,
    }


def _write_json(path: Path, content: dict) -> None:
    content |= {"created": datetime.now(UTC).isoformat(timespec="seconds")}
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _write_csv(path: Path, table: "pd.DataFrame", number_format: str) -> None:
    write_atomically(path, table.to_csv(index=False, float_format=number_format).encode())
