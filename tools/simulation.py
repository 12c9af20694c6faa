"""Hosts that read ahead of GPUs and wait for each other in every step, event by event.

It says where the closed form of `plan` holds, and is compared with the real reader of shards by
`calibrate`. docs/scaling.md has what it found.
"""

import heapq
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from toolkit.errors import UsageError

import numpy as np


def simulate(
    reads: np.ndarray, steps: np.ndarray, num_readers: int = 1, prefetch: int = 4
) -> np.ndarray:
    """Run hosts that read ahead of devices that wait for each other, event by event.

    As `input_data.SegmentReader.batches` has it, a batch is asked for when the one `prefetch`
    before it is taken; readers take what is asked for in turn, and batches are taken in order. A
    step begins when the last host has its batch, and ends everywhere when the last device has.

    Parameters
    ----------
    reads : np.ndarray [shape=(n_hosts, n_steps)]
        Seconds that a reader takes for each batch.
    steps : np.ndarray [shape=(n_hosts, n_steps)]
        Seconds that each device computes.
    num_readers : int
        Batches that a host reads at once.
    prefetch : int
        Batches ahead.

    Returns
    -------
    np.ndarray [shape=(n_steps,)]
        When each step ended, in seconds.
    """
    num_hosts, num_steps = reads.shape
    free = [[0.0] * num_readers for _ in range(num_hosts)]  # when each reader is, a heap a host
    done = np.zeros((num_hosts, num_steps))
    ends = np.zeros(num_steps)
    asked = 0  # batches, of every host: the barrier keeps them together
    now = 0.0
    for step in range(num_steps):
        while asked < min(step + prefetch + 1, num_steps):
            for host, readers in enumerate(free):
                done[host, asked] = max(now, readers[0]) + reads[host, asked]
                heapq.heapreplace(readers, done[host, asked])
            asked += 1
        begin = max(now, done[:, step].max())
        now = begin + steps[:, step].max()
        ends[step] = now
    return ends


def steady_step(ends: np.ndarray) -> float:
    """Give the seconds a step once the queue has settled: after the first fifth."""
    skipped = len(ends) // 5
    return (ends[-1] - ends[skipped]) / (len(ends) - 1 - skipped)


def draw_times(
    mean: float, spread: float, shape: tuple[int, int], random: np.random.Generator
) -> np.ndarray:
    """Draw log-normal times.

    Parameters
    ----------
    mean : float
        Seconds.
    spread : float
        Standard deviation over mean.
    shape : tuple of int
        Hosts and steps.
    random : np.random.Generator
        Where from.
    """
    variance = math.log1p(spread**2)
    return mean * random.lognormal(-variance / 2, variance**0.5, shape)


@dataclass(frozen=True)
class Regime:
    """A case to simulate, in units of the mean time of reading a batch."""

    name: str
    step: float  # of the device
    read_spread: float = 0.1
    step_spread: float = 0.0
    hosts: int = 1
    prefetch: int = 4
    slow: float = 1.0  # how much longer the last host reads

    def closed_form(self) -> float:
        """Give the seconds a step of the closed form: the longest mean."""
        return max(self.step, self.slow)

    def simulated(self, seed: int) -> float:
        """Give the seconds a step of the simulation."""
        random = np.random.default_rng(seed)
        # One host alone has its mean from its own steps.
        shape = (self.hosts, 40_000 if self.hosts == 1 else 2_500)
        reads = draw_times(1.0, self.read_spread, shape, random)
        reads[-1] *= self.slow
        steps = draw_times(self.step, self.step_spread, shape, random)
        return steady_step(simulate(reads, steps, prefetch=self.prefetch))


REGIMES = (
    *(Regime("input-bound", 0.5, hosts=n) for n in (1, 8, 64)),
    *(Regime("GPU-bound", 2.0, hosts=n) for n in (1, 8, 64)),
    *(Regime("balance", 1.0, hosts=n) for n in (1, 8, 64)),
    *(Regime("uneven reads, balance", 1.0, 1.0, hosts=n) for n in (1, 8, 64)),
    *(Regime("uneven reads, GPU-bound", 2.0, 1.0, hosts=n) for n in (1, 8, 64)),
    *(Regime("the same, 34 ahead", 2.0, 1.0, hosts=n, prefetch=34) for n in (1, 8, 64)),
    *(Regime("the same, balance", 1.0, 1.0, hosts=n, prefetch=34) for n in (1, 8, 64)),
    *(Regime("uneven steps, GPU-bound", 2.0, 0.1, 0.1, hosts=n) for n in (1, 8, 64)),
    *(Regime("one host reads 3 x as long", 2.0, hosts=n, slow=3.0) for n in (8, 64)),
    *(Regime("rare long reads, GPU-bound", 2.0, 5.0, hosts=n) for n in (1, 8, 64)),
)


def compare_regimes(seed: int) -> list[dict[str, float | str]]:
    """Compare the closed form with the simulation in every regime."""
    rows = []
    for regime in REGIMES:
        expected, found = regime.closed_form(), regime.simulated(seed)
        rows.append(
            asdict(regime)
            | {"closed_form": expected, "simulated": found, "error": found / expected - 1}
        )
    return rows


def calibrate(
    data_dir: str | Path,
    batch_size: int,
    num_threads: int,
    step_seconds: Sequence[float],
    seconds: float = 3.0,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Compare the simulation with the real reader, which feeds a device that only sleeps.

    Parameters
    ----------
    data_dir : str or Path
        A dataset with training shards.
    batch_size : int
        Segments a step.
    num_threads : int
        Threads of the reader.
    step_seconds : sequence of float
        What to sleep a step; 0 first, whose rate is the reader's own.
    seconds : float
        How long to measure each.
    seed : int
        Of order and simulation.

    Returns
    -------
    list of dict
        For each sleep: seconds a step as measured, of the closed form and of the simulation.

    Raises
    ------
    UsageError
        There are fewer segments than a batch.
    """
    from input_data import SegmentReader, open_dataset, shuffled_order

    reader = SegmentReader(open_dataset(data_dir), "train", num_threads)
    if reader.num_segments < batch_size:
        raise UsageError(
            f"--batch-size {batch_size}: more than the {reader.num_segments} training segments"
        )
    epochs = itertools.count()

    def feed(sleep: float) -> float:
        """Give the median over five parts of the measurement."""
        parts = []
        for _ in range(5):
            num_steps = 0
            started = time.perf_counter()
            while (taken := time.perf_counter() - started) < seconds / 5:
                order = shuffled_order(reader.num_segments, seed, 0, next(epochs))
                for _ in reader.batches(batch_size, order):
                    num_steps += 1
                    if sleep:
                        time.sleep(sleep)
            parts.append(taken / num_steps)
        return statistics.median(parts)

    def nap(sleep: float) -> float:
        started = time.perf_counter()
        for _ in range(50):
            time.sleep(sleep)
        return (time.perf_counter() - started) / 50

    try:
        feed(0.0)  # the page cache
        # A process reads no faster than Python's lock lets it, however many threads: one reader.
        own = feed(0.0)
        order = shuffled_order(reader.num_segments, seed, 0, next(epochs))
        singles = []
        for start in range(0, len(order) - batch_size + 1, batch_size):
            begun = time.perf_counter()
            reader.read(order[start : start + batch_size])
            singles.append(time.perf_counter() - begun)
        spread = statistics.pstdev(singles) / statistics.mean(singles)
        rows = []
        for sleep in step_seconds:
            device = nap(sleep) if sleep else 0.0
            random = np.random.default_rng(seed)
            reads = draw_times(own, spread, (1, 2000), random)
            rows.append(
                {
                    "sleep": sleep,
                    "measured": feed(sleep),
                    "closed_form": max(own, device),
                    "simulated": steady_step(simulate(reads, np.full((1, 2000), device))),
                    "read_spread": spread,
                }
            )
        return rows
    finally:
        reader.close()
