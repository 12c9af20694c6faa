"""The network: its parameters, layers, initial weights and parts."""

import model
from model import build_excitations, build_network, kernel_limit
from toolkit.errors import UsageError
from toolkit.models.config import NetworkConfig
from toolkit.models.hdf5 import list_arrays

import h5py
import numpy as np
import pytest

# Of the published program, and of the paper's definition for res1 and rese1, which it lacks.
PARAMETERS = {"se": 24_749_618, "rese": 26_993_202, "res": 4_933_938, "basic": 2_690_354}
PARAMETERS |= {"res1": 2_858_034, "rese1": 24_917_298}
# Without the aggregation of levels, the hidden layer is smaller.
LESS = 814_592
PUBLISHED_PARAMETERS = {(block, True): number for block, number in PARAMETERS.items()}
PUBLISHED_PARAMETERS |= {(block, False): number - LESS for block, number in PARAMETERS.items()}
WIDTHS = (128, 128, 256, 256, 256, 256, 256, 256, 512)


@pytest.fixture(scope="module", params=PUBLISHED_PARAMETERS, ids=lambda key: f"{key[0]}-{key[1]}")
def full_size(request):
    block, multi = request.param
    return request.param, build_network(NetworkConfig(block=block, multi=multi))


def small(block="se", **options):
    return NetworkConfig(
        **{"block": block, "init_features": 2, "alpha": 2, "num_tags": 5} | options
    )


def layers_of(network, *kinds):
    return [layer for layer in network.layers if type(layer).__name__ in kinds]


def uniform_limit(shape, published):
    """Return the limit of a kernel's uniform distribution, computed from the definitions."""
    if len(shape) == 2:  # Dense: glorot_uniform
        return np.sqrt(6 / (shape[0] + shape[1]))
    width, channels_in, channels_out = shape
    if published:
        # Keras 2.0.5 computed fans over the first two axes.
        fan_in, fan_out = width * channels_in * channels_in, width * channels_in * channels_out
    else:
        fan_in, fan_out = width * channels_in, width * channels_out
    return np.sqrt(6 / (fan_in + fan_out)) if width == 1 else np.sqrt(6 / fan_in)


def assert_uniform(kernel, limit, name):
    """Check limit and spread; by chance, a check fails for less than one in a million kernels."""
    n = kernel.size
    largest = np.abs(kernel).max() / limit
    assert largest <= 1 + 1e-6, name
    assert largest >= 1 - 20 / n, name
    assert kernel.std() / limit == pytest.approx(3**-0.5, rel=3 / n**0.5), name
    assert abs(kernel.mean()) / limit < 4 / n**0.5, name


def test_number_of_parameters_equals_the_published_number(full_size):
    key, network = full_size
    assert network.count_params() == PUBLISHED_PARAMETERS[key]


def test_published_initial_weights(full_size):
    _, network = full_size
    for layer in layers_of(network, "Conv1D", "Dense"):
        kernel = np.asarray(layer.kernel)
        assert_uniform(kernel, uniform_limit(kernel.shape, published=True), layer.name)
        assert not np.asarray(layer.bias).any(), layer.name
    for layer in layers_of(network, "BatchNormalization"):
        values = [np.unique(np.asarray(weight)).tolist() for weight in layer.weights]
        assert values == [[1.0], [0.0], [0.0], [1.0]], layer.name


def test_layers_are_those_of_the_paper(full_size):
    (block, multi), network = full_size
    is_residual, has_se = block.startswith("res"), block in ("se", "rese", "rese1")
    expected, channels_in = [("conv0", (3, 1, 128))], 128
    for number, width in enumerate(WIDTHS):
        name = f"block{number}"
        if is_residual and width != channels_in:
            expected.append((f"{name}_shortcut", (1, channels_in, width)))
        expected.append((f"{name}_conv1", (3, channels_in, width)))
        if block in ("res", "rese"):
            expected.append((f"{name}_conv2", (3, width, width)))
        if has_se:
            expected.append((f"{name}_se_fc", (width, 16 * width)))
            expected.append((f"{name}_se_excitation", (16 * width, width)))
        channels_in = width
    hidden = 256 + 256 + 512 if multi else 512
    expected += [("hidden", (hidden, hidden)), ("tags", (hidden, 50))]

    kernels = {
        layer.name: tuple(layer.kernel.shape) for layer in layers_of(network, "Conv1D", "Dense")
    }
    assert kernels == dict(expected)
    # Keras lists parallel branches by depth; along the main path the order is the paper's.
    path = [name for name, _ in expected if "shortcut" not in name]
    assert [name for name in kernels if "shortcut" not in name] == path
    assert {layer.strides for layer in layers_of(network, "Conv1D")[1:]} == {(1,)}
    assert network.get_layer("conv0").strides == (3,)
    assert network.get_layer("conv0").padding == "valid"


@pytest.mark.parametrize(
    ("block", "last"), [("res1", "conv1_bn"), ("rese1", "se"), ("res", "conv2_bn")]
)
def test_the_shortcut_joins_the_last_layer_of_a_residual_block(block, last):
    network = build_network(small(block))
    for number, shortcut in ((1, "block0_relu"), (2, "block2_shortcut_bn")):  # 2: width changes
        name = f"block{number}"
        added = network.get_layer(f"{name}_add").input
        expected = [network.get_layer(place).output for place in (shortcut, f"{name}_{last}")]
        assert list(map(id, added)) == list(map(id, expected))


def test_each_block_divides_frames_by_three(full_size):
    (_, multi), network = full_size
    frames = [network.get_layer(f"block{number}_relu").output.shape[1] for number in range(9)]
    assert frames == [3**power for power in range(8, -1, -1)]
    maxima = [layer.name for layer in layers_of(network, "GlobalMaxPooling1D")]
    assert maxima == (["block6_max", "block7_max", "block8_max"] if multi else ["block8_max"])


def test_parameters_of_normalization_and_dropout(full_size):
    (block, _), network = full_size
    for layer in layers_of(network, "BatchNormalization"):
        assert (layer.momentum, layer.epsilon) == (0.99, 1e-3), layer.name
    rates = {layer.name: layer.rate for layer in layers_of(network, "Dropout")}
    expected = {"hidden_dropout": 0.5}
    if block in ("res", "rese"):
        expected |= {f"block{number}_dropout": 0.2 for number in range(9)}
    assert rates == expected


def test_initial_weights_depend_on_the_seed_and_not_on_the_backend():
    limit = uniform_limit((3, 1, 2), published=True)
    for seed in (3, 4):
        kernel = build_network(small(), seed).get_layer("conv0").kernel
        expected = np.random.default_rng(seed).uniform(-limit, limit, (3, 1, 2))
        np.testing.assert_allclose(kernel, expected, rtol=1e-6)


def test_he_initial_weights():
    config = NetworkConfig(block="rese", init_features=32, alpha=4, initializer="he")
    network = build_network(config)
    for layer in layers_of(network, "Conv1D", "Dense"):
        kernel = np.asarray(layer.kernel)
        assert_uniform(kernel, uniform_limit(kernel.shape, published=False), layer.name)


@pytest.mark.parametrize("block", ["se", "basic"])
def test_published_initializer_has_the_limits_of_published_weights(golden, block):
    """The published initial kernels fill exactly the range of 'published'."""
    shares, first_convolutions = [], 0
    with h5py.File(golden / "training" / f"{block}-initial.hdf5") as file:
        found = list_arrays(file, "")
        names = [name for name in found if name.endswith("kernel:0") and "optimizer" not in name]
        kernels = [found[name][()] for name in names if found[name].ndim == 3]
    for kernel in kernels:
        limit = kernel_limit("published", kernel.shape)
        assert limit == pytest.approx(uniform_limit(kernel.shape, published=True))
        assert np.abs(kernel).max() <= limit * (1 + 1e-6)
        assert np.abs(kernel).max() >= limit * (1 - 20 / kernel.size)
        shares.append(np.abs(kernel).ravel() / limit)
        first_convolutions += kernel.shape[1] == 1
    assert len(shares) == 10 and first_convolutions == 1
    shares = np.concatenate(shares)
    assert shares.max() > 0.995
    assert shares.mean() == pytest.approx(0.5, abs=4 * 12**-0.5 / shares.size**0.5)


@pytest.mark.parametrize("frames", [3, 4, 5, 27])
def test_pool_relu_is_max_pooling_and_relu(frames):
    import keras

    segments = keras.Input((frames, 4))
    ours = keras.Model(segments, model.pool_relu(segments, name="block"))
    pooled = keras.layers.ReLU()(keras.layers.MaxPooling1D(3)(segments))
    x = np.random.default_rng(frames).standard_normal((5, frames, 4)).astype(np.float32)
    result = keras.ops.convert_to_numpy(ours(x))
    assert result.shape == (5, frames // 3, 4)
    np.testing.assert_array_equal(result, keras.Model(segments, pooled)(x))


def test_impossible_networks_are_refused():
    odd = {"num_samples": 59048, "block": "dense", "initializer": "glorot"}
    odd |= {"alpha": 0.1}  # 2 features x 0.1: less than one hidden unit
    for name, value in odd.items():
        with pytest.raises(UsageError, match=str(value)):
            small(**{name: value})


def test_outputs_are_probabilities_independent_of_the_batch():
    network = build_network(small("rese"))
    x = np.random.default_rng(0).standard_normal((4, 59049)).astype(np.float32)
    together = np.asarray(network(x))
    assert together.shape == (4, 5)
    assert ((together > 0) & (together < 1)).all()
    alone = np.concatenate([network(x[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_weight_decay_applies_to_convolutions_only():
    network = build_network(small("rese", weight_decay=0.01))
    for layer in layers_of(network, "Conv1D"):
        assert layer.kernel_regularizer.l2 == pytest.approx(0.01)
    assert all(layer.kernel_regularizer is None for layer in layers_of(network, "Dense"))
    penalty = sum(
        0.01 * float(np.sum(np.asarray(layer.kernel) ** 2))
        for layer in layers_of(network, "Conv1D")
    )
    assert float(sum(network.losses)) == pytest.approx(penalty, rel=1e-4)
    assert not build_network(small("rese")).losses


def test_excitations_come_in_the_order_of_blocks():
    excitations = build_excitations(build_network(small("se")))
    outputs = [np.asarray(output) for output in excitations(np.zeros((3, 59049), np.float32))]
    assert [output.shape for output in outputs] == [(3, 2)] * 2 + [(3, 4)] * 6 + [(3, 8)]
    assert all(((output > 0) & (output < 1)).all() for output in outputs)
