"""Damaged model files and shards are read or refused, within limits of time and memory.

The environment variable FUZZ_MUTATIONS sets the number of model files; a quarter as many shards are
damaged. 2000 takes a quarter of an hour. FUZZ_SEED sets the seed.
"""

import os

import fuzz
import pytest

SEED = int(os.environ.get("FUZZ_SEED", "20180415"))


def assert_all_end_well(what, count):
    summary = fuzz.fuzz(what, count, SEED)
    print(summary)  # shown by pytest -rP
    assert summary["failures"] == []
    assert summary["failed"] == 0
    assert summary["tried"] == count == summary["result"] + summary["refused"]
    # The mutations must be neither all refused nor all read.
    assert summary["refused"] > count // 10 and summary["result"] > count // 20
    assert summary["seconds"] < fuzz.MAX_SECONDS and summary["bytes"] < fuzz.MAX_BYTES


@pytest.mark.parametrize(("what", "count"), [("checkpoints", 10), ("shards", 60)])
def test_some_damaged_files_are_read_or_refused(what, count):
    assert_all_end_well(what, count)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "share"), [("checkpoints", 1), ("shards", 4)])
def test_many_damaged_files_are_read_or_refused(what, share):
    assert_all_end_well(what, int(os.environ.get("FUZZ_MUTATIONS", "200")) // share)
