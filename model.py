"""The network: sample-level blocks and their multi-level aggregation.

Kim, Lee and Nam, "Sample-level CNN Architectures for Music Auto-tagging Using Raw Waveforms",
ICASSP 2018 (arXiv 1710.10451). A functional Keras 3 model of built-in layers, for any backend.

Small parts come first, the network last. Layers are named by their place in the network:
``block3_conv1``, ``block3_conv1_bn``, …, ``block3_se_excitation``.
"""

from collections.abc import Sequence

from toolkit.blocks import BLOCKS, WIDTHS
from toolkit.errors import UsageError
from toolkit.models.config import NetworkConfig

import keras
import numpy as np
from keras import layers, ops

# Rate of the published program's residual blocks; --dropout is that of the last hidden layer.
_BLOCK_DROPOUT = 0.2


# --- Parts -------------------------------------------------------------------------------------


def batch_norm(x, name: str):
    """Apply batch normalisation; Keras computes it in float32 even with mixed precision."""
    # The defaults of Keras 2.0.5, which the published program uses.
    return layers.BatchNormalization(momentum=0.99, epsilon=1e-3, name=name)(x)


def conv_bn(x, features: int, config: NetworkConfig, name: str, width=3, strides=1, padding="same"):
    """Apply a convolution and batch normalisation: (B, N, C) -> (B, N / strides, features)."""
    penalty = keras.regularizers.L2(config.weight_decay) if config.weight_decay else None
    # With biases, although batch normalisation cancels them: published checkpoints contain them.
    x = layers.Conv1D(
        features,
        width,
        strides=strides,
        padding=padding,
        kernel_initializer="zeros",  # drawn by draw_kernels
        kernel_regularizer=penalty,
        name=name,
    )(x)
    return batch_norm(x, name=f"{name}_bn")


def dense(x, units: int, **options):
    """Apply a dense layer: (B, C) -> (B, units)."""
    return layers.Dense(units, kernel_initializer="zeros", **options)(x)  # see draw_kernels


def pool_relu(x, name: str):
    """Apply max pooling by 3, then ReLU: (B, N, C) -> (B, N / 3, C).

    The two operations commute; in this order, ReLU processes a third of the frames. Reshape and
    maximum compute the same as a pooling layer, and their gradient is faster in compiled networks.
    """
    _, frames, channels = x.shape
    # A pooling layer drops the remaining frames, too.
    x = x[:, : frames // 3 * 3] if frames % 3 else x
    x = layers.Reshape((frames // 3, 3, channels), name=f"{name}_frames")(x)  # (B, N/3, 3, C)
    x = ops.max(x, axis=2)  # (B, N/3, C)
    return layers.ReLU(name=f"{name}_relu")(x)


def squeeze_excite(x, alpha: float, name: str):
    """Scale each channel by an excitation in (0, 1) computed from the means of all channels."""
    channels = x.shape[-1]
    squeeze = layers.GlobalAveragePooling1D(dtype="float32", name=f"{name}_squeeze")(x)  # (B, C)
    y = dense(squeeze, int(channels * alpha), activation="relu", name=f"{name}_fc")
    y = dense(y, channels, activation="sigmoid", name=f"{name}_excitation")  # (B, C)
    y = layers.Reshape((1, channels), name=f"{name}_scale")(y)  # (B, 1, C)
    return layers.Multiply(name=name)([x, y])  # (B, N, C)


# --- Blocks: (B, N, C) -> (B, N/3, features) -----------------------------------------------------


def basic_block(x, features: int, config: NetworkConfig, name: str):
    """Convolution, pooling, ReLU."""
    return pool_relu(conv_bn(x, features, config, name=f"{name}_conv1"), name=name)


def se_block(x, features: int, config: NetworkConfig, name: str):
    """Basic block with squeeze and excitation."""
    x = basic_block(x, features, config, name)
    return squeeze_excite(x, config.alpha, name=f"{name}_se")


def res_block(x, features: int, config: NetworkConfig, name: str):
    """One or two convolutions (Res-1, Res-2) with a shortcut, pooling, ReLU.

    In the ReSE blocks, squeeze and excitation precede the addition of the shortcut.
    """
    parts = BLOCKS[config.block].layers
    shortcut = x
    if x.shape[-1] != features:
        shortcut = conv_bn(x, features, config, name=f"{name}_shortcut", width=1)
    x = conv_bn(x, features, config, name=f"{name}_conv1")
    if "conv2" in parts:
        x = layers.ReLU(name=f"{name}_conv1_relu")(x)
        x = layers.Dropout(_BLOCK_DROPOUT, name=f"{name}_dropout")(x)
        x = conv_bn(x, features, config, name=f"{name}_conv2")
    if "se_excitation" in parts:
        x = squeeze_excite(x, config.alpha, name=f"{name}_se")
    x = layers.Add(name=f"{name}_add")([shortcut, x])
    return pool_relu(x, name=name)


_BUILDERS = {"basic": basic_block, "se": se_block}
_BUILDERS |= dict.fromkeys(("res1", "res", "rese1", "rese"), res_block)


# --- Initial weights -----------------------------------------------------------------------------


def kernel_limit(initializer: str, kernel: tuple[int, int, int]) -> float:
    """Return the largest initial weight of a convolution's kernel; the weights are uniform.

    The published program asks for he_uniform (kernels of width 3) and glorot_uniform (width 1).
    However, Keras 2.0.5 computed fans over the first two axes of a kernel, which for a kernel of
    shape (k, c_in, c_out) gives fan_in = k * c_in * c_in and fan_out = k * c_in * c_out. The
    initial weights are therefore much smaller (Keras issue 8430). The published results depend on
    these weights.

    Parameters
    ----------
    initializer : {'published', 'he'}
        'published' uses the fans of Keras 2.0.5, 'he' those of later versions.
    kernel : tuple of int
        Kernel width, input channels and output channels.
    """
    width, channels_in, channels_out = kernel
    receptive_field = width * channels_in if initializer == "published" else width
    fan_in, fan_out = receptive_field * channels_in, receptive_field * channels_out
    return (6 / (fan_in + fan_out) if width == 1 else 6 / fan_in) ** 0.5


def draw_kernels(network: keras.Model, initializer: str, seed: int) -> None:
    """Draw initial kernels: convolutions within `kernel_limit`, dense layers glorot_uniform.

    NumPy draws the same numbers for every backend. JAX would compile a program per shape, which
    takes 7.8 s instead of 1.0 s for a small se network.

    Parameters
    ----------
    network : keras.Model
        Network whose kernels are drawn.
    initializer : {'published', 'he'}
        Limits of the convolutions (see `kernel_limit`).
    seed : int
        Seed of all kernels.
    """
    random = np.random.default_rng(seed)
    for layer in network.layers:
        if isinstance(layer, layers.Conv1D):
            limit = kernel_limit(initializer, layer.kernel.shape)
        elif isinstance(layer, layers.Dense):
            # With correct fans ("he"), the limit at width 1 is that of glorot_uniform.
            limit = kernel_limit("he", (1, *layer.kernel.shape))
        else:
            continue
        layer.kernel.assign(random.uniform(-limit, limit, layer.kernel.shape).astype("float32"))
        # A .keras file records this initializer, not the zeros of the layer's creation.
        layer.kernel_initializer = keras.initializers.RandomUniform(-limit, limit)


# --- The network ---------------------------------------------------------------------------------


def build_network(config: NetworkConfig, seed: int = 0) -> keras.Model:
    """Build a network with initial weights.

    Parameters
    ----------
    config : NetworkConfig
        Hyper-parameters.
    seed : int
        Seed of the initial weights, which are the same on every backend.

    Returns
    -------
    keras.Model
        Maps segments [shape=(batch, num_samples), dtype=float32, full scale 1] to tag
        probabilities [shape=(batch, num_tags), dtype=float32].
    """
    segments = keras.Input((config.num_samples,), dtype="float32", name="segments")
    x = layers.Reshape((config.num_samples, 1), name="samples")(segments)  # (B, N, 1)
    x = conv_bn(x, config.init_features, config, name="conv0", strides=3, padding="valid")
    x = layers.ReLU(name="conv0_relu")(x)  # (B, N/3, F)

    outputs = []
    for number, width in enumerate(WIDTHS):
        features = width * config.init_features
        x = _BUILDERS[config.block](x, features, config, name=f"block{number}")
        outputs.append(x)  # (B, N/3^(number + 2), width * F)

    maxima = [
        layers.GlobalMaxPooling1D(name=f"block{number}_max")(outputs[number])
        for number in range(len(WIDTHS))[-3 if config.multi else -1 :]
    ]
    x = layers.Concatenate(name="multi")(maxima) if config.multi else maxima[0]  # (B, 8F or 4F)
    x = dense(x, x.shape[-1], name="hidden")
    x = batch_norm(x, name="hidden_bn")
    x = layers.ReLU(name="hidden_relu")(x)
    x = layers.Dropout(config.dropout, name="hidden_dropout")(x)
    # With mixed precision, the output and the loss stay in float32.
    tags = dense(x, config.num_tags, activation="sigmoid", dtype="float32", name="tags")
    network = keras.Model(segments, tags, name=config.block + "_multi" * config.multi)
    draw_kernels(network, config.initializer, seed)
    return network


def build_embeddings(network: keras.Model) -> keras.Model:
    """Build a model that also outputs embeddings, and shares the network's weights.

    Parameters
    ----------
    network : keras.Model
        Network of `build_network`.

    Returns
    -------
    keras.Model
        Maps segments to the tag probabilities and to embeddings [shape=(batch, num_features),
        dtype=float32]: what the output layer receives, after ReLU and without dropout.
    """
    return keras.Model(network.input, [network.output, network.get_layer("hidden_relu").output])


def build_excitations(network: keras.Model, depths: Sequence[int] | None = None) -> keras.Model:
    """Build a model that outputs the excitations of a network and shares the network's weights.

    Parameters
    ----------
    network : keras.Model
        Network whose blocks contain squeeze and excitation.
    depths : sequence of int or None
        Blocks: 0 for the first to 8 for the last; None for all. Later blocks are not computed.

    Returns
    -------
    keras.Model
        Maps segments to a list of arrays [shape=(batch, channels), dtype=float32], one per depth:
        the factors in (0, 1) by which the block scales its channels.

    Raises
    ------
    UsageError
        The network has no excitations.
    """
    if "block0_se_excitation" not in {layer.name for layer in network.layers}:
        suitable = " or ".join(name for name, block in BLOCKS.items() if block.has_excitations)
        raise UsageError(
            f"a network of {network.name.split('_')[0]} blocks has no excitations: "
            f"use a model of {suitable} blocks"
        )
    depths = range(len(WIDTHS)) if depths is None else depths
    layers_of_depths = [network.get_layer(f"block{depth}_se_excitation") for depth in depths]
    return keras.Model(network.input, [layer.output for layer in layers_of_depths])
