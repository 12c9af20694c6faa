"""Estimate cost and bottlenecks of builds and trainings that are too large to try.

    python -m tools.plan --clips 250000 10000000
    python -m tools.plan --clips 250000 --gpus 1 8 64 --gpu-rate 9000
    python -m tools.plan --clips 55000 --seconds 240 --kbit-s 320 --decode-ms 520 --json

The estimate is a closed form: every part of the work has a rate, and the slowest part determines
the duration. `Plan` lists the rates. Each rate is an option and can be replaced by a rate measured
on your machines. docs/scaling.md explains where the defaults come from and where the estimate does
not hold.
"""

import argparse
import itertools
import json
import math
import sys
from dataclasses import dataclass

from toolkit import cli, messages
from toolkit.data.annotations import SPLIT_SHARES
from toolkit.data.audio import SAMPLE_RATE, SAMPLES_PER_SEGMENT
from toolkit.errors import UsageError

SAMPLE_BYTES = {"float32": 4, "int16": 2}
CLIPS_PER_SHARD = 100
GRADIENT_BYTES = 99e6  # 24.7 million parameters of full-size se in float32
# Per step, besides the gradients: 11 batch normalisations exchange mean and variance, forward and
# backward.
SMALL_EXCHANGES = 44
# JAX reserves 75 % of a GPU's memory; training segments may use 60 % of the reserved memory.
CACHE_SHARE = 0.75 * 0.6
INDEX_RATE = 900_000.0  # record headers/s, read before the first step
CHECKPOINT_SECONDS = 1.4  # per epoch: best checkpoint, and state to resume from
SCORE_SECONDS = 2e-5  # per clip


def _number(group: str, default: float, help: str):
    kind = cli.positive_int if isinstance(default, int) else cli.positive_float
    return cli.option(default, help, group=group, type=kind, metavar="N")


@dataclass(frozen=True)
class Plan:
    """A dataset, machines, and rates."""

    clips: int
    gpus: int = 8
    seconds: float = _number("dataset", 29.0, "seconds of audio per clip")
    kbit_s: float = _number("dataset", 128.0, "bit rate of the audio files, in kbit/s")
    decode_ms: float = _number(
        "dataset", 51.0, "core time per clip from MP3 to shard, in milliseconds"
    )
    encoding: str = cli.option(
        "float32", "how shards store samples", group="dataset", choices=tuple(SAMPLE_BYTES)
    )
    gpu_batch_size: int = _number("training", 64, "segments per step and GPU")
    epochs: int = _number("training", 50, "epochs of all stages together")
    stages: int = _number("training", 5, "stages; each ends with a test")
    cores: int = _number("machines", 64, "cores that decode")
    gpus_per_host: int = _number("machines", 8, "GPUs per host")
    gpu_memory: float = _number("machines", 84.0, "memory per GPU, in GB")
    host_memory: float = _number("machines", 256.0, "memory per host for cached shards, in GB")
    gpu_rate: float = _number("rates", 14_000.0, "segments/s that one GPU trains on")
    input_rate: float = _number("rates", 32_000.0, "shuffled segments/s that one host reads")
    sequential_rate: float = _number("rates", 8_700.0, "segments/s that one host reads in order")
    storage: float = _number("rates", 2.0, "GB/s of the storage, to all hosts together")
    network: float = _number("rates", 100.0, "Gbit/s of a host's network")
    gpu_link: float = _number("rates", 450.0, "GB/s between GPUs of a host, one way")
    latency_us: float = _number("rates", 4.0, "microseconds per hop between two GPUs")

    @property
    def hosts(self) -> int:
        """Number of hosts; each runs one process."""
        return math.ceil(self.gpus / self.gpus_per_host)

    @property
    def batch_size(self) -> int:
        """Segments per step of all GPUs."""
        return self.gpu_batch_size * self.gpus

    @property
    def segments_per_clip(self) -> int:
        """Whole segments per clip."""
        return int(self.seconds * SAMPLE_RATE / SAMPLES_PER_SEGMENT)

    @property
    def segment_bytes(self) -> int:
        """Bytes of a segment in a shard."""
        return SAMPLES_PER_SEGMENT * SAMPLE_BYTES[self.encoding]

    @property
    def source(self) -> str:
        """Where an epoch reads training segments: GPU memory, page cache or storage."""
        train, val = (self.num_segments(s) * self.segment_bytes / 1e9 for s in ("train", "val"))
        if self.hosts == 1 and train <= CACHE_SHARE * self.gpu_memory:
            return "GPU memory"
        return "page cache" if train + val <= self.host_memory else "storage"

    def num_segments(self, split: str) -> float:
        """Return the number of segments of a split."""
        return SPLIT_SHARES[split] * self.clips * self.segments_per_clip

    def check(self) -> None:
        """Raise UsageError if the numbers are inconsistent."""
        if not self.segments_per_clip:
            segment = f"a segment ({SAMPLES_PER_SEGMENT / SAMPLE_RATE:.2f} s)"
            raise UsageError(f"--seconds {self.seconds:g}: shorter than {segment}")
        if self.hosts > 1 and self.gpus % self.gpus_per_host:
            raise UsageError(
                f"--gpus {self.gpus}: not a multiple of --gpus-per-host {self.gpus_per_host}: "
                "every host must have the same number of GPUs"
            )
        if self.batch_size > self.num_segments("train"):
            raise UsageError(
                f"--gpu-batch-size {self.gpu_batch_size}: a step of {self.batch_size} segments is "
                f"larger than the training split ({self.num_segments('train'):.0f} segments)"
            )


# --- The closed form -----------------------------------------------------------------------------


def estimate_build(plan: Plan) -> dict[str, float | str]:
    """Estimate a build: counts, bytes, seconds and the bottleneck, by name."""
    audio_bytes = plan.clips * plan.seconds * plan.kbit_s * 1000 / 8
    shard_bytes = plan.clips * plan.segments_per_clip * plan.segment_bytes
    core_seconds = plan.clips * plan.decode_ms / 1000
    seconds = {
        "decoding": core_seconds / plan.cores,
        "storage": (audio_bytes + shard_bytes) / (plan.storage * 1e9),
    }
    bottleneck = max(seconds, key=seconds.get)
    return {
        "segments": plan.clips * plan.segments_per_clip,
        "audio_bytes": audio_bytes,
        "shard_bytes": shard_bytes,
        "core_hours": core_seconds / 3600,
        "build_seconds": seconds[bottleneck],
        "build_bottleneck": bottleneck,
        "cores_that_saturate_storage": math.ceil(core_seconds / seconds["storage"]),
    }


def exchange_seconds(plan: Plan) -> float:
    """Return the seconds per step in which GPUs exchange gradients and batch statistics.

    A ring passes 2 (n - 1) / n of the gradients through the slowest link; batch statistics are
    exchanged in a tree.
    """
    if plan.gpus == 1:
        return 0.0
    link = plan.gpu_link if plan.hosts == 1 else min(plan.gpu_link, plan.network / 8)  # GB/s
    ring = 2 * (plan.gpus - 1) / plan.gpus * GRADIENT_BYTES / (link * 1e9)
    hops = 2 * math.ceil(math.log2(plan.gpus))
    return ring + (1 + SMALL_EXCHANGES) * hops * plan.latency_us / 1e6


def step_seconds(plan: Plan) -> dict[str, float]:
    """Return the seconds per step that each part of training is busy.

    GPU and exchange alternate; input and storage run in parallel with both.
    """
    host_batch = plan.batch_size / plan.hosts
    storage = max(
        plan.batch_size * plan.segment_bytes / (plan.storage * 1e9),
        host_batch * plan.segment_bytes / (plan.network * 1e9 / 8),
    )
    return {
        "GPU": plan.gpu_batch_size / plan.gpu_rate,
        "exchange": exchange_seconds(plan),
        "input": 0.0 if plan.source == "GPU memory" else host_batch / plan.input_rate,
        "storage": storage if plan.source == "storage" else 0.0,
    }


def prediction_seconds(plan: Plan, split: str) -> float:
    """Return the seconds to read, predict and score a split; hosts divide its shards."""
    num_segments, num_clips = plan.num_segments(split), SPLIT_SHARES[split] * plan.clips
    hosts = min(plan.hosts, math.ceil(num_clips / CLIPS_PER_SHARD))  # the others have no shard
    read_rate = hosts * plan.sequential_rate
    if plan.source == "storage":
        read_rate = min(read_rate, plan.storage * 1e9 / plan.segment_bytes)
    # A prediction takes a third of the operations of a training step.
    predict_rate = 3 * plan.gpu_rate * hosts * plan.gpus / plan.hosts
    return num_segments / read_rate + num_segments / predict_rate + num_clips * SCORE_SECONDS


def estimate_training(plan: Plan) -> dict[str, float | str]:
    """Estimate all stages: counts, bytes, rates, seconds and the bottleneck, by name."""
    train, val, test = map(plan.num_segments, SPLIT_SHARES)
    parts = step_seconds(plan)
    step = max(parts["GPU"] + parts["exchange"], parts["input"], parts["storage"])
    epoch = {
        "steps": train // plan.batch_size * step,
        "validation": prediction_seconds(plan, "val"),
        "checkpoint": CHECKPOINT_SECONDS,
    }
    bottleneck = max(epoch, key=epoch.get)
    if bottleneck == "steps":
        waiting = step > parts["GPU"] + parts["exchange"]
        bottleneck = max(("input", "storage") if waiting else ("GPU", "exchange"), key=parts.get)
    # Segments are shuffled over all hosts, so each host's page cache finally contains all segments.
    first_read = {
        "GPU memory": train / plan.input_rate,
        "page cache": plan.hosts * train * plan.segment_bytes / (plan.storage * 1e9),
        "storage": 0.0,
    }
    read_segments = {
        "GPU memory": train + val + test,
        "page cache": plan.hosts * train + val + test,
        "storage": plan.epochs * (train + val) + plan.stages * test,
    }
    seconds = train / INDEX_RATE + first_read[plan.source] + plan.epochs * sum(epoch.values())
    seconds += plan.stages * prediction_seconds(plan, "test")
    return {
        "gpus": plan.gpus,
        "hosts": plan.hosts,
        "source": plan.source,
        "train_rate": plan.batch_size / step,
        "gpu_busy": parts["GPU"] / step,
        **{f"epoch_{name}_seconds": value for name, value in epoch.items()},
        "training_bottleneck": bottleneck,
        "training_seconds": seconds,
        "gpu_hours": plan.gpus * seconds / 3600,
        "read_bytes": read_segments[plan.source] * plan.segment_bytes,
    }


# --- Command line --------------------------------------------------------------------------------


def _significant(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


_ROWS = {
    "segments": ("segments", "{:,}".format),
    "audio_bytes": ("audio files", messages.size),
    "shard_bytes": ("shards", messages.size),
    "core_hours": ("build: core hours", _significant),
    "build_seconds": ("build: time", messages.duration),
    "build_bottleneck": ("build: bottleneck", str),
    "cores_that_saturate_storage": ("build: cores that saturate the storage", "{:,}".format),
    "hosts": ("hosts", "{:,}".format),
    "source": ("training segments are in", str),
    "train_rate": ("training segments/s", _significant),
    "gpu_busy": ("GPUs busy in a step", "{:.0%}".format),
    "epoch_steps_seconds": ("epoch: steps", messages.duration),
    "epoch_validation_seconds": ("epoch: validation", messages.duration),
    "training_bottleneck": ("epoch: bottleneck", str),
    "training_seconds": ("training: time", messages.duration),
    "gpu_hours": ("training: GPU hours", _significant),
    "read_bytes": ("training: read from storage", messages.size),
}


def format_table(estimates: dict[str, dict]) -> str:
    """Format estimates as a Markdown table with one column per estimate."""
    rows = [["", *estimates]]
    for key, (label, form) in _ROWS.items():
        rows.append([label, *(form(estimate[key]) for estimate in estimates.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |"
        for row in rows
    )


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Estimate cost and bottlenecks of builds and trainings that are too large to try.",
        "  python -m tools.plan --clips 250000 10000000\n"
        "  python -m tools.plan --clips 250000 --gpus 1 8 64 --gpu-rate 9000",
    )
    columns = parser.add_argument_group("columns")
    for flag, default, what in (
        ("--clips", 250_000, "clips in the shards"),
        ("--gpus", Plan.gpus, "GPUs of all hosts"),
    ):
        columns.add_argument(
            flag, metavar="N", type=cli.positive_int, nargs="+", default=[default],
            help=f"{what}, one column each (default: {default})",
        )  # fmt: skip
    cli.add_options(parser, Plan)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json",
        action="store_true",
        help="print seconds, bytes and counts as JSON instead of a table (default: off)",
    )
    return cli.add_general(parser)


def main(argv: list[str] | None = None) -> int:
    return cli.run(_plan, build_parser().parse_args(argv))


def _plan(arguments: argparse.Namespace) -> None:
    estimates = {}
    names = [name for name in vars(arguments) if name in Plan.__dataclass_fields__]
    options = {name: getattr(arguments, name) for name in names}
    for clips, gpus in itertools.product(arguments.clips, arguments.gpus):
        plan = Plan(**options | {"clips": clips, "gpus": gpus})
        plan.check()
        title = f"{clips:,} clips, {messages.count(gpus, 'GPU')}"
        estimates[title] = estimate_build(plan) | estimate_training(plan)
    print(json.dumps(estimates, indent=1) if arguments.json else format_table(estimates))


if __name__ == "__main__":
    sys.exit(main())
