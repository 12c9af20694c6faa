"""Files from untrusted sources: each damaged model file or shard is read or refused, within limits.

The environment variable FUZZ_MUTATIONS sets the number of damaged model files in the slow test,
which also reads a quarter as many damaged shards (2000 take about 15 minutes). FUZZ_SEED is the
seed of the mutations.
"""

import os
from collections import Counter

import fuzz
import pytest
from conftest import needs_proc

pytestmark = needs_proc

SEED = int(os.environ.get("FUZZ_SEED", "20180415"))


def assert_read_or_refused(what, count):
    reports = fuzz.fuzz(what, count, SEED)
    counts = Counter(report["outcome"] for report in reports)
    seconds, num_bytes = (max(report[name] for report in reports) for name in ("seconds", "bytes"))
    print(what, dict(counts), f"{seconds:.2f} s, {num_bytes} bytes")  # shown by pytest -rP
    assert not [report for report in reports if report["outcome"] == "failed"]
    # If all mutants were refused, or all were read, the mutations would test nothing.
    assert counts["refused"] > count // 10 and counts["result"] > count // 20
    assert seconds < fuzz.MAX_SECONDS and num_bytes < fuzz.MAX_BYTES


@pytest.mark.parametrize(("what", "count"), [("checkpoints", 10), ("shards", 60)])
def test_some_damaged_files_are_read_or_refused(what, count):
    assert_read_or_refused(what, count)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "share"), [("checkpoints", 1), ("shards", 4)])
def test_many_damaged_files_are_read_or_refused(what, share):
    assert_read_or_refused(what, int(os.environ.get("FUZZ_MUTATIONS", "200")) // share)
