"""HDF5 files from untrusted sources: links, external content and false sizes are refused."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import opened
from model_files import assert_refused, edit_weights, keras_content

KERNEL = "model_weights/dense_19/dense_19/kernel:0"


@pytest.fixture
def old_file(golden, tmp_path):
    return Path(shutil.copy(golden / "checkpoints" / "se-multi.hdf5", tmp_path / "old.hdf5"))


def other_file(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["kernel"] = np.zeros((32, 32), np.float32)
    return str(tmp_path / "other.h5")


def external_link(file, tmp_path):
    file[KERNEL] = h5py.ExternalLink(other_file(tmp_path), "/kernel")
    return "link"


def soft_link(file, tmp_path):
    file["elsewhere"] = np.zeros((32, 32), np.float32)
    file[KERNEL] = h5py.SoftLink("/elsewhere")
    return "link"


def external_storage(file, tmp_path):
    file.create_dataset(KERNEL, (32, 32), "f4", external=[(other_file(tmp_path), 0, 4096)])
    return "another file"


def virtual_dataset(file, tmp_path):
    layout = h5py.VirtualLayout((32, 32), "f4")
    layout[:] = h5py.VirtualSource(other_file(tmp_path), "kernel", (32, 32))
    file.create_virtual_dataset(KERNEL, layout)
    return "another file"


def compressed(file, tmp_path):
    file.create_dataset(KERNEL, data=np.zeros((32, 32), np.float32), compression="gzip")
    return "declares 4096 bytes and stores"


def ten_terabytes_chunked(file, tmp_path):
    file.create_dataset(KERNEL, (1_600_000, 1_600_000), "f4", chunks=(1000, 1000))
    return "declares 10240000000000 bytes and stores 0"


def ten_terabytes_unallocated(file, tmp_path):
    file.create_dataset(KERNEL, (1_600_000, 1_600_000), "f4")
    return "declares 10240000000000 bytes and stores 0"


def chunked(file, tmp_path):
    file.create_dataset(KERNEL, data=np.zeros((32, 32), np.float32), chunks=(32, 32))
    return "in chunks"


def root_in_a_group(file, tmp_path):
    file["model_weights/again"] = file["/"]
    return "more than 100,000 objects, or groups nested too deeply"


def group_in_itself(file, tmp_path):
    group = file.create_group("loop")
    for number in range(20):
        group[str(number)] = group
    return "more than 100,000 objects, or groups nested too deeply"


def strings(file, tmp_path):
    file[KERNEL] = np.full((32, 32), b"1234", "S4")
    return "expected numbers"


def strings_of_variable_length(file, tmp_path):
    file.create_dataset(KERNEL, data=["x" * 4] * 32)
    return ""


def complex_numbers(file, tmp_path):
    file[KERNEL] = np.zeros((32, 32), np.complex64)
    return "expected numbers"


def empty(file, tmp_path):
    file[KERNEL] = h5py.Empty("f4")
    return "is empty"


def named_type(file, tmp_path):
    file[KERNEL] = np.dtype("f4")
    return "is neither an array nor a group"


STORED_ELSEWHERE = [external_link, external_storage, virtual_dataset]
STORED_ODDLY = [soft_link, compressed, chunked, ten_terabytes_chunked, ten_terabytes_unallocated]
CYCLES = [group_in_itself, root_in_a_group]
NO_NUMBERS = [strings, strings_of_variable_length, complex_numbers, empty, named_type]


@pytest.mark.parametrize("attack", STORED_ELSEWHERE + STORED_ODDLY + CYCLES + NO_NUMBERS)
def test_unusual_objects_are_refused_and_other_files_are_not_opened(old_file, tmp_path, attack):
    with h5py.File(old_file, "r+") as file:
        del file[KERNEL]
        part = attack(file, tmp_path)
    other = tmp_path / "other.h5"
    with opened(other if attack in STORED_ELSEWHERE else old_file) as was_opened:
        assert_refused(old_file, part)
        assert was_opened() == (attack not in STORED_ELSEWHERE)


def test_weights_of_keras_files_are_checked_too(tmp_path):
    path = tmp_path / "model.keras"
    path.write_bytes(keras_content())
    edit_weights(path, lambda file: external_link(file, tmp_path))
    assert_refused(path, "links are not allowed")


def test_truncated_files_are_refused(old_file, tmp_path):
    path = tmp_path / "truncated"
    for content in (old_file.read_bytes(), keras_content()):
        path.write_bytes(content[: len(content) // 2])
        assert_refused(path)
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + np.random.default_rng(0).bytes(5000))
    assert_refused(path, "damaged")
