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
import itertools
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from input_data import Dataset, open_dataset
from toolkit import cli, messages
from toolkit.cli import option
from toolkit.data.annotations import FOLDER_SPLITS, MTT_TOP_TAGS
from toolkit.data.manifest import read_build
from toolkit.errors import TrainingError, UsageError
from toolkit.files import only_run, remove_leftovers
from toolkit.models.config import NetworkConfig
from toolkit.signals import StopRequest, stop_on_signals
from toolkit.training.options import Folders, TrainingOptions
from toolkit.training.run import compare_run
from toolkit.training.state import check_stages
from tools.paper_results import (
    BASELINE,
    NETWORKS,
    Job,
    is_newer,
    is_result_of,
    write_differences,
    write_tables,
)

ROOT = Path(__file__).resolve().parents[1]
MTT_CLIPS = {"train": 15_250, "val": 1_529, "test": 4_332}  # listed, with those that are skipped
# Options of train.py that are set for each network.
_SET_HERE = ("train_dir", "block", "multi", "seed", "initial_stage")


# fmt: off
@dataclasses.dataclass(frozen=True)
class PaperOptions:
    """Options besides those of train.py."""

    out: str = option(
        "./paper", "folder for networks and results", group="data and output", metavar="PATH"
    )
    networks: tuple[str, ...] = option(
        tuple(NETWORKS), "networks to train, and to show in tables and figures, of "
        f"{', '.join(NETWORKS)}", shown="all",
        group="networks to train", choices=NETWORKS, nargs="+", metavar="NETWORK",
    )
    seeds: tuple[int, ...] = option(
        (0,), "seeds of initial weights, shuffling and dropout; several seeds give mean and range",
        shown="0", group="networks to train", type=cli.non_negative_int, nargs="+", metavar="N",
    )
# fmt: on


def run_paper(arguments: argparse.Namespace, dataset: Dataset, stop: StopRequest) -> int:
    """Train, test and analyse all networks; return the exit status."""
    out = Path(arguments.out)
    jobs = plan(arguments, dataset, out)
    is_mtt = is_magnatagatune(dataset)
    scored, failures = [], []

    def fail(what: str) -> None:
        failures.append(what)
        messages.say(f"{what}; continuing with the next step")

    def run(what: str, words: Iterable[str | Path], **options) -> bool:
        status = run_command(words, stop, **options)
        if status < 0:
            end = f"ended by {signal.Signals(-status).name}, possibly out of memory"
            fail(f"{what}: {end}")
        elif status:
            fail(f"{what}: exit status {status}")
        return not status

    for job in jobs:
        messages.say(f"=> {job}")
        data = ("--data-dir", arguments.data_dir)
        if not job.is_finished:
            words = ("train.py", *data, "--train-dir", job.folder, *words_of(job))
            if not run(f"{job}: train.py", words, watch=estimate_of(job)):
                continue
        words = ("eval.py", job.last_stage, *data, "--report", job.report)
        try:
            is_scored = job.has_report(dataset) or run(f"{job}: eval.py", words)
        except TrainingError as error:  # the best checkpoint was deleted
            fail(f"{job}: {error}")
            continue
        if is_scored:
            scored.append(job)
            write_tables(out, scored, is_mtt, dataset)
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
        try:
            compare_run(folder, dataset, dataclasses.replace(config, **sizes), options)
        except UsageError as error:
            text = str(error).replace("--train-dir", "--out")
            raise UsageError(f"{network}, seed {seed}: {text}") from None
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
    built = read_build(dataset.path)
    if not built or set(dataset.tags) != set(MTT_TOP_TAGS):
        return False
    skipped = (row["mp3_path"] for row in built.get("skipped", ()))
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


def estimate_of(job: Job) -> Callable[[], None]:
    """Return a function that prints how long a network trains, after its first epoch in a call."""
    num_before = len(job.history())

    def estimate() -> None:
        nonlocal num_before
        rows = job.history()
        if len(rows) <= num_before:
            return
        num_before = math.inf  # print once
        seconds, options = rows[-1]["seconds"], job.options
        fewest = min(options.patience + 2, options.max_epochs)  # if the first epoch is the best
        least, most = (
            messages.duration(seconds * options.num_lr_decays * epochs)
            for epochs in (fewest, options.max_epochs)
        )
        stages = messages.count(options.num_lr_decays, "stage")
        text = f"{messages.duration(seconds)} per epoch: {least} for {stages} of "
        text += messages.count(fewest, "epoch")
        if fewest < options.max_epochs:
            text += f", at most {most} for {options.max_epochs}"
        messages.say(f"{job}: {text}")

    return estimate


def analyse(out: Path, job: Job | None, dataset: Dataset, run: Callable) -> None:
    """Extract the excitations of se-multi and execute the notebook."""
    if job is None:
        messages.say(f"no notebook: {BASELINE} was not trained")
        return
    clips, segments = out / "excitations.parquet", out / "segments.parquet"
    for path, options in ((clips, ()), (segments, ("--segments", "--depths", "0"))):
        words = (job.last_stage, "--data-dir", dataset.path, "--out", path, *options)
        name = "extract_excitations.py"
        if not is_result_of(path, job.best()) and not run(name, (name, *words)):
            return
    notebook, figures = ROOT / "excitation_analysis.ipynb", out / "figures"
    if figures.is_dir() and is_newer(out / notebook.name, clips, segments, notebook):
        return
    figures.mkdir(exist_ok=True)
    places = {"EXCITATIONS": clips, "EXCITATIONS_SEGMENTS": segments, "FIGURES_DIR": figures}
    places["DATA_DIR"] = dataset.path
    temporary = out.resolve() / ".executing.ipynb"
    words = ("-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", notebook)
    words += ("--output-dir", temporary.parent, "--output", temporary.name)
    words += ("--ExecutePreprocessor.timeout=None", "--log-level", "ERROR")
    words += ("--ExecutePreprocessor.extra_arguments=--log-level=ERROR",)
    # The notebook runs in its own folder, so the paths must be absolute.
    if run(notebook.name, words, **{name: str(path.resolve()) for name, path in places.items()}):
        os.replace(temporary, out / notebook.name)


# --- Command line --------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Train, test and analyse the twelve networks of the paper. Options of training are those "
        "of train.py.",
        "  python -m tools.paper --data-dir ./dataset --out ./paper\n"
        "  python -m tools.paper --networks se-multi rese-multi --seeds 0 1 2",
    )
    classes = (Folders, PaperOptions, NetworkConfig, TrainingOptions)
    cli.add_options(parser, *classes, without=_SET_HERE)
    return cli.add_general(parser)


def main(argv: list[str] | None = None) -> int:
    return cli.run(_run, build_parser().parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    cli.check_output(arguments.out, "--out", is_folder=True)
    dataset = open_dataset(arguments.data_dir)
    for split, found in dataset.splits.items():
        if not (found.num_clips or found.num_segments):
            raise UsageError(f"{arguments.data_dir}: no {split} clips: all three splits are needed")
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    with only_run(out, "run of tools.paper", TrainingError), stop_on_signals() as stop:
        remove_leftovers(out)  # a killed extraction can leave hundreds of megabytes
        return run_paper(arguments, dataset, stop)


if __name__ == "__main__":
    sys.exit(main())
