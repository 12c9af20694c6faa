"""Measure the throughput of each stage, and of the model alone on any Keras backend.

    python benchmark.py all --data-dir ./dataset
    python benchmark.py train predict --block rese --batch-size 23 --jit off
    python benchmark.py train --backend jax --batch-size 23 256 --mixed-precision --json bf16.json

Every figure is a median over repeats with its spread, beside the same run's measure of the
machine: the rate of matrix products, of copies in memory, and of sequential reads. ``machine``,
``train`` and ``predict`` need neither TensorFlow nor data.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cli
from errors import UsageError

import numpy as np

if TYPE_CHECKING:
    from model import NetworkConfig
    from train import Options

    import keras

STAGES = ("machine", "decode", "build", "input", "train", "predict")
BACKENDS = ("tensorflow", "jax", "torch")
# A repeat is as many calls as take about this long, so that clocks and caches settle.
_SECONDS_A_REPEAT = 2.0


@dataclass
class Figure:
    """What was measured of one thing."""

    stage: str
    what: str
    unit: str
    median: float
    lowest: float
    highest: float
    flops: float | None = None  # achieved FLOP/s, where arithmetic is counted
    bytes: float | None = None  # achieved bytes/s, of the least that must move
    note: str = ""


# --- Timing --------------------------------------------------------------------------------------


def measure(call: Callable[[], object], amount: float, repeats: int) -> tuple[float, float, float]:
    """Time calls and give their rate.

    Parameters
    ----------
    call : callable
        Returns only when its work is done.
    amount : float
        Work a call does, in whatever unit.
    repeats : int
        Timed repeats, after a warm-up that also finds how many calls a repeat takes.

    Returns
    -------
    median, lowest, highest : float
        Units of work a second.
    """
    call()
    started = time.perf_counter()
    call()
    calls = max(1, round(_SECONDS_A_REPEAT / max(time.perf_counter() - started, 1e-9)))
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(calls):
            call()
        rates.append(calls * amount / (time.perf_counter() - started))
    return statistics.median(rates), min(rates), max(rates)


# --- Counting ------------------------------------------------------------------------------------


def count_flops(network: "keras.Model") -> float:
    """Count the floating-point operations of a segment's forward pass: two a multiplication.

    Only convolutions and dense layers are counted; training takes three times as many.
    """
    flops = 0.0
    for layer in network.layers:
        if type(layer).__name__ == "Conv1D":
            frames = layer.output.shape[1]
            flops += 2.0 * frames * float(np.prod(layer.kernel.shape))
        elif type(layer).__name__ == "Dense":
            flops += 2.0 * float(np.prod(layer.kernel.shape))
    return flops


def count_bytes(network: "keras.Model", training: bool, itemsize: int) -> float:
    """Count the bytes of activations a segment must move through memory with perfect fusion.

    A convolution writes its output once, its batch statistics taken on the way, and the
    normalisation, rectification and pooling after it read that once; in training the backward
    pass reads it twice (to reduce, then to apply), writes the gradient, and reads that and the
    input for the two gradients of the convolution. Weights are shared by the batch and left out.
    """
    moved = float(np.prod(network.input_shape[1:])) * 4  # the samples stay in float32
    for layer in network.layers:
        if type(layer).__name__ != "Conv1D":
            continue
        inputs = float(np.prod(layer.input.shape[1:]))
        outputs = float(np.prod(layer.output.shape[1:]))
        forward = inputs + 2 * outputs
        backward = 2 * outputs + outputs + 2 * outputs + 2 * inputs
        moved += itemsize * (forward + (backward if training else 0))
    return moved


# --- Stages --------------------------------------------------------------------------------------


def measure_machine(repeats: int, data_dir: Path | None, mixed_precision: bool) -> Iterator[Figure]:
    """Measure the ceilings: matrix products, copies, sequential reads."""
    import keras

    size = 8192 if _on_accelerator() else 2048
    dtypes = ["float32", "bfloat16"] if mixed_precision or _on_accelerator() else ["float32"]
    product = _compiled(keras.ops.matmul)
    for dtype in dtypes:
        a, b = (
            keras.ops.cast(keras.random.normal((size, size), seed=seed), dtype) for seed in (1, 2)
        )
        rates = measure(lambda a=a, b=b: _wait(product(a, b)), 2.0 * size**3, repeats)
        yield Figure("machine", f"matrix product, {dtype}", "FLOP/s", *rates)

    if _on_accelerator():
        source = keras.random.normal((2**28,), seed=1)
        add = _compiled(lambda x: x + 1.0)
        rates = measure(lambda: _wait(add(source)), 2 * 4 * 2**28, repeats)
    else:
        source = np.ones(2**26, np.float32)
        target = np.empty_like(source)
        rates = measure(lambda: np.copyto(target, source), 2 * source.nbytes, repeats)
    yield Figure("machine", "copy in memory", "B/s", *rates, note="bytes read and written")

    shards = _train_shards(data_dir)
    if shards:
        total = sum(path.stat().st_size for path in shards)
        rates = measure(lambda: _read_through(shards), total, repeats)
        yield Figure("machine", "sequential read of shards", "B/s", *rates, note="page cache")


def measure_decode(repeats: int, data_dir: Path) -> Iterator[Figure]:
    """Measure decoding on one core."""
    from audio import cut_segments, decode

    paths = sorted((data_dir / "mp3").glob("*/*.mp3"))[:32]
    if not paths:
        raise UsageError(f"{data_dir / 'mp3'}: no MP3s to decode")
    for decoder in ("av", "madmom"):
        try:
            decode(paths[0], decoder=decoder)
        except UsageError:
            continue  # madmom is optional

        def call(decoder=decoder):
            for path in paths:
                cut_segments(decode(path, decoder=decoder), 59049)

        rates = measure(call, len(paths), repeats)
        yield Figure("decode", f"{decoder}, one process", "clips/s", *rates)


def measure_build(repeats: int, data_dir: Path, workers: list[int]) -> Iterator[Figure]:
    """Measure building the shards of a dataset, whole, the start of the workers included."""
    from build_mtt import build

    for num_workers in workers:
        rates = []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory(dir=data_dir.parent) as folder:
                copy = Path(folder)
                for name in ("annotations_final.csv", "mp3"):
                    (copy / name).symlink_to((data_dir / name).resolve())
                started = time.perf_counter()
                manifest = build(copy, num_audios_per_shard=10, num_workers=num_workers)
                clips = sum(split["clips"] for split in manifest["splits"].values())
                rates.append(clips / (time.perf_counter() - started))
        yield Figure(
            "build", f"{num_workers} workers", "clips/s",
            statistics.median(rates), min(rates), max(rates),
        )  # fmt: skip


def measure_input(repeats: int, data_dir: Path, batch_size: int) -> Iterator[Figure]:
    """Measure shuffled training batches against a bare sequential read of the same shards."""
    from input_data import SegmentReader, open_dataset, shuffled_order

    dataset = open_dataset(data_dir)
    reader = SegmentReader(dataset)
    epochs = iter(range(10**9))

    def epoch():
        order = shuffled_order(reader.num_segments, 0, 0, next(epochs))
        for _ in reader.batches(batch_size, order):
            pass

    num_segments = reader.num_segments // batch_size * batch_size
    rates = measure(epoch, num_segments, repeats)
    moved = rates[0] * 4 * dataset.num_samples
    yield Figure(
        "input", f"shuffled batches of {batch_size}", "segments/s", *rates, bytes=moved,
        note=f"{reader.num_segments} segments, page cache",
    )  # fmt: skip
    reader.close()
    try:
        cli.import_quietly("tensorflow")
        import tensorflow as tf
    except ImportError:
        return
    paths = [str(path) for path in dataset.splits["train"].shards]

    def bare():
        for _ in tf.data.TFRecordDataset(paths):
            pass

    rates = measure(bare, dataset.splits["train"].num_segments, repeats)
    yield Figure(
        "input", "bare TFRecordDataset, in order", "segments/s", *rates,
        bytes=rates[0] * 4 * dataset.num_samples,
    )  # fmt: skip


def measure_model(
    stages: list[str], repeats: int, config: "NetworkConfig", batch_size: int, options: "Options"
) -> Iterator[Figure]:
    """Measure training and prediction of a network on random segments that lie on the device."""
    from model import build_network
    from train import choose_jit, compile_trainer

    import keras

    if options.mixed_precision:
        keras.config.set_dtype_policy("mixed_bfloat16")
    keras.utils.set_random_seed(0)
    jit = choose_jit(options.jit, config.block)
    network = build_network(config)
    trainer = compile_trainer(network, options, 0, jit)
    itemsize = 2 if options.mixed_precision else 4
    flops = count_flops(network)
    random = np.random.default_rng(0)
    # Real levels, and more than one batch, so that no cache holds them all.
    num_segments = 4 * batch_size
    x = random.standard_normal((num_segments, config.num_samples), np.float32) * 0.1
    y = (random.random((num_segments, config.num_tags)) < 0.1).astype(np.float32)
    how = (
        f"{config.block}, {config.init_features} features, batch {batch_size}, "
        f"{'bf16' if options.mixed_precision else 'float32'}, {'' if jit else 'not '}compiled"
    )

    if "train" in stages:
        call, segments_a_call, finish = _train_call(trainer, x, y, batch_size, jit)
        rates = measure(call, segments_a_call, repeats)
        finish()
        yield Figure(
            "train", how, "segments/s", *rates, flops=3 * flops * rates[0],
            bytes=count_bytes(network, True, itemsize) * rates[0],
            note=f"{1000 / rates[0]:.3g} ms a segment",
        )  # fmt: skip
    if "predict" in stages:
        network.compile(jit_compile=jit)
        batch = keras.ops.convert_to_tensor(x[:batch_size])
        rates = measure(lambda: network.predict_on_batch(batch), batch_size, repeats)
        yield Figure(
            "predict", how, "segments/s", *rates, flops=flops * rates[0],
            bytes=count_bytes(network, False, itemsize) * rates[0],
            note=f"{1000 / rates[0]:.3g} ms a segment, {rates[0] / 10:.3g} clips of 10 a second",
        )  # fmt: skip


def _train_call(trainer, x: np.ndarray, y: np.ndarray, batch_size: int, jit: bool):
    """Give a call that trains some steps, the segments it takes, and what ends the training."""
    import keras

    num_batches = len(x) // batch_size
    if keras.backend.backend() == "jax" and jit:
        from jax_training import JaxTrainer

        runner = JaxTrainer(trainer)
        runner.set_cache(x, y)
        steps = runner.steps_per_dispatch
        rows = np.arange(steps * batch_size, dtype=np.int32) % len(x)
        rows = rows.reshape(steps, batch_size)
        state = [runner.state()]

        def call():
            state[0], losses = runner.run(state[0], rows)
            np.asarray(losses)

        return call, steps * batch_size, lambda: runner.set_state(state[0])
    batches = [
        tuple(keras.ops.convert_to_tensor(part[n * batch_size : (n + 1) * batch_size])
              for part in (x, y))
        for n in range(num_batches)
    ]  # fmt: skip
    turn = iter(range(10**9))

    def call():
        trainer.train_on_batch(*batches[next(turn) % num_batches])

    return call, batch_size, lambda: None


# --- The machine ---------------------------------------------------------------------------------


def describe_machine() -> dict[str, str]:
    """Name the processor, the accelerator and the versions that matter."""
    from importlib.metadata import PackageNotFoundError, version

    described = {
        "python": platform.python_version(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0),
        "processor": _processor_name(),
    }
    if "keras" in sys.modules:
        from train import device_names

        described["accelerator"] = ", ".join(device_names()) or "none"
        described["backend"] = os.environ.get("KERAS_BACKEND", "tensorflow")
    for package in ("keras", "tensorflow", "jax", "torch", "numpy", "av"):
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            continue
    return described


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _on_accelerator() -> bool:
    from train import device_names

    return bool(device_names())


def _compiled(function: Callable) -> Callable:
    import keras

    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.jit(function)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    return function


def _wait(result) -> None:
    """Return when the device has computed a result."""
    import keras

    backend = keras.backend.backend()
    if backend == "jax":
        result.block_until_ready()
    elif backend == "torch":
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
    else:
        # The last element has to come to the host, so the whole has to be there.
        np.asarray(result.numpy() if result.ndim == 0 else keras.ops.ravel(result)[-1])


def _train_shards(data_dir: Path | None) -> list[Path]:
    if data_dir is None or not (data_dir / "tfrecord").is_dir():
        return []
    from input_data import open_dataset

    return open_dataset(data_dir).splits["train"].shards


def _read_through(paths: list[Path]) -> None:
    buffer = bytearray(2**22)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


# --- Reporting -----------------------------------------------------------------------------------


def format_table(figures: list[Figure]) -> str:
    """Lay figures out for a terminal, with what they reach of the ceilings of the same run."""
    product = max((f.median for f in figures if f.what.startswith("matrix product")), default=None)
    copy = next((f.median for f in figures if f.what == "copy in memory"), None)
    rows = [("stage", "what", "median", "lowest", "highest", "unit", "of ceiling", "note")]
    for figure in figures:
        shares = []
        if figure.flops and product:
            shares.append(f"{figure.flops / product:.0%} FLOP/s")
        if figure.bytes and copy:
            shares.append(f"{figure.bytes / copy:.0%} B/s")
        values = (_human(figure.median), _human(figure.lowest), _human(figure.highest))
        rows.append(
            (figure.stage, figure.what, *values, figure.unit, ", ".join(shares), figure.note)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in (2, 3, 4) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _human(value: float) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


# --- Command line --------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Measure the throughput of each stage, and of the model alone on any Keras backend.",
        "  python benchmark.py all --data-dir ./dataset\n"
        "  python benchmark.py train --backend jax --batch-size 23 256 --mixed-precision",
    )
    parser.add_argument(
        "stages", metavar="STAGE", nargs="+", choices=(*STAGES, "all"),
        help=f"what to measure: {', '.join(STAGES)}, or all",
    )  # fmt: skip
    add = parser.add_argument
    add(
        "--data-dir",
        metavar="PATH",
        default="./dataset",
        help="dataset for decode, build and input (default: ./dataset)",
    )
    add(
        "--block",
        choices=("se", "rese", "res", "basic"),
        nargs="+",
        default=["se"],
        help="building blocks (default: se)",
    )
    add(
        "--batch-size",
        metavar="N",
        type=cli.positive_int,
        nargs="+",
        default=[23],
        help="segments a batch (default: 23)",
    )
    add(
        "--init-features",
        metavar="N",
        type=cli.positive_int,
        default=128,
        help="features of the first convolution (default: 128)",
    )
    add(
        "--mixed-precision",
        action="store_true",
        help="compute in bfloat16 where that is safe (default: off)",
    )
    add(
        "--jit",
        choices=("auto", "on", "off"),
        default="auto",
        help="compile the network by XLA (default: auto)",
    )
    add(
        "--backend",
        choices=BACKENDS,
        default=None,
        help="Keras backend (default: KERAS_BACKEND, or tensorflow)",
    )
    add(
        "--num-workers",
        metavar="N",
        type=cli.positive_int,
        nargs="+",
        default=[1, 2, 4],
        help="worker processes to build with (default: 1 2 4)",
    )
    add(
        "--repeats",
        metavar="N",
        type=cli.positive_int,
        default=5,
        help="timed repeats, of about 2 s each (default: 5)",
    )
    add("--json", metavar="FILE", default=None,
        help="write the figures here too (default: no)")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    return cli.run(_benchmark, build_parser().parse_args(argv))


def _benchmark(arguments: argparse.Namespace) -> None:
    if arguments.backend:
        os.environ["KERAS_BACKEND"] = arguments.backend
    stages = list(STAGES) if "all" in arguments.stages else arguments.stages
    data_dir = Path(arguments.data_dir)
    if not data_dir.is_dir() and set(stages) & {"decode", "build", "input"}:
        raise UsageError(f"{data_dir}: no dataset for {', '.join(stages)} (--data-dir)")
    cli.import_quietly("keras")
    from model import NetworkConfig
    from train import Options

    figures = []
    for figure in _measure_all(arguments, stages, data_dir, NetworkConfig, Options):
        figures.append(figure)
        cli.say(f"{figure.stage}: {figure.what}: {_human(figure.median)} {figure.unit}")
    machine = describe_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(format_table(figures))
    if arguments.json:
        content = {"machine": machine, "figures": [asdict(figure) for figure in figures]}
        Path(arguments.json).write_text(json.dumps(content, indent=1) + "\n")


def _measure_all(arguments, stages, data_dir, NetworkConfig, Options) -> Iterator[Figure]:
    repeats = arguments.repeats
    if "machine" in stages:
        yield from measure_machine(repeats, data_dir, arguments.mixed_precision)
    if "decode" in stages:
        yield from measure_decode(repeats, data_dir)
    if "build" in stages:
        yield from measure_build(repeats, data_dir, arguments.num_workers)
    if "input" in stages:
        yield from measure_input(repeats, data_dir, arguments.batch_size[0])
    if {"train", "predict"} & set(stages):
        for block in arguments.block:
            for batch_size in arguments.batch_size:
                config = NetworkConfig(block, init_features=arguments.init_features)
                options = Options(
                    batch_size=batch_size,
                    jit=arguments.jit,
                    mixed_precision=arguments.mixed_precision,
                )
                yield from measure_model(stages, repeats, config, batch_size, options)


if __name__ == "__main__":
    sys.exit(main())
