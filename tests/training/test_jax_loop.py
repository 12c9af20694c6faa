"""The training loop for JAX takes the same steps as Keras's loop, however they are dispatched."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import build_mtt
from toolkit.models.checkpoints import find_best

import pytest
from conftest import write_dataset

pytest.importorskip("jax")

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
def test_loops_give_the_same_losses_and_weights(tiny_dataset):
    """Keras's fit, one and three steps per dispatch, and segments in device memory."""
    program = """
        import sys
        import keras, numpy as np
        from input_data import SegmentReader, open_dataset, shuffled_order
        from toolkit.training.jax_loop import JaxTrainer
        from toolkit.training.loop import compile_trainer
        from toolkit.training.options import TrainingOptions
        from model import NetworkConfig, build_network

        reader = SegmentReader(open_dataset(sys.argv[1]))
        order = shuffled_order(reader.num_segments, 0, 0, 0)

        def trainer():
            keras.utils.set_random_seed(1)
            config = NetworkConfig(
                "basic", num_tags=12, init_features=2, dropout=0.0, weight_decay=1e-3
            )
            return compile_trainer(build_network(config), TrainingOptions(lr=0.01), 0, True)

        expected = trainer()
        steps = len(order) // 4
        history = expected.fit(
            reader.batches(4, order), steps_per_epoch=steps, shuffle=False, verbose=0
        )
        for cache, steps_per_dispatch in ((False, 1), (False, 3), (True, 1), (True, 3)):
            model = trainer()
            called = []
            runner = JaxTrainer(model, reader, cache, steps_per_dispatch)
            loss = runner.run_epoch(4, order, lambda step, loss: called.append((step, loss)))
            assert [step for step, _ in called] == list(range(1, steps + 1)), called
            assert abs(loss - history.history["loss"][0]) < 1e-5, (cache, steps_per_dispatch)
            difference = max(
                float(np.abs(np.asarray(a) - np.asarray(b)).max())
                for a, b in zip(model.weights, expected.weights)
            )
            assert difference < 1e-3, (cache, steps_per_dispatch, difference)
            assert int(model.optimizer.iterations.value) == steps
        print("equal")
    """
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tiny_dataset)],
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.stdout == "equal\n", finished.stderr[-2000:]


@pytest.mark.slow
def test_training_with_segments_on_the_device_is_the_same(tiny_dataset, tmp_path):
    scores = []
    for device_cache in ("on", "off"):
        log = tmp_path / device_cache
        finished = subprocess.run(
            [
                sys.executable, str(ROOT / "train.py"), "--data-dir", str(tiny_dataset),
                "--train-dir", str(log), "--block", "se", "--init-features", "2", "--alpha", "2",
                "--batch-size", "4", "--num-lr-decays", "1", "--max-epochs", "2",
                "--device-cache", device_cache,
            ],
            env=ENVIRONMENT, capture_output=True, text=True,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stderr
        assert finished.stderr.startswith("JAX backend on CPU")
        history = (log / "0" / "training.csv").read_text().splitlines()
        scores.append([row.split(",")[:-1] for row in history])
        assert find_best(log / "0") is not None
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_int16_segments_stay_so_on_the_device_and_train_the_same(tmp_path):
    data_dir = write_dataset(tmp_path / "data", num_clips=20)
    build_mtt.build(data_dir, num_audios_per_shard=4, num_workers=1, encoding="int16")
    program = """
        import sys
        import keras, numpy as np
        from input_data import SegmentReader, open_dataset, shuffled_order
        from toolkit.training.jax_loop import JaxTrainer
        from toolkit.training.loop import compile_trainer
        from toolkit.training.options import TrainingOptions
        from model import NetworkConfig, build_network

        reader = SegmentReader(open_dataset(sys.argv[1]))
        order = shuffled_order(reader.num_segments, 0, 0, 0)
        losses = []
        for cache in (False, True):
            keras.utils.set_random_seed(1)
            config = NetworkConfig("basic", num_tags=12, init_features=2, dropout=0.0)
            model = compile_trainer(build_network(config), TrainingOptions(lr=0.01), 0, True)
            runner = JaxTrainer(model, reader, cache)
            losses.append(runner.run_epoch(4, order, lambda step, loss: None))
        print(runner._cache[0].dtype, losses[0] == losses[1], np.isfinite(losses).all())
    """
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(data_dir)],
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.stdout == "int16 True True\n", finished.stderr[-2000:]
