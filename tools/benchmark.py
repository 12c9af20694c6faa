"""Measure the throughput of each stage, also as a share of the machine's limit.

    python -m tools.benchmark all --data-dir demo/dataset
    python -m tools.benchmark train predict --block rese --batch-size 23 --jit off
    python -m tools.benchmark train --backend jax --batch-size 23 256 --mixed-precision
    python -m tools.benchmark sweep --batch-size 23 64 256 1024 --json gpu.json

Each figure is the median of several repeats, with the lowest and the highest value. The limit of
networks is the rate of matrix products. The limit of reading is the rate of reads of the same
samples into memory without any check. Both are measured in the same run.

``machine``, ``train``, ``predict`` and ``sweep`` need no dataset. ``sweep`` measures a GPU: it runs
the network on JAX and PyTorch in float32, tf32 and bfloat16, each in its own process, and lists
measurements that failed, for example because of too little memory. TensorFlow is not needed.
"""

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from toolkit import backend, cli, messages
from toolkit.cli import option
from toolkit.data.annotations import MTT_TOP_TAGS
from toolkit.data.audio import SAMPLE_RATE
from toolkit.errors import ToolkitError, UsageError
from toolkit.files import write_atomically
from toolkit.models.config import BLOCKS, NetworkConfig

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("machine", "decode", "build", "input", "train", "predict", "start")
# The precisions that `sweep` compares, with the environment and the options that select each. On
# GPUs, JAX computes float32 products in tf32 by default, PyTorch does not.
PRECISIONS = {
    "float32": ({"NVIDIA_TF32_OVERRIDE": "0", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}, []),
    "tf32": ({"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}, []),
    "bfloat16": ({}, ["--mixed-precision"]),
}
# A repeat calls short work as often as fits into this time, so that clocks and caches settle.
_REPEAT_SECONDS = 2.0


# fmt: off
@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    data_dir: str = option(
        "./dataset", "dataset for decode, build, input and start",
        group="what to measure", metavar="PATH")
    num_workers: tuple[int, ...] = option(
        (1, 2), "worker processes of a build", shown="1 2",
        group="what to measure", type=cli.positive_int, nargs="+", metavar="N")
    repeats: int = option(
        5, "timed repeats; short work is looped for about 2 s per repeat",
        group="what to measure", type=cli.positive_int, metavar="N")
    block: tuple[str, ...] = option(
        ("se",), "building blocks", shown="se", group="network", choices=BLOCKS, nargs="+")
    batch_size: tuple[int, ...] = option(
        (23,), "segments per batch", shown="23",
        group="network", type=cli.positive_int, nargs="+", metavar="N")
    init_features: int = option(
        128, "features of the first convolution",
        group="network", type=cli.positive_int, metavar="N")
    backend: str | None = option(
        None, "Keras backend", shown="as train.py selects; for sweep, jax and torch",
        group="machine", choices=("tensorflow", "jax", "torch"))
    mixed_precision: bool = option(False, "compute in bfloat16", group="machine")
    jit: str = option("auto", cli.JIT_HELP, group="machine", choices=("auto", "on", "off"))
    json: str | None = option(
        None, "write the figures to a file", group="output", metavar="FILE")
# fmt: on


@dataclass
class Figure:
    """A rate or a duration, or the error if the measurement failed."""

    stage: str
    what: str
    unit: str
    median: float | None = None
    lowest: float | None = None
    highest: float | None = None
    share: float | None = None  # of the machine's rate that limits it
    error: str = ""


def measure(stage, what, unit, call, amount, repeats, limit=None) -> Figure:
    """Measure how many units of work a call does per second, or its seconds if the unit is s.

    Parameters
    ----------
    stage, what, unit : str
        As in `Figure`.
    call : callable
        Returns when `amount` units are done.
    amount : float
        Units of work per call.
    repeats : int
        Number of timed repeats.
    limit : float or None
        Units per second that the machine allows.
    """

    def seconds(num_calls: int) -> float:
        started = time.perf_counter()
        for _ in range(num_calls):
            call()
        return (time.perf_counter() - started) / num_calls

    # The first call compiles the network and fills caches.
    call()
    num_calls = max(1, round(_REPEAT_SECONDS / max(seconds(1), 1e-9)))
    values = [seconds(num_calls) for _ in range(repeats)]
    if unit != "s":
        values = [amount / value for value in values]
    median = statistics.median(values)
    share = None if limit is None else median / limit
    return Figure(stage, what, unit, median, min(values), max(values), share)


# --- Stages of the pipeline ----------------------------------------------------------------------


def measure_decode(options: Options) -> Iterator[Figure]:
    """Measure decoding in one process."""
    from toolkit.data.audio import decode

    paths = _audio_files(options.data_dir)[:32]

    def call() -> None:
        for path in paths:
            decode(path)

    yield measure("decode", "1 process", "clips/s", call, len(paths), options.repeats)


def measure_build(options: Options) -> Iterator[Figure]:
    """Measure build_mtt.py from its start to its end, on links to the dataset."""
    from input_data import open_dataset

    data_dir = Path(options.data_dir).resolve()
    num_clips = sum(split.num_clips for split in open_dataset(data_dir).splits.values())

    def build(num_workers: int) -> None:
        with tempfile.TemporaryDirectory(dir=data_dir.parent) as folder:
            for name in ("annotations_final.csv", "mp3"):
                (Path(folder) / name).symlink_to(data_dir / name)
            command = ["build_mtt.py", "--data-dir", folder, "--num-audios-per-shard", "10"]
            _run_script(*command, "--num-workers", str(num_workers))

    for number in options.num_workers:
        what = messages.count(number, "worker")
        yield measure("build", what, "clips/s", partial(build, number), num_clips, options.repeats)


def measure_input(options: Options) -> Iterator[Figure]:
    """Measure shuffled training batches, and bare reads of the same samples as their limit."""
    from input_data import SegmentReader, open_dataset, shuffled_order
    from toolkit.training.loop import choose_trainer, compile_trainer
    from toolkit.training.options import TrainingOptions

    import keras

    class BareReader(SegmentReader):
        """Reads only the samples, without any check."""

        def read(self, rows: np.ndarray) -> tuple[np.ndarray, None]:
            segments = np.empty((len(rows), self.num_samples), self.stored_type)
            for samples, record in zip(segments, self._records[rows].tolist(), strict=True):
                shard, _, start, length = record
                os.preadv(self._files[shard].fileno(), [samples], start + length - samples.nbytes)
            return segments, None

    dataset, batch_size = open_dataset(options.data_dir), options.batch_size[0]
    num_segments = dataset.splits["train"].num_segments // batch_size * batch_size
    if not num_segments:
        raise UsageError(f"--batch-size {batch_size}: more than there are training segments")
    # Its network computes almost nothing, so training is as fast as segments reach it.
    samples = keras.Input((dataset.num_samples,))
    tags = keras.layers.Dense(len(dataset.tags), activation="sigmoid")(samples[:, ::1000])
    jit = backend.choose_jit(options.jit, "basic")
    trainer = compile_trainer(keras.Model(samples, tags), TrainingOptions(), 0, jit)
    epochs = itertools.count()

    def next_order(reader: SegmentReader) -> np.ndarray:
        # Another order in every epoch, as in training.
        return shuffled_order(reader.num_segments, 0, 0, next(epochs))

    def read_epoch(reader: SegmentReader) -> None:
        for _ in reader.batches(batch_size, next_order(reader)):
            pass

    def train_epoch(runner, reader: SegmentReader) -> None:
        runner.run_epoch(batch_size, next_order(reader), lambda num_steps, loss: None)

    # Eight is the default; from the page cache, two are faster (docs/performance.md).
    for num_threads in (1, 2, 8):
        limit = None
        for stage, reader_class, what in (
            ("machine", BareReader, "reads without any check"),
            ("input", SegmentReader, f"batches of {batch_size}"),
            ("input", SegmentReader, f"training on batches of {batch_size} without a network"),
        ):
            reader = reader_class(dataset, "train", num_threads)
            what += f", {reader.stored_type.__name__}, {messages.count(num_threads, 'thread')}"
            call = partial(read_epoch, reader)
            if "training" in what:
                what += f", {keras.backend.backend()}"
                call = partial(train_epoch, choose_trainer(trainer, reader), reader)
            figure = measure(stage, what, "segments/s", call, num_segments, options.repeats, limit)
            reader.close()
            limit = limit or figure.median
            yield figure


def measure_start(options: Options) -> Iterator[Figure]:
    """Measure the time from the start of tag.py to the tags of one clip."""
    from model import build_network
    from toolkit.models.checkpoints import Checkpoint, save

    config = NetworkConfig(options.block[0], init_features=options.init_features)
    audio = str(_audio_files(options.data_dir)[0])
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "model.keras")
        save(model, Checkpoint(build_network(config), config, MTT_TOP_TAGS, SAMPLE_RATE))
        call = partial(_run_script, "tag.py", model, audio)
        yield measure("start", f"tag.py on one clip, {config.block}", "s", call, 1, options.repeats)


def _audio_files(data_dir: str) -> list[Path]:
    paths = sorted(Path(data_dir).glob("mp3/*/*.mp3"))
    if not paths:
        raise UsageError(f"{data_dir}/mp3: no MP3 files")
    return paths


def _run_script(script: str, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / script), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or [f"status {finished.returncode}"]
        raise ToolkitError(lines[-1])


# --- Machine and network -------------------------------------------------------------------------


def measure_machine(options: Options) -> Iterator[Figure]:
    """Measure matrix products and copies in the memory of the backend's device."""
    from keras import ops, random

    on_accelerator, repeats = bool(backend.device_names()), options.repeats
    size, length = (8192, 2**28) if on_accelerator else (2048, 2**26)
    dtype = "bfloat16" if options.mixed_precision else "float32"
    a, b = (ops.cast(random.normal((size, size), seed=seed), dtype) for seed in (1, 2))
    source = ops.ones(length, "float32")

    def finish(compute: Callable) -> None:
        """Wait for the device: copy the last element of the result to the host."""
        ops.convert_to_numpy(ops.cast(ops.ravel(compute())[-1], "float32"))

    multiply, add = partial(finish, lambda: ops.matmul(a, b)), partial(finish, lambda: source + 1.0)
    what = f"matrix product, {dtype}"
    yield measure("machine", what, "GFLOP/s", multiply, 2e-9 * size**3, repeats)
    yield measure("machine", "memory, read and written", "GB/s", add, 8e-9 * length, repeats)


def count_flops(network) -> float:
    """Count the floating-point operations of the forward pass per segment.

    Convolutions and dense layers only; a multiplication and an addition are two operations.
    Training takes three times as many.
    """
    flops = 0.0
    for layer in network.layers:
        if type(layer).__name__ in ("Conv1D", "Dense"):
            frames = layer.output.shape[1] if type(layer).__name__ == "Conv1D" else 1
            flops += 2.0 * frames * float(np.prod(layer.kernel.shape))
    return flops


def measure_network(
    options: Options, stage: str, block: str, batch_size: int, gflops: float
) -> Figure:
    """Measure training or prediction on random segments in device memory."""
    from model import build_network

    import keras

    jit = backend.choose_jit(options.jit, block)
    what = (
        f"{keras.backend.backend()}, {block}, {options.init_features} features, batch {batch_size}"
        f", {'bfloat16' if options.mixed_precision else 'float32'}"
        f", {'compiled' if jit else 'not compiled'}"
    )
    try:
        network = build_network(NetworkConfig(block, init_features=options.init_features))
        random = np.random.default_rng(0)
        x = random.standard_normal((batch_size, network.input_shape[1]), np.float32) * 0.1
        y = (random.random((batch_size, network.output_shape[1])) < 0.1).astype(np.float32)
        call, amount = (_train_call if stage == "train" else _predict_call)(network, x, y, jit)
        limit = gflops * 1e9 / count_flops(network) / (3 if stage == "train" else 1)
        return measure(stage, what, "segments/s", call, amount, options.repeats, limit)
    except Exception as error:  # usually a lack of memory; each backend raises another type
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        return Figure(stage, what, "segments/s", error=reason)


def _predict_call(network, x: np.ndarray, y: np.ndarray, jit: bool) -> tuple[Callable, int]:
    """Return a call that predicts a batch, and its number of segments."""
    import keras

    network.compile(jit_compile=jit)
    return partial(network.predict_on_batch, keras.ops.convert_to_tensor(x)), len(x)


def _train_call(network, x: np.ndarray, y: np.ndarray, jit: bool) -> tuple[Callable, int]:
    """Return a call that trains one or several steps, and its number of segments."""
    from toolkit.training.loop import choose_trainer, compile_trainer
    from toolkit.training.options import TrainingOptions

    import keras

    runner = choose_trainer(compile_trainer(network, TrainingOptions(), 0, jit))
    steps = [np.broadcast_to(part, (runner.steps_per_call, *part.shape)) for part in (x, y)]
    inputs = [keras.ops.convert_to_tensor(part) for part in steps]
    # Read the losses to wait for the device: JAX returns before the steps are finished.
    return lambda: np.asarray(runner.run(*inputs)), runner.steps_per_call * len(x)


def sweep(options: Options, machine: dict[str, str]) -> Iterator[Figure]:
    """Measure the network on JAX and PyTorch in each precision, each in its own process.

    The accelerator that a process finds is added to `machine`.
    """
    shared = ["machine", "predict", "train", "--jit", options.jit, "--block", *options.block]
    shared += ["--batch-size", *map(str, options.batch_size), "--repeats", str(options.repeats)]
    shared += ["--init-features", str(options.init_features)]
    names = [options.backend] if options.backend else ["jax", "torch"]
    for name, precision in itertools.product(names, PRECISIONS):
        # A process keeps its backend, and the libraries read the environment when they start.
        environment, its_options = PRECISIONS[precision]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "figures.json"
            command = [sys.executable, "-m", "tools.benchmark", *shared, *its_options]
            command += ["--backend", name, "--json", str(path)]
            # Messages are shown; the figures are printed in one table at the end.
            status = subprocess.run(
                command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL
            ).returncode
            found = path.read_text() if path.exists() else '{"machine": {}, "figures": []}'
            found = json.loads(found)
        machine |= found["machine"]
        for figure in found["figures"]:
            yield Figure(**figure | {"what": f"{precision}: {figure['what']}"})
        # A process that was killed, for example for lack of memory, reports no error itself.
        if status and not any(figure["error"] for figure in found["figures"]):
            error = f"the process ended with status {status}"
            yield Figure("sweep", f"{name}, {precision}", "", error=error)


# --- Report and command line ---------------------------------------------------------------------


def describe_machine() -> dict[str, str]:
    """Return processor, memory, accelerators and versions of packages."""
    described = {"processor": platform.machine()}
    with suppress(OSError, IndexError):
        cpuinfo = Path("/proc/cpuinfo").read_text()
        described["processor"] = re.findall(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)[0]
    described["cores"] = str(os.cpu_count())
    described["memory"] = messages.size(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    described["python"] = platform.python_version()
    # Asking for devices imports a backend, which decoding and building do not need.
    if "keras" in sys.modules:
        described["accelerator"] = ", ".join(backend.device_names()) or "none"
    for package in ("keras", "tensorflow", "jax", "torch", "numpy", "av"):
        with suppress(metadata.PackageNotFoundError):
            described[package] = metadata.version(package)
    return described


def report(measured: Iterable[Figure], machine: dict[str, str], json_path: str | None) -> int:
    """Print each figure once measured, then a table; return 1 if a measurement failed."""
    figures = []
    for figure in measured:
        figures.append(figure)
        rate = f"failed: {figure.error}" if figure.error else _format(figure.median)
        messages.say(f"{figure.stage}: {figure.what}: {rate} {figure.unit}")
        if json_path:  # after each figure, so that an aborted run keeps its figures
            content = {"machine": machine, "figures": [asdict(each) for each in figures]}
            write_atomically(Path(json_path), json.dumps(content, indent=1).encode() + b"\n")
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{'median':>10} {'lowest':>10} {'highest':>10} {'unit':<10} {'share':>5}  what")
    for figure in figures:
        values = (_format(value) for value in (figure.median, figure.lowest, figure.highest))
        share = "" if figure.share is None else f"{figure.share:.0%}"
        columns = f"{' '.join(f'{value:>10}' for value in values)} {figure.unit:<10} {share:>5}"
        print(f"{columns}  {figure.stage}: {figure.what} {figure.error}".rstrip())
    return 1 if any(figure.error for figure in figures) else 0


def _format(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Measure the throughput of each stage, also as a share of the machine's limit.",
        "  python -m tools.benchmark all --data-dir demo/dataset\n"
        "  python -m tools.benchmark train --backend jax --batch-size 23 256 --mixed-precision\n"
        "  python -m tools.benchmark sweep --batch-size 23 64 256 1024 --json gpu.json",
    )
    parser.add_argument_group("what to measure").add_argument(
        "stages",
        metavar="STAGE",
        nargs="+",
        choices=(*STAGES, "all", "sweep"),
        help=f"one or more of {', '.join(STAGES)}; or all; or sweep",
    )
    cli.add_options(parser, Options)
    return cli.add_general(parser)


def main(argv: list[str] | None = None) -> int:
    return cli.run(_benchmark, build_parser().parse_args(argv))


def _benchmark(arguments: argparse.Namespace) -> int:
    options = cli.read_options(Options, arguments)
    if options.json:
        cli.check_output(options.json, "--json")
    stages = STAGES if "all" in arguments.stages else arguments.stages
    if "sweep" in stages:
        if len(stages) > 1:
            raise UsageError(f"{' '.join(stages)}: run sweep alone")
        machine = describe_machine()
        return report(sweep(options, machine), machine, options.json)
    needing = [stage for stage in stages if stage in ("decode", "build", "input", "start")]
    if needing and not Path(options.data_dir).is_dir():
        raise UsageError(f"--data-dir {options.data_dir}: no dataset for {', '.join(needing)}")
    if options.backend:
        os.environ["KERAS_BACKEND"] = options.backend
    if set(stages) - {"decode", "build"}:
        backend.import_keras()
    return report(_measure_stages(options, stages), describe_machine(), options.json)


def _measure_stages(options: Options, stages: Sequence[str]) -> Iterator[Figure]:
    for stage, measure_stage in (
        ("decode", measure_decode),
        ("build", measure_build),
        ("input", measure_input),
        ("start", measure_start),
    ):
        if stage in stages:
            yield from measure_stage(options)
    if not {"machine", "predict", "train"} & {*stages}:
        return
    product, copy = measure_machine(options)
    yield from (product, copy)
    if options.mixed_precision:
        import keras

        keras.config.set_dtype_policy("mixed_bfloat16")
    for block, size in itertools.product(options.block, options.batch_size):
        for stage in ("predict", "train"):
            if stage in stages:
                yield measure_network(options, stage, block, size, product.median)


if __name__ == "__main__":
    sys.exit(main())
