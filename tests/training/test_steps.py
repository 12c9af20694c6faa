"""On JAX and TensorFlow, training computes the steps of Keras's fit, with any steps per call."""

import textwrap

import build_mtt

import pytest
from conftest import run_python, write_dataset
from training_jobs import XLA_FLAGS

PROGRAM = """
    import sys
    import keras, numpy as np
    from input_data import SegmentReader, open_dataset, shuffled_order
    from model import NetworkConfig, build_network
    from toolkit.training.loop import choose_trainer, compile_trainer
    from toolkit.training.options import TrainingOptions

    reader = SegmentReader(open_dataset(sys.argv[1]))
    order = shuffled_order(reader.num_segments, 0, 0, 0)
    steps = len(order) // 4
    is_jax = keras.backend.backend() == "jax"

    # With a high learning rate, rounding differences grow tenfold from step to step.
    def trainer():
        config = NetworkConfig(
            "basic", num_tags=12, init_features=2, dropout=0.0, weight_decay=1e-3
        )
        return compile_trainer(build_network(config), TrainingOptions(lr=0.001), 0, is_jax)

    expected = trainer()
    batches = reader.batches(4, order)
    if reader.stored_type == np.int16:
        batches = ((np.float32(x) / 32768, y) for x, y in batches)
    history = expected.fit(batches, steps_per_epoch=steps, shuffle=False, verbose=0)
    losses = {}
    for steps_per_call in (1, 3):
        for cache in ("off", "on") if is_jax else ("off",):
            model = trainer()
            called = []
            runner = choose_trainer(model, reader, device_cache=cache)
            runner.steps_per_call = steps_per_call
            loss = runner.run_epoch(4, order, lambda step, loss: called.append((step, loss)))
            losses[steps_per_call, cache] = loss
            assert [step for step, _ in called] == list(range(1, steps + 1)), called
            assert abs(loss - history.history["loss"][0]) < 1e-5, losses
            difference = max(
                float(np.abs(np.asarray(a) - np.asarray(b)).max())
                for a, b in zip(model.weights, expected.weights)
            )
            assert difference < 1e-4, (steps_per_call, cache, difference)
            assert int(model.optimizer.iterations.value) == steps
    # Cached segments are exactly those that are read; several steps of TensorFlow round like one.
    assert losses[1, "off"] == losses[(1, "on") if is_jax else (3, "off")], losses
    print(runner._cache[0].dtype if is_jax else reader.stored_type.__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["float32", "int16"])
@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
def test_loops_give_the_same_losses_and_weights(tiny_dataset, tmp_path, backend, encoding):
    """Compare Keras's fit, one and three steps per call, and segments in device memory."""
    pytest.importorskip(backend)
    data_dir = tiny_dataset
    if encoding == "int16":
        data_dir = write_dataset(tmp_path / "data", num_clips=20)
        build_mtt.build(data_dir, num_audios_per_shard=4, num_workers=1, encoding="int16")
    on_cpu = {"KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS}
    finished = run_python("-c", textwrap.dedent(PROGRAM), data_dir, **on_cpu)
    assert finished.stdout == f"{encoding}\n", finished.stderr[-2000:]
