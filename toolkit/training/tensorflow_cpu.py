"""Faster training on TensorFlow's CPU device, for networks that XLA does not compile.

TensorFlow then computes every operation on its own. The replacements below compute the same with
fewer and faster passes over memory (docs/performance.md).
"""

from functools import partial

from toolkit.backend import device_names

import keras
import tensorflow as tf

# TensorFlow never removes a registered gradient. `tf.custom_gradient` would register one per
# convolution and trace, and each would keep the graph and the weights of its stage in memory.
_GRADIENT = "SampleCnnConvolution"


def replace_operations(network: keras.Model) -> None:
    """Replace the convolutions, batch normalisations and maxima of a network that is trained.

    The layers, their weights and their files stay the same. On GPUs and with several devices,
    nothing is replaced. Convolutions with strides are not replaced.

    Parameters
    ----------
    network : keras.Model
        Network of `model.build_network`.
    """
    if device_names() or tf.distribute.has_strategy():
        return
    for operation in network.operations:
        kind = type(operation).__name__
        if kind == "Conv1D" and operation.padding == "same" and operation.strides == (1,):
            operation.call = partial(_convolve, operation)
        elif kind == "BatchNormalization" and len(operation.input.shape) == 3:
            operation.call = partial(_normalise, operation, operation.call)
        elif kind == "Max":
            operation.call = _max_frames


# --- Convolution ---------------------------------------------------------------------------------


def _convolve(layer: keras.layers.Conv1D, x: tf.Tensor) -> tf.Tensor:
    graph = tf.compat.v1.get_default_graph()
    with graph.gradient_override_map({"Conv2D": _GRADIENT}):
        y = tf.nn.conv1d(x, layer.kernel.value, 1, "SAME")
    return tf.nn.bias_add(y, layer.bias.value)


@tf.RegisterGradient(_GRADIENT)
def _gradients(convolution: tf.Operation, dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the gradients of a convolution's input (B, 1, N, C) and kernel (1, k, C, D).

    TensorFlow's own gradient of kernels takes two to three times as long.
    """
    x, kernel = convolution.inputs
    x, kernel, dy = tf.squeeze(x, 1), tf.squeeze(kernel, 0), tf.squeeze(dy, 1)
    flipped = tf.reverse(tf.transpose(kernel, (0, 2, 1)), axis=[0])
    reach = kernel.shape[0] // 2
    products = [_shifted_product(x, dy, shift) for shift in range(-reach, reach + 1)]
    dx = tf.nn.conv1d(dy, flipped, 1, "SAME")
    return tf.expand_dims(dx, 1), tf.expand_dims(tf.stack(products), 0)


def _shifted_product(x: tf.Tensor, y: tf.Tensor, shift: int) -> tf.Tensor:
    """Sum x[b, n + shift] y[b, n]^T over all b and n: (B, N, C), (B, N, D) -> (C, D)."""
    if shift < 0:
        return tf.transpose(_shifted_product(y, x, -shift))
    if shift == 0:
        return _product(_rows(x), _rows(y))
    # A shift of the flattened frames is a slice of rows, which needs no copy. Such a slice also
    # pairs frames of neighbouring segments; the products of these pairs are subtracted.
    across = _product(_rows(x[1:, :shift]), _rows(y[:-1, -shift:]))
    return _product(_rows(x)[shift:], _rows(y)[:-shift]) - across


def _product(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    return tf.matmul(x, y, transpose_a=True)


def _rows(x: tf.Tensor) -> tf.Tensor:
    return tf.reshape(x, (-1, x.shape[-1]))


# --- Batch normalisation and maximum -------------------------------------------------------------


def _normalise(layer: keras.layers.BatchNormalization, call, x, training=None, mask=None):
    """Normalise in training by TensorFlow's fused operation; Keras uses a dozen operations."""
    if not training:
        return call(x, training=training)
    frames, channels = x.shape[1:]
    images = tf.reshape(x, (-1, 1, frames, channels))  # the fused operation needs 4-D input
    gamma, beta, epsilon = layer.gamma.value, layer.beta.value, layer.epsilon
    y, mean, variance = tf.compat.v1.nn.fused_batch_norm(images, gamma, beta, epsilon=epsilon)
    num_rows = tf.cast(tf.shape(x)[0] * frames, variance.dtype)
    variance *= (num_rows - 1) / num_rows  # TensorFlow returns the unbiased variance
    for moving, of_batch in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
        moving.assign(moving * layer.momentum + of_batch * (1 - layer.momentum))
    return tf.reshape(y, (-1, frames, channels))


def _max_frames(x: tf.Tensor) -> tf.Tensor:
    """Return the maxima of groups of frames: (B, N, 3, C) -> (B, N, C).

    Among equal values, one receives the gradient; with Keras's maximum, all share it.
    """
    size = (1, x.shape[2])
    return tf.squeeze(tf.nn.max_pool2d(x, size, size, "VALID"), axis=2)
