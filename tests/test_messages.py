"""Progress bars on terminals, in logs and in notebooks; formats of counts, durations and sizes."""

import os
import pty
import re
import subprocess
import sys
import termios

from toolkit import messages

import pytest
from conftest import ROOT, run_python


def on_terminal(command, variables):
    """Run a Python command on a terminal and return the bytes that it writes."""
    environment = {name: os.environ[name] for name in os.environ if "COLOR" not in name}
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    environment |= {"TERM": "xterm"} | variables
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, **streams)
    os.close(terminal)
    written = b""
    while True:
        try:
            read = os.read(controller, 65536)
        except OSError:  # raised on Linux when the other end is closed
            read = b""
        if not read:
            break
        written += read
    os.close(controller)
    assert process.wait(timeout=60) == 0, written
    return written


PROGRESS = """
import sys
from toolkit import messages
for number in messages.progress(range(3), mininterval=0, desc="trying"):
    messages.say(f"at {number}")
"""
COLOURS = re.compile(rb"\x1b\[[0-9;]*m")


@pytest.mark.parametrize("variables", [{}, {"TQDM_COLOUR": "green"}])
def test_progress_has_no_colours_on_a_terminal_and_no_escape_codes_elsewhere(variables):
    written = on_terminal(["-c", PROGRESS], variables)
    assert b"\rtrying: 100%|\xe2\x96\x88" in written  # a bar of block characters
    assert b"at 1\r\n" in written
    assert not COLOURS.search(written)

    done = run_python("-c", PROGRESS, **variables)
    assert done.returncode == 0 and done.stdout == ""
    assert "at 1\n" in done.stderr and "trying: 100%" in done.stderr
    assert "\x1b" not in done.stderr and "\r" not in done.stderr


@pytest.mark.slow
def test_progress_in_a_notebook_redraws_one_line():
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cell = nbformat.v4.new_code_cell(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{PROGRESS}")
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    assert {output.name for output in outputs} == {"stderr"}
    text = "".join(output.text for output in outputs)
    assert "\rtrying: 100%|██████████| 3/3" in text
    assert "at 1\n" in text and text.count("\n") == 4  # three messages and the end of the bar
    assert "\x1b" not in text


# fmt: off
DURATIONS = [
    (0, "under 1 s"), (0.99, "under 1 s"), (1, "1 s"), (8.4, "8 s"), (59.4, "59 s"),
    (59.6, "1 min"), (185, "3 min 5 s"), (3599.4, "59 min 59 s"), (3599.6, "1 h"),
    (7423, "2 h 4 min"), (7199.9, "2 h"), (4_000_000, "1,111 h 7 min"),
]
SIZES = [
    (0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1.0 kB"), (9_949, "9.9 kB"),
    (9_951, "10 kB"), (999_499, "999 kB"), (999_501, "1.0 MB"), (49_863_329_844, "50 GB"),
    (999_600_000_000, "1.0 TB"), (12_345 * 10**12, "12,345.0 TB"),
]
# fmt: on


@pytest.mark.parametrize(("seconds", "expected"), DURATIONS)
def test_durations(seconds, expected):
    assert messages.duration(seconds) == expected


@pytest.mark.parametrize(("num_bytes", "expected"), SIZES)
def test_sizes(num_bytes, expected):
    assert messages.size(num_bytes) == expected


def test_the_size_of_files_and_folders(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "a").write_bytes(bytes(1500))
    (tmp_path / "folder" / "deep" / "b").write_bytes(bytes(1000))
    (tmp_path / "c").write_bytes(bytes(5))
    assert messages.size_on_disk(tmp_path / "c") == "5 bytes"
    assert messages.size_on_disk(tmp_path / "folder") == "2.5 kB"
    assert messages.size_on_disk(tmp_path / "folder", str(tmp_path / "c")) == "2.5 kB"
    assert messages.size_on_disk() == "0 bytes"


def test_counts():
    found = [messages.count(number, "clip") for number in (0, 1, 152_500)]
    assert found == ["0 clips", "1 clip", "152,500 clips"]


def test_progress_in_a_log_is_printed_as_whole_lines(capsys):
    with messages.progress(total=10, initial=4, mininterval=0, unit="clip") as bar:
        assert capsys.readouterr() == ("", "")
        bar.update(3)
        bar.update(3)
    out, err = capsys.readouterr()
    assert out == ""
    assert "7/10" in err.splitlines()[0]
    assert "10/10" in err.splitlines()[-1]
    assert "\r" not in err
    with messages.progress(range(100)) as bar:
        assert list(bar) == list(range(100))
    assert capsys.readouterr() == ("", "")


def test_messages_do_not_repeat_the_line_of_progress(capsys):
    with messages.progress(total=10) as bar:
        bar.start_t -= 60
        bar.update()
        messages.say("one")
    assert capsys.readouterr().err == "one\n"
