"""The building blocks of the networks: what distinguishes each from the others."""

from typing import NamedTuple

# Features of the nine blocks, as multiples of the first convolution's features.
WIDTHS = (1, 1, 2, 2, 2, 2, 2, 2, 4)
# The layers of all blocks that have weights, in order of creation: the order of the numbers in the
# layer names of Keras 2 files. Each convolution has a batch normalisation.
CONVOLUTIONS = ("shortcut", "conv1", "conv2")
SE = ("se_fc", "se_excitation")


class Block(NamedTuple):
    """What distinguishes a building block."""

    layers: tuple[str, ...]  # a part of CONVOLUTIONS and SE, in this order
    # Whether TensorFlow compiles networks on one GPU with XLA by default (docs/performance.md).
    jit_on_gpu: bool

    @property
    def has_excitations(self) -> bool:
        """Whether the block contains squeeze and excitation."""
        return "se_excitation" in self.layers


BLOCKS = {
    "se": Block(("conv1", *SE), True),
    "rese": Block(("shortcut", "conv1", "conv2", *SE), False),
    "res": Block(("shortcut", "conv1", "conv2"), False),
    "basic": Block(("conv1",), True),
    "rese1": Block(("shortcut", "conv1", *SE), False),
    "res1": Block(("shortcut", "conv1"), False),
}
