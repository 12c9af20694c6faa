"""The measurements of tools.benchmark: one function per stage.

Each function takes the parsed command line of `tools.benchmark` and yields or returns figures.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit import backend, messages
from toolkit.errors import ToolkitError, UsageError
from toolkit.models.config import NetworkConfig

import numpy as np

if TYPE_CHECKING:
    import keras

ROOT = Path(__file__).resolve().parents[1]
_REPEAT_SECONDS = 2.0  # a repeat calls short work as often as fits into this time


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


def summarise(
    stage: str, what: str, unit: str, values: Sequence[float], limit: float | None = None
) -> Figure:
    """Return the median and the range of values; `limit` is the highest possible value."""
    median = statistics.median(values)
    share = None if limit is None else median / limit
    return Figure(stage, what, unit, median, min(values), max(values), share)


def measure_rate(
    stage: str, what: str, unit: str, call: Callable[[], object], amount: float, repeats: int,
    limit: float | None = None,
) -> Figure:  # fmt: skip
    """Measure the units of work per second; each call blocks until `amount` units are done."""
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
    return summarise(stage, what, unit, rates, limit)


# --- Stages of the pipeline ----------------------------------------------------------------------


def measure_decode(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Measure decoding in one process."""
    from toolkit.data.audio import decode

    paths = _audio_files(arguments.data_dir)[:32]
    yield measure_rate(
        "decode", "1 process", "clips/s", lambda: [decode(path) for path in paths],
        len(paths), arguments.repeats,
    )  # fmt: skip


def measure_build(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Measure build_mtt.py from its start to its end, on links to the dataset."""
    data_dir = Path(arguments.data_dir).resolve()
    for num_workers in arguments.num_workers:
        rates = []
        for _ in range(arguments.repeats):
            with tempfile.TemporaryDirectory(dir=data_dir.parent) as folder:
                for name in ("annotations_final.csv", "mp3"):
                    (Path(folder) / name).symlink_to(data_dir / name)
                seconds = _time_python(
                    str(ROOT / "build_mtt.py"), "--data-dir", folder,
                    "--num-workers", str(num_workers), "--num-audios-per-shard", "10",
                )  # fmt: skip
                manifest = json.loads((Path(folder) / "tfrecord/manifest.json").read_text())
            rates.append(sum(split["clips"] for split in manifest["splits"].values()) / seconds)
        yield summarise("build", messages.count(num_workers, "worker"), "clips/s", rates)


def measure_input(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Measure shuffled training batches against bare reads of the same samples, without checks."""
    from input_data import SegmentReader, open_dataset, shuffled_order

    backend.keep_freed_memory()  # as in training
    dataset, batch_size = open_dataset(arguments.data_dir), arguments.batch_size[0]
    epochs = itertools.count()

    def read_epoch(reader: SegmentReader) -> None:
        order = shuffled_order(reader.num_segments, 0, 0, next(epochs))
        for _ in reader.batches(batch_size, order):
            pass

    def read_first_epoch() -> None:
        reader = SegmentReader(dataset, "train", num_threads=1)
        read_epoch(reader)
        reader.close()

    class BareReader(SegmentReader):
        """Reads only the samples, without any check."""

        def read(self, rows: np.ndarray) -> tuple[np.ndarray, None]:
            segments = np.empty((len(rows), self.num_samples), self.stored_type)
            for samples, record in zip(segments, self._records[rows].tolist(), strict=True):
                shard, _, start, length = record
                os.preadv(self._files[shard].fileno(), [samples], start + length - samples.nbytes)
            return segments, None

    for num_threads in (1, 2, 8):
        reader = SegmentReader(dataset, "train", num_threads)
        num_segments = reader.num_segments // batch_size * batch_size
        if not num_segments:
            raise UsageError(
                f"--batch-size {batch_size}: more than the {reader.num_segments} training segments"
            )
        threads = messages.count(num_threads, "thread")
        bare_reader = BareReader(dataset, "train", num_threads)
        bare = measure_rate(
            "machine", f"reads without any check, {threads}", "segments/s",
            lambda r=bare_reader: read_epoch(r), num_segments, arguments.repeats,
        )  # fmt: skip
        yield bare
        what = f"batches of {batch_size}, {reader.stored_type.__name__}"
        yield measure_rate(
            "input", f"{what}, {threads}", "segments/s", lambda r=reader: read_epoch(r),
            num_segments, arguments.repeats, bare.median,
        )  # fmt: skip
        reader.close()
        bare_reader.close()
        if num_threads == 1:
            yield measure_rate(
                "input", f"{what}, first epoch, with checksums, 1 thread", "segments/s",
                read_first_epoch, num_segments, arguments.repeats, bare.median,
            )  # fmt: skip


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
            seconds = [_time_python(*command) for _ in range(arguments.repeats)]
            yield summarise("start", f"{what}, {config.block}", "s", seconds)


# Runs eval.py until Keras has predicted the first batch.
_FIRST_BATCH = """
import importlib, os, sys
from toolkit import prediction
predict = prediction.predict_clips
prediction.predict_clips = lambda model, clips, batch_size, *options: predict(
    model, clips, batch_size, lambda: os._exit(0)
)
importlib.import_module("eval").main([sys.argv[1], "--data-dir", sys.argv[2]])
sys.exit("eval.py ended before its first batch")
"""


def _audio_files(data_dir: str) -> list[Path]:
    paths = sorted(Path(data_dir).glob("mp3/*/*.mp3"))
    if not paths:
        raise UsageError(f"{data_dir}/mp3: no MP3 files")
    return paths


def _time_python(*arguments: str) -> float:
    """Run Python in a new process that can import the toolkit; return the duration in seconds."""
    started = time.perf_counter()
    finished = subprocess.run(
        [sys.executable, *arguments], env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or [f"status {finished.returncode}"]
        raise ToolkitError(lines[-1])
    return time.perf_counter() - started


# --- Machine and network -------------------------------------------------------------------------


def measure_machine(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Measure matrix products and copies in the memory of the backend's device."""
    import keras

    on_accelerator = bool(backend.device_names())

    def finish(result) -> None:
        """Wait for the device: copy the last element of the result to the host."""
        keras.ops.convert_to_numpy(keras.ops.cast(keras.ops.ravel(result)[-1], "float32"))

    size = 8192 if on_accelerator else 2048
    dtype = "bfloat16" if arguments.mixed_precision else "float32"
    a, b = (keras.ops.cast(keras.random.normal((size, size), seed=s), dtype) for s in (1, 2))
    yield measure_rate(
        "machine", f"matrix product, {dtype}", "GFLOP/s", lambda: finish(keras.ops.matmul(a, b)),
        2e-9 * size**3, arguments.repeats,
    )  # fmt: skip
    source = keras.ops.ones(2**28 if on_accelerator else 2**26, "float32")
    yield measure_rate(
        "machine", "memory, read and written", "GB/s", lambda: finish(source + 1.0),
        8e-9 * source.shape[0], arguments.repeats,
    )  # fmt: skip


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


def measure_network(
    arguments: argparse.Namespace, stage: str, block: str, batch_size: int, gflops: float
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
        limit = gflops * 1e9 / count_flops(network) / (3 if stage == "train" else 1)
        return measure_rate(stage, what, "segments/s", call, num_segments, arguments.repeats, limit)
    except Exception as error:  # usually a lack of memory, with other types in each backend: go on
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        return Figure(stage, what, "segments/s", error=reason)


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
