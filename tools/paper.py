"""Train, test and analyse the twelve networks of the paper.

    python -m tools.paper --data-dir ./dataset --out ./paper
    python -m tools.paper --networks se-multi rese-multi --seeds 0 1 2
    python -m tools.paper --data-dir demo/dataset --out demo/paper --init-features 8 --max-epochs 3

train.py, eval.py, extract_excitations.py and the notebook run one after another, each in its own
process. A network is trained and tested in ``paper/NETWORK/seed-N``; its score is that of the last
stage's best checkpoint on the test clips. The results are ``table.csv``, ``table.md``,
``differences.csv`` (each network against se-multi), ``auc.png``, ``excitation_analysis.ipynb`` and
its ``figures/``. To continue after an interruption, run the same command again.
"""

import argparse
import ctypes
import dataclasses
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from input_data import Dataset, open_dataset, read_clips
from toolkit import cli, messages
from toolkit.cli import option
from toolkit.data.annotations import FOLDER_SPLITS, MTT_TOP_TAGS
from toolkit.data.manifest import MANIFEST_NAME, SHARD_FOLDER, read_manifest
from toolkit.errors import TrainingError
from toolkit.evaluation import CONFIDENCE, Resamples, bootstrap, interval
from toolkit.files import only_run, replaced_whole, write_atomically
from toolkit.models.checkpoints import find_best
from toolkit.models.config import NetworkConfig
from toolkit.models.hdf5 import list_arrays, open_hdf5
from toolkit.signals import StopRequest, stop_on_signals
from toolkit.training.history import HISTORY_NAME, read_history
from toolkit.training.options import TrainingOptions
from toolkit.training.run import compare_run
from toolkit.training.state import check_stages, list_stages

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
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
MTT_CLIPS = {"train": 15_250, "val": 1_529, "test": 4_332}  # listed, with those that are skipped
_FROM_NETWORK = ("block", "multi", "seed", "initial_stage")  # options of train.py that are set here
_METRICS = ("roc_auc", "pr_auc")


# fmt: off
@dataclasses.dataclass(frozen=True)
class PaperOptions:
    """Options besides those of train.py."""

    data_dir: str = option(
        "./dataset", "folder of the dataset, which contains tfrecord/",
        group="data and output", metavar="PATH",
    )
    out: str = option(
        "./paper", "folder for networks and results", group="data and output", metavar="PATH"
    )
    networks: tuple[str, ...] = option(
        tuple(NETWORKS), f"networks to train, of {', '.join(NETWORKS)}", shown="all",
        group="networks to train", choices=NETWORKS, nargs="+", metavar="NETWORK",
    )
    seeds: tuple[int, ...] = option(
        (0,), "seeds of initial weights, shuffling and dropout; several seeds give mean and range",
        shown="0", group="networks to train", type=cli.non_negative_int, nargs="+", metavar="N",
    )
# fmt: on


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

    def history(self) -> list[dict[str, float]]:
        """Return the rows of ``training.csv`` of all stages."""
        stages = [self.folder / str(stage) / HISTORY_NAME for stage in list_stages(self.folder)]
        return [row for path in stages if path.exists() for row in read_history(path)]


def run_paper(arguments: argparse.Namespace, stop: StopRequest) -> int:
    """Train, test and analyse all networks; return the exit status."""
    dataset = open_dataset(arguments.data_dir)
    out = Path(arguments.out)
    jobs = plan(arguments, dataset, out)
    is_mtt = is_magnatagatune(dataset)
    scored, failures = [], []

    def run(what: str, words: Iterable[str | Path], **options) -> bool:
        status = run_command(words, stop, **options)
        if status:
            end = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            failures.append(f"{what}: {end}")
            messages.say(f"{failures[-1]}; the other steps go on")
        return not status

    for job in jobs:
        messages.say(f"=> {job}")
        data = ("--data-dir", arguments.data_dir)
        if not job.is_finished:
            words = ("train.py", *data, "--train-dir", job.folder, *words_of(job))
            if not run(f"{job}: train.py", words, watch=Estimate(job)):
                continue
        page = job.report / "report.html"  # the last file of a report
        words = ("eval.py", job.last_stage, *data, "--report", job.report)
        if is_newer(page, find_best(job.last_stage)) or run(f"{job}: eval.py", words):
            scored.append(job)
            write_tables(out, scored, is_mtt, arguments.data_dir)
    write_differences(out / "differences.csv", scored, dataset)
    analyse(out, next((job for job in scored if job.network == BASELINE), None), dataset, run)
    for failure in failures:
        messages.say(f"failed: {failure}")
    return 1 if failures else 0


def plan(arguments: argparse.Namespace, dataset: Dataset, out: Path) -> list[Job]:
    """Return the networks to train, and print which of them exist.

    Raises
    ------
    UsageError
        A folder contains the training of another network, dataset or other options.
    """
    jobs = []
    for network, seed in itertools.product(
        dict.fromkeys(arguments.networks), dict.fromkeys(arguments.seeds)
    ):
        block, multi = NETWORKS[network]
        own = {"block": block, "multi": bool(multi), "seed": seed, "initial_stage": 0}
        given = argparse.Namespace(**vars(arguments) | own)
        config = cli.read_options(NetworkConfig, given)
        options = cli.read_options(TrainingOptions, given)
        folder = out / network / f"seed-{seed}"
        sizes = {"num_tags": len(dataset.tags), "num_samples": dataset.num_samples}
        compare_run(folder, dataset, dataclasses.replace(config, **sizes), options)
        jobs.append(Job(network, seed, folder, config, options, check_stages(folder, options)))
    for job in jobs:
        epochs = len(job.history())
        state = f"continues after {messages.count(epochs, 'epoch')}" if epochs else "to train"
        messages.say(f"{job}: {'finished' if job.is_finished else state}")
    return jobs


def words_of(job: Job) -> list[str]:
    """Return the options of train.py that differ from their defaults."""
    words = []
    for options in (job.config, job.options):
        for field in dataclasses.fields(options):
            value = getattr(options, field.name)
            if field.metadata and value != field.default:
                words.append(field.metadata["flag"] or f"--{field.name.replace('_', '-')}")
                words += [] if isinstance(value, bool) else [str(value)]
    return words


def is_magnatagatune(dataset: Dataset) -> bool:
    """Return whether the dataset is the paper's: the same tags and numbers of listed clips."""
    path = dataset.path / SHARD_FOLDER / MANIFEST_NAME
    if not path.exists() or set(dataset.tags) != set(MTT_TOP_TAGS):
        return False
    skipped = (row["mp3_path"] for row in read_manifest(path).get("skipped", ()))
    listed = Counter(FOLDER_SPLITS.get(name.partition("/")[0]) for name in skipped)
    listed += Counter({split: found.num_clips for split, found in dataset.splits.items()})
    return listed == MTT_CLIPS


# --- Running commands ----------------------------------------------------------------------------


def run_command(
    words: Iterable[str | Path],
    stop: StopRequest,
    watch: Callable[[], None] = lambda: None,
    **environment: str,
) -> int:
    """Run a script of the toolkit, or a module after ``-m``, and return its exit status.

    Parameters
    ----------
    words : iterable of str or Path
        Name of the script and its arguments.
    stop : StopRequest
        A signal also stops the command.
    watch : callable
        Called every second.
    **environment : str
        Additional environment variables.

    Raises
    ------
    Interrupted
        A signal has arrived.
    """
    script, *rest = map(str, words)
    command = [sys.executable, *([script] if script == "-m" else [str(ROOT / script)]), *rest]
    process = subprocess.Popen(command, env=os.environ | environment, preexec_fn=_end_with_parent)
    while process.poll() is None and stop.signal_number is None:
        watch()
        try:
            process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            continue
    if process.poll() is None:
        process.terminate()
    status = process.wait()
    stop.check()
    return status


def _end_with_parent() -> None:
    """Kill the command if this program is killed: the next call starts it again."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # of linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class Estimate:
    """Prints how long a network trains, after its first epoch in this call."""

    def __init__(self, job: Job):
        self._job, self._before = job, len(job.history())

    def __call__(self) -> None:
        if self._before is None or len(rows := self._job.history()) <= self._before:
            return
        self._before, options = None, self._job.options
        shortest = min(options.patience + 2, options.max_epochs)  # the first epoch is the best
        least, most = (
            messages.duration(rows[-1]["seconds"] * options.num_lr_decays * epochs)
            for epochs in (shortest, options.max_epochs)
        )
        messages.say(
            f"{self._job}: {messages.duration(rows[-1]['seconds'])} per epoch: {least} for "
            f"{options.num_lr_decays} stages of {messages.count(shortest, 'epoch')}, at most {most}"
        )


def is_newer(path: Path, *sources: Path | None) -> bool:
    """Return whether a result exists and was written after the files it was computed from."""
    times = [source.stat().st_mtime for source in sources if source]
    return path.exists() and path.stat().st_mtime >= max(times, default=0)


def analyse(out: Path, job: Job | None, dataset: Dataset, run: Callable) -> None:
    """Extract the excitations of se-multi and execute the notebook."""
    if job is None:
        messages.say(f"no notebook: {BASELINE} was not trained")
        return
    clips, segments = out / "excitations.parquet", out / "segments.parquet"
    for path, options in ((clips, ()), (segments, ("--segments", "--depths", "0"))):
        words = (job.last_stage, "--data-dir", dataset.path, "--out", path, *options)
        name = "extract_excitations.py"
        if not is_newer(path, find_best(job.last_stage)) and not run(name, (name, *words)):
            return
    notebook, figures = ROOT / "excitation_analysis.ipynb", out / "figures"
    if is_newer(out / notebook.name, clips, segments):
        return
    figures.mkdir(exist_ok=True)
    places = {"EXCITATIONS": clips, "EXCITATIONS_SEGMENTS": segments, "FIGURES_DIR": figures}
    places["DATA_DIR"] = dataset.path  # the notebook runs in its own folder
    with replaced_whole(out / notebook.name, ".ipynb") as temporary:
        words = (notebook, "--output-dir", out.resolve(), "--output", temporary.name)
        run(
            notebook.name,
            ("-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", *words,
             "--ExecutePreprocessor.timeout=None", "--log-level", "ERROR",
             "--ExecutePreprocessor.extra_arguments=--log-level=ERROR"),
            **{name: str(path.resolve()) for name, path in places.items()},
        )  # fmt: skip


# --- Results -------------------------------------------------------------------------------------


def write_tables(out: Path, jobs: list[Job], is_mtt: bool, data_dir: str) -> None:
    """Write ``table.csv``, ``table.md`` and ``auc.png``."""
    table = pd.DataFrame([row_of(job, is_mtt) for job in jobs])
    write_atomically(out / "table.csv", table.to_csv(index=False).encode())
    lines = ["| network | parameters | ROC AUC | PR AUC | epochs | hours | published ROC AUC |"]
    lines.append("|---|--:|---|---|--:|--:|--:|")
    for network, rows in table.groupby("network", sort=False):
        scores = " | ".join(summary(rows, metric)[-1] for metric in _METRICS)
        published = f"{rows['published_roc_auc'].iloc[0]:.4f}" if is_mtt else "–"
        lines.append(
            f"| {network} | {rows['parameters'].iloc[0]:,} | {scores} | "
            f"{rows['epochs'].mean():.0f} | {rows['hours'].mean():.2f} | {published} |"
        )
    write_atomically(out / "table.md", ("\n".join(lines) + "\n").encode())
    write_atomically(out / "auc.png", draw_scores(table, is_mtt, data_dir))


def row_of(job: Job, is_mtt: bool) -> dict:
    """Return the row of ``table.csv``."""
    metrics = json.loads((job.report / "metrics.json").read_text(encoding="utf-8"))
    history = job.history()
    row = {"network": job.network, "seed": job.seed, "parameters": count_parameters(job)}
    for metric in _METRICS:
        low, high = metrics[f"{metric}_interval"]
        row |= {metric: metrics[metric], f"{metric}_low": low, f"{metric}_high": high}
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


def summary(rows: pd.DataFrame, metric: str) -> tuple[float, float, float, str]:
    """Return score, low and high end, and text: interval of one seed, range of several."""
    if len(rows) == 1:
        value, low, high = rows.iloc[0][[metric, f"{metric}_low", f"{metric}_high"]]
    else:
        value, low, high = (getattr(rows[metric], name)() for name in ("mean", "min", "max"))
    return value, low, high, f"{value:.4f} ({low:.4f}–{high:.4f})"


def write_differences(path: Path, jobs: list[Job], dataset: Dataset) -> None:
    """Write the differences of all networks from se-multi with the same seed, on the same clips."""
    by_key = {(job.network, job.seed): job for job in jobs}
    rows, drawn = [], {}
    clips = read_clips(dataset.splits["test"].shards)
    labels = np.array([clip.labels for clip in clips if not clip.part])

    def resamples_of(job: Job) -> Resamples:
        if job not in drawn:
            predictions = pd.read_csv(job.report / "predictions.csv").iloc[:, 2:]
            drawn[job] = bootstrap(labels, predictions.to_numpy(float))
        return drawn[job]

    for (network, seed), job in by_key.items():
        baseline = by_key.get((BASELINE, seed))
        if network == BASELINE or baseline is None:
            continue
        difference = resamples_of(job) - resamples_of(baseline)
        row = {"network": network, "seed": seed, "baseline": BASELINE}
        for metric in _METRICS:
            values = getattr(difference, f"macro_{metric}")
            ends = interval(values, lowest=-1)
            names = (f"{metric}_difference{end}" for end in ("", "_low", "_high"))
            row |= dict(zip(names, (values[0], *ends), strict=True))
        rows.append(row)
    if rows:
        content = pd.DataFrame(rows).to_csv(index=False, float_format="%.6f")
        write_atomically(path, content.encode())
    else:
        messages.say(f"no {path.name}: it compares networks with {BASELINE}")


def draw_scores(table: pd.DataFrame, is_mtt: bool, data: str) -> bytes:
    """Draw the ROC AUC of all networks as bars, as on the authors' poster; return a PNG file."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MultipleLocator

    figure = Figure(figsize=(8.3, 4), dpi=100, layout="constrained")  # 830 pixels wide
    axes = figure.subplots()
    found = {name: summary(rows, "roc_auc") for name, rows in table.groupby("network")}
    blocks = [block for block in PUBLISHED if {block, f"{block}-multi"} & found.keys()]
    bottom = math.floor(min(low for _, low, _, _ in found.values()) * 50 - 0.5) / 50
    several = table["seed"].nunique() > 1
    for multi, label, colour in ((0, "last block alone", "#9ecae9"), (1, "multi-level", "#0072B2")):
        for at, block in enumerate(blocks):
            if (name := f"{block}{'-multi' * multi}") not in found:
                continue
            value, low, high, _ = found[name]
            x = at + 0.4 * multi - 0.2
            axes.bar(x, value - bottom, 0.38, bottom, color=colour, label=label)
            label = None  # one entry in the legend
            axes.vlines(x, low, high, color="black", linewidth=1.2)
            axes.annotate(f"{value:.4f}", (x, high), (0, 3), textcoords="offset points",
                          ha="center", fontsize=8)  # fmt: skip
    if is_mtt:
        values = [value for block in blocks for value in PUBLISHED[block]]
        places = np.arange(len(values)) / 2
        places = np.repeat(np.arange(len(blocks)), 2) + np.tile([-0.2, 0.2], len(blocks))
        axes.scatter(places, values, marker="D", s=26, color="#D55E00", edgecolor="white",
                     label="published", zorder=3)  # fmt: skip
    ends = "range of the seeds" if several else f"{100 * CONFIDENCE:g} % interval"
    axes.plot([], [], color="black", linewidth=1.2, label=ends)
    axes.set_xticks(range(len(blocks)), [TITLES.get(block, block) for block in blocks])
    axes.set_ylabel(f"test ROC AUC (axis starts at {bottom:.2f})")
    axes.set_ylim(bottom, min(1.0, axes.get_ylim()[1] + 0.004) if bottom < 1 else None)
    axes.yaxis.set_major_locator(MultipleLocator(0.02))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    figure.supxlabel(data, x=0.01, ha="left", fontsize="small", parse_math=False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


# --- Command line --------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Train, test and analyse the twelve networks of the paper. Options of training are those "
        "of train.py.",
        "  python -m tools.paper --data-dir ./dataset --out ./paper\n"
        "  python -m tools.paper --networks se-multi rese-multi --seeds 0 1 2",
    )
    cli.add_options(parser, PaperOptions, NetworkConfig, TrainingOptions, without=_FROM_NETWORK)
    return cli.add_general(parser)


def main(argv: list[str] | None = None) -> int:
    return cli.run(_run, build_parser().parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    cli.check_output(arguments.out, "--out", is_folder=True)
    open_dataset(arguments.data_dir)
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    with only_run(Path(arguments.out), "run", TrainingError), stop_on_signals() as stop:
        return run_paper(arguments, stop)


if __name__ == "__main__":
    sys.exit(main())
