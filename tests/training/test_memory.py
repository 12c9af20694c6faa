"""A training frees what it used, so memory does not grow with epochs, stages or trainings."""

import gc
import weakref

import train
from input_data import SegmentReader

import pytest
from training_runs import ONE_EPOCH, arguments


def test_a_training_leaves_no_batches_networks_or_graphs(tiny_dataset, tmp_path, monkeypatch):
    tf = pytest.importorskip("tensorflow")
    watched = []
    read, compile_trainer = SegmentReader.read, train.compile_trainer

    def read_and_watch(reader, rows):
        segments, labels = read(reader, rows)
        memory = segments
        while memory.base is not None:
            memory = memory.base
        watched.append(weakref.ref(memory))
        return segments, labels

    def compile_and_watch(*arguments):
        trainer = compile_trainer(*arguments)
        watched.append(weakref.ref(trainer))
        return trainer

    def graphs():
        gc.collect()
        return {id(each) for each in gc.get_objects() if issubclass(type(each), tf.Graph)}

    monkeypatch.setattr(SegmentReader, "read", read_and_watch)
    monkeypatch.setattr(train, "compile_trainer", compile_and_watch)
    tf.compat.v1.get_default_graph()
    before = graphs()
    assert train.main(arguments(tiny_dataset, tmp_path / "log", *ONE_EPOCH)) == 0
    assert graphs() <= before
    assert len(watched) > 1 and not any(reference() is not None for reference in watched)
