"""Measure the throughput of each stage, and of the model alone on any Keras backend.

    python benchmark.py all --data-dir ./dataset
    python benchmark.py train predict --block rese --batch-size 23 --jit off
    python benchmark.py train --backend jax --batch-size 23 256 --mixed-precision --json bf16.json
    python benchmark.py sweep --batch-size 23 64 256 1024 --profile --json gpu.json
    python benchmark.py machine growth --data-dir demo/dataset --repeats 3

Every figure is a median over repeats with its spread, beside the same run's measure of the
machine: the rate of matrix products, of copies in memory, and of sequential reads. ``machine``,
``train``, ``predict`` and ``sweep`` need neither TensorFlow nor data.

``start`` is how long ``eval.py`` takes to its first batch. ``growth`` repeats a dataset's clips to
100, 500 and 2,000 and takes the time and the memory of building, training and evaluation.
``hosts`` trains on JAX in one process and in two that share the cores, and takes what the exchange
of gradients costs. ``sweep`` runs the model alone on JAX and PyTorch in float32, with tf32, and in
bfloat16, each in a process of its own: all that is to be known of a GPU in one run. What fails
there, for want of memory perhaps, is said, and the rest is measured.
"""

import argparse
import csv
import gzip
import importlib
import importlib.util
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit import backend, cli, messages
from toolkit.errors import ToolkitError, UsageError
from toolkit.training import devices, hosts

import numpy as np

if TYPE_CHECKING:
    from model import NetworkConfig
    from toolkit.training.options import TrainingOptions

    import keras

STAGES = ("machine", "decode", "build", "input", "train", "predict", "start")
EXTRA_STAGES = ("growth", "hosts", "sweep")
_NEED_DATA = ("decode", "build", "input", "start", "growth")
# What `sweep` compares: a name, and the options that make it.
PRECISIONS = {
    "float32": ["--no-tf32"],
    "tf32": [],
    "bf16": ["--mixed-precision"],
}
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
    # Of networks and input, by the segment:
    flops: float | None = None  # floating-point operations
    bytes: float | None = None  # the least that must move through memory
    precision: str = "float32"  # whose matrix-product rate is the ceiling
    floors: dict[str, float] = field(default_factory=dict)  # seconds, at each ceiling of the run
    reached: float | None = None  # the binding floor, the longest, over the time measured
    note: str = ""
    setting: dict = field(default_factory=dict)  # of a network: what `what` says in words
    profile: list[dict] = field(default_factory=list)  # kernel, share and ms, the longest first


@dataclass
class Failure:
    """What could not be measured, and why."""

    stage: str
    what: str
    reason: str


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


def _figure_of(stage: str, what: str, unit: str, values: Sequence[float], note: str = "") -> Figure:
    return Figure(
        stage, what, unit, statistics.median(values), min(values), max(values), note=note
    )  # fmt: skip


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
    from toolkit.data.audio import cut_segments, decode

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
        yield _figure_of("build", f"{num_workers} workers", "clips/s", rates)


def measure_input(repeats: int, data_dir: Path, batch_size: int) -> Iterator[Figure]:
    """Measure shuffled training batches against a bare sequential read of the same shards."""
    from input_data import SegmentReader, open_dataset, shuffled_order

    dataset = open_dataset(data_dir)
    paths = dataset.splits["train"].shards
    reader = SegmentReader(dataset)
    stored = sum(path.stat().st_size for path in paths) / reader.num_segments
    epochs = iter(range(10**9))

    def epoch():
        order = shuffled_order(reader.num_segments, 0, 0, next(epochs))
        for _ in reader.batches(batch_size, order):
            pass

    num_segments = reader.num_segments // batch_size * batch_size
    rates = measure(epoch, num_segments, repeats)
    yield Figure(
        "input", f"shuffled batches of {batch_size}", "segments/s", *rates, bytes=stored,
        note=f"{reader.num_segments} segments of {stored / 1000:.0f} kB, page cache",
    )  # fmt: skip
    reader.close()
    peaks = []
    for _ in range(repeats):
        code = "import sys, benchmark; benchmark.say_memory_of_an_epoch(*sys.argv[1:])"
        peaks.append(int(_run_code(code, str(data_dir), str(batch_size))) / 1e6)
    yield _figure_of(
        "input", f"memory of an epoch in batches of {batch_size}", "MB", peaks,
        note="peak of a process that only reads, over what it held before",
    )  # fmt: skip
    try:
        backend.import_quietly("tensorflow")
        import tensorflow as tf
    except ImportError:
        return

    def bare():
        for _ in tf.data.TFRecordDataset([str(path) for path in paths]):
            pass

    rates = measure(bare, dataset.splits["train"].num_segments, repeats)
    yield Figure("input", "bare TFRecordDataset, in order", "segments/s", *rates, bytes=stored)


def say_memory_of_an_epoch(data_dir: str, batch_size: str) -> None:
    """Read an epoch and print how far the peak of this process's memory rose for it, in bytes."""
    from input_data import SegmentReader, open_dataset, shuffled_order

    before = _memory("VmRSS")
    reader = SegmentReader(open_dataset(data_dir))
    for _ in reader.batches(int(batch_size), shuffled_order(reader.num_segments, 0, 0, 0)):
        pass
    reader.close()
    print(_memory("VmHWM") - before)


def _memory(what: str) -> int:
    """Give what Linux says of this process's memory, in bytes: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def _module_path() -> str:
    paths = filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
    return os.pathsep.join(paths)


def _run_code(code: str, *arguments: str) -> str:
    """Run code in a process of its own, where our modules are found; give what it printed."""
    finished = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": _module_path()},
        capture_output=True, text=True,
    )  # fmt: skip
    if finished.returncode:
        said = finished.stderr.strip().splitlines() or [f"status {finished.returncode}"]
        raise ToolkitError(f"{' '.join(arguments)}: {said[-1]}")
    return finished.stdout


def measure_model(
    stages: list[str],
    repeats: int,
    config: "NetworkConfig",
    batch_size: int,
    options: "TrainingOptions",
    profile: bool = False,
) -> Iterator[Figure | Failure]:
    """Measure training and prediction of a network on random segments that lie on the device.

    What fails of one, for want of memory perhaps, leaves the other to be measured.
    """
    from model import build_network
    from toolkit.backend import choose_jit

    import keras

    if options.mixed_precision:
        keras.config.set_dtype_policy("mixed_bfloat16")
    with backend.stderr_held():
        keras.utils.set_random_seed(0)
    jit = choose_jit(options.jit, config.block)
    precision = "bf16" if options.mixed_precision else "float32"
    how = (
        f"{config.block}, {config.init_features} features, batch {batch_size}, {precision}, "
        f"{'' if jit else 'not '}compiled"
    )
    setting = {
        "backend": keras.backend.backend(),
        "precision": precision,
        "block": config.block,
        "init_features": config.init_features,
        "batch_size": batch_size,
        "compiled": jit,
    }
    network = build_network(config)
    # Real levels, and more than one batch, so that no cache holds them all.
    random = np.random.default_rng(0)
    num_segments = 4 * batch_size
    x = random.standard_normal((num_segments, config.num_samples), np.float32) * 0.1
    y = (random.random((num_segments, config.num_tags)) < 0.1).astype(np.float32)

    def failure(stage: str, error: Exception) -> Failure:
        # Keras puts lines and colours of its own before what the backend says.
        said = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())
        return Failure(stage, how, f"{type(error).__name__}: {said[:400]}")

    # Training last: where it fails, the network's variables may have been given up.
    for stage, make_call in (("predict", _predict_call), ("train", _train_call)):
        if stage not in stages:
            continue
        try:
            call, segments_a_call = make_call(network, x, y, batch_size, options, jit)
            rates = measure(call, segments_a_call, repeats)
        except Exception as error:
            yield failure(stage, error)
            continue
        profiled = []
        if profile and stage == "train":
            try:
                profiled = _profile(call)
            except Exception as error:
                yield failure("profile", error)
        training = stage == "train"
        yield Figure(
            stage, how, "segments/s", *rates,
            flops=(3 if training else 1) * count_flops(network),
            bytes=count_bytes(network, training, 2 if options.mixed_precision else 4),
            precision="bfloat16" if options.mixed_precision else "float32",
            note=f"{1000 / rates[0]:.3g} ms a segment"
            + ("" if training else f", {rates[0] / 10:.3g} clips of 10 a second"),
            setting=setting,
            profile=profiled,
        )  # fmt: skip


def _predict_call(
    network: "keras.Model",
    x: np.ndarray,
    y: np.ndarray,
    batch_size: int,
    options: "TrainingOptions",
    jit: bool,
) -> tuple[Callable[[], None], int]:
    """Give a call that predicts a batch, and its segments."""
    import keras

    network.compile(jit_compile=jit)
    batch = keras.ops.convert_to_tensor(x[:batch_size])
    return lambda: network.predict_on_batch(batch), batch_size


def _train_call(
    network: "keras.Model",
    x: np.ndarray,
    y: np.ndarray,
    batch_size: int,
    options: "TrainingOptions",
    jit: bool,
) -> tuple[Callable[[], None], int]:
    """Give a call that trains some steps, and the segments it takes."""
    from toolkit.training.loop import compile_trainer

    import keras

    trainer = compile_trainer(network, options, 0, jit)
    if keras.backend.backend() == "jax" and jit:
        from toolkit.training.jax_loop import JaxTrainer

        runner = JaxTrainer(trainer)
        runner.set_cache(x, y)
        steps = runner.steps_per_dispatch
        rows = np.arange(steps * batch_size, dtype=np.int32) % len(x)
        rows = rows.reshape(steps, batch_size)
        state = [runner.state()]

        def call():
            state[0], losses = runner.run(state[0], rows)
            np.asarray(losses)

        return call, steps * batch_size
    batches = [
        tuple(keras.ops.convert_to_tensor(part[start : start + batch_size]) for part in (x, y))
        for start in range(0, len(x), batch_size)
    ]
    turn = cycle(batches)

    def call():
        trainer.train_on_batch(*next(turn))

    return call, batch_size


def _profile(call: Callable[[], object], num_rows: int = 15) -> list[dict]:
    """Profile a call: the kernels that took the most time, their shares and milliseconds."""
    import keras

    kernels = _profile_torch if keras.backend.backend() == "torch" else _profile_jax
    taken = kernels(call)
    total = sum(taken.values()) or 1
    rows = [
        {"kernel": name, "share": microseconds / total, "ms": microseconds / 1000}
        for name, microseconds in taken.most_common(num_rows)
    ]
    for row in rows:
        messages.say(f"  {row['share']:6.1%}  {row['ms']:9.2f} ms  {row['kernel'][:80]}")
    return rows


def _profile_torch(call: Callable[[], object]) -> Counter:
    """Count microseconds by kernel on a GPU, by operation on the CPU."""
    from torch.autograd import DeviceType
    from torch.profiler import profile

    with backend.stderr_held(), profile() as profiled:
        call()
    events = profiled.key_averages()
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    if kernels:
        return Counter({event.key: event.self_device_time_total for event in kernels})
    return Counter({event.key: event.self_cpu_time_total for event in events})


def _profile_jax(call: Callable[[], object]) -> Counter:
    """Count microseconds by kernel on a GPU, by operation on the CPU."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            call()
        (path,) = Path(folder).rglob("perfetto_trace.json.gz")
        with gzip.open(path, "rt") as file:
            events = json.load(file)["traceEvents"]

    processes, threads = {}, {}
    for event in events:
        if event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    # A GPU's other lines, such as "XLA Modules", hold the same time again.
    streams = {
        place
        for place, name in threads.items()
        if "/device:" in processes.get(place[0], "") and name.startswith("Stream")
    }
    computing = streams or {place for place, name in threads.items() if name.startswith("tf_XLA")}
    taken = Counter()
    for event in events:
        is_kernel = event.get("ph") == "X" and not event["name"].startswith("ThunkExecutor")
        if is_kernel and (event["pid"], event.get("tid")) in computing:
            taken[event["name"]] += event.get("dur", 0)
    return taken


def measure_start(repeats: int, data_dir: Path, config: "NetworkConfig") -> Iterator[Figure]:
    """Measure how long ``eval.py`` takes to its imports' end, and to its first batch's."""
    from input_data import open_dataset
    from model import build_network
    from toolkit.models import checkpoints

    dataset = open_dataset(data_dir)
    config = replace(config, num_tags=len(dataset.tags), num_samples=dataset.num_samples)
    network = build_network(config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        checkpoints.save(
            path, checkpoints.Checkpoint(network, config, dataset.tags, dataset.sample_rate)
        )
        times = []
        for _ in range(repeats):
            started = time.time()
            code = "import sys, benchmark; benchmark.say_start_of_eval(*sys.argv[1:])"
            said = _run_code(code, str(path), str(data_dir))
            times.append([float(moment) - started for moment in said.split()])
    imports, first_batches = zip(*times, strict=True)
    how = f"eval.py, {config.block}, {config.init_features} features"
    yield _figure_of("start", f"{how}: imports done", "s", imports)
    yield _figure_of("start", f"{how}: first batch done", "s", first_batches)


def say_start_of_eval(model_path: str, data_dir: str) -> None:
    """Run ``eval.py`` to its first batch; print the times of its imports' and the batch's end."""
    script = importlib.import_module("eval")
    evaluate, predict_clips = script.evaluate, script.predict_clips

    def say_and_evaluate(*arguments):
        print(time.time())
        return evaluate(*arguments)

    def say_and_end():
        print(time.time(), flush=True)
        os._exit(0)

    script.evaluate = say_and_evaluate
    script.predict_clips = lambda *arguments: predict_clips(*arguments, say_and_end)
    sys.exit(script.main([model_path, "--data-dir", data_dir]))


def measure_growth(repeats: int, data_dir: Path, clips: list[int]) -> Iterator[Figure]:
    """Measure time and peak memory of building, an epoch and evaluation as clips grow."""
    scripts = Path(__file__).parent
    for num_clips in clips:
        seconds, peaks = {}, {}
        for _ in range(repeats):
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
                    taken, peak = _run_watched([*command, *options])
                    seconds.setdefault(what, []).append(taken)
                    peaks.setdefault(what, []).append(peak / 1e6)
        for what in seconds:
            yield _figure_of("growth", f"{num_clips} clips: {what}", "s", seconds[what])
            yield _figure_of(
                "growth", f"{num_clips} clips: {what}, memory", "MB", peaks[what],
                note="peak of its largest process",
            )  # fmt: skip


# A process counts its peak memory from that of the process that started it: a small one has to.
_WATCH = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(status)
"""


def _run_watched(command: list[str]) -> tuple[float, int]:
    """Run a command and give its seconds and the peak memory of its largest process in bytes."""
    started = time.perf_counter()
    peak = int(_run_code(_WATCH, *command))
    return time.perf_counter() - started, peak


def _repeat_clips(data_dir: Path, grown: Path, num_clips: int) -> None:
    """Make a dataset of so many clips out of links to another's."""
    path = data_dir / "annotations_final.csv"
    if not path.exists():
        raise UsageError(f"{path}: growth repeats a dataset's clips, and needs its annotations")
    with open(path, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t")
    clip_id, mp3_path = header.index("clip_id"), header.index("mp3_path")
    (grown / "mp3").mkdir(parents=True)
    with open(grown / path.name, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL)
        writer.writerow(header)
        for number in range(num_clips):
            row = list(rows[number % len(rows)])
            source = data_dir / "mp3" / row[mp3_path]
            row[clip_id] = str(number)
            row[mp3_path] = f"{row[mp3_path].removesuffix('.mp3')}-{number}.mp3"
            writer.writerow(row)
            target = grown / "mp3" / row[mp3_path]
            target.parent.mkdir(exist_ok=True)
            os.link(source, target)


def measure_sweep(arguments: argparse.Namespace, machine: dict) -> Iterator[Figure | Failure]:
    """Measure the model on JAX and PyTorch in each precision, every one in its own process.

    What the processes say of the machine, the accelerator's name above all, is entered in
    `machine`.
    """
    for backend in [arguments.backend] if arguments.backend else ["jax", "torch"]:  # noqa: F402
        if importlib.util.find_spec(backend) is None:
            yield Failure("sweep", backend, "it is not installed")
            continue
        for name, options in PRECISIONS.items():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "figures.json"
                command = [
                    sys.executable, __file__, "machine", "predict", "train", *options,
                    "--backend", backend, "--json", str(path),
                    "--block", *arguments.block,
                    "--batch-size", *map(str, arguments.batch_size),
                    "--init-features", str(arguments.init_features),
                    "--jit", arguments.jit, "--repeats", str(arguments.repeats),
                    *(["--profile"] if arguments.profile else []),
                ]  # fmt: skip
                # What it says comes through; its figures go into one table and file.
                status = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
                found = {"machine": {}, "figures": [], "failures": []}
                if path.exists():
                    found |= json.loads(path.read_text())
            machine |= {key: value for key, value in found["machine"].items() if key != "backend"}
            for figure in found["figures"]:
                figure["what"] = f"{backend}, {name}: {figure['what']}"
                if figure["setting"]:
                    figure["setting"]["precision"] = name
                yield Figure(**figure)
            for failure in found["failures"]:
                failure["what"] = f"{backend}, {name}: {failure['what']}"
                yield Failure(**failure)
            if status not in (0, 1) or (status and not found["failures"]):
                how = f"by signal {-status}" if status < 0 else f"with status {status}"
                yield Failure("sweep", f"{backend}, {name}", f"its process ended {how}")


def compare_backends(figures: list[Figure]) -> list[dict]:
    """Divide JAX's rate by PyTorch's wherever both were measured at the same."""
    rates = {}
    for figure in figures:
        same = {k: v for k, v in figure.setting.items() if k not in ("backend", "compiled")}
        if same:
            key = (figure.stage, *same.items())
            rates.setdefault(key, {})[figure.setting["backend"]] = figure.median
    return [
        {"stage": stage} | dict(same) | {"jax_over_torch": rate["jax"] / rate["torch"]}
        for (stage, *same), rate in rates.items()
        if {"jax", "torch"} <= rate.keys()
    ]


# --- Several processes ---------------------------------------------------------------------------


def measure_hosts(
    repeats: int, block: str, init_features: int, batch_size: int
) -> Iterator[Figure]:
    """Measure training in one process on one core and on two, and in two processes of a core.

    The batch is the same; the last two differ by the exchange of gradients and by what one process
    gains of two cores.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise UsageError("hosts: needs two cores")
    if importlib.util.find_spec("jax") is None:
        raise UsageError("hosts: needs JAX: install requirements/backends.txt")
    for what, shares in (
        ("1 process on 1 core", [cores[:1]]),
        ("1 process on 2 cores", [cores]),
        ("2 processes of 1 core", [cores[:1], cores[1:]]),
    ):
        found = _run_job(shares, (repeats, block, init_features, batch_size))
        yield _figure_of("hosts", what, "segments/s", found["steps"], f"batch {batch_size}")
        if found["exchanges"]:
            yield _figure_of(
                "hosts", f"{what}: gradients exchanged", "ms a step", found["exchanges"],
                f"{messages.size(found['bytes'])} of gradients, "
                f"{messages.size(found['sent'])} sent by each",
            )  # fmt: skip


def _run_job(shares: list[list[int]], arguments: tuple) -> dict:
    """Run `say_rate_of_a_host` in a process for each share of the cores; give what it measured."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    code = "import json, sys, benchmark; benchmark.say_rate_of_a_host(*json.loads(sys.argv[1]))"
    processes = []
    # To files: a pipe that nobody reads would hold up a process, and the others with it.
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        try:
            for process, share in enumerate(shares):
                environment = os.environ | {
                    "KERAS_BACKEND": "jax",
                    "PYTHONPATH": _module_path(),
                    hosts.ADDRESSES: f"127.0.0.1:{port}",
                    hosts.NUM_PROCESSES: str(len(shares)),
                    hosts.PROCESS_ID: str(process),
                }
                command = [sys.executable, "-c", code, json.dumps([share, *arguments])]
                processes.append(
                    subprocess.Popen(command, env=environment, stdout=said, stderr=errors)
                )
            statuses = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.kill()
        for file in (said, errors):
            file.seek(0)
        if any(statuses):
            raise ToolkitError(f"hosts: {(errors.read().strip() or 'ended').splitlines()[-1]}")
        return json.loads(said.read().splitlines()[-1])


def say_rate_of_a_host(
    cores: list[int], repeats: int, block: str, init_features: int, batch_size: int
) -> None:
    """Train as one process of a job on some cores; the first prints its rates as JSON."""
    os.sched_setaffinity(0, cores)
    backend.import_keras()
    from model import NetworkConfig, build_network
    from toolkit.training.jax_loop import JaxTrainer
    from toolkit.training.loop import compile_trainer
    from toolkit.training.options import TrainingOptions

    import jax
    import keras
    from jax.sharding import NamedSharding, PartitionSpec

    with backend.stderr_held():
        keras.utils.set_random_seed(0)
    with devices.open_job(True, lambda: None) as job:
        job.check_batch_size(batch_size)
        network = build_network(NetworkConfig(block, init_features=init_features))
        trainer = compile_trainer(network, TrainingOptions(batch_size=batch_size), 0, True)
        runner = JaxTrainer(trainer, job=job)
        random = np.random.default_rng(job.process)
        own = batch_size // job.num_processes
        x = random.standard_normal((1, own, network.input_shape[1]), np.float32) * 0.1
        y = (random.random((1, own, network.output_shape[1])) < 0.1).astype(np.float32)
        state = runner.state()
        seconds = []
        for _ in range(2 + repeats):  # two to warm up; as many in every process
            started = time.perf_counter()
            state, losses = runner.run(state, x, y)
            np.asarray(losses)
            seconds.append(time.perf_counter() - started)
        num_parameters = sum(int(np.prod(v.shape)) for v in trainer.trainable_variables)
        exchanges = []
        if job.num_processes > 1:
            spread = NamedSharding(job.mesh, PartitionSpec(devices.BATCH_AXIS))
            together = NamedSharding(job.mesh, PartitionSpec())
            gradients = np.ones((job.num_devices // job.num_processes, num_parameters), np.float32)
            gradients = jax.make_array_from_process_local_data(spread, gradients)
            add = jax.jit(lambda each: each.sum(axis=0), out_shardings=together)
            for _ in range(2 + repeats):
                started = time.perf_counter()
                add(gradients).block_until_ready()
                exchanges.append(1000 * (time.perf_counter() - started))
    if job.is_first:
        found = {
            "steps": [batch_size / each for each in seconds[2:]],
            "exchanges": exchanges[2:],
            "bytes": 4 * num_parameters,
            # A ring: each sends all but its part to be added, and again to be known.
            "sent": 8 * num_parameters * (job.num_processes - 1) / job.num_processes,
        }
        print(json.dumps(found))


# --- The machine ---------------------------------------------------------------------------------


def describe_machine() -> dict[str, str]:
    """Name the processor, the accelerator and the versions that matter."""
    from importlib.metadata import PackageNotFoundError, version

    described = {
        "python": platform.python_version(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB",
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0),
        "processor": _processor_name(),
    }
    if "keras" in sys.modules:
        from toolkit.backend import device_names

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
    from toolkit.backend import device_names

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


def enter_floors(figure: Figure, earlier: list[Figure]) -> None:
    """Enter the shortest times that the machine's ceilings, measured earlier, allow a figure."""
    for other in earlier:
        is_product = other.what.startswith("matrix product") and other.stage == "machine"
        if is_product and figure.flops and figure.precision == other.precision:
            figure.floors["FLOP/s"] = figure.flops / other.median
        if other.what == "copy in memory" and figure.bytes:
            figure.floors["B/s"] = figure.bytes / other.median
    if figure.floors:
        figure.reached = max(figure.floors.values()) * figure.median


def format_table(figures: list[Figure]) -> str:
    """Lay figures out for a terminal, with what they reach of the ceilings of the same run."""
    rows = [("stage", "what", "median", "lowest", "highest", "unit", "of ceiling", "note")]
    for figure in figures:
        # The larger of the two shares says how far the binding floor is.
        shares = [f"{floor * figure.median:.0%} {unit}" for unit, floor in figure.floors.items()]
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
    measured = parser.add_argument_group("what to measure")
    measured.add_argument(
        "stages", metavar="STAGE", nargs="+", choices=(*STAGES, *EXTRA_STAGES, "all"),
        help=f"what to measure: {', '.join(STAGES)}, or all for these; {', '.join(EXTRA_STAGES)}",
    )  # fmt: skip
    cli.add_data_dir(measured, "dataset for decode, build, input, start and growth")
    add = measured.add_argument
    add(
        "--num-workers",
        metavar="N",
        type=cli.positive_int,
        nargs="+",
        default=[1, 2, 4],
        help="worker processes to build with (default: 1 2 4)",
    )
    add(
        "--clips",
        metavar="N",
        type=cli.positive_int,
        nargs="+",
        default=[100, 500, 2000],
        help="sizes for growth, of 2.5 MB a clip on the disk (default: 100 500 2000)",
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
        help="timed repeats, of about 2 s each where it is less (default: 5)",
    )
    network = parser.add_argument_group("network")
    add = network.add_argument
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
    machine = parser.add_argument_group("machine")
    add = machine.add_argument
    add(
        "--backend",
        choices=BACKENDS,
        default=None,
        help="Keras backend (default: KERAS_BACKEND, or tensorflow)",
    )
    add(
        "--mixed-precision",
        action="store_true",
        help="compute in bfloat16 where that is safe (default: off)",
    )
    add(
        "--no-tf32",
        action="store_true",
        help="forbid tf32 for float32 on GPUs that have it (default: allowed)",
    )
    cli.add_jit(machine)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", metavar="FILE", default=None, help="write the figures here too (default: no)"
    )
    return cli.add_general(parser)


def main(argv: list[str] | None = None) -> int:
    return cli.run(_benchmark, build_parser().parse_args(argv))


def _benchmark(arguments: argparse.Namespace) -> int:
    if arguments.backend:
        os.environ["KERAS_BACKEND"] = arguments.backend
    stages = list(STAGES) if "all" in arguments.stages else arguments.stages
    data_dir = Path(arguments.data_dir)
    if not data_dir.is_dir() and (needing := set(stages) & set(_NEED_DATA)):
        raise UsageError(f"{data_dir}: no dataset for {', '.join(sorted(needing))} (--data-dir)")
    if "sweep" in stages:
        if len(stages) > 1:
            raise UsageError(f"{' '.join(stages)}: sweep is measured alone")
        machine = describe_machine()
        return _report(measure_sweep(arguments, machine), machine, arguments.json)
    if arguments.profile and os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow":
        raise UsageError("--profile: needs the JAX or the PyTorch backend (--backend)")
    backend.import_keras()
    _allow_tf32(not arguments.no_tf32)
    return _report(_measure_all(arguments, stages, data_dir), describe_machine(), arguments.json)


def _allow_tf32(is_allowed: bool) -> None:
    import keras

    if keras.backend.backend() == "jax":
        import jax

        # None is JAX's default, which takes tf32 on a GPU that has it.
        jax.config.update("jax_default_matmul_precision", None if is_allowed else "highest")
    elif keras.backend.backend() == "torch":
        import torch

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = is_allowed
    else:
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(is_allowed)


def _report(
    measured: Iterator[Figure | Failure], machine: dict[str, str], json_path: str | None
) -> int:
    """Say each figure when it is known, write the file anew with it, and print the table."""
    from toolkit.files import write_atomically

    figures, failures = [], []
    for found in measured:
        if isinstance(found, Failure):
            failures.append(found)
            messages.say(f"{found.stage}: {found.what}: not measured: {found.reason}")
        else:
            if not found.floors:  # those of a sweep's processes have theirs
                enter_floors(found, figures)
            figures.append(found)
            messages.say(f"{found.stage}: {found.what}: {_human(found.median)} {found.unit}")
        if json_path:
            content = {
                "machine": machine,
                "figures": [asdict(figure) for figure in figures],
                "failures": [asdict(failure) for failure in failures],
                "ratios": compare_backends(figures),
            }
            write_atomically(Path(json_path), json.dumps(content, indent=1).encode() + b"\n")
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(format_table(figures))
    for ratio in compare_backends(figures):
        print(
            "JAX over PyTorch: {stage}, {precision}, {block}, {init_features} features, "
            "batch {batch_size}: {jax_over_torch:.2f}".format(**ratio)
        )
    for failure in failures:
        print(f"not measured: {failure.stage}: {failure.what}: {failure.reason}")
    return 1 if failures else 0


def _measure_all(
    arguments: argparse.Namespace, stages: list[str], data_dir: Path
) -> Iterator[Figure | Failure]:
    from model import NetworkConfig
    from toolkit.training.options import TrainingOptions

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
                options = TrainingOptions(
                    batch_size=batch_size,
                    jit=arguments.jit,
                    mixed_precision=arguments.mixed_precision,
                )
                yield from measure_model(
                    stages, repeats, config, batch_size, options, arguments.profile
                )
    if "start" in stages:
        config = NetworkConfig(arguments.block[0], init_features=arguments.init_features)
        yield from measure_start(repeats, data_dir, config)
    if "growth" in stages:
        yield from measure_growth(repeats, data_dir, arguments.clips)
    if "hosts" in stages:
        for block in arguments.block:
            yield from measure_hosts(
                repeats, block, arguments.init_features, arguments.batch_size[0]
            )


if __name__ == "__main__":
    sys.exit(main())
