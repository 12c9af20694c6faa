"""files.py: files that are whole or not there, and folders that one run at a time writes to."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

from toolkit import files
from toolkit.errors import TrainingError

import pytest

_HOLDER = """
import sys
from pathlib import Path
from toolkit.errors import TrainingError
from toolkit.files import only_run
with only_run(Path(sys.argv[1]), "training", TrainingError):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_an_earlier_file_stays_until_the_next_is_whole(tmp_path):
    path = tmp_path / "a.bin"
    files.write_atomically(path, b"earlier")
    with pytest.raises(RuntimeError), files.written_whole(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"earlier"
    files.write_atomically(path, b"later")
    assert path.read_bytes() == b"later"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writings_of_one_file_do_not_meet(tmp_path):
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


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path):
    folder = tmp_path / "folder.csv"
    folder.mkdir()
    for path in (folder, tmp_path / "nowhere" / "a.csv"):
        with pytest.raises(OSError) as caught:
            files.write_atomically(path, b"")
        assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == [folder]


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, files.written_whole(tmp_path / "a.csv"):
        (tmp_path / "b.csv").read_bytes()
    assert caught.value.filename == str(tmp_path / "b.csv")
    with pytest.raises(OSError) as caught, files.written_whole(tmp_path / "a.csv"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write says it
    assert caught.value.filename == str(tmp_path / "a.csv")
    assert not list(tmp_path.iterdir())


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    left = [".a.csv.node1.12.0badcafe.tmp", ".a.keras.node1.12.0badcafe.tmp.keras"]
    kept = [".lock", "a.csv", "a.tmp"]
    for name in left + kept:
        (tmp_path / name).touch()
    files.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path):
    with (
        files.only_run(tmp_path, "training", TrainingError),
        pytest.raises(TrainingError, match=f"{tmp_path}: another training is at work here"),
        files.only_run(tmp_path, "training", TrainingError),
    ):
        pass
    with files.only_run(tmp_path, "training", TrainingError):
        pass


def test_another_process_holds_a_folder_until_it_is_killed(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as holder:  # fmt: skip
        try:
            assert holder.stdout.readline() == b"held\n"
            with (
                pytest.raises(TrainingError, match="another training is at work here"),
                files.only_run(tmp_path, "training", TrainingError),
            ):
                pass
        finally:
            holder.kill()
    with files.only_run(tmp_path, "training", TrainingError):
        pass


def test_where_there_are_no_locks_it_is_said(tmp_path, monkeypatch, capsys):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with files.only_run(tmp_path, "training", TrainingError):
        said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path}: cannot be locked (")
    assert said.endswith("start no second training in it\n")
