"""Figures of training, scores and tags over time, 830 pixels wide.

The figures are drawn without pyplot, so that they need no display and work in any thread.
"""

import io
import json
import math
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit import messages
from toolkit.evaluation import CONFIDENCE, Resamples, Scores, interval
from toolkit.files import write_atomically
from toolkit.prediction import clip_mean
from toolkit.provenance import Provenance

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE_FORMATS = (".png", ".svg", ".pdf")  # file name extensions for `plot_taggram`
# 830 pixels, in inches of 100 pixels.
_WIDTH = 8.3
_DPI = 100
# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = "oDs^vP"
_GREY = "0.85"
# With fewer positive clips, resamples are too similar for a reliable interval.
_FEW_POSITIVES = 10


def plot_training(
    path: str | Path, provenance: Provenance, histories: dict[int, list[dict[str, float]]]
) -> None:
    """Draw losses and validation scores over the epochs of all stages.

    Parameters
    ----------
    path : str or Path
        Picture to write.
    provenance : Provenance
        Best checkpoint of the last stage, and the validation clips.
    histories : dict of int to list of dict
        Rows of ``training.csv`` of each stage, in order; every stage has at least one row.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = [row for history in histories.values() for row in history]
    epochs = np.arange(1, len(rows) + 1)
    figure = Figure(figsize=(_WIDTH, 5.2), dpi=_DPI, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for axes, lines in (
        (top, (("loss", "training", 1, "s--"), ("val_loss", "validation", 0, "o-"))),
        (bottom, (("val_roc_auc", "ROC AUC", 0, "o-"), ("val_pr_auc", "PR AUC", 2, "D-"))),
    ):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=_GREY, linewidth=0.6)
        axes.set_axisbelow(True)
        for column, name, colour, style in lines:
            # One line per stage, because a stage starts from the best epoch, not from the last.
            start = 0
            for number, history in enumerate(histories.values()):
                values = [row[column] for row in history]
                look = {"color": _COLOURS[colour], "markersize": 4, "linewidth": 1.5}
                label = name if number == 0 else None
                axes.plot(epochs[start : start + len(values)], values, style, label=label, **look)
                start += len(values)
    start = 0
    for stage, history in histories.items():
        best = start + int(np.argmin([row["val_loss"] for row in history]))
        look = {"markersize": 11, "fillstyle": "none", "color": "black"}
        label = "best of its stage" if start == 0 else None
        top.plot(epochs[best], rows[best]["val_loss"], "o", label=label, **look)
        if start:
            for axes in (top, bottom):
                axes.axvline(start + 0.5, color="0.4", linestyle=":", linewidth=1)
        title = f"stage {stage}\nlr {history[0]['learning_rate']:.2g}"
        units = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        top.annotate(title, (start + 0.5, 1), (4, 2), **units, fontsize="small")
        start += len(history)
    top.set_ylabel("loss (binary cross-entropy)")
    bottom.set_ylabel("validation score")
    bottom.set_xlabel("epochs since the start of training")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set_xlim(0.5, len(rows) + 0.5)
    top.legend(frameon=False, fontsize="small")
    bottom.legend(frameon=False, fontsize="small")
    _save(figure, path, provenance, split="validation")


def _save(
    figure: "Figure", path: str | Path, *provenances: Provenance, split: str = "test"
) -> None:
    """Write a figure completely or not at all, in fonts that have its characters.

    The figure shows model, dataset and number of clips of the split. The metadata of the file
    contains all of the provenance.
    """
    from matplotlib.text import Text

    line, num_clips = provenances[0].dataset, provenances[0].num_clips
    if num_clips is not None:  # unknown, or an audio file
        line += f", {messages.count(num_clips, f'{split} clip')}"
    if len(provenances) == 1:  # several models are in the legend
        line = f"{provenances[0].model}: {line}"
    figure.supxlabel(_shorten(line), x=0.01, ha="left", fontsize="small")
    texts = figure.findobj(Text)
    families = choose_fonts(text.get_text() for text in texts)
    for text in texts:
        text.set_fontfamily(families)
        text.set_parse_math(False)  # tags and paths may contain $
    picture_format = Path(path).suffix[1:].lower()
    key = "Subject" if picture_format == "pdf" else "Description"  # names that the formats define
    found = json.dumps([provenance.to_json() for provenance in provenances])
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # said by choose_fonts
        figure.savefig(content, format=picture_format, metadata={key: found})
    write_atomically(path, content.getvalue())


def _shorten(line: str, length: int = 90) -> str:
    return line if len(line) <= length else f"{line[: length - 1]}…"


def _tag_rows(tags: tuple[str, ...], positives: np.ndarray, order: np.ndarray) -> list[str]:
    return [f"{_shorten(tags[tag], 40)} ({positives[tag]})" for tag in order]


def _draw_rows(num_rows: int, row_height: float, width_ratios: Sequence[float]):
    """Create a figure of two panels side by side that share one row per tag."""
    from matplotlib.figure import Figure

    height = max(2.8, 1.6 + row_height * num_rows)
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, width_ratios=width_ratios)
    for axes in panels:
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        across = axes.get_yaxis_transform()
        look = {"color": _GREY, "linewidth": 0.6, "zorder": 0}
        axes.hlines(np.arange(num_rows), 0, 1, transform=across, **look)
    panels[0].set_ylim(-0.8, max(num_rows, 1) - 0.2)
    return figure, panels


def _look(model: int) -> tuple[str, str]:
    """Return the colour and the marker of a model."""
    return _COLOURS[model % len(_COLOURS)], _MARKERS[model % len(_MARKERS)]


def _draw_intervals(
    axes: "Axes",
    rows: np.ndarray,
    values: np.ndarray,
    ends: tuple[np.ndarray, np.ndarray],
    is_filled: np.ndarray,
    model: int,
) -> None:
    """Draw one value per row with its interval; markers that are not filled are unreliable."""
    colour, marker = _look(model)
    axes.hlines(rows, *ends, color=colour, linewidth=1.6, alpha=0.55)
    faces = [colour if filled else "white" for filled in is_filled]
    look = {"s": 22, "marker": marker, "edgecolors": colour, "linewidths": 1.1}
    axes.scatter(values, rows, c=faces, zorder=3, clip_on=False, **look)


def plot_tags(
    path: str | Path,
    provenance: Provenance,
    tags: tuple[str, ...],
    scores: Scores,
    resamples: Resamples,
) -> None:
    """Draw the scores of each tag with their intervals; the best tag is on top.

    Parameters
    ----------
    path : str or Path
        Picture to write.
    provenance : Provenance
        Model, dataset and number of test clips.
    tags : tuple of str
        Names of the tags, in the model's order.
    scores : Scores
        Scores of the model.
    resamples : Resamples
        Resampled scores of the model.
    """
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D

    known = np.flatnonzero(~np.isnan(scores.roc_auc))
    order = known[np.argsort(scores.roc_auc[known], kind="stable")]
    rows = np.arange(len(order))
    figure, (left, right) = _draw_rows(len(order), 0.19, (1, 1))
    is_filled = scores.positives[order] >= _FEW_POSITIVES
    lowest = 0.5
    for axes, values, drawn, macro, name in (
        (left, scores.roc_auc, resamples.roc_auc, scores.macro_roc_auc, "ROC AUC"),
        (right, scores.pr_auc, resamples.pr_auc, scores.macro_pr_auc, "PR AUC"),
    ):
        ends = interval(drawn[:, order])
        if axes is left and len(order):
            lowest = min(0.5, np.nanmin(ends[0]))
        _draw_intervals(axes, rows, values[order], ends, is_filled, model=0)
        if not math.isnan(macro):
            axes.axvline(macro, color="black", linewidth=1, zorder=1)
        axes.set_xlabel(f"{name} (mean {macro:.4f})")
    left.axvline(0.5, color="0.4", linestyle=":", linewidth=1)
    left.set_xlim(lowest - 0.01, 1.005)
    right.set_xlim(0, 1.01)
    right.scatter(
        scores.positives[order] / provenance.num_clips,
        rows,
        marker="|",
        color="0.4",
        s=30,
        linewidths=1,
    )
    left.set_yticks(rows, _tag_rows(tags, scores.positives, order), fontsize=8)
    left.set_ylabel(f"tag (positive clips of {provenance.num_clips:,})")
    marker = {"marker": "o", "color": _COLOURS[0], "linewidth": 1.6, "markersize": 5}
    handles = [
        Line2D([], [], **marker),
        Line2D([], [], **marker | {"markerfacecolor": "white"}),
        Line2D([], [], color="black", linewidth=1),
        (
            Line2D([], [], color="0.4", linestyle=":", linewidth=1),
            Line2D([], [], color="0.4", linestyle="", marker="|", markersize=6),
        ),
    ]
    names = [
        f"tag, {100 * CONFIDENCE:g} % interval",
        f"under {_FEW_POSITIVES} positive clips: interval unreliable",
        "mean over tags",
        "chance",
    ]
    side_by_side = {tuple: HandlerTuple(ndivide=None)}  # the two marks of chance
    place = {"loc": "outside upper center", "frameon": False, "fontsize": "small"}
    figure.legend(handles, names, ncols=4, handler_map=side_by_side, **place)
    _save(figure, path, provenance)


def plot_comparison(
    path: str | Path,
    provenances: Sequence[Provenance],
    tags: tuple[str, ...],
    scores: Sequence[Scores],
    resamples: Sequence[Resamples],
) -> None:
    """Draw the ROC AUC of several models per tag, and their differences from the first.

    Parameters
    ----------
    path : str or Path
        Picture to write.
    provenances : sequence of Provenance
        The models on the same dataset.
    tags : tuple of str
        Names of the tags, in the models' order.
    scores : sequence of Scores
        Scores of each model.
    resamples : sequence of Resamples
        Resampled scores of each model, on the same clips.
    """
    from matplotlib.lines import Line2D

    known = np.flatnonzero(~np.isnan(scores[0].roc_auc))
    last = scores[-1].roc_auc - scores[0].roc_auc
    order = known[np.argsort(last[known], kind="stable")]
    rows = np.arange(len(order))
    names = [provenance.model for provenance in provenances]
    num_models = len(names)
    figure, (left, right) = _draw_rows(len(order), 0.07 + 0.06 * num_models, (1, 1.2))
    is_filled = scores[0].positives[order] >= _FEW_POSITIVES
    values = np.stack([its.roc_auc[order] for its in scores])  # (num_models, num_rows)
    if len(order):
        left.hlines(rows, values.min(axis=0), values.max(axis=0), color="0.6", linewidth=1)
        left.set_xlim(
            math.floor(10 * values.min()) / 10 - 0.01, math.ceil(10 * values.max()) / 10 + 0.005
        )
    for model in range(num_models):
        nothing = values[model], values[model]
        _draw_intervals(left, rows, values[model], nothing, is_filled, model)
        if model == 0:
            continue
        # Within a row, each model is drawn below the previous one.
        shift = 0.8 * ((num_models / 2 - model) / (num_models - 1))
        differences = (resamples[model] - resamples[0]).roc_auc[:, order]
        ends = interval(differences, lowest=-1)
        _draw_intervals(right, rows + shift, values[model] - values[0], ends, is_filled, model)
    right.axvline(0, color="0.4", linewidth=1)
    left.set_yticks(rows, _tag_rows(tags, scores[0].positives, order), fontsize=8)
    left.set_ylabel("tag (positive clips)")
    left.set_xlabel("ROC AUC")
    right.set_xlabel(
        f"ROC AUC above that of {_shorten(names[0], 26)},\n"
        f"with {100 * CONFIDENCE:g} % interval\n"
        f"(hollow: under {_FEW_POSITIVES} positive clips, interval unreliable)"
    )
    if num_models == 2:
        macro = (resamples[1] - resamples[0]).macro_roc_auc
        low, high = interval(macro, lowest=-1)
        right.set_title(f"mean {macro[0]:+.4f} ({low:+.4f} to {high:+.4f})", fontsize="medium")
    looks = map(_look, range(num_models))
    handles = [Line2D([], [], linestyle="", color=c, marker=m) for c, m in looks]
    labels = [
        f"{_shorten(name, 70)} (mean {its.macro_roc_auc:.4f})"
        for name, its in zip(names, scores, strict=True)
    ]
    # About 105 characters fit into the width, and a marker takes the place of 6.
    fitting = 105 // (max(map(len, labels)) + 6)
    num_columns = max(1, min(num_models, 3, fitting))
    figure.set_figheight(figure.get_figheight() + 0.22 * ((num_models - 1) // num_columns))
    figure.legend(handles, labels, loc="outside upper center", ncols=num_columns, frameon=False)
    _save(figure, path, *provenances)


def plot_taggram(
    path: str | Path,
    provenance: Provenance,
    tags: tuple[str, ...],
    probabilities: np.ndarray,
    starts: np.ndarray,
    segment_seconds: float,
    top: int = 10,
) -> None:
    """Draw tags over time as a heat map.

    Parameters
    ----------
    path : str or Path
        Picture to write, with an extension of `PICTURE_FORMATS`.
    provenance : Provenance
        Model and audio file.
    tags : tuple of str
        Names of the tags, in the model's order.
    probabilities : np.ndarray [shape=(n_segments, n_tags)]
        Probabilities of the tags in each segment.
    starts : np.ndarray [shape=(n_segments,)]
        Start of each segment, in seconds.
    segment_seconds : float
        Length of a segment, in seconds. Overlapping segments are drawn around their centres.
    top : int
        Number of tags to draw, those with the largest mean.
    """
    from matplotlib.figure import Figure

    order = np.argsort(-clip_mean(probabilities), kind="stable")[:top]
    step = starts[1] - starts[0] if len(starts) > 1 else segment_seconds
    left = starts[0] + (segment_seconds - step) / 2
    height = 1.75 + 0.22 * len(order)
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        probabilities[:, order].T,
        cmap="viridis",  # perceptually uniform, also for colour-blind readers
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(left, left + step * len(starts), len(order) - 0.5, -0.5),
    )
    axes.set_yticks(range(len(order)), [_shorten(tags[tag], 40) for tag in order])
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel("tag, by mean probability")
    axes.set_xlabel("time (s)")
    figure.colorbar(image, ax=axes, label="probability", pad=0.02)
    title = _shorten(Path(provenance.dataset).name)
    axes.set_title(title, loc="left", fontsize="medium")
    _save(figure, path, provenance)


def choose_fonts(texts: Iterable[str]) -> list[str]:
    """Return font families for Matplotlib that have the characters of texts.

    The families are the default ones and as many installed fonts as are needed. If no installed
    font has a character, a line names a font to install.
    """
    from matplotlib import font_manager, rcParams

    missing = {
        character
        for character in "".join(texts)
        if unicodedata.category(character)[0] not in "CMZ"  # others are not drawn on their own
    }
    families = [*rcParams["font.family"]]
    has = _characters(font_manager.findfont(font_manager.FontProperties(family=families)))
    while missing := missing - has:
        # Matplotlib takes each character from the first font of the list that has the character.
        fonts = _installed_fonts()
        name = max(fonts, key=lambda name: len(missing & _characters(fonts[name])))
        has = _characters(fonts[name])
        if not missing & has:
            _say_once(f"no installed font has {''.join(sorted(missing)[:8])}: {_hint(missing)}")
            break
        families.append(name)
    return families


@cache
def _installed_fonts() -> dict[str, str]:
    """Return the regular file of all fonts by name."""
    from matplotlib import font_manager

    known = font_manager.fontManager.ttflist
    # Matplotlib does not notice fonts that were installed since its first use.
    for path in {*font_manager.findSystemFonts()} - {font.fname for font in known}:
        with suppress(Exception):  # bitmap fonts, such as those of coloured emoji
            font_manager.fontManager.addfont(path)
    regular_last = sorted(known, key=lambda font: (font.style == "normal", -abs(font.weight - 400)))
    fonts = {font.name: font.fname for font in regular_last}
    # Matplotlib's last resort draws boxes for all characters.
    return {name: path for name, path in fonts.items() if not name.startswith("Last Resort")}


@cache
def _characters(path: str) -> frozenset[str]:
    from matplotlib.font_manager import get_font

    return frozenset(map(chr, get_font(path).get_charmap()))


def _hint(missing: set[str]) -> str:
    names = {unicodedata.name(character, "").split()[0] for character in missing}
    if names & {"CJK", "HANGUL", "HIRAGANA", "KATAKANA"}:
        return "install Noto Sans CJK (on Debian: fonts-noto-cjk)"
    if max(missing) >= "\U0001f000":  # emoji
        return "install Symbola (on Debian: fonts-symbola)"
    return "install a font that has them, such as Noto Sans (on Debian: fonts-noto-core)"


_say_once = cache(messages.say)
