"""Reckon what building and training cost at a size that cannot be tried, and what holds them up.

    python plan.py --dataset magnatagatune msd 10m jamendo
    python plan.py --clips 250000 --gpus 1 8 64 --batch-size 4096
    python plan.py --clips 250000 --gpu-rate 9000 --json
    python plan.py simulate
    python plan.py calibrate --data-dir demo/dataset
    python plan.py figure --out docs/images/scaling.png

``cost`` is a closed form over rates that were measured and rates that are assumed; every one is an
option. ``simulate`` says where it is off, by `simulation`; ``calibrate`` compares both with the
real reader of shards. docs/scaling.md explains the model and holds its tables.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from toolkit import cli, messages
from toolkit.errors import UsageError
from tools.simulation import Regime, calibrate, compare_regimes

import numpy as np

# --- What is known -------------------------------------------------------------------------------

# Clips that come into shards, seconds of a file, seconds of it that are used, kbit/s, milliseconds
# a file. The clips of MagnaTagATune are 16 kHz mono; of the others 44.1 kHz stereo is assumed.
DATASETS = {
    "magnatagatune": (21_111, 29.1, 29.0, 32.0, 26.0),
    "msd": (250_000, 30.0, 29.0, 128.0, 51.0),
    "10m": (10_000_000, 30.0, 29.0, 128.0, 51.0),
    "jamendo": (55_000, 240.0, 240.0, 320.0, 520.0),
}
_CLIPS_A_SHARD = 100  # build_mtt.py's default
SPLIT_SHARES = {"train": 0.75, "val": 0.08, "test": 0.17}  # as build_mtt.py draws them
SAMPLE_RATE = 22_050  # Hz
SEGMENT_SAMPLES = 59_049
SAMPLE_BYTES = {"float32": 4, "int16": 2}
# Full-size se with multi-level aggregation, by benchmark.count_flops and count_bytes.
TRAIN_FLOPS = 10.5e9  # a segment
TRAIN_BYTES = {"float32": 236e6, "tf32": 236e6, "bfloat16": 118e6}  # a segment
GRADIENT_BYTES = 99e6  # 24.7 M parameters in float32, also under mixed precision
# Matrix products of an H100 or H200 by their data sheet, without sparsity.
PEAK_FLOPS = {"float32": 67e12, "tf32": 494e12, "bfloat16": 989e12}  # FLOP/s
# Eleven batch normalisations reduce a mean and a variance over all devices, forward and backward.
_SMALL_EXCHANGES = 44
_CACHE_SHARE = 0.6 * 0.75  # of a GPU's memory: jax_training's of what JAX takes of it
_INDEX_RATE = 900_000  # record headers a second
_SCORE_SECONDS = 2e-5  # a clip
_CHECKPOINT_SECONDS = 1.4  # the best and the state after an epoch
_SLEEPS = (0.0, 0.001, 0.002, 0.003, 0.004, 0.006, 0.010)  # seconds a step, to calibrate with


@dataclass(frozen=True)
class Plan:
    """A dataset and the machines that it meets."""

    clips: int = 21_111
    seconds: float = 29.1  # of an audio file
    stop: float = 29.0  # of it that are cut into segments
    kbit_s: float = 32.0
    decode_ms: float = 26.0  # of a core for a file: decoding, resampling, writing
    encoding: str = "float32"
    cores: int = 64
    gpus: int = 8
    gpus_per_host: int = 8
    batch_size: int | None = None  # of all GPUs; None for 64 each
    epochs: int = 50  # of all stages together
    stages: int = 5
    precision: str = "bfloat16"
    gpu_rate: float | None = None  # segments/s; None for a share of the roofline
    gpu_share: float = 0.5
    gpu_bandwidth: float = 3.35  # TB/s
    gpu_memory: float = 84.0  # GB
    input_rate: float = 4_100.0  # segments/s that a process reads shuffled, and stacks for JAX
    sequential_rate: float = 7_700.0  # segments/s that a process reads in order, to validate
    host_memory: float = 256.0  # GB
    storage_rate: float = 2.0  # GB/s, of all hosts together
    network: float = 100.0  # Gbit/s a host
    gpu_link: float = 450.0  # GB/s between the GPUs of a host, one way
    pcie: float = 50.0  # GB/s a GPU
    latency_us: float = 4.0  # of a hop between two GPUs
    overlap: float = 0.0  # share of the GPU's time that the exchange may hide behind

    def __post_init__(self):
        if self.gpus > self.gpus_per_host and self.gpus % self.gpus_per_host:
            raise UsageError(
                f"--gpus {self.gpus}: no multiple of --gpus-per-host {self.gpus_per_host}: "
                "every host takes an equal share of a batch"
            )
        if self.batch_size is not None and self.batch_size % self.gpus:
            raise UsageError(
                f"--batch-size {self.batch_size}: cannot be shared out evenly among "
                f"{self.gpus} GPUs"
            )
        if self.segments_a_clip < 1:
            raise UsageError(
                f"--stop {min(self.stop, self.seconds):g}: less than one segment "
                f"of {SEGMENT_SAMPLES / SAMPLE_RATE:.2f} s"
            )

    @property
    def hosts(self) -> int:
        """One process each."""
        return math.ceil(self.gpus / self.gpus_per_host)

    @property
    def batch(self) -> int:
        """Segments a step, of all GPUs."""
        return self.batch_size or 64 * self.gpus

    @property
    def segments_a_clip(self) -> int:
        return int(min(self.stop, self.seconds) * SAMPLE_RATE / SEGMENT_SAMPLES)

    @property
    def segment_bytes(self) -> int:
        return SEGMENT_SAMPLES * SAMPLE_BYTES[self.encoding]

    def segments(self, split: str) -> float:
        """Segments of a split."""
        return SPLIT_SHARES[split] * self.clips * self.segments_a_clip

    @property
    def is_on_device(self) -> bool:
        """Whether train.py keeps the training segments in each GPU's memory, as the shards do."""
        num_bytes = self.segments("train") * self.segment_bytes
        return self.hosts == 1 and num_bytes <= _CACHE_SHARE * self.gpu_memory * 1e9

    @property
    def is_in_memory(self) -> bool:
        """Whether the shards of training and validation stay in a host's page cache."""
        num_segments = self.segments("train") + self.segments("val")
        return num_segments * self.segment_bytes <= self.host_memory * 1e9


# --- The closed form -----------------------------------------------------------------------------


def reckon_build(plan: Plan) -> dict[str, float | str]:
    """Reckon what making the shards takes.

    Parameters
    ----------
    plan : Plan
        The dataset and machines.

    Returns
    -------
    dict
        Bytes, core seconds, seconds and what holds the build up.
    """
    audio_bytes = plan.clips * plan.seconds * plan.kbit_s * 1000 / 8
    num_segments = plan.clips * plan.segments_a_clip
    core_seconds = plan.clips * plan.decode_ms / 1000
    # Of a file no more is read than is used.
    moved = audio_bytes * min(1, plan.stop / plan.seconds)
    moved += num_segments * plan.segment_bytes
    times = {
        "decoding": core_seconds / plan.cores,
        "storage": moved / (plan.storage_rate * 1e9),
    }
    slowest = max(times, key=times.get)
    return {
        "audio_bytes": audio_bytes,
        "segments": num_segments,
        "shard_bytes_float32": num_segments * SEGMENT_SAMPLES * SAMPLE_BYTES["float32"],
        "shard_bytes_int16": num_segments * SEGMENT_SAMPLES * SAMPLE_BYTES["int16"],
        "build_moved_bytes": moved,
        "build_core_seconds": core_seconds,
        "build_seconds": times[slowest],
        "build_bottleneck": slowest,
        "build_full_cores": math.ceil(core_seconds / times["storage"]),
    }


def gpu_rate(plan: Plan) -> float:
    """Give the segments/s that one GPU trains on: as measured, or a share of the roofline."""
    if plan.gpu_rate is not None:
        return plan.gpu_rate
    floor = max(
        TRAIN_BYTES[plan.precision] / (plan.gpu_bandwidth * 1e12),
        TRAIN_FLOPS / PEAK_FLOPS[plan.precision],
    )
    return plan.gpu_share / floor


def exchange_seconds(plan: Plan) -> float:
    """Give the time of a step's exchange between GPUs: the gradients and the batch statistics.

    A ring passes 2 (n - 1) / n of the gradients through the slowest link, a tree the small ones.
    """
    if plan.gpus == 1:
        return 0.0
    link = plan.gpu_link * 1e9  # bytes/s
    if plan.hosts > 1:
        link = min(link, plan.network * 1e9 / 8)
    ring = 2 * (plan.gpus - 1) / plan.gpus * GRADIENT_BYTES / link
    hops = 2 * math.ceil(math.log2(plan.gpus))
    return ring + (1 + _SMALL_EXCHANGES) * hops * plan.latency_us / 1e6


def step_times(plan: Plan) -> dict[str, float]:
    """Give the seconds that each part is busy in a step.

    GPU and exchange come one after the other, but for what overlaps; all else goes on beside them,
    so that a step takes the longest.

    Parameters
    ----------
    plan : Plan
        The dataset and machines.

    Returns
    -------
    dict of str to float
        Of ``GPU``, ``exchange`` (what does not overlap), ``input``, ``storage``, ``PCIe``.
    """
    gpu = plan.batch / plan.gpus / gpu_rate(plan)
    times = {
        "GPU": gpu,
        "exchange": max(0.0, exchange_seconds(plan) - plan.overlap * gpu),
        "input": 0.0,
        "storage": 0.0,
        "PCIe": 0.0,
    }
    if not plan.is_on_device:
        times["input"] = plan.batch / plan.hosts / plan.input_rate
        times["PCIe"] = plan.batch / plan.gpus * SEGMENT_SAMPLES * 4 / (plan.pcie * 1e9)
        if not plan.is_in_memory:
            moved = plan.batch * plan.segment_bytes
            times["storage"] = max(
                moved / (plan.storage_rate * 1e9), moved / plan.hosts / (plan.network * 1e9 / 8)
            )
    return times


def _prediction_seconds(plan: Plan, split: str) -> float:
    """Each host reads and predicts its share of the split's shards; one waits for the other."""
    num_segments = plan.segments(split)
    hosts = min(plan.hosts, _num_shards(plan, split))  # the others have none
    rate = hosts * plan.sequential_rate
    if not plan.is_in_memory:
        rate = min(rate, plan.storage_rate * 1e9 / plan.segment_bytes)
    # A prediction is a third of a training step.
    predicting = num_segments / (plan.gpus / plan.hosts * hosts * 3 * gpu_rate(plan))
    return num_segments / rate + predicting + SPLIT_SHARES[split] * plan.clips * _SCORE_SECONDS


def _num_shards(plan: Plan, split: str) -> int:
    return math.ceil(SPLIT_SHARES[split] * plan.clips / _CLIPS_A_SHARD)


def _bytes_from_storage(plan: Plan) -> float:
    """Count what training reads in all.

    Of val and test each host reads always the same share. Of train an epoch is shuffled anew, so
    that every host comes to read every segment, once if memory holds them.
    """
    train, val, test = (plan.segments(split) * plan.segment_bytes for split in SPLIT_SHARES)
    if plan.is_in_memory:
        return plan.hosts * train + val + test
    if plan.is_on_device:
        return train + plan.epochs * val + plan.stages * test
    return plan.epochs * (train + val) + plan.stages * test


def reckon_training(plan: Plan) -> dict[str, float | str]:
    """Reckon what training takes.

    Parameters
    ----------
    plan : Plan
        The dataset and machines.

    Returns
    -------
    dict
        Rates, the seconds of a step, an epoch and all, and what holds them up.

    Raises
    ------
    UsageError
        A batch is larger than the training split.
    """
    num_segments = plan.segments("train")
    num_steps = int(num_segments // plan.batch)
    if not num_steps:
        raise UsageError(
            f"--batch-size {plan.batch}: more than the {num_segments:.0f} training segments"
        )
    parts = step_times(plan)
    computing = parts["GPU"] + parts["exchange"]
    step = max(computing, parts["input"], parts["storage"], parts["PCIe"])
    waits = [name for name in ("input", "storage", "PCIe") if parts[name] > computing]
    epoch = {
        "steps": num_steps * step,
        "validation": _prediction_seconds(plan, "val"),
        "checkpoint": _CHECKPOINT_SECONDS,
    }
    bottleneck = max(epoch, key=epoch.get)
    if bottleneck == "steps":
        bottleneck = max(waits or ("GPU", "exchange"), key=parts.get)
    # The index of every record; the segments to the device, or once through the page cache.
    start = num_segments / _INDEX_RATE
    if plan.is_on_device:
        start += num_segments / plan.input_rate
    elif plan.is_in_memory:
        cold_bytes = plan.hosts * num_segments * plan.segment_bytes
        start += cold_bytes / (plan.storage_rate * 1e9)
    epoch_seconds = sum(epoch.values())
    total = start + plan.epochs * epoch_seconds + plan.stages * _prediction_seconds(plan, "test")
    exchanged = 0.0
    if plan.hosts > 1:
        ring = 2 * (plan.gpus - 1) / plan.gpus * GRADIENT_BYTES
        exchanged = plan.epochs * num_steps * ring
    return {
        "hosts": plan.hosts,
        "batch": plan.batch,
        "gpu_rate": gpu_rate(plan),
        "steps": num_steps,
        "step_seconds": step,
        "train_rate": plan.batch / step,
        "gpu_busy": parts["GPU"] / step,
        **{f"step_{name.lower()}_seconds": seconds for name, seconds in parts.items()},
        "segments_from": "GPU memory"
        if plan.is_on_device
        else "page cache"
        if plan.is_in_memory
        else "storage",
        **{f"epoch_{name}_seconds": seconds for name, seconds in epoch.items()},
        "epoch_seconds": epoch_seconds,
        "bottleneck": bottleneck,
        "start_seconds": start,
        "storage_read_bytes": _bytes_from_storage(plan),
        "host_exchange_bytes": exchanged,
        "total_seconds": total,
        "gpu_hours": plan.gpus * total / 3600,
    }


def turning_points(plan: Plan) -> dict[str, float]:
    """Give where one part takes over from another as the bottleneck.

    Parameters
    ----------
    plan : Plan
        The dataset and machines.

    Returns
    -------
    dict of str to float
        See docs/scaling.md.
    """
    rate = gpu_rate(plan)
    return {
        "gpus_a_host_feeds": plan.input_rate / rate,
        "gpus_the_storage_feeds": plan.storage_rate * 1e9 / plan.segment_bytes / rate,
        "batch_a_gpu_that_outweighs_exchange": exchange_seconds(plan) * rate,
        "hosts_with_a_shard_of_validation": _num_shards(plan, "val"),
        "gpu_rate_that_fills_pcie": plan.pcie * 1e9 / (SEGMENT_SAMPLES * 4),
        "clips_where_checkpoints_take_a_tenth": 9
        * _CHECKPOINT_SECONDS
        * plan.gpus
        * rate
        / (SPLIT_SHARES["train"] * plan.segments_a_clip),
    }


# --- Tables and the figure -----------------------------------------------------------------------


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.0f} h" if seconds >= 360_000 else messages.duration(seconds)


def _significant(value: float) -> str:
    """Say a number with three digits, or all of its whole ones."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


_BUILD_ROWS: tuple[tuple[str, str, Callable[..., str]], ...] = (
    ("clips", "clips", "{:,}".format),
    ("segments", "segments", "{:,}".format),
    ("audio, compressed", "audio_bytes", messages.size),
    ("shards, float32", "shard_bytes_float32", messages.size),
    ("shards, int16", "shard_bytes_int16", messages.size),
    ("read and written", "build_moved_bytes", messages.size),
    ("core hours", "build_core_seconds", lambda seconds: _significant(seconds / 3600)),
    ("cores that fill the storage", "build_full_cores", "{:,}".format),
    ("**the build**", "build_seconds", _hours),
    ("held up by", "build_bottleneck", str),
)
_TRAINING_ROWS: tuple[tuple[str, str, Callable[..., str]], ...] = (
    ("GPUs", "gpus", "{:,}".format),
    ("hosts", "hosts", "{:,}".format),
    ("batch, all GPUs", "batch", "{:,}".format),
    ("a GPU alone, segments/s", "gpu_rate", _significant),
    ("segments come from", "segments_from", str),
    ("together, segments/s", "train_rate", _significant),
    ("GPUs busy in a step", "gpu_busy", "{:.0%}".format),
    ("an epoch's steps", "epoch_steps_seconds", _hours),
    ("its validation", "epoch_validation_seconds", _hours),
    ("held up by", "bottleneck", str),
    ("before the first step", "start_seconds", _hours),
    ("**all epochs**", "total_seconds", _hours),
    ("GPU hours", "gpu_hours", _significant),
    ("read from the storage", "storage_read_bytes", messages.size),
    (
        "exchanged by a host, each way",
        "host_exchange_bytes",
        lambda size: messages.size(round(size)),
    ),
)
_TURNING_ROWS = (
    ("GPUs that a host can feed from shards", "gpus_a_host_feeds"),
    ("GPUs that the storage can feed, where memory does not hold the shards",
     "gpus_the_storage_feeds"),
    ("batch of a GPU below which the exchange takes longer than the GPU",
     "batch_a_gpu_that_outweighs_exchange"),
    ("hosts beyond which validation has no shard for another",
     "hosts_with_a_shard_of_validation"),
    ("segments/s of a GPU that fill its PCIe", "gpu_rate_that_fills_pcie"),
    ("clips below which checkpoints take a tenth of an epoch's steps",
     "clips_where_checkpoints_take_a_tenth"),
)  # fmt: skip


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table that reads as it stands and in Markdown."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print(f"| {' | '.join(cells)} |")


def _print_costs(results: dict[str, dict]) -> None:
    # Building does not depend on the GPUs: a column a dataset.
    builds = {name.split(" on ")[0]: result for name, result in results.items()}
    for title, columns, rows in (
        ("building", builds, _BUILD_ROWS),
        ("training", results, _TRAINING_ROWS),
    ):
        print_table(
            [title, *columns],
            [[label, *(form(its[key]) for its in columns.values())] for label, key, form in rows],
        )
        print()
    rows = [
        [label, *(_significant(its["turning_points"][key]) for its in results.values())]
        for label, key in _TURNING_ROWS
    ]
    print_table(["where it turns", *results], rows)


def _print_regimes(rows: list[dict]) -> None:
    print_table(
        ["regime", "hosts", "closed form", "simulated", "difference"],
        [
            [row["name"], str(row["hosts"]), f"{row['closed_form']:.2f}",
             f"{row['simulated']:.2f}", f"{row['error']:+.1%}"]
            for row in rows
        ],
    )  # fmt: skip


def _print_calibration(rows: list[dict]) -> None:
    milliseconds = [
        [f"{1000 * row[key]:.2f}" for key in ("sleep", "measured", "closed_form", "simulated")]
        + [f"{row[key] / row['measured'] - 1:+.0%}" for key in ("closed_form", "simulated")]
        for row in rows
    ]
    print_table(
        ["device, ms a step", "measured", "closed form", "simulated", "closed form is off",
         "simulation is off"],
        milliseconds,
    )  # fmt: skip


def plot_plan(path: str | Path, plan: Plan, seed: int = 0) -> None:
    """Draw how training grows with GPUs, and where the closed form holds.

    Parameters
    ----------
    path : str or Path
        Picture to write.
    plan : Plan
        Its GPUs are replaced by 1 to 512, as far as it has segments for, its batch by 64 and 512
        a GPU; shards come from memory.
    seed : int
        Of the simulation.
    """
    from matplotlib.figure import Figure

    # Okabe and Ito's colours; every line has a marker of its own too.
    blue, orange, green, purple = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
    figure = Figure(figsize=(8.3, 4.4), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    plan = replace(plan, gpu_memory=0.0, host_memory=math.inf)
    counts = [2**power for power in range(10) if 512 * 2**power <= plan.segments("train")] or [1]

    def draw(rate: Callable[[Plan], float], batch: int, gpus_per_host: int, **style) -> None:
        plans = [
            replace(plan, gpus=n, gpus_per_host=gpus_per_host, batch_size=batch * n) for n in counts
        ]
        left.loglog(counts, [rate(its) for its in plans], markersize=4, linewidth=1.5, **style)

    def computing(its: Plan) -> float:
        parts = step_times(its)
        return its.batch / (parts["GPU"] + parts["exchange"])

    def reading(its: Plan) -> float:
        return its.hosts * its.input_rate

    def whole_epoch(its: Plan) -> float:
        return its.segments("train") / reckon_training(its)["epoch_seconds"]

    large, small = "GPUs and exchange, 512 segments a GPU", "GPUs and exchange, 64 segments a GPU"
    whole = "whole epoch, 512 segments, 1 GPU a host"
    draw(computing, 512, 8, color="0.35", linestyle="--", label=large)
    draw(computing, 64, 8, color=purple, marker="^", label=small)
    draw(reading, 512, 1, color=green, marker="D", label="reading, 1 GPU a host")
    draw(reading, 512, 8, color=orange, marker="s", label="reading, 8 GPUs a host")
    draw(whole_epoch, 512, 1, color=blue, marker="o", label=whole)
    left.set_title(f"Training on {plan.clips:,} clips", fontsize="medium")
    left.set_xticks(counts[::3], [str(count) for count in counts[::3]])
    left.minorticks_off()
    left.set_xlabel("GPUs")
    left.set_ylabel("training segments/s")
    left.legend(frameon=False, fontsize=8, loc="upper left")
    left.set_ylim(top=left.get_ylim()[1] * 15)

    ratios = np.geomspace(0.33, 3.0, 15)
    for hosts, spread, colour, marker in (
        (1, 0.1, blue, "o"),
        (64, 0.1, green, "D"),
        (1, 1.0, orange, "s"),
        (64, 1.0, purple, "^"),
    ):
        regimes = [Regime("", ratio, spread, hosts=hosts) for ratio in ratios]
        shares = [100 * its.closed_form() / its.simulated(seed) for its in regimes]
        right.semilogx(
            ratios, shares, color=colour, marker=marker, markersize=4, linewidth=1.5,
            label=f"{hosts} host{'s' if hosts > 1 else ''}, spread {spread:g}",
        )  # fmt: skip
    right.set_title("Where the closed form holds", fontsize="medium")
    right.axvline(1, color="0.4", linestyle=":", linewidth=1)
    right.set_xticks([0.33, 0.5, 1, 2, 3], ["⅓", "½", "1", "2", "3"])
    right.minorticks_off()
    right.set_ylim(0, 105)
    right.set_xlabel("GPU's step / reading of its batch")
    right.set_ylabel("simulated rate (% of the closed form)")
    right.legend(frameon=False, fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.85", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.savefig(path)


# --- Command line --------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Reckon what building and training cost at any size, and what holds them up.",
        "  python plan.py --clips 250000 --gpus 1 8 64\n"
        "  python plan.py --dataset jamendo --stop 29 --gpu-rate 9000 --json",
    )
    standard = Plan()
    task = parser.add_argument_group("what to do")
    task.add_argument(
        "what",
        nargs="?",
        choices=("cost", "simulate", "calibrate", "figure"),
        default="cost",
        help="the closed form; the simulation beside it; the simulation beside the reader of "
        "shards; or the picture of both (default: cost)",
    )

    def add_number(group, name: str, what: str, kind=cli.positive_float, **options) -> None:
        value = getattr(standard, name.removeprefix("--").replace("-", "_"), None)
        default = {"default": value} | options
        said = "" if "default:" in what else f" (default: {default['default']:g})"
        group.add_argument(name, metavar="N", type=kind, help=what + said, **default)

    data = parser.add_argument_group("dataset")
    data.add_argument(
        "--dataset",
        choices=tuple(DATASETS),
        nargs="+",
        default=["magnatagatune"],
        help="what gives the five numbers below where they are not given, one column each "
        "(default: magnatagatune)",
    )
    for name, what, kind in (
        ("--clips", "clips that come into shards (default: the dataset's)", cli.positive_int),
        ("--seconds", "length of an audio file (default: the dataset's)", cli.positive_float),
        ("--stop", "where build_mtt.py --stop cuts it, in seconds "
         "(default: the dataset's)", cli.positive_float),
        ("--kbit-s", "bit rate of the audio (default: the dataset's)", cli.positive_float),
        ("--decode-ms", "milliseconds of a core for a file, to the shard (default: the dataset's)",
         cli.positive_float),
    ):  # fmt: skip
        add_number(data, name, what, kind, default=None)
    data.add_argument(
        "--encoding",
        choices=tuple(SAMPLE_BYTES),
        default="float32",
        help="how shards store samples (default: float32)",
    )
    build = parser.add_argument_group("building")
    add_number(build, "--cores", "cores that decode", cli.positive_int)
    training = parser.add_argument_group("training")
    add_number(
        training, "--gpus", "GPUs of all hosts, one column each (default: 8)", cli.positive_int,
        nargs="+", default=[8],
    )  # fmt: skip
    add_number(training, "--gpus-per-host", "GPUs of a host", cli.positive_int)
    add_number(
        training, "--batch-size", "segments a step, of all GPUs, as train.py takes it (default: "
        "64 a GPU)", cli.positive_int,
    )  # fmt: skip
    add_number(training, "--epochs", "epochs of all stages together", cli.positive_int)
    add_number(training, "--stages", "stages, each of which ends in a test", cli.positive_int)
    gpu = parser.add_argument_group("a GPU")
    gpu.add_argument(
        "--precision",
        choices=tuple(PEAK_FLOPS),
        default=standard.precision,
        help="what it computes in; JAX takes tf32 unless train.py has --mixed-precision "
        "(default: bfloat16)",
    )
    add_number(
        gpu, "--gpu-rate", "segments/s that `benchmark.py sweep` found for training, one column "
        "each (default: the next two)", nargs="+", default=[None],
    )  # fmt: skip
    add_number(gpu, "--gpu-share", "share of its roofline that it reaches")
    add_number(gpu, "--gpu-bandwidth", "TB/s of its memory")
    add_number(gpu, "--gpu-memory", "GB of its memory")
    machines = parser.add_argument_group("hosts, storage and network")
    add_number(machines, "--input-rate", "segments/s that a host reads from shards to train")
    add_number(
        machines, "--sequential-rate", "segments/s that a host reads in order, to validate and test"
    )
    add_number(machines, "--host-memory", "GB that hold shards which were read before")
    add_number(machines, "--storage-rate", "GB/s of the shared storage, to all hosts together")
    add_number(machines, "--network", "Gbit/s of a host")
    add_number(machines, "--gpu-link", "GB/s between the GPUs of a host, one way")
    add_number(machines, "--pcie", "GB/s from a host to one GPU")
    add_number(
        machines, "--latency-us", "microseconds of a hop of an exchange", cli.non_negative_float
    )
    add_number(
        machines, "--overlap", "share of the GPU's time that an exchange hides behind", cli.rate
    )
    check = parser.add_argument_group("simulate, calibrate and figure")
    cli.add_data_dir(check, "dataset whose shards `calibrate` reads")
    check.add_argument(
        "--num-read-threads", metavar="N", type=cli.positive_int, default=8,
        help="threads that read them (default: 8)",
    )  # fmt: skip
    check.add_argument(
        "--seed", metavar="N", type=cli.non_negative_int, default=0,
        help="seed of the simulation (default: 0)",
    )  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", action="store_true",
        help="print every quantity in seconds, bytes and counts (default: tables)",
    )  # fmt: skip
    output.add_argument(
        "--out", metavar="FILE", default="scaling.png",
        help="picture that `figure` writes (default: scaling.png)",
    )  # fmt: skip
    return cli.add_general(parser)


def make_plans(arguments: argparse.Namespace) -> dict[str, Plan]:
    """Make a plan for each dataset, number of GPUs and rate, by the name of its column.

    Parameters
    ----------
    arguments : argparse.Namespace
        The parsed command line.

    Returns
    -------
    dict of str to Plan
        At least one.

    Raises
    ------
    UsageError
        Numbers do not fit together.
    """
    plans = {}
    dataset_fields = ("clips", "seconds", "stop", "kbit_s", "decode_ms")
    others = {
        name: getattr(arguments, name)
        for name in asdict(Plan())
        if name not in (*dataset_fields, "gpus", "gpu_rate")
    }
    for dataset, gpus, gpu_rate in itertools.product(
        arguments.dataset, arguments.gpus, arguments.gpu_rate
    ):
        known = dict(zip(dataset_fields, DATASETS[dataset], strict=True))
        given = {name: getattr(arguments, name) for name in dataset_fields}
        chosen = known | {name: value for name, value in given.items() if value is not None}
        name = dataset if arguments.clips is None else f"{arguments.clips:,} clips"
        if len(arguments.gpus) > 1 or gpu_rate is not None:
            name += f" on {messages.count(gpus, 'GPU')}"
            name += "" if gpu_rate is None else f" of {gpu_rate:,g}/s"
        plans[name] = Plan(**chosen, **others, gpus=gpus, gpu_rate=gpu_rate)
    return plans


def main(argv: list[str] | None = None) -> int:
    return cli.run(_plan, build_parser().parse_args(argv))


def _plan(arguments: argparse.Namespace) -> None:
    if arguments.what == "figure":
        plot_plan(arguments.out, next(iter(make_plans(arguments).values())), arguments.seed)
        messages.say(f"{arguments.out}: drawn")
        return
    if arguments.what == "cost":
        results = {
            name: asdict(plan)
            | reckon_build(plan)
            | reckon_training(plan)
            | {"turning_points": turning_points(plan)}
            for name, plan in make_plans(arguments).items()
        }
        show = _print_costs
    elif arguments.what == "simulate":
        results, show = compare_regimes(arguments.seed), _print_regimes
    else:
        results = calibrate(
            arguments.data_dir,
            arguments.batch_size or 23,
            arguments.num_read_threads,
            _SLEEPS,
            seed=arguments.seed,
        )
        show = _print_calibration
    if arguments.json:
        print(json.dumps(results, indent=1))
    else:
        show(results)


if __name__ == "__main__":
    sys.exit(main())
