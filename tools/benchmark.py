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
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from toolkit import backend, cli, messages
from toolkit.errors import UsageError
from toolkit.files import write_atomically
from toolkit.models.config import BLOCKS
from tools.measurements import (
    ROOT,
    Figure,
    measure_build,
    measure_decode,
    measure_input,
    measure_machine,
    measure_network,
    measure_start,
)

STAGES = ("machine", "decode", "build", "input", "train", "predict", "start")
# The precisions that `sweep` compares, with the environment and the options that select each.
PRECISIONS = {
    "float32": ({"NVIDIA_TF32_OVERRIDE": "0", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}, []),
    "tf32": ({"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}, []),  # JAX's default
    "bfloat16": ({}, ["--mixed-precision"]),
}


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


def sweep(arguments: argparse.Namespace, machine: dict[str, str]) -> Iterator[Figure]:
    """Measure the network on JAX and PyTorch in each precision, each in its own process.

    The accelerator that a process finds is added to `machine`.
    """
    names = [arguments.backend] if arguments.backend else ["jax", "torch"]
    for name, precision in itertools.product(names, PRECISIONS):
        environment, options = PRECISIONS[precision]
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
            status = subprocess.run(
                command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL
            ).returncode
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
        (what, "--repeats", "timed repeats; short work is looped for about 2 s per repeat", 5),
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
        help="Keras backend (default: as train.py selects; for sweep, jax and torch)",
    )  # fmt: skip
    machine.add_argument(
        "--mixed-precision", action="store_true", help="compute in bfloat16 (default: off)"
    )
    cli.add_jit(machine)
    parser.add_argument_group("output").add_argument(
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
        yield measure_network(arguments, stage, block, size, product.median)


if __name__ == "__main__":
    sys.exit(main())
