"""Measure the throughput of each stage, and what share of the machine's limit it reaches.

    python -m tools.benchmark all --data-dir demo/dataset
    python -m tools.benchmark train predict --block rese --batch-size 23 --jit off
    python -m tools.benchmark train --backend jax --batch-size 23 256 --mixed-precision
    python -m tools.benchmark sweep --batch-size 23 64 256 1024 --json gpu.json

Each figure is the median of repeats with the lowest and the highest. Networks are compared with the
rate of matrix products, and reading with plain reads of the shards, both measured in the same run.

``machine``, ``train``, ``predict`` and ``sweep`` need no dataset. ``sweep`` measures a GPU: it runs
the network on JAX and PyTorch in float32, tf32 and bfloat16, each in its own process, and lists
what failed, for example for lack of memory. It needs no TensorFlow.
"""

import argparse
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit import backend, cli, messages
from toolkit.errors import ToolkitError, UsageError
from toolkit.files import write_atomically
from toolkit.models.config import BLOCKS, NetworkConfig

import numpy as np

if TYPE_CHECKING:
    import keras

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("machine", "decode", "build", "input", "train", "predict", "start")
# The precisions that `sweep` compares, and the options that select each.
PRECISIONS = {"float32": ["--no-tf32"], "tf32": [], "bfloat16": ["--mixed-precision"]}
_REPEAT_SECONDS = 2.0  # a repeat calls short work as often as fits into this time


@dataclass
class Figure:
    """A rate or a time, or why it could not be measured."""

    stage: str
    what: str
    unit: str
    median: float | None = None
    lowest: float | None = None
    highest: float | None = None
    share: float | None = None  # of the machine's rate that limits it
    error: str = ""


def summarise(
    stage: str, what: str, unit: str, values: Sequence[float], limit: float | None = None
) -> Figure:
    """Return the median and the range of values; `limit` is the highest that is possible."""
    median = statistics.median(values)
    share = None if limit is None else median / limit
    return Figure(stage, what, unit, median, min(values), max(values), share)


def measure(call: Callable[[], object], amount: float, repeats: int) -> list[float]:
    """Time a call.

    Parameters
    ----------
    call : callable
        Returns when its work is done.
    amount : float
        Units of work per call.
    repeats : int
        Number of timed repeats, after two calls to warm up.

    Returns
    -------
    list of float
        Units of work per second in each repeat.
    """
    call()
    started = time.perf_counter()
    call()
    num_calls = max(1, round(_REPEAT_SECONDS / max(time.perf_counter() - started, 1e-9)))
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(num_calls):
            call()
        rates.append(num_calls * amount / (time.perf_counter() - started))
    return rates


# --- Stages of the pipeline ----------------------------------------------------------------------


def measure_decode(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Measure decoding in one process."""
    from toolkit.data.audio import decode

    paths = _audio_files(arguments.data_dir)[:32]
    rates = measure(lambda: [decode(path) for path in paths], len(paths), arguments.repeats)
    yield summarise("decode", "1 process", "clips/s", rates)


def measure_build(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Measure build_mtt.py from its start to its end, on links to the dataset."""
    data_dir = Path(arguments.data_dir).resolve()
    for num_workers in arguments.num_workers:
        rates = []
        for _ in range(arguments.repeats):
            with tempfile.TemporaryDirectory(dir=data_dir.parent) as folder:
                for name in ("annotations_final.csv", "mp3"):
                    (Path(folder) / name).symlink_to(data_dir / name)
                started = time.perf_counter()
                _run_python(
                    str(ROOT / "build_mtt.py"), "--data-dir", folder,
                    "--num-workers", str(num_workers), "--num-audios-per-shard", "10",
                )  # fmt: skip
                seconds = time.perf_counter() - started
                manifest = json.loads((Path(folder) / "tfrecord/manifest.json").read_text())
            rates.append(sum(split["clips"] for split in manifest["splits"].values()) / seconds)
        yield summarise("build", messages.count(num_workers, "worker"), "clips/s", rates)


def measure_input(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Measure shuffled training batches against plain reads of the same files."""
    from input_data import SegmentReader, open_dataset, shuffled_order

    dataset, batch_size = open_dataset(arguments.data_dir), arguments.batch_size[0]
    paths = dataset.splits["train"].shards
    buffer = bytearray(2**22)

    def read_files() -> None:
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    num_bytes = sum(path.stat().st_size for path in paths)
    rates = measure(read_files, num_bytes, arguments.repeats)
    bytes_per_second = statistics.median(rates)
    yield summarise("machine", "plain reads of the shards", "B/s", rates)
    epochs = itertools.count()
    for num_threads in (1, 8):
        reader = SegmentReader(dataset, "train", num_threads)
        num_steps = reader.num_segments // batch_size
        if not num_steps:
            raise UsageError(
                f"--batch-size {batch_size}: more than the {reader.num_segments} training segments"
            )

        def read_epoch(reader=reader) -> None:
            order = shuffled_order(reader.num_segments, 0, 0, next(epochs))
            for _ in reader.batches(batch_size, order):
                pass

        rates = measure(read_epoch, num_steps * batch_size, arguments.repeats)
        limit = bytes_per_second / num_bytes * reader.num_segments
        what = f"batches of {batch_size}, {messages.count(num_threads, 'thread')}"
        yield summarise("input", what, "segments/s", rates, limit)
        reader.close()


def measure_start(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Measure the time from the start of eval.py and tag.py to their first results."""
    from input_data import open_dataset
    from model import build_network
    from toolkit.models.checkpoints import Checkpoint, save

    dataset = open_dataset(arguments.data_dir)
    config = NetworkConfig(
        arguments.block[0], init_features=arguments.init_features,
        num_tags=len(dataset.tags), num_samples=dataset.num_samples,
    )  # fmt: skip
    audio = str(_audio_files(arguments.data_dir)[0])
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "model.keras")
        save(model, Checkpoint(build_network(config), config, dataset.tags, dataset.sample_rate))
        for what, command in (
            ("eval.py to its first batch", ["-c", _FIRST_BATCH, model, arguments.data_dir]),
            ("tag.py on one clip", [str(ROOT / "tag.py"), model, audio]),
        ):
            seconds = []
            for _ in range(arguments.repeats):
                started = time.perf_counter()
                _run_python(*command)
                seconds.append(time.perf_counter() - started)
            yield summarise("start", f"{what}, {config.block}", "s", seconds)


# Runs eval.py until Keras has predicted the first batch.
_FIRST_BATCH = """
import importlib, os, sys
from toolkit import backend
backend.import_keras()
import keras
predict = keras.Model.predict_on_batch
def predict_and_exit(*arguments, **options):
    predict(*arguments, **options)
    os._exit(0)
keras.Model.predict_on_batch = predict_and_exit
importlib.import_module("eval").main([sys.argv[1], "--data-dir", sys.argv[2]])
sys.exit("eval.py ended before its first batch")
"""


def _audio_files(data_dir: str) -> list[Path]:
    paths = sorted(Path(data_dir).glob("mp3/*/*.mp3"))
    if not paths:
        raise UsageError(f"{data_dir}/mp3: no MP3 files")
    return paths


def _run_python(*arguments: str) -> None:
    """Run Python in its own process, where the toolkit can be imported."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or [f"status {finished.returncode}"]
        raise ToolkitError(lines[-1])


# --- Machine and network -------------------------------------------------------------------------


def describe_machine() -> dict[str, str]:
    """Return processor, memory, accelerators and versions of packages."""
    described = {"processor": platform.processor() or platform.machine()}
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line for line in lines if line.startswith("model name"))
        described["processor"] = model.split(":")[1].strip()
    described["cores"] = str(os.cpu_count())
    described["memory"] = messages.size(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    described["python"] = platform.python_version()
    if "keras" in sys.modules:
        described["accelerator"] = ", ".join(backend.device_names()) or "none"
    for package in ("keras", "tensorflow", "jax", "torch", "numpy", "av"):
        with suppress(metadata.PackageNotFoundError):
            described[package] = metadata.version(package)
    return described


def measure_machine(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Measure matrix products and copies in the memory of the backend's device."""
    import keras

    on_accelerator = bool(backend.device_names())

    def finish(result) -> None:
        """Copy the last element to the host, after the device has computed all."""
        keras.ops.convert_to_numpy(keras.ops.cast(keras.ops.ravel(result)[-1], "float32"))

    size = 8192 if on_accelerator else 2048
    dtype = "bfloat16" if arguments.mixed_precision else "float32"
    a, b = (keras.ops.cast(keras.random.normal((size, size), seed=s), dtype) for s in (1, 2))
    rates = measure(lambda: finish(keras.ops.matmul(a, b)), 2.0 * size**3, arguments.repeats)
    yield summarise("machine", f"matrix product, {dtype}", "FLOP/s", rates)
    length = 2**28 if on_accelerator else 2**26
    source = keras.ops.ones(length, "float32")
    rates = measure(lambda: finish(source + 1.0), 2 * 4 * length, arguments.repeats)
    yield summarise("machine", "memory, read and written", "B/s", rates)


def count_flops(network: "keras.Model") -> float:
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


def _measure_network(
    arguments: argparse.Namespace, stage: str, block: str, batch_size: int, flops_per_second: float
) -> Figure:
    """Measure training or prediction on random segments in device memory."""
    from model import build_network

    import keras

    jit = backend.choose_jit(arguments.jit, block)
    precision = "bfloat16" if arguments.mixed_precision else "float32"
    what = (
        f"{keras.backend.backend()}, {block}, {arguments.init_features} features, "
        f"batch {batch_size}, {precision}, {'compiled' if jit else 'not compiled'}"
    )
    try:
        network = build_network(NetworkConfig(block, init_features=arguments.init_features))
        random = np.random.default_rng(0)
        x = random.standard_normal((batch_size, network.input_shape[1]), np.float32) * 0.1
        y = (random.random((batch_size, network.output_shape[1])) < 0.1).astype(np.float32)
        call, num_segments = (_train_call if stage == "train" else _predict_call)(
            network, x, y, jit
        )
        rates = measure(call, num_segments, arguments.repeats)
    except Exception as error:  # of any backend, probably a lack of memory: measure the rest
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        return Figure(stage, what, "segments/s", error=reason)
    flops = count_flops(network) * (3 if stage == "train" else 1)
    return summarise(stage, what, "segments/s", rates, flops_per_second / flops)


def _predict_call(network: "keras.Model", x, y, jit: bool) -> tuple[Callable, int]:
    """Return a call that predicts a batch, and its number of segments."""
    import keras

    network.compile(jit_compile=jit)
    batch = keras.ops.convert_to_tensor(x)
    return lambda: network.predict_on_batch(batch), len(x)


def _train_call(network: "keras.Model", x, y, jit: bool) -> tuple[Callable, int]:
    """Return a call that trains one or several steps, and its number of segments."""
    from toolkit.training.loop import compile_trainer
    from toolkit.training.options import TrainingOptions

    import keras

    trainer = compile_trainer(network, TrainingOptions(), 0, jit)
    if keras.backend.backend() != "jax" or not jit:
        x, y = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)
        return lambda: trainer.train_on_batch(x, y), len(x)

    from toolkit.training.jax_loop import JaxTrainer

    runner = JaxTrainer(trainer)
    runner.set_cache(x, y)
    state = runner.state()
    rows = np.tile(np.arange(len(x), dtype=np.int32), (runner.steps_per_dispatch, 1))

    def call() -> None:
        nonlocal state
        state, losses = runner.run(state, rows)
        np.asarray(losses)

    return call, rows.size


def _forbid_tf32() -> None:
    import keras

    if keras.backend.backend() == "jax":
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")
    elif keras.backend.backend() == "torch":
        import torch

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    else:
        raise UsageError("--no-tf32: needs the JAX or PyTorch backend (--backend)")


def sweep(arguments: argparse.Namespace, machine: dict[str, str]) -> Iterator[Figure]:
    """Measure the network on JAX and PyTorch in each precision, each in its own process.

    The accelerator that a process finds is added to `machine`.
    """
    names = [arguments.backend] if arguments.backend else ["jax", "torch"]
    for name, (precision, options) in itertools.product(names, PRECISIONS.items()):
        if importlib.util.find_spec(name) is None:
            yield Figure("sweep", f"{name}, {precision}", "", error=f"{name} is not installed")
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "figures.json"
            command = [
                sys.executable, "-m", "tools.benchmark", "machine", "predict", "train", *options,
                "--backend", name, "--jit", arguments.jit, "--json", str(path),
                "--block", *arguments.block, "--batch-size", *map(str, arguments.batch_size),
                "--init-features", str(arguments.init_features),
                "--repeats", str(arguments.repeats),
            ]  # fmt: skip
            # Messages are shown; the figures are printed in one table at the end.
            status = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode
            found = {"machine": {}, "figures": []}
            if path.exists():
                found = json.loads(path.read_text())
        machine |= found["machine"]
        for figure in found["figures"]:
            yield Figure(**figure | {"what": f"{precision}: {figure['what']}"})
        if status and not any(figure["error"] for figure in found["figures"]):
            error = f"the process ended with status {status}"
            yield Figure("sweep", f"{name}, {precision}", "", error=error)


# --- Report and command line ---------------------------------------------------------------------


def report(measured: Iterable[Figure], machine: dict[str, str], json_path: str | None) -> int:
    """Print each figure when it is known, then a table; return 1 if a measurement failed."""
    figures = []
    for figure in measured:
        figures.append(figure)
        rate = f"failed: {figure.error}" if figure.error else _human(figure.median)
        messages.say(f"{figure.stage}: {figure.what}: {rate} {figure.unit}")
        if json_path:  # after each figure, so that an aborted run leaves its figures
            content = {"machine": machine, "figures": [asdict(each) for each in figures]}
            write_atomically(Path(json_path), json.dumps(content, indent=1).encode() + b"\n")
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{'median':>10} {'lowest':>10} {'highest':>10} {'unit':<10} {'share':>5}  what")
    for figure in figures:
        values = (_human(value) for value in (figure.median, figure.lowest, figure.highest))
        share = "" if figure.share is None else f"{figure.share:.0%}"
        columns = f"{' '.join(f'{value:>10}' for value in values)} {figure.unit:<10} {share:>5}"
        print(f"{columns}  {figure.stage}: {figure.what} {figure.error}".rstrip())
    return 1 if any(figure.error for figure in figures) else 0


def _human(value: float | None) -> str:
    if value is None:
        return "-"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Measure the throughput of each stage, and what share of the machine's limit it reaches.",
        "  python -m tools.benchmark all --data-dir demo/dataset\n"
        "  python -m tools.benchmark train --backend jax --batch-size 23 256 --mixed-precision\n"
        "  python -m tools.benchmark sweep --batch-size 23 64 256 1024 --json gpu.json",
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "stages", metavar="STAGE", nargs="+", choices=(*STAGES, "all", "sweep"),
        help=f"{', '.join(STAGES)}; all for all of these; or sweep",
    )  # fmt: skip
    cli.add_data_dir(what, "dataset for decode, build, input and start")
    network = parser.add_argument_group("network")
    network.add_argument(
        "--block", choices=BLOCKS, nargs="+", default=["se"], help="building blocks (default: se)"
    )
    for group, flag, help, default in (
        (what, "--num-workers", "worker processes of a build", [1, 2]),
        (what, "--repeats", "timed repeats, of about 2 s for short work", 5),
        (network, "--batch-size", "segments per batch", [23]),
        (network, "--init-features", "features of the first convolution", 128),
    ):
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        group.add_argument(
            flag, metavar="N", type=cli.positive_int, default=default,
            nargs="+" if isinstance(default, list) else None, help=f"{help} (default: {shown})",
        )  # fmt: skip
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--backend", choices=("tensorflow", "jax", "torch"), default=None,
        help="Keras backend (default: KERAS_BACKEND, or tensorflow; for sweep, jax and torch)",
    )  # fmt: skip
    for flag, help in (
        ("--mixed-precision", "compute in bfloat16"),
        ("--no-tf32", "do not use tf32 for float32 (JAX, PyTorch)"),
    ):
        machine.add_argument(flag, action="store_true", help=f"{help} (default: off)")
    cli.add_jit(machine)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", metavar="FILE", default=None, help="write the figures to a file (default: none)"
    )
    return cli.add_general(parser)


def main(argv: list[str] | None = None) -> int:
    return cli.run(_benchmark, build_parser().parse_args(argv))


def _benchmark(arguments: argparse.Namespace) -> int:
    stages = STAGES if "all" in arguments.stages else arguments.stages
    if "sweep" in stages:
        if len(stages) > 1:
            raise UsageError(f"{' '.join(stages)}: run sweep alone")
        machine = describe_machine()
        return report(sweep(arguments, machine), machine, arguments.json)
    needing = [stage for stage in stages if stage in ("decode", "build", "input", "start")]
    if needing and not Path(arguments.data_dir).is_dir():
        raise UsageError(f"--data-dir {arguments.data_dir}: no dataset for {', '.join(needing)}")
    if arguments.backend:
        os.environ["KERAS_BACKEND"] = arguments.backend
    if set(stages) - {"decode", "build", "input"}:
        backend.import_keras()
    if arguments.no_tf32:
        _forbid_tf32()
    return report(_measure_stages(arguments, stages), describe_machine(), arguments.json)


def _measure_stages(arguments: argparse.Namespace, stages: Sequence[str]) -> Iterator[Figure]:
    for stage, measure_stage in (
        ("decode", measure_decode),
        ("build", measure_build),
        ("input", measure_input),
        ("start", measure_start),
    ):
        if stage in stages:
            yield from measure_stage(arguments)
    network_stages = [stage for stage in ("predict", "train") if stage in stages]
    if network_stages or "machine" in stages:
        product, copy = measure_machine(arguments)
        yield from (product, copy)
    if arguments.mixed_precision:
        import keras

        keras.config.set_dtype_policy("mixed_bfloat16")
    for block, size, stage in itertools.product(
        arguments.block, arguments.batch_size, network_stages
    ):
        yield _measure_network(arguments, stage, block, size, product.median)


if __name__ == "__main__":
    sys.exit(main())
