"""The results of tools.paper: its tables and its figure, from the files of each network."""

import dataclasses
import io
import json
import math
import zipfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from input_data import Dataset, read_clips
from toolkit import messages
from toolkit.evaluation import CONFIDENCE, Resamples, bootstrap, interval
from toolkit.files import write_atomically
from toolkit.models.checkpoints import find_best
from toolkit.models.config import NetworkConfig
from toolkit.models.hdf5 import list_arrays, open_hdf5
from toolkit.training.history import HISTORY_NAME, read_history
from toolkit.training.options import TrainingOptions
from toolkit.training.state import best_checkpoint, find_state

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

# Test ROC AUC on MagnaTagATune: the last block alone, and multi-level aggregation. From the
# authors' poster at ICASSP 2018 (github.com/tae-jun/resemul, assets/icassp2018poster.pdf).
PUBLISHED = {
    "basic": (0.9055, 0.9077),
    "se": (0.9083, 0.9111),
    "res1": (0.9048, 0.9037),
    "res": (0.9061, 0.9098),
    "rese1": (0.9066, 0.9053),
    "rese": (0.9102, 0.9113),
}
TITLES = {"res1": "Res-1", "res": "Res-2", "rese1": "ReSE-1", "rese": "ReSE-2", "se": "SE"}
NETWORKS = {f"{block}{'-multi' * multi}": (block, multi) for block in PUBLISHED for multi in (0, 1)}
BASELINE = "se-multi"  # the paper's analysis is of this network
_METRICS = ("roc_auc", "pr_auc")


@dataclasses.dataclass(frozen=True)
class Job:
    """A network to train and test."""

    network: str
    seed: int
    folder: Path
    config: NetworkConfig
    options: TrainingOptions
    is_finished: bool  # before this call

    def __str__(self) -> str:
        return f"{self.network}, seed {self.seed}"

    @property
    def last_stage(self) -> Path:
        return self.folder / str(self.options.num_lr_decays - 1)

    @property
    def report(self) -> Path:
        return self.folder / "report"

    def best(self) -> Path:
        """Return the best checkpoint of the last stage; raise TrainingError if it is missing."""
        return best_checkpoint(self.last_stage, find_state(self.last_stage, self.options)[1])

    def has_report(self, dataset: Dataset) -> bool:
        """Return whether there is a complete report of the best checkpoint."""
        metrics, page = self.report / "metrics.json", self.report / "report.html"
        # eval.py writes the page last.
        if not (is_result_of(metrics, self.best()) and is_newer(page, metrics)):
            return False
        try:
            predictions = self.predictions()
        except (OSError, ValueError):
            return False
        expected = (dataset.splits["test"].num_clips, len(dataset.tags))
        return predictions.shape == expected and bool(np.isfinite(predictions).all())

    def predictions(self) -> np.ndarray:
        """Read the predictions of the test clips: (n_clips, n_tags)."""
        import pandas as pd

        return pd.read_csv(self.report / "predictions.csv").iloc[:, 2:].to_numpy(float)

    def history(self) -> list[dict[str, float]]:
        """Return the rows of ``training.csv`` of all stages."""
        stages = range(self.options.num_lr_decays)
        paths = [self.folder / str(stage) / HISTORY_NAME for stage in stages]
        return [row for path in paths if path.exists() for row in read_history(path)]


def is_newer(path: Path, *sources: Path) -> bool:
    """Return whether a result exists and was written after the files it was computed from."""
    return path.exists() and path.stat().st_mtime >= max(s.stat().st_mtime for s in sources)


def is_result_of(path: Path, checkpoint: Path) -> bool:
    """Return whether ``metrics.json`` or a table of excitations is complete and of a checkpoint."""
    try:
        if path.suffix == ".parquet":
            from pyarrow.parquet import read_schema

            provenance = json.loads(read_schema(path).metadata[b"PANDAS_ATTRS"])
        else:
            provenance = json.loads(path.read_text(encoding="utf-8"))
        named = Path(provenance["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    # NETWORK/seed-N/STAGE/ckpt-….keras: the folder above may have been moved.
    return named.parts[-4:] == checkpoint.parts[-4:] and is_newer(path, checkpoint)


def write_tables(out: Path, jobs: list[Job], is_mtt: bool, dataset: Dataset) -> None:
    """Write ``table.csv``, ``table.md`` and ``auc.png``."""
    import pandas as pd

    table = pd.DataFrame([row_of(job, is_mtt) for job in jobs])
    write_atomically(out / "table.csv", table.to_csv(index=False, float_format="%.6g").encode())
    several = table["seed"].nunique() > 1
    of = "mean, range of seeds" if several else f"{100 * CONFIDENCE:g} % interval"
    lines = [
        f"| network | parameters | ROC AUC ({of}) | PR AUC | epochs | hours | published ROC AUC |"
    ]
    lines.append("|---|--:|---|---|--:|--:|--:|")
    for network, rows in table.groupby("network", sort=False):
        scores = " | ".join(summary(rows, metric, several)[-1] for metric in _METRICS)
        published = f"{rows['published_roc_auc'].iloc[0]:.4f}" if is_mtt else "–"
        lines.append(
            f"| {network} | {rows['parameters'].iloc[0]:,} | {scores} | "
            f"{rows['epochs'].mean():.0f} | {rows['hours'].mean():.3g} | {published} |"
        )
    write_atomically(out / "table.md", ("\n".join(lines) + "\n").encode())
    data = f"{dataset.path}, {messages.count(dataset.splits['test'].num_clips, 'test clip')}"
    write_atomically(out / "auc.png", draw_scores(table, is_mtt, data))


def row_of(job: Job, is_mtt: bool) -> dict:
    """Return the row of ``table.csv``."""
    metrics = json.loads((job.report / "metrics.json").read_text(encoding="utf-8"))
    history = job.history()
    row = {"network": job.network, "seed": job.seed, "parameters": count_parameters(job)}
    for metric in _METRICS:
        found = (metrics[metric], *metrics[f"{metric}_interval"])  # None without any scored tag
        names = (metric, f"{metric}_low", f"{metric}_high")
        row |= {name: np.nan if it is None else it for name, it in zip(names, found, strict=True)}
    row |= {"stages": job.options.num_lr_decays, "epochs": len(history)}
    # Only finished epochs count, so that interruptions change little.
    row["hours"] = round(sum(epoch["seconds"] for epoch in history) / 3600, 4)
    block, multi = NETWORKS[job.network]
    return row | {"published_roc_auc": PUBLISHED[block][multi] if is_mtt else None}


def count_parameters(job: Job) -> int:
    """Count the parameters in the best checkpoint, without importing Keras."""
    path = find_best(job.last_stage)
    with zipfile.ZipFile(path) as archive:
        content = archive.read("model.weights.h5")
    with open_hdf5(path, content) as file:
        arrays = list_arrays(file, path)
        return sum(array.size for name, array in arrays.items() if "seed_generator" not in name)


def summary(rows: "pd.DataFrame", metric: str, several: bool) -> tuple[float, float, float, str]:
    """Return score, low and high end, and text: interval of one seed, range of several."""
    if not several:
        value, low, high = rows.iloc[0][[metric, f"{metric}_low", f"{metric}_high"]]
    else:
        value, low, high = (getattr(rows[metric], name)() for name in ("mean", "min", "max"))
    text = "–" if np.isnan(value) else f"{value:.4f} ({low:.4f}–{high:.4f})"
    return value, low, high, text


def write_differences(path: Path, jobs: list[Job], dataset: Dataset) -> None:
    """Write the differences of all networks from se-multi with the same seed, on the same clips."""
    import pandas as pd

    path.unlink(missing_ok=True)
    baselines = {job.seed: job for job in jobs if job.network == BASELINE}
    pairs = [(job, baselines.get(job.seed)) for job in jobs if job.network != BASELINE]
    pairs = [pair for pair in pairs if all(pair)]
    if not pairs:
        messages.say(f"no {path.name}: it needs {BASELINE} and another network")
        return
    clips = read_clips(dataset.splits["test"].shards)
    labels = np.array([clip.labels for clip in clips if not clip.part])

    @cache
    def resamples_of(job: Job) -> Resamples:
        return bootstrap(labels, job.predictions())

    rows = []
    for job, baseline in pairs:
        difference = resamples_of(job) - resamples_of(baseline)
        row = {"network": job.network, "seed": job.seed, "baseline": BASELINE}
        for metric in _METRICS:
            values = getattr(difference, f"macro_{metric}")
            names = (f"{metric}_difference{end}" for end in ("", "_low", "_high"))
            row |= dict(zip(names, (values[0], *interval(values, lowest=-1)), strict=True))
        rows.append(row)
    content = pd.DataFrame(rows).to_csv(index=False, float_format="%.6f")
    write_atomically(path, content.encode())


def draw_scores(table: "pd.DataFrame", is_mtt: bool, data: str) -> bytes:
    """Draw the ROC AUC of all networks as bars, as on the authors' poster; return a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.3, 4), dpi=100, layout="constrained")  # 830 pixels wide
    axes = figure.subplots()
    several = table["seed"].nunique() > 1
    found = {name: summary(rows, "roc_auc", several) for name, rows in table.groupby("network")}
    blocks = [block for block in PUBLISHED if {block, f"{block}-multi"} & found.keys()]
    lows = [low for _, low, _, _ in found.values() if not np.isnan(low)]
    lows += [value for block in blocks for value in PUBLISHED[block] if is_mtt]
    bottom = max(0, math.floor(50 * min(lows, default=0) - 0.5) / 50)
    ends = "range of seeds" if several else f"{100 * CONFIDENCE:g} % interval"
    shown = {}  # what is in the legend
    for block, multi in NETWORKS.values():
        if (name := f"{block}{'-multi' * multi}") not in found:
            continue
        value, low, high, shown_value = found[name]
        x = blocks.index(block) + 0.4 * multi - 0.2
        title, colour = (("last block alone", "#b3d4ec"), ("multi-level", "#4a97cf"))[multi]
        shown[title] = axes.bar(x, value - bottom, 0.38, bottom, color=colour)
        text = {"textcoords": "offset points", "ha": "center", "fontsize": 8.5}
        axes.annotate(shown_value.split()[0], (x, bottom), (0, 4), **text)
        shown[ends] = axes.vlines(x, low, high, color="black", linewidth=1.2)
        if is_mtt:
            look = {"marker": "D", "s": 30, "color": "#D55E00", "edgecolor": "white", "zorder": 3}
            shown["published"] = axes.scatter(x, PUBLISHED[block][multi], **look)
    axes.set_xticks(range(len(blocks)), [TITLES.get(block, block) for block in blocks])
    axes.set_ylabel(f"test ROC AUC (axis starts at {bottom:.2f})")
    axes.set_ylim(bottom=bottom)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    place = {"loc": "outside upper center", "ncols": 4, "frameon": False, "fontsize": "small"}
    figure.legend(shown.values(), shown.keys(), **place)
    figure.supxlabel(data, x=0.01, ha="left", fontsize="small", parse_math=False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
