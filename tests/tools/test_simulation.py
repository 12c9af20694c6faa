"""Tests of the simulation of hosts that read, compute and wait for each other."""

from pathlib import Path

from input_data import Clip, encode_clip, shard_name, write_manifest, write_records
from tools.simulation import Regime, calibrate, draw_times, simulate, steady_step

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st


def constant(seconds: float, hosts: int = 1, steps: int = 200) -> np.ndarray:
    return np.full((hosts, steps), seconds)


def test_simulated_steps_by_hand():
    # One reader of 2 s a batch, one batch ahead: reading begins with two, then at each taking.
    ends = simulate(constant(2.0, steps=4), constant(3.0, steps=4), prefetch=1)
    # Batch 0 is there at 2, step to 5; batch 1 was read by 4, step to 8; and so on.
    assert ends.tolist() == [5, 8, 11, 14]
    # Nothing ahead: reading and computing take turns.
    ends = simulate(constant(2.0, steps=3), constant(3.0, steps=3), prefetch=0)
    assert ends.tolist() == [5, 10, 15]


@pytest.mark.parametrize("hosts", [1, 5])
@pytest.mark.parametrize(
    ("read", "step", "readers", "expected"),
    [(1.0, 3.0, 1, 3.0), (3.0, 1.0, 1, 3.0), (3.0, 1.0, 2, 1.5), (3.0, 1.0, 4, 1.0)],
)
def test_even_times_meet_the_closed_form(hosts, read, step, readers, expected):
    ends = simulate(constant(read, hosts), constant(step, hosts), num_readers=readers)
    assert steady_step(ends) == pytest.approx(expected, rel=0.02)


def test_the_slowest_host_counts():
    reads = constant(1.0, hosts=4)
    reads[2] = 2.5
    assert steady_step(simulate(reads, constant(1.0, hosts=4))) == pytest.approx(2.5, rel=0.02)
    steps = constant(1.0, hosts=4)
    steps[1] = 1.7
    assert steady_step(simulate(constant(0.1, hosts=4), steps)) == pytest.approx(1.7, rel=0.02)


@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(0, 6),
    st.floats(0.1, 2.0),
)
def test_no_simulation_beats_the_closed_form_and_reading_further_ahead_never_hurts(
    seed, hosts, readers, prefetch, spread
):
    random = np.random.default_rng(seed)
    reads = draw_times(1.0, spread, (hosts, 60), random)
    steps = draw_times(1.0, 0.1, (hosts, 60), random)
    end = simulate(reads, steps, readers, prefetch)[-1]
    floor = max(reads.sum(axis=1).max() / readers, steps.max(axis=0).sum())
    assert end >= floor * (1 - 1e-9)
    assert simulate(reads, steps, readers, prefetch + 1)[-1] <= end * (1 + 1e-9)
    assert end <= reads.max(axis=0).sum() + steps.max(axis=0).sum() + 1e-9


def test_the_same_seed_gives_the_same_times():
    regime = Regime("", 1.0, 0.5, hosts=3)
    assert regime.simulated(1) == regime.simulated(1)
    assert regime.simulated(1) != regime.simulated(2)


def test_hosts_that_wait_for_each_other_lose_most_near_balance():
    def loss(step: float, spread: float, hosts: int) -> float:
        regime = Regime("", step, spread, hosts=hosts)
        return regime.simulated(0) / regime.closed_form() - 1

    assert abs(loss(2.0, 0.1, 64)) < 0.01
    assert abs(loss(0.5, 0.1, 64)) < 0.03
    assert loss(1.0, 1.0, 64) > loss(1.0, 1.0, 8) > loss(1.0, 1.0, 1) > 0.03
    assert loss(1.0, 1.0, 64) > 5 * loss(3.0, 1.0, 64)


def test_calibration_compares_with_the_real_reader(tmp_path):
    write_training_shards(tmp_path)
    rows = calibrate(tmp_path, 4, 2, [0.0, 0.02], seconds=0.1)
    assert [row["sleep"] for row in rows] == [0.0, 0.02]
    # The device is far slower than reading four short segments: it alone counts.
    assert rows[1]["measured"] >= 0.02
    assert rows[1]["simulated"] >= 0.02


def write_training_shards(folder: Path) -> None:
    random = np.random.default_rng(0)
    shards = folder / "tfrecord"
    shards.mkdir()
    splits = {}
    for split in ("train", "val", "test"):
        path = shards / shard_name(split, 0, 1)
        segments = random.standard_normal((20, 600)).astype(np.float32)
        clip = Clip(segments, np.array([1, 0], np.uint8), "1", "a.mp3")
        write_records(path, encode_clip(clip, split))
        splits[split] = {"clips": 1, "segments": 20, "shards": [{"name": path.name}]}
    write_manifest(
        shards, {"tags": ["a", "b"], "sample_rate": 22050, "num_samples": 600, "splits": splits}
    )
