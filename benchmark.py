"""Measure the throughput of each stage, and of the model alone on any Keras backend.

    python benchmark.py all --data-dir ./dataset
    python benchmark.py train predict --block rese --batch-size 23 --jit off
    python benchmark.py train --backend jax --batch-size 23 256 --mixed-precision --json bf16.json
    python benchmark.py sweep --batch-size 23 64 256 1024 --json gpu.json
    python benchmark.py growth --data-dir demo/dataset

Every figure is a median over repeats with its spread, beside the same run's measure of the
machine: the rate of matrix products, of copies in memory, and of sequential reads. ``machine``,
``train``, ``predict`` and ``sweep`` need neither TensorFlow nor data.

``sweep`` runs the model alone on JAX and PyTorch in float32, with tf32, and in bfloat16, each in a
process of its own: all that is to be known of a GPU in one run. ``growth`` repeats a dataset's
clips to 100, 500 and 2,000 and takes the time and the memory of building, training and evaluation.
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
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
EXTRA_STAGES = ("sweep", "growth")
# What `sweep` compares: a name, and the options that make it.
PRECISIONS = {
    "float32": ["--no-tf32"],
    "tf32": [],
    "bf16": ["--mixed-precision"],
}
_GROWTH = (100, 500, 2000)  # clips
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
    precision: str = "float32"  # whose matrix-product rate is the ceiling
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
        yield Figure("machine", f"matrix product, {dtype}", "FLOP/s", *rates, precision=dtype)

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
    stages: list[str],
    repeats: int,
    config: "NetworkConfig",
    batch_size: int,
    options: "Options",
    profile: bool = False,
) -> Iterator[Figure]:
    """Measure training and prediction of a network on random segments that lie on the device."""
    from model import build_network
    from train import choose_jit, compile_trainer

    import keras

    if options.mixed_precision:
        keras.config.set_dtype_policy("mixed_bfloat16")
    with cli.chatter_held():
        keras.utils.set_random_seed(0)
    jit = choose_jit(options.jit, config.block)
    network = build_network(config)
    trainer = compile_trainer(network, options, 0, jit)
    itemsize = 2 if options.mixed_precision else 4
    precision = "bfloat16" if options.mixed_precision else "float32"
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
        if profile:
            _say_where_time_goes(call)
        finish()
        yield Figure(
            "train", how, "segments/s", *rates, flops=3 * flops * rates[0],
            bytes=count_bytes(network, True, itemsize) * rates[0], precision=precision,
            note=f"{1000 / rates[0]:.3g} ms a segment",
        )  # fmt: skip
    if "predict" in stages:
        network.compile(jit_compile=jit)
        batch = keras.ops.convert_to_tensor(x[:batch_size])
        rates = measure(lambda: network.predict_on_batch(batch), batch_size, repeats)
        yield Figure(
            "predict", how, "segments/s", *rates, flops=flops * rates[0],
            bytes=count_bytes(network, False, itemsize) * rates[0], precision=precision,
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


def _say_where_time_goes(call: Callable[[], object], num_rows: int = 15) -> None:
    """Profile one call and say which kernels took the time."""
    import keras

    if keras.backend.backend() == "torch":
        from torch.profiler import profile

        with profile() as profiled:
            call()
        cli.say(profiled.key_averages().table(sort_by="self_cuda_time_total", row_limit=num_rows))
        return
    if keras.backend.backend() != "jax":
        raise UsageError("--profile: needs the JAX or the PyTorch backend")
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            call()
        (path,) = Path(folder).rglob("perfetto_trace.json.gz")
        with gzip.open(path, "rt") as file:
            events = json.load(file)["traceEvents"]
    processes = {
        event["pid"]: event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event.get("name") == "process_name"
    }
    on_device = any("GPU" in name or "TPU" in name for name in processes.values())
    taken = Counter()
    for event in events:
        name = processes.get(event.get("pid"), "")
        if event.get("ph") == "X" and (not on_device or "GPU" in name or "TPU" in name):
            taken[event["name"]] += event.get("dur", 0)
    total = sum(taken.values()) or 1
    for name, microseconds in taken.most_common(num_rows):
        cli.say(f"  {microseconds / total:6.1%}  {microseconds / 1000:9.2f} ms  {name[:80]}")


def measure_sweep(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Measure the model on JAX and PyTorch in each precision, every one in its own process."""
    for backend in [arguments.backend] if arguments.backend else ["jax", "torch"]:
        for name, options in PRECISIONS.items():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "figures.json"
                command = [
                    sys.executable, __file__, "machine", "train", "predict", *options,
                    "--backend", backend, "--json", str(path),
                    "--block", *arguments.block,
                    "--batch-size", *map(str, arguments.batch_size),
                    "--init-features", str(arguments.init_features),
                    "--jit", arguments.jit, "--repeats", str(arguments.repeats),
                    *(["--profile"] if arguments.profile else []),
                ]  # fmt: skip
                # Its table is for reading now; its figures go into one table and file.
                finished = subprocess.run(command, stdout=sys.stderr)
                if not path.exists():
                    cli.say(f"{backend}, {name}: ended with status {finished.returncode}")
                    continue
                for figure in json.loads(path.read_text())["figures"]:
                    yield Figure(**figure | {"what": f"{backend}, {name}: {figure['what']}"})


def measure_growth(data_dir: Path) -> Iterator[Figure]:
    """Measure time and peak memory of building, an epoch and evaluation as clips grow."""
    scripts = Path(__file__).parent
    for num_clips in _GROWTH:
        with tempfile.TemporaryDirectory(dir=data_dir.parent) as folder:
            grown, log = Path(folder) / "dataset", Path(folder) / "log"
            _repeat_clips(data_dir, grown, num_clips)
            commands = {
                "build": ["build_mtt.py", "--num-audios-per-shard", "20"],
                "an epoch": [
                    "train.py", "--train-dir", str(log), "--init-features", "4",
                    "--num-lr-decays", "1", "--max-epochs", "1",
                ],
                "evaluation": ["eval.py", str(log / "0")],
            }  # fmt: skip
            for what, (script, *options) in commands.items():
                command = [sys.executable, str(scripts / script), "--data-dir", str(grown)]
                seconds, peak = _run_measured([*command, *options])
                yield Figure(
                    "growth", f"{what}, {num_clips} clips", "s", seconds, seconds, seconds,
                    note=f"peak memory of the largest process {peak / 2**20:.0f} MiB",
                )  # fmt: skip


def _run_measured(command: list[str]) -> tuple[float, int]:
    """Run a command and give its seconds and the peak memory of its largest process in bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise UsageError(f"{' '.join(command)}: ended with status {status}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def _repeat_clips(data_dir: Path, grown: Path, num_clips: int) -> None:
    """Make a dataset of so many clips out of links to another's."""
    import pandas as pd

    path = data_dir / "annotations_final.csv"
    if not path.exists():
        raise UsageError(f"{path}: growth repeats a dataset's clips, and needs its annotations")
    table = pd.read_csv(path, sep="\t", dtype=str)
    repeats = [table] * (num_clips // len(table) + 1)
    repeated = pd.concat(repeats, ignore_index=True).iloc[:num_clips].copy()
    sources = repeated["mp3_path"].tolist()
    repeated["clip_id"] = [str(number) for number in range(num_clips)]
    repeated["mp3_path"] = [
        f"{source.removesuffix('.mp3')}-{number}.mp3" for number, source in enumerate(sources)
    ]
    for source, copy in zip(sources, repeated["mp3_path"], strict=True):
        target = grown / "mp3" / copy
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(data_dir / "mp3" / source, target)
    repeated.to_csv(grown / "annotations_final.csv", sep="\t", index=False, quoting=1)


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
        keras.ops.convert_to_numpy(keras.ops.cast(keras.ops.ravel(result)[-1], "float32"))


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
    products = {f.precision: f.median for f in figures if f.what.startswith("matrix product")}
    copy = next((f.median for f in figures if f.what == "copy in memory"), None)
    rows = [("stage", "what", "median", "lowest", "highest", "unit", "of ceiling", "note")]
    for figure in figures:
        # The larger of the two shares says how far the binding floor is.
        shares = []
        if figure.flops and figure.precision in products:
            shares.append(f"{figure.flops / products[figure.precision]:.0%} FLOP/s")
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
        "stages", metavar="STAGE", nargs="+", choices=(*STAGES, *EXTRA_STAGES, "all"),
        help=f"what to measure: {', '.join(STAGES)}, all of these, or {', '.join(EXTRA_STAGES)}",
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
        "--no-tf32",
        action="store_true",
        help="forbid tf32 for float32 on GPUs that have it (default: allowed)",
    )
    add(
        "--profile",
        action="store_true",
        help="say which kernels a training step's time goes to (default: off)",
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
    if not data_dir.is_dir() and set(stages) & {"decode", "build", "input", "growth"}:
        raise UsageError(f"{data_dir}: no dataset for {', '.join(stages)} (--data-dir)")
    if set(stages) & set(EXTRA_STAGES):
        if len(stages) > 1:
            raise UsageError(f"{' '.join(stages)}: sweep and growth are measured alone")
        figures = measure_growth(data_dir) if stages == ["growth"] else measure_sweep(arguments)
        return _report(figures, arguments.json)
    cli.import_quietly("keras")
    if arguments.no_tf32:
        _forbid_tf32()
    return _report(_measure_all(arguments, stages, data_dir), arguments.json)


def _forbid_tf32() -> None:
    import keras

    if keras.backend.backend() == "jax":
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")
    elif keras.backend.backend() == "torch":
        import torch

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    else:
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(False)


def _report(measured: Iterator[Figure], json_path: str | None) -> None:
    figures = []
    for figure in measured:
        figures.append(figure)
        cli.say(f"{figure.stage}: {figure.what}: {_human(figure.median)} {figure.unit}")
    machine = describe_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(format_table(figures))
    if json_path:
        content = {"machine": machine, "figures": [asdict(figure) for figure in figures]}
        Path(json_path).write_text(json.dumps(content, indent=1) + "\n")


def _measure_all(
    arguments: argparse.Namespace, stages: list[str], data_dir: Path
) -> Iterator[Figure]:
    from model import NetworkConfig
    from train import Options

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
                yield from measure_model(
                    stages, repeats, config, batch_size, options, arguments.profile
                )


if __name__ == "__main__":
    sys.exit(main())
