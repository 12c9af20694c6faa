"""Training on several devices of one or more hosts, simulated on one CPU, has equal losses."""

import pytest
from training_jobs import finish, read_losses, start_job, start_training
from training_runs import validation_loss_of

SE = ("--block", "se", "--alpha", "2")


@pytest.mark.slow
def test_one_device_two_devices_and_two_processes_have_equal_losses(tiny_dataset, tmp_path):
    pytest.importorskip("jax")
    finish(start_training(tiny_dataset, tmp_path / "alone", *SE))
    distributed = (*SE, "--distribute")
    (said,) = finish(start_training(tiny_dataset, tmp_path / "devices", *distributed, devices=2))
    assert "2 devices in 1 process," in said
    cached = (*distributed, "--device-cache", "on")
    finish(start_training(tiny_dataset, tmp_path / "cached", *cached, devices=2))
    run = (tiny_dataset, tmp_path / "processes", *SE)
    first, second = finish(*start_job(run, run, devices=2))
    assert "4 devices in 2 processes," in first
    assert second == ""  # only the first one prints messages
    # A second stage, in the folder of a finished job.
    second_stage = (*run, "--num-lr-decays", "2")
    first, _ = finish(*start_job(second_stage, second_stage, devices=2))
    assert "stage 0: already finished" in first and "stage 1: best checkpoint on test" in first
    expected = read_losses(tmp_path / "alone")
    for name in ("alone", "devices", "cached", "processes"):
        losses = read_losses(tmp_path / name)
        assert losses[:2] == pytest.approx(expected[:2], abs=1e-5), name
        # In later epochs, rounding differences grow.
        assert losses[3:5] == pytest.approx(expected[3:5], abs=1e-3), name
        last = tmp_path / name / "0" / "resume.keras"
        with_l2 = validation_loss_of(last, tiny_dataset, 0.001)
        assert losses[4] == pytest.approx(with_l2, abs=1e-5), name
        files = sorted(path.name for path in (tmp_path / name / "0").iterdir())
        others = [path for path in files if not path.startswith(("ckpt", "events"))]
        assert others == ["resume.keras", "test.json", "training.csv"]
        assert len([path for path in files if path.startswith("events")]) == 1


@pytest.mark.slow
def test_validation_segments_may_be_fewer_than_a_batch(tiny_dataset, tmp_path):
    pytest.importorskip("jax")
    options = ("--distribute", "--batch-size", "12", "--max-epochs", "1")
    finish(start_training(tiny_dataset, tmp_path / "log", *options, devices=2))
    assert len(read_losses(tmp_path / "log")) == 3


@pytest.mark.slow
def test_two_devices_of_tensorflow_train_as_one(tiny_dataset, tmp_path):
    pytest.importorskip("tensorflow")
    program = """
        import sys
        import tensorflow as tf
        cpu = tf.config.list_physical_devices("CPU")[0]
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
        import train
        sys.exit(train.main(sys.argv[1:]))
    """
    # Dropout masks differ between devices. Compiled, one device would round differently, by up to
    # 1e-3 on some processors.
    options = (*SE, "--dropout", "0", "--jit", "off")
    how = {"program": program, "KERAS_BACKEND": "tensorflow"}
    for name, distribute in (("one", ()), ("two", ("--distribute",))):
        run = start_training(tiny_dataset, tmp_path / name, *options, *distribute, **how)
        (said,) = finish(run)
        assert ("2 devices in 1 process," in said) == (name == "two")
    one, two = (read_losses(tmp_path / name) for name in ("one", "two"))
    assert two[:2] == pytest.approx(one[:2], abs=1e-3)
    last = tmp_path / "two" / "0" / "resume.keras"
    assert two[4] == pytest.approx(validation_loss_of(last, tiny_dataset, 0.001), abs=1e-5)
