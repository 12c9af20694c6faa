"""Files appear complete or not at all; only one process at a time writes to a folder."""

import errno
import fcntl
import os
import resource
import subprocess
import sys

from toolkit import files
from toolkit.errors import TrainingError

import pytest
from conftest import ROOT

_HOLDER = """
import sys
from pathlib import Path
from toolkit.errors import TrainingError
from toolkit.files import only_run
with only_run(Path(sys.argv[1]), "training", TrainingError):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_file_is_replaced_only_by_a_complete_one(tmp_path):
    path = tmp_path / "a.bin"
    files.write_atomically(path, b"earlier")
    with pytest.raises(RuntimeError), files.written_whole(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"earlier"
    files.write_atomically(path, b"later")
    assert path.read_bytes() == b"later"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_use_different_temporary_files(tmp_path):
    path = tmp_path / "a.keras"
    with files.replaced_whole(path, ".keras") as one:
        one.write_bytes(b"one")
        with files.replaced_whole(path, ".keras") as other:
            assert one != other
            assert {one.suffix, other.suffix} == {".keras"}
            other.write_bytes(b"other")
        assert path.read_bytes() == b"other"
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_names_the_file_instead_of_the_temporary_file(tmp_path):
    folder = tmp_path / "folder.csv"
    folder.mkdir()
    for path in (folder, tmp_path / "nowhere" / "a.csv"):
        with pytest.raises(OSError) as caught:
            files.write_atomically(path, b"")
        assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("supported", [True, False])
def test_on_macos_files_are_flushed_to_the_disk_itself(tmp_path, monkeypatch, supported):
    calls = []

    def full_sync(file, command):
        calls.append(command)
        if not supported:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full_sync)
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync"))
    files.write_atomically(tmp_path / "a.csv", b"content")
    assert calls == ([51] if supported else [51, "fsync"])
    assert (tmp_path / "a.csv").read_bytes() == b"content"


def test_a_refused_limit_of_open_files_is_no_error(monkeypatch):
    """On macOS, the hard limit is infinite, but high limits are refused."""
    asked = []

    def refuse(kind, limits):
        asked.append(limits)
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    files.allow_open_files(50_000)
    ((limit, hard),) = asked
    assert limit > 50_000 and hard == resource.RLIM_INFINITY


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, files.written_whole(tmp_path / "a.csv"):
        (tmp_path / "b.csv").read_bytes()
    assert caught.value.filename == str(tmp_path / "b.csv")
    with pytest.raises(OSError) as caught, files.written_whole(tmp_path / "a.csv"):
        raise OSError(errno.ENOSPC, "")  # the error of a failed write names no file
    assert caught.value.filename == str(tmp_path / "a.csv")
    assert not list(tmp_path.iterdir())


def test_only_temporary_files_are_removed(tmp_path):
    left = [".a.csv.node1.12.0badcafe.tmp", ".a.keras.node1.12.0badcafe.tmp.keras"]
    kept = [".lock", "a.csv", "a.tmp"]
    for name in left + kept:
        (tmp_path / name).touch()
    files.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_a_killed_process_releases_its_lock(tmp_path):
    command = [sys.executable, "-c", _HOLDER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    said = f"{tmp_path}: another training is already running in this folder"
    with subprocess.Popen(command, cwd=ROOT, **pipes) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(TrainingError, match=said):
                files.only_run(tmp_path, "training", TrainingError).__enter__()
        finally:
            holder.kill()
    with files.only_run(tmp_path, "training", TrainingError):
        pass


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, capsys):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with files.only_run(tmp_path, "training", TrainingError):
        said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path}: the folder cannot be locked (")
    assert said.endswith("do not start another training in this folder\n")


def test_a_folder_is_replaced_only_by_a_complete_one(tmp_path):
    path = tmp_path / "a.savedmodel"
    for content in ("earlier", "later"):
        with files.replaced_whole(path) as temporary:
            (temporary / "variables").mkdir(parents=True)
            (temporary / "variables" / "data").write_text(content)
        assert (path / "variables" / "data").read_text() == content
    with pytest.raises(RuntimeError), files.replaced_whole(path) as temporary:
        temporary.mkdir()
        raise RuntimeError
    assert (path / "variables" / "data").read_text() == "later"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_whatever_error_a_library_raises(tmp_path):
    path = tmp_path / "a.savedmodel"
    with pytest.raises(OSError, match="No space left on device") as caught:  # noqa: SIM117
        with files.replaced_whole(path) as temporary:
            raise RuntimeError(f"{temporary}/variables; No space left on device [Op:SaveV2]")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
