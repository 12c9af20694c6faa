"""Pages of eval.py's reports: ``report.html``, and ``errors.csv`` with the same mistakes."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib import import_module
from pathlib import Path
from urllib.parse import quote

from input_data import Clip, Dataset
from toolkit import mistakes
from toolkit.data.manifest import read_build
from toolkit.evaluation import CONFIDENCE, Resamples, Scores, interval
from toolkit.files import write_atomically
from toolkit.models import onnx_file
from toolkit.provenance import Provenance, as_text

import numpy as np

PAGE_NAME, ERRORS_NAME = "report.html", "errors.csv"
_TEMPLATE = "report.html.j2"
_SIDE = 200  # width and height of a plot, in units of its drawing
_NUM_PROBABLE = 5  # tags per clip


@dataclass
class Result:
    """A model's predictions of the test clips, and their scores.

    Attributes
    ----------
    provenance : Provenance
        Model and dataset.
    labels, predictions : np.ndarray [shape=(n_clips, n_tags)]
        Labels and probabilities of the test clips.
    scores : Scores
        Scores of the predictions.
    resamples : Resamples
        Resampled scores.
    validation : tuple of np.ndarray or None
        Labels and predictions of the validation clips, which determine the thresholds; None if
        there are none.
    """

    provenance: Provenance
    labels: np.ndarray
    predictions: np.ndarray
    scores: Scores
    resamples: Resamples
    validation: tuple[np.ndarray, np.ndarray] | None

    @cached_property
    def thresholds(self) -> np.ndarray:
        """Threshold of each tag, from the test clips where no validation clip has the tag."""
        of_test = mistakes.f1_thresholds(self.labels, self.predictions)
        if self.validation is None:
            return of_test
        of_validation = mistakes.f1_thresholds(*self.validation)
        return np.where(self.is_from_test, of_test, of_validation)

    @property
    def is_from_test(self) -> np.ndarray:
        """Whether the threshold of each tag is chosen on the test clips."""
        if self.validation is None:
            return np.ones(self.labels.shape[1], bool)
        return ~self.validation[0].any(axis=0)

    @cached_property
    def mistakes(self) -> list[mistakes.Mistake]:
        return mistakes.find_mistakes(self.labels, self.predictions, self.thresholds)


def write_errors(
    folder: str | Path, tags: Sequence[str], clips: list[Clip], result: Result
) -> None:
    """Write ``errors.csv``: the most confident mistakes of each tag, in both directions.

    Parameters
    ----------
    folder : str or Path
        Existing folder.
    tags : sequence of str
        Names of the tags, in the model's order.
    clips : list of Clip
        Test clips.
    result : Result
        Predictions of the model.
    """
    import pandas as pd

    rows = [
        # Clips of published shards have no identity.
        (tags[tag], clips[clip].clip_id or _name(clip), clips[clip].mp3_path, *rest)
        for tag, clip, *rest in result.mistakes
    ]
    columns = ["tag", "clip_id", "mp3_path", "label", "prediction", "rank"]
    content = pd.DataFrame(rows, columns=columns).to_csv(index=False, float_format="%.8f")
    write_atomically(Path(folder) / ERRORS_NAME, content.encode())


def write_page(
    folder: str | Path,
    dataset: Dataset,
    tags: Sequence[str],
    clips: list[Clip],
    results: Sequence[Result],
) -> None:
    """Write ``report.html``, a page about one model, or about several side by side.

    The page loads nothing from the network. Its players read the dataset's audio files by relative
    links.

    Parameters
    ----------
    folder : str or Path
        Existing folder.
    dataset : Dataset
        Dataset of the clips.
    tags : sequence of str
        Names of the tags, in the models' order.
    clips : list of Clip
        Test clips.
    results : sequence of Result
        Predictions of the models, which are compared with the first.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, undefined=StrictUndefined, **options)
    environment.filters |= {
        "score": lambda value: "–" if np.isnan(value) else f"{value:.3f}",
        "gain": lambda value: "–" if np.isnan(value) else f"{value:+.3f}".replace("-", "−"),
        "key": lambda value: "" if np.isnan(value) else f"{value:.6f}",
    }
    skipped, audio_folder = _build_of(dataset)
    link = os.path.relpath(Path(audio_folder).absolute(), Path(folder).absolute())
    shown = _describe_clips(tags, clips, Path(audio_folder), link)
    found = [clip["url"] for clip in shown if clip["path"]]
    by_tag, overall = np.empty((0, len(tags)), int), np.empty(0, int)
    if len(results) > 1:
        predictions = np.stack([result.predictions for result in results])
        by_tag, overall = mistakes.differing_clips(predictions)
    content = environment.get_template(_TEMPLATE).render(
        dataset=results[0].provenance.dataset,
        versions=_versions(results),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        skipped=skipped,
        audio_folder=as_text(link),
        has_audio=any(found),
        misses_audio=not all(found),
        clips=shown,
        tags=tags,
        models=[_describe_model(tags, result, results[0]) for result in results],
        num_scored=int((~np.isnan(results[0].scores.roc_auc)).sum()),
        rows=_describe_tags(tags, results, by_tag),
        differing=overall,
        has_validation=results[0].validation is not None,
        has_starred=bool(results[0].is_from_test.any()),
        confidence=f"{100 * CONFIDENCE:g}",
        rules=mistakes,
    )
    write_atomically(Path(folder) / PAGE_NAME, content.encode(errors="replace"))


def _build_of(dataset: Dataset) -> tuple[list[dict] | None, str]:
    """Return a dataset's skipped clips, None if they are unknown, and its folder of audio files."""
    built = read_build(dataset.path)
    audio_dir = built.get("options", {}).get("audio_dir", "mp3")
    # build_mtt.py records --audio-dir relative to the folder itself, not to a link to it.
    return built.get("skipped"), os.path.normpath(dataset.path.resolve() / audio_dir)


def _describe_clips(
    tags: Sequence[str], clips: list[Clip], audio_folder: Path, link: str
) -> list[dict]:
    """Return path, link and tags of each clip; the link is None if there is no such file."""
    shown = []
    for number, clip in enumerate(clips):
        has_audio = clip.mp3_path and os.path.isfile(audio_folder / clip.mp3_path)
        # Quoted, because # ? % and : have a meaning in links.
        url = quote(os.fsencode(os.path.join(link, clip.mp3_path))) if has_audio else None
        shown.append(
            {
                "name": clip.mp3_path or _name(number),
                "path": clip.mp3_path,
                "id": clip.clip_id,
                "url": url,
                "tags": [tags[tag] for tag in np.flatnonzero(clip.labels)],
            }
        )
    return shown


def _name(clip: int) -> str:
    return f"test clip {clip + 1}"


def _versions(results: Sequence[Result]) -> str:
    packages = ["numpy"]
    for result in results:
        if result.provenance.checkpoint.endswith(onnx_file.SUFFIX):
            packages.append("onnxruntime")
        else:
            import keras

            packages += ["keras", keras.backend.backend()]
    named = [f"{name} {import_module(name).__version__}" for name in dict.fromkeys(packages)]
    toolkit = f"toolkit {results[0].provenance.toolkit}"
    return ", ".join([toolkit, f"Python {platform.python_version()}", *named])


def _describe_model(tags: Sequence[str], result: Result, first: Result) -> dict:
    """Return what the page says about all tags of a model."""
    described = {"name": result.provenance.model, "checkpoint": result.provenance.checkpoint}
    difference = result.resamples - first.resamples
    for metric in ("roc_auc", "pr_auc"):
        rows = getattr(result.resamples, f"macro_{metric}")
        described[metric] = (getattr(result.scores, f"macro_{metric}"), *interval(rows))
        rows = getattr(difference, f"macro_{metric}")
        described[f"{metric}_difference"] = (rows[0], *interval(rows, lowest=-1))
    confused, synonyms = mistakes.correlated_tags(result.labels, result.predictions)
    missing, wrong = mistakes.doubtful_labels(result.labels, result.predictions)
    # The most probable tags of each clip, as (tag, probability).
    order = np.argsort(-result.predictions, axis=1, kind="stable")[:, :_NUM_PROBABLE]
    values = np.take_along_axis(result.predictions, order, axis=1)
    probable = [
        [(tags[tag], value) for tag, value in zip(*row, strict=True)]
        for row in zip(order, values, strict=True)
    ]
    return described | {
        "probable": probable,
        "predictions": result.predictions,
        "confused": confused,
        "synonyms": synonyms,
        "missing": _by_clip(missing),
        "wrong": _by_clip(wrong),
    }


def _by_clip(doubts: list[mistakes.Doubt]) -> dict[int, list[mistakes.Doubt]]:
    grouped = {}
    for doubt in doubts:
        grouped.setdefault(doubt.clip, []).append(doubt)
    return grouped


def _describe_tags(
    tags: Sequence[str], results: Sequence[Result], differing: np.ndarray
) -> list[dict]:
    """Return what the page says about each tag, the tag with most clips first."""
    columns = [_columns(result, results[0]) for result in results]
    wrong = [{} for _ in results]
    for result, of_tag in zip(results, wrong, strict=True):
        for mistake in result.mistakes:
            of_tag.setdefault((mistake.tag, mistake.label), []).append(mistake)
    rows = []
    for tag in np.argsort(-results[0].scores.positives, kind="stable").tolist():
        models = []
        for result, values, of_tag in zip(results, columns, wrong, strict=True):
            model = {name: column[tag] for name, column in values.items()}
            model |= {"false": of_tag.get((tag, 0), []), "missed": of_tag.get((tag, 1), [])}
            models.append(model | _draw(result.labels[:, tag], result.predictions[:, tag]))
        rows.append(
            {
                "number": tag,
                "name": tags[tag],
                "positives": int(results[0].scores.positives[tag]),
                "share": float(results[0].labels[:, tag].mean()),
                "models": models,
                "differing": differing[:, tag],
            }
        )
    return rows


def _columns(result: Result, first: Result) -> dict[str, Sequence]:
    """Return the values of all tags by name; scores with their intervals."""
    thresholds = result.thresholds
    precision, recall = mistakes.precision_and_recall(result.labels, result.predictions, thresholds)
    difference = result.resamples - first.resamples
    columns = {"threshold": thresholds, "precision": precision, "recall": recall}
    columns["is_from_test"] = result.is_from_test
    for metric in ("roc_auc", "pr_auc"):
        ends = interval(getattr(result.resamples, metric))
        columns[metric] = np.stack([getattr(result.scores, metric), *ends], axis=1)
        rows = getattr(difference, metric)
        columns[f"{metric}_difference"] = np.stack([rows[0], *interval(rows, lowest=-1)], axis=1)
    return columns


def _draw(labels: np.ndarray, predictions: np.ndarray) -> dict[str, str]:
    """Return the curves and histograms of a tag as SVG data; empty without both classes."""
    if len(np.unique(labels)) < 2:
        return {"roc": "", "pr": "", "with_tag": "", "without_tag": ""}
    roc, precision_recall = (_points(points) for points in mistakes.curves(labels, predictions))
    with_tag, without_tag = mistakes.histograms(labels, predictions)
    return {
        "roc": roc,
        "pr": precision_recall,
        "with_tag": _bars(with_tag, up=True),
        "without_tag": _bars(without_tag, up=False),
    }


def _points(points: np.ndarray) -> str:
    places = np.rint(points * _SIDE).astype(int)
    return " ".join(f"{x},{_SIDE - y}" for x, y in places)


def _bars(counts: np.ndarray, up: bool) -> str:
    """Return bars from the middle of the plot, whose heights are square roots of the counts."""
    # Most clips are in one bin; the others would be invisible on a linear scale.
    heights = np.rint(np.sqrt(counts / counts.max()) * (_SIDE / 2 - 4)).astype(int)
    width = _SIDE // len(counts)
    middle = _SIDE // 2
    return "".join(
        f"M{number * width} {middle}v{-height if up else height}h{width - 1}V{middle}z"
        for number, height in enumerate(heights)
        if height
    )
