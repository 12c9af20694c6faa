"""Train a network in stages of decreasing learning rate.

    python train.py --data-dir ./dataset --train-dir ./log
    python train.py --block rese --batch-size 23
    python train.py --block basic --init-features 16 --num-lr-decays 2
    KERAS_BACKEND=jax python train.py
    KERAS_BACKEND=jax python train.py --distribute --batch-size 64

Each stage has a folder, ``log/0``, ``log/1``, …, with the checkpoints that improved the validation
loss, ``training.csv`` and TensorBoard events. ``log/training.png`` shows all stages. After an
interruption, run the same command again to resume from the last finished epoch. With
``--distribute``, all GPUs of the host train together and, with JAX, those of several hosts.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from input_data import Dataset, SegmentReader, open_dataset
from toolkit import backend, cli, messages
from toolkit.errors import UsageError
from toolkit.evaluation import Scores
from toolkit.models.checkpoints import Checkpoint, load_optimizer
from toolkit.models.config import NetworkConfig
from toolkit.signals import stop_on_signals
from toolkit.training.devices import open_job
from toolkit.training.hosts import run_process
from toolkit.training.loop import compile_trainer, make_epoch
from toolkit.training.options import Folders, IgnoredOptions, TrainingOptions
from toolkit.training.run import compare_run
from toolkit.training.stage import Run, epoch_writer, locked_folder, start_stage
from toolkit.training.state import RESUME_NAME, StageState
from toolkit.training.validation import make_predictor, test_best, validate


def train(
    data_dir: str | Path,
    train_dir: str | Path,
    config: NetworkConfig,
    options: TrainingOptions,
) -> dict[int, Scores]:
    """Train a network through all stages and test the best checkpoint of each stage.

    Stage 0 starts from initial weights. Every other stage starts from the best checkpoint of the
    previous stage, with the learning rate of the previous stage times `options.lr_decay`.

    Parameters
    ----------
    data_dir : str or Path
        Folder of the dataset.
    train_dir : str or Path
        Folder to which the folders of the stages are written.
    config : NetworkConfig
        Network to train; its numbers of tags and samples are replaced by those of the dataset.
    options : TrainingOptions
        Options of the training procedure and of the machine.

    Returns
    -------
    dict of int to Scores
        Test scores of each stage that was tested by this call.

    Raises
    ------
    ShardError, UsageError, CheckpointError, TrainingError, Interrupted
        The dataset, the options and the checkpoints are inconsistent, the loss becomes NaN or
        infinite, or a signal arrives.
    """
    scores = {}
    with _prepared(data_dir, Path(train_dir), config, options) as run:
        for stage in range(options.initial_stage, options.num_lr_decays):
            state, checkpoint = start_stage(run, stage)
            if state.finished:
                run.job.say(f"stage {stage}: already finished, best val_loss {state.best_loss:.4f}")
            else:
                train_stage(run, stage, state, checkpoint)
            tested = test_best(run, stage, state)
            if tested is not None:
                scores[stage] = tested
        stages = messages.count(options.num_lr_decays, "stage")
        run.job.say(f"{train_dir}: finished after {stages}")
    return scores


def train_stage(run: Run, stage: int, state: StageState, checkpoint: Checkpoint) -> None:
    """Train epochs until the validation loss has stopped improving.

    Parameters
    ----------
    run : Run
        The training.
    stage : int
        Number of the stage, from 0.
    state : StageState
        Progress of the stage; updated after every epoch.
    checkpoint : Checkpoint
        Network to train.
    """
    trainer = compile_trainer(checkpoint.network, run.options, stage, run.jit)
    resume = run.stage_dir(stage) / RESUME_NAME
    if resume.exists():
        load_optimizer(resume, trainer)
    train_epoch = make_epoch(run, stage, trainer)
    predictor = make_predictor(run, trainer)
    with epoch_writer(run, stage, checkpoint, trainer, state.history) as write_epoch:
        lr = run.options.stage_lr(stage)
        run.job.say(f"stage {stage}: learning rate {lr:g}, from epoch {state.epoch + 1}")
        while not state.finished:
            started = time.monotonic()
            epoch = state.epoch + 1
            loss = train_epoch(epoch)
            val_loss, scores = validate(run, trainer, predictor)
            improved = state.update(epoch, val_loss, run.options)
            seconds = time.monotonic() - started
            state.history.append(
                {
                    "epoch": epoch,
                    "loss": loss,
                    "val_loss": val_loss,
                    "learning_rate": float(trainer.optimizer.learning_rate),
                    "val_roc_auc": scores.macro_roc_auc,
                    "val_pr_auc": scores.macro_pr_auc,
                    "seconds": seconds,
                }
            )
            write_epoch(state)
            run.job.say(
                f"stage {stage} epoch {epoch}: loss {loss:.4f}, val_loss {val_loss:.4f}, "
                f"val ROC AUC {scores.macro_roc_auc:.4f}, PR AUC {scores.macro_pr_auc:.4f}, "
                f"{messages.duration(seconds)}{' *' if improved else ''}"
            )


@contextmanager
def _prepared(
    data_dir: str | Path, train_dir: Path, config: NetworkConfig, options: TrainingOptions
) -> Iterator[Run]:
    """Open the dataset, the devices and the output folder; check that they are consistent."""
    dataset = open_dataset(data_dir)
    for split in ("train", "val"):
        if not dataset.splits[split].num_segments:
            raise UsageError(
                f"{data_dir}: no {split} segments: training needs train and val shards"
            )
    config = dataclasses.replace(
        config, num_tags=len(dataset.tags), num_samples=dataset.num_samples
    )
    record = compare_run(train_dir, dataset, config, options)
    backend.import_keras()
    import keras

    with stop_on_signals() as stop, _open_segments(dataset, options) as segments:
        # Keras draws the seeds of new dropout layers, which must be the same on all hosts. NumPy's
        # seed, which Keras sets too, has 32 bits.
        keras.utils.set_random_seed(options.seed % 2**32)
        if options.mixed_precision:
            keras.config.set_dtype_policy("mixed_bfloat16")
        with open_job(options.distribute, stop.check) as job:
            job.check_same(
                "options", lambda: repr((options, config)), "run the same command on each"
            )
            job.check_batch_size(options.batch_size)
            job.check_same(
                str(data_dir), lambda: record.dataset_hash, "use the same dataset on each"
            )
            jit = job.choose_jit(options.jit, config.block)
            device = job.describe(jit, options.mixed_precision)
            job.say(device)
            with locked_folder(train_dir, job):
                for line in record.lines(device):
                    job.say(line)
                if job.is_first:
                    record.write(device)
                yield Run(train_dir, dataset, segments, config, options, jit, job, stop)


@contextmanager
def _open_segments(dataset: Dataset, options: TrainingOptions) -> Iterator[SegmentReader]:
    reader = SegmentReader(dataset, "train", options.num_read_threads)
    try:
        if reader.num_segments < options.batch_size:
            raise UsageError(
                f"--batch-size {options.batch_size}: more than the {reader.num_segments} "
                "training segments"
            )
        yield reader
    finally:
        reader.close()


# --- Command line --------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Train a network in stages of decreasing learning rate.",
        "  python train.py --data-dir ./dataset --train-dir ./log\n"
        "  python train.py --block rese --no-multi --train-dir ./log-rese",
    )
    cli.add_options(parser, Folders, NetworkConfig, TrainingOptions, IgnoredOptions)
    return cli.add_general(parser)


def main(argv: list[str] | None = None) -> int:
    # argparse does not set defaults of existing attributes: ignored options stay None if not given.
    not_given = dict.fromkeys(field.name for field in dataclasses.fields(IgnoredOptions))
    arguments = build_parser().parse_args(argv, argparse.Namespace(**not_given))
    if arguments.distribute:
        return run_process(lambda: cli.run(_run, arguments))
    return cli.run(_run, arguments)


def _run(arguments: argparse.Namespace) -> None:
    cli.check_output(arguments.train_dir, "--train-dir", is_folder=True)
    dataset = open_dataset(arguments.data_dir)  # report errors before the slow import of Keras
    _report_ignored(dataset, cli.read_options(IgnoredOptions, arguments))
    config = cli.read_options(NetworkConfig, arguments)
    options = cli.read_options(TrainingOptions, arguments)
    if options.initial_stage >= options.num_lr_decays:
        raise UsageError(
            f"--initial-stage {options.initial_stage}: expected a stage from 0 to "
            f"{options.num_lr_decays - 1} (--num-lr-decays {options.num_lr_decays})"
        )
    train(arguments.data_dir, arguments.train_dir, config, options)


def _report_ignored(dataset: Dataset, options: IgnoredOptions) -> None:
    """Print a line for each ignored option that was given and differs from the shards."""
    lines = {}
    for split in dataset.splits.values():
        clips, segments, shards = split.num_clips, split.num_segments, len(split.shards)
        for name, parts, wholes, unit in (
            ("num_segments_per_audio", segments, clips, "segments per clip"),
            ("num_audios_per_shard", clips, shards, "clips per shard"),
        ):
            given = getattr(options, name)
            if not (given and parts and wholes):
                continue
            # build_mtt.py makes as many shards as the clips fill completely, but at least one.
            is_shard = name == "num_audios_per_shard"
            if (max(1, parts // given) if is_shard else parts / given) != wholes:
                has = f"{dataset.path} has {parts / wholes:.3g} {unit}"
                lines.setdefault(name, f"--{name.replace('_', '-')} {given}: ignored: {has}")
    for line in lines.values():
        messages.say(line)


if __name__ == "__main__":
    sys.exit(main())
