"""What scripts share: exit statuses, one line on standard error, types of arguments."""

import argparse
import os
import subprocess
import sys

import cli
import errors
from errors import AudioError, BuildError, Interrupted, ShardError, ToolkitError, UsageError

import numpy as np
import pytest


def run(stage, *options):
    parser = cli.new_parser("Does a thing.", "  python thing.py")
    return cli.run(stage, parser.parse_args(options))


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
        parser = cli.new_parser("", "")
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
        f"    cli.import_quietly({module!r})\n"
        f"    {use}\n"
        "parser = cli.new_parser('', '')\n"
        "parser.add_argument('--batch-size', default=8)\n"
        "sys.argv[0] = 'thing.py'\n"
        "sys.exit(cli.run(stage, parser.parse_args([])))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100,
        env=os.environ
        | {"PYTHONPATH": os.path.dirname(cli.__file__), "CUDA_VISIBLE_DEVICES": "",
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
        "sys.exit(cli.run(stage, cli.new_parser('', '').parse_args()))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.path.dirname(cli.__file__)},
    )
    assert process.stdout.readline() == b"data\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=20) == 1


def test_help_ends_with_the_examples(capsys):
    parser = cli.new_parser("Does a thing.", "  python thing.py\n  python thing.py --verbose")
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "Does a thing." in out
    assert out.endswith("examples:\n  python thing.py\n  python thing.py --verbose\n")


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
        parser = cli.new_parser("", "")
        parser.add_argument("--number", type=kind)
        with pytest.raises(SystemExit) as caught:
            parser.parse_args([f"--number={text}"])
        assert caught.value.code == 2
        assert f"argument --number: {text!r} is not" in capsys.readouterr().err


def write_module(folder, name, body):
    (folder / f"{name}.py").write_text(body)


def test_import_quietly_swallows_chatter_but_not_failures(tmp_path, monkeypatch, capfd):
    monkeypatch.syspath_prepend(tmp_path)
    write_module(tmp_path, "chatty_module", "import os\nos.write(2, b'chatter\\n')\n")
    write_module(tmp_path, "broken_module", "import os\nos.write(2, b'why\\n')\nraise ImportError")
    cli.import_quietly("chatty_module")
    assert "chatty_module" in sys.modules
    assert capfd.readouterr().err == ""
    with pytest.raises(ImportError):
        cli.import_quietly("broken_module")
    assert capfd.readouterr().err == "why\n"
    os.write(2, b"still there\n")
    assert capfd.readouterr().err == "still there\n"


def test_progress_in_a_log_is_a_line_now_and_then(capsys):
    with cli.progress(total=10, initial=4, mininterval=0, unit="clip") as bar:
        assert capsys.readouterr() == ("", "")
        bar.update(3)
        bar.update(3)
    out, err = capsys.readouterr()
    assert out == ""
    assert "7/10" in err.splitlines()[0]
    assert "10/10" in err.splitlines()[-1]
    assert "\r" not in err
    with cli.progress(range(100)) as bar:
        assert list(bar) == list(range(100))
    assert capsys.readouterr() == ("", "")
