"""The options of train.py: folders, training procedure, and use of the machine."""

from dataclasses import dataclass

from toolkit import cli
from toolkit.cli import option
from toolkit.training.hosts import ADDRESSES, NUM_PROCESSES, PROCESS_ID


# fmt: off
@dataclass(frozen=True)
class Folders:
    """Input and output of train.py."""

    data_dir: str = option(
        "./dataset", "folder of the dataset, which contains tfrecord/",
        group="data and output", metavar="PATH",
    )
    train_dir: str = option(
        "./log", "folder for event logs and checkpoints", group="data and output", metavar="PATH"
    )


@dataclass(frozen=True)
class TrainingOptions:
    """How to train a network; `toolkit.models.config.NetworkConfig` describes the network."""

    batch_size: int = option(
        23, "segments per step", group="training", type=cli.positive_int, metavar="N"
    )
    momentum: float = option(
        0.9, "Nesterov momentum of stochastic gradient descent",
        group="training", type=cli.rate, metavar="M",
    )
    lr: float = option(
        0.01, "learning rate of the first stage",
        group="training", type=cli.positive_float, metavar="LR",
    )
    lr_decay: float = option(
        0.2, "factor of the learning rate from stage to stage",
        group="training", type=cli.positive_float, metavar="DC",
    )
    initial_stage: int = option(
        0, "first stage to train, from 0", group="training", type=cli.non_negative_int, metavar="N"
    )
    patience: int = option(
        2, "a stage ends after N + 1 epochs without a lower validation loss, as with Keras 2.0.5",
        group="training", type=cli.positive_int, metavar="N",
    )
    num_lr_decays: int = option(
        5, "number of stages", group="training", type=cli.positive_int, metavar="N"
    )
    max_epochs: int = option(
        100, "maximum number of epochs per stage",
        group="training", type=cli.positive_int, metavar="N",
    )
    seed: int = option(
        0, "seed of initial weights, shuffling and dropout",
        group="training", type=cli.non_negative_int, metavar="N",
    )
    mixed_precision: bool = option(
        False, "mixed precision: compute in bfloat16, store weights in float32", group="machine"
    )
    jit: str = option("auto", cli.JIT_HELP, group="machine", choices=("auto", "on", "off"))
    device_cache: str = option(
        "auto", "keep the training segments in device memory (JAX only); auto keeps them if they "
        "fit into the memory of a GPU or TPU",
        group="machine", choices=("auto", "on", "off"),
    )
    # Eight is the published program's default.
    num_read_threads: int = option(
        8, "threads that read shards", group="machine", type=cli.positive_int, metavar="N"
    )
    distribute: bool = option(
        False, "train on all GPUs of this host, and with JAX on those of all hosts given by the "
        f"environment variables {ADDRESSES}, {NUM_PROCESSES} and {PROCESS_ID}, one process per "
        "host",
        group="machine",
    )

    def stage_lr(self, stage: int) -> float:
        """Return the learning rate at the start of a stage."""
        return self.lr * self.lr_decay**stage


_IGNORED = "ignored; accepted so that commands for the published program still run"


@dataclass(frozen=True)
class IgnoredOptions:
    """Options of the published program whose values are now read from the shards."""

    num_audios_per_shard: int = option(
        100, "clips per shard", group=_IGNORED, type=cli.positive_int, metavar="N"
    )
    num_segments_per_audio: int = option(
        10, "segments per clip", group=_IGNORED, type=cli.positive_int, metavar="N"
    )
# fmt: on
