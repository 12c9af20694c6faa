"""The hyper-parameters of a network, as options of the command line and fields of model files."""

import reprlib
from dataclasses import asdict, dataclass

from toolkit import cli
from toolkit.blocks import BLOCKS, WIDTHS
from toolkit.cli import option
from toolkit.data.audio import SAMPLES_PER_SEGMENT
from toolkit.errors import UsageError

INITIALIZERS = ("published", "he")
_CHOICES = {"block": tuple(BLOCKS), "initializer": INITIALIZERS, "multi": (True, False)}
# Type, smallest and largest value. The largest values are far beyond useful ones: they keep damaged
# model files from allocating too much memory.
_LIMITS = {
    "alpha": (int | float, 0, 256),
    "init_features": (int, 1, 4096),
    "dropout": (int | float, 0, 0.999),
    "weight_decay": (int | float, 0, 1e6),
    "num_tags": (int, 1, 100_000),
    # Ten reductions by 3 need 3 ** 10 samples.
    "num_samples": (int, SAMPLES_PER_SEGMENT, 2**26),
}


@dataclass(frozen=True)
class NetworkConfig:
    """Hyper-parameters that select one of the paper's networks."""

    # fmt: off
    block: str = option(
        "se", "building block; res and rese are the paper's Res-2 and ReSE-2, res1 and rese1 its "
        "Res-1 and ReSE-1", group="network", choices=tuple(BLOCKS),
    )
    multi: bool = option(
        True, "use only the output of the last block instead of aggregating the last three",
        group="network", flag="--no-multi",
    )
    alpha: float = option(
        16.0, "width of an SE block's hidden layer relative to its input",
        group="network", type=cli.positive_float, metavar="A",
    )
    init_features: int = option(
        128, "features of the first convolution; the blocks have 1, 2 and 4 times as many",
        group="network", type=cli.positive_int, metavar="N",
    )
    initializer: str = option(
        "published", "initial weights of the convolutions: the published program's, which are "
        "smaller and train better, or he_uniform (see model.kernel_limit)",
        group="network", choices=INITIALIZERS,
    )
    dropout: float = option(
        0.5, "dropout rate before the output layer", group="network", type=cli.rate, metavar="DO",
    )
    weight_decay: float = option(
        0.0, "L2 penalty of the convolution kernels",
        group="network", type=cli.non_negative_float, metavar="WD",
    )
    # fmt: on
    # Taken from the dataset, not from options.
    num_tags: int = 50
    num_samples: int = SAMPLES_PER_SEGMENT

    def __post_init__(self):
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                self._refuse(name, f"one of {', '.join(map(str, allowed))}")
        for name, (kind, smallest, largest) in _LIMITS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or not smallest <= value <= largest:
                number = "an integer" if kind is int else "a number"
                self._refuse(name, f"{number} from {smallest} to {largest}")
        if self.has_excitations and self.init_features * self.alpha < 1:
            raise UsageError(
                f"alpha times the {self.init_features} initial features must be at least 1. "
                f"Received: alpha {self.alpha}"
            )

    def _refuse(self, name: str, expected: str) -> None:
        received = reprlib.repr(getattr(self, name))
        raise UsageError(f"{name} must be {expected}. Received: {received}")

    @property
    def has_excitations(self) -> bool:
        """Whether the blocks contain squeeze and excitation."""
        return BLOCKS[self.block].has_excitations

    @property
    def num_features(self) -> int:
        """Number of features that the output layer receives."""
        return sum(WIDTHS[-3 if self.multi else -1 :]) * self.init_features

    def to_json(self) -> dict:
        """Return the fields as a JSON-serialisable dict."""
        return asdict(self)
