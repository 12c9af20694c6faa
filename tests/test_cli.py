"""What scripts share: help, types of arguments, one line an error, progress wherever it is read."""

import argparse
import importlib.util
import os
import pty
import re
import shlex
import subprocess
import sys
import termios
from pathlib import Path

from toolkit import backend, cli, errors, messages
from toolkit.errors import AudioError, BuildError, Interrupted, ShardError, ToolkitError, UsageError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    path.name
    for path in ROOT.glob("*.py")
    if "def build_parser" in path.read_text(encoding="utf-8")
)


def new_parser():
    return cli.add_general(cli.new_parser("Does a thing.", "  python thing.py"))


def run(stage, *options):
    return cli.run(stage, new_parser().parse_args(options))


def raising(error):
    def stage(arguments):
        raise error

    return stage


@pytest.fixture(autouse=True)
def program(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/thing.py"])


@pytest.mark.parametrize(("result", "exit_status"), [(None, 0), (0, 0), (3, 3)])
def test_stage_says_the_exit_status(capsys, result, exit_status):
    assert run(lambda arguments: result) == exit_status
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "exit_status", "message"),
    [
        (UsageError("--this and --that"), 2, "--this and --that"),
        (AudioError("a.mp3: the file is empty"), 1, "a.mp3: the file is empty"),
        (BuildError("no"), 1, "no"),
        (ShardError("no"), 1, "no"),
        (Interrupted("stopped by a signal", 15), 143, "stopped by a signal"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory"),
        (OSError(28, "No space left on device", "x/y"), 1, "x/y: No space left on device"),
        (OSError("odd"), 1, "odd"),
        (OSError(), 1, "OSError"),
        (OSError("can't write\nfile write failed"), 1, "can't write"),
    ],
)
def test_error_is_one_line_and_an_exit_status(capsys, error, exit_status, message):
    assert run(raising(error)) == exit_status
    assert capsys.readouterr() == ("", f"thing.py: error: {message}\n")


class ResourceExhaustedError(Exception):
    """As TensorFlow names its own."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((10**6, 10**6), np.dtype("f4")),
        ResourceExhaustedError("Graph execution error:\n\nOOM when allocating tensor"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 40461680640."),
        RuntimeError("[alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity"),
    ],
)
def test_no_memory_is_one_line_that_says_what_to_lower(capsys, error):
    for option, words in {
        "--batch-size": "out of memory: a smaller --batch-size (now 23) may help",
        "--num-workers": "out of memory: a lower --num-workers (now 23) may help",
    }.items():
        parser = new_parser()
        parser.add_argument(option, type=int, default=23)
        assert cli.run(raising(error), parser.parse_args([])) == 1
        assert capsys.readouterr() == ("", f"thing.py: error: {words}\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "use"),
    [
        ("jax", "import jax.numpy as np; np.zeros((10**6, 10**6)).block_until_ready()"),
        ("torch", "import torch; torch.ones(10**7, 10**7)"),
        ("tensorflow", "import tensorflow as tf; tf.ones((10**6, 10**6))"),
        ("numpy", "import numpy as np; np.ones((10**7, 10**7))"),
    ],
)
def test_the_backends_own_errors_of_memory_are_told(module, use):
    pytest.importorskip(module)
    program = (
        "import sys, cli\n"
        "def stage(arguments):\n"
        f"    backend.import_quietly({module!r})\n"
        f"    {use}\n"
        "parser = cli.add_general(cli.new_parser('', ''))\n"
        "parser.add_argument('--batch-size', default=8)\n"
        "sys.argv[0] = 'thing.py'\n"
        "sys.exit(cli.run(stage, parser.parse_args([])))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
           "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    *talk, last = done.stderr.splitlines()
    assert last == "thing.py: error: out of memory: a smaller --batch-size (now 8) may help"
    assert not any("Traceback" in line for line in talk)


def test_every_error_of_ours_has_an_exit_status():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert all(issubclass(kind, ToolkitError) for kind in kinds)
    assert {kind.exit_status for kind in kinds} == {1, 2}


def test_verbose_shows_the_traceback_before_the_line(capsys):
    assert run(raising(ShardError("x: damaged")), "--verbose") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Traceback (most recent call last):\n")
    assert "in stage\n" in err
    assert err.endswith("thing.py: error: x: damaged\n")


def test_bugs_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run(lambda arguments: 1 // 0)


def test_reader_that_left_is_no_complaint():
    program = (
        "import sys, cli\n"
        "def stage(arguments):\n"
        "    while True: print('data', flush=True)\n"
        "sys.exit(cli.run(stage, cli.add_general(cli.new_parser('', '')).parse_args()))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == b"data\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=20) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_groups_defaults_and_examples_that_parse(script):
    shown = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    options, examples = shown.stdout.split("\nexamples:\n")
    commands = [shlex.split(line.partition(">")[0]) for line in examples.splitlines()]
    assert len(commands) >= 2
    parser = importlib.import_module(Path(script).stem).build_parser()
    for command in commands:
        assert command[:2] == ["python", script]
        try:
            parser.parse_args(command[2:])
        except SystemExit:
            pytest.fail(f"{script} --help: {shlex.join(command)}: does not take these options")

    # argparse's own groups, which stand where nobody named one.
    titles = re.findall(r"^(\S.*):$", options, re.MULTILINE)
    assert not {"options", "optional arguments", "positional arguments"} & set(titles)
    assert titles[-1] == "general" and len(titles) >= 2
    for action in parser._actions:
        if action.option_strings and action.dest != "help":
            words = "required" if action.required else "(default: "
            assert words in action.help, f"{script}: {action.option_strings[0]}"


def on_terminal(command, variables):
    """Run a Python command with a terminal for all it writes; give the bytes."""
    environment = {name: os.environ[name] for name in os.environ if "COLOR" not in name}
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment | {"TERM": "xterm"} | variables,
        stdin=terminal, stdout=terminal, stderr=terminal,
    )  # fmt: skip
    os.close(terminal)
    written = b""
    while True:
        try:
            read = os.read(controller, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            read = b""
        if not read:
            break
        written += read
    os.close(controller)
    assert process.wait(timeout=60) == 0, written
    return written


PROGRESS = """
import sys, cli
for number in messages.progress(range(3), mininterval=0, desc="trying"):
    messages.say(f"at {number}")
"""
COLOURS = re.compile(rb"\x1b\[[0-9;]*m")


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}, {"TQDM_COLOUR": "green"}])
def test_progress_has_no_colours_on_a_terminal_and_no_escape_codes_elsewhere(variables):
    written = on_terminal(["-c", PROGRESS], variables)
    assert b"\rtrying: 100%|\xe2\x96\x88" in written  # a bar, of blocks
    assert b"at 1\r\n" in written
    assert not COLOURS.search(written)

    done = subprocess.run(
        [sys.executable, "-c", PROGRESS], cwd=ROOT, env=os.environ | variables,
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == b""
    assert b"at 1\n" in done.stderr and b"trying: 100%" in done.stderr
    assert b"\x1b" not in done.stderr and b"\r" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}, {"TQDM_COLOUR": "green"}])
def test_a_script_on_a_terminal_shows_a_bar_without_colours(tmp_path, variables):
    out = tmp_path / "dataset"
    command = ["-m", "tools.make_demo_dataset", "--clips", "16", "--out", str(out)]
    written = on_terminal(command, variables)
    assert b"\rsynthesising:" in written and b"16/16" in written
    last = written.decode().splitlines()[-1]
    assert re.search(r"dataset: 16 clips of 29 s with \d+ tags, 1\.9 MB$", last), last
    assert not COLOURS.search(written)


@pytest.mark.slow
def test_progress_in_a_notebook_is_one_line_that_is_drawn_again():
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
    assert "at 1\n" in text and text.count("\n") == 4  # three that were said, and the bar's end
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (cli.positive_int, {"1": 1, "12": 12}, ["0", "-1", "1.5", "", "x", "1e3", "nan"]),
        (cli.non_negative_int, {"0": 0, "7": 7}, ["-1", "0.0", "inf"]),
        (cli.positive_float, {"1e-3": 0.001, "2": 2.0}, ["0", "-1", "inf", "nan", "x"]),
        (cli.non_negative_float, {"0": 0.0, "0.5": 0.5}, ["-0.1", "inf", "nan", ""]),
        (cli.percentage, {"0": 0.0, "5": 5.0, "100": 100.0}, ["-1", "100.1", "nan", "x", "5%"]),
        (cli.rate, {"0": 0.0, "0.999": 0.999}, ["1", "-0.1", "nan", "2", "x"]),
    ],
)
def test_argument_types(capsys, kind, good, bad):
    for text, value in good.items():
        parsed = kind(text)
        assert parsed == value
        assert type(parsed) is type(value)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=r"is not a (whole )?number"):
            kind(text)
        parser = new_parser()
        parser.add_argument("--number", type=kind)
        with pytest.raises(SystemExit) as caught:
            parser.parse_args([f"--number={text}"])
        assert caught.value.code == 2
        assert f"argument --number: {text!r} is not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "under 1 s"), (0.99, "under 1 s"), (1, "1 s"), (8.4, "8 s"), (59.4, "59 s"),
        (59.6, "1 min"), (185, "3 min 5 s"), (3599.4, "59 min 59 s"), (3599.6, "1 h"),
        (7423, "2 h 4 min"), (7199.9, "2 h"), (4_000_000, "1,111 h 7 min"),
    ],
)  # fmt: skip
def test_durations(seconds, said):
    assert messages.duration(seconds) == said


@given(st.floats(1, 1e9))
def test_a_duration_says_about_as_long_as_it_is(seconds):
    said = messages.duration(seconds)
    parts = re.fullmatch(r"(?:([\d,]+) h)? ?(?:(\d+) min)? ?(?:(\d+) s)?", said)
    hours, minutes, rest = (int((part or "0").replace(",", "")) for part in parts.groups())
    assert minutes < 60 and rest < 60 and not (hours and rest)
    assert abs(3600 * hours + 60 * minutes + rest - seconds) <= (30 if hours else 0.5)


@pytest.mark.parametrize(
    ("num_bytes", "said"),
    [
        (0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1.0 kB"), (9_949, "9.9 kB"),
        (9_951, "10 kB"), (999_499, "999 kB"), (999_501, "1.0 MB"), (49_863_329_844, "50 GB"),
        (999_600_000_000, "1.0 TB"), (12_345 * 10**12, "12,345.0 TB"),
    ],
)  # fmt: skip
def test_sizes(num_bytes, said):
    assert messages.size(num_bytes) == said


@given(st.integers(0, 10**18))
def test_a_size_says_two_digits_or_more_of_what_it_is(num_bytes):
    number, unit = messages.size(num_bytes).split()
    factor = {"byte": 1, "bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    value = float(number.replace(",", ""))
    assert abs(value * factor - num_bytes) <= 0.05001 * num_bytes
    assert value < 1000 or unit == "TB"


def test_the_size_of_files_and_folders(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "a").write_bytes(bytes(1500))
    (tmp_path / "folder" / "deep" / "b").write_bytes(bytes(1000))
    (tmp_path / "c").write_bytes(bytes(5))
    assert messages.size_on_disk(tmp_path / "c") == "5 bytes"
    assert messages.size_on_disk(tmp_path / "folder") == "2.5 kB"
    assert messages.size_on_disk(tmp_path / "folder", str(tmp_path / "c")) == "2.5 kB"
    assert messages.size_on_disk() == "0 bytes"


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0 clips"), (1, "1 clip"), (2, "2 clips"), (152_500, "152,500 clips")],
)
def test_counts(number, said):
    assert messages.count(number, "clip") == said


def write_module(folder, name, body):
    (folder / f"{name}.py").write_text(body)


def test_import_quietly_swallows_chatter_but_not_failures(tmp_path, monkeypatch, capfd):
    monkeypatch.syspath_prepend(tmp_path)
    write_module(tmp_path, "chatty_module", "import os\nos.write(2, b'chatter\\n')\n")
    write_module(tmp_path, "broken_module", "import os\nos.write(2, b'why\\n')\nraise ImportError")
    backend.import_quietly("chatty_module")
    assert "chatty_module" in sys.modules
    assert capfd.readouterr().err == ""
    with pytest.raises(ImportError):
        backend.import_quietly("broken_module")
    assert capfd.readouterr().err == "why\n"
    os.write(2, b"still there\n")
    assert capfd.readouterr().err == "still there\n"


def test_progress_in_a_log_is_a_line_now_and_then(capsys):
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


def test_a_backend_that_cannot_be_had_is_one_line(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "nonsense")
    with pytest.raises(UsageError, match=r"^KERAS_BACKEND=nonsense: .*tensorflow, jax, torch$"):
        backend.import_keras()
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"^jax, .*-r requirements/backends.txt, or name another"):
        backend.import_keras()


def test_a_script_says_a_wrong_backend_in_one_line(golden):
    model = golden / "checkpoints" / "basic-multi.hdf5"
    done = subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), str(model), "--data-dir", str(golden)],
        env=os.environ | {"KERAS_BACKEND": "nonsense"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "eval.py: error: KERAS_BACKEND=nonsense: expected one of tensorflow, jax, torch\n"
    )


@pytest.mark.parametrize(
    ("backend", "requirements"),
    [
        (None, "requirements.txt"),
        ("tensorflow", "requirements.txt"),
        ("torch", "requirements/backends.txt"),
    ],
)
def test_a_missing_backend_is_named_with_its_requirements(
    tmp_path, monkeypatch, backend, requirements
):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))  # where no settings are
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    if backend:
        monkeypatch.setenv("KERAS_BACKEND", backend)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        backend.import_keras()
    assert str(caught.value).startswith(f"{backend or 'tensorflow'}, Keras's backend here, is not ")
    assert f"pip install -r {requirements}, " in str(caught.value)
    assert (ROOT / requirements).is_file()


def test_the_backend_of_keras_own_settings_is_heeded(tmp_path, monkeypatch):
    (tmp_path / "keras.json").write_text('{"backend": "jax"}')
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("KERAS_BACKEND", "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"^jax, Keras's backend here, is not installed"):
        backend.import_keras()
