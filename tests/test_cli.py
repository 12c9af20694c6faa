"""The command line of all scripts: options, help, argument types, errors and exit status."""

import argparse
import dataclasses
import importlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time

from toolkit import cli, errors
from toolkit.errors import AudioError, Interrupted, ShardError, ToolkitError, UsageError

import numpy as np
import pytest
from conftest import ROOT, run_python

SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]
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
def test_the_result_of_a_stage_is_the_exit_status(capsys, result, exit_status):
    assert run(lambda arguments: result) == exit_status
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "exit_status", "message"),
    [
        (UsageError("--this and --that"), 2, "--this and --that"),
        (AudioError("a.mp3: the file is empty"), 1, "a.mp3: the file is empty"),
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


def test_an_empty_value_is_refused(capsys):
    parser = new_parser()
    parser.add_argument("--data-dir")
    parser.add_argument("audio", nargs="*")
    for words, name in ((["--data-dir", ""], "data-dir"), (["a.mp3", ""], "audio")):
        assert cli.run(lambda arguments: 0, parser.parse_args(words)) == 2
        assert capsys.readouterr().err == f"thing.py: error: {name}: the value is empty\n"


def test_ctrl_c_is_named_even_if_a_library_replaces_its_exception(capsys):
    def script(arguments):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(9)
        except KeyboardInterrupt:
            raise UsageError("onnxruntime is not installed") from None

    assert run(script) == 130
    assert capsys.readouterr().err == "thing.py: error: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_any_character_can_be_printed(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", write_through=True)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run(lambda arguments: print("très 音 \udcff")) == 0
    assert stdout.buffer.getvalue() == "très ? ?\n".encode("latin-1")


class ResourceExhaustedError(Exception):
    """An exception with the name of TensorFlow's."""


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
def test_out_of_memory_is_one_line_that_names_the_option_to_reduce(capsys, error):
    for option in ("--batch-size", "--num-workers"):
        parser = new_parser()
        parser.add_argument(option, type=int, default=23)
        assert cli.run(raising(error), parser.parse_args([])) == 1
        said = f"thing.py: error: out of memory: try a smaller {option} (now 23)\n"
        assert capsys.readouterr() == ("", said)


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
def test_out_of_memory_errors_of_each_backend_are_recognised(module, use):
    pytest.importorskip(module)
    program = (
        "import sys\nfrom toolkit import backend, cli\n"
        "def stage(arguments):\n"
        f"    backend.import_quietly({module!r})\n"
        f"    {use}\n"
        "parser = cli.add_general(cli.new_parser('', ''))\n"
        "parser.add_argument('--batch-size', default=8)\n"
        "sys.argv[0] = 'thing.py'\n"
        "sys.exit(cli.run(stage, parser.parse_args([])))\n"
    )
    done = run_python("-c", program, JAX_PLATFORMS="cpu")
    assert done.returncode == 1, done.stderr
    *earlier, last = done.stderr.splitlines()
    assert last == "thing.py: error: out of memory: try a smaller --batch-size (now 8)"
    assert not any("Traceback" in line for line in earlier)


def test_every_error_of_the_toolkit_has_an_exit_status():
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


def test_unexpected_exceptions_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run(lambda arguments: 1 // 0)


def test_closed_stdout_is_not_an_error_message():
    program = (
        "import sys\nfrom toolkit import cli\n"
        "def stage(arguments):\n"
        "    while True: print('data', flush=True)\n"
        "sys.exit(cli.run(stage, cli.add_general(cli.new_parser('', '')).parse_args()))\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **pipes)
    assert process.stdout.readline() == b"data\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=20) == 1


def module_name(script):
    return script.removesuffix(".py").replace("/", ".")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_groups_and_examples_that_parse(script):
    name = module_name(script)
    command = ["-m", name] if "/" in script else [script]
    shown = run_python(*command, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    options, examples = shown.stdout.split("\nexamples:\n")
    examples = [shlex.split(line.partition(">")[0]) for line in examples.splitlines()]
    assert examples
    parser = importlib.import_module(name).build_parser()
    for words in examples:
        assert words[: 1 + len(command)] == ["python", *command]
        try:
            parser.parse_args(words[1 + len(command) :])
        except SystemExit:
            pytest.fail(f"{script} --help: {shlex.join(words)}: these options are not accepted")
    # The default groups of argparse contain the options that were added without a group.
    titles = re.findall(r"^(\S.*):$", options, re.MULTILINE)
    assert not {"options", "optional arguments", "positional arguments"} & set(titles)
    assert titles[-1] == "general" and len(titles) >= 2


def parsers(parser):
    """Yield a parser and the parsers of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from parsers(each)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_default_of_every_option(script):
    for parser in parsers(importlib.import_module(module_name(script)).build_parser()):
        for action in parser._actions:
            if not action.option_strings or action.dest == "help" or action.required:
                continue
            shown = re.search(r"\(default: (.*)\)$", action.help % vars(action))
            assert shown, f"{script} {action.option_strings[0]}: no default in {action.help!r}"
            if action.nargs == 0:
                assert shown[1] == "off"
            elif isinstance(action.default, str | int | float):
                value = action.default
                assert shown[1] == (f"{value:g}" if isinstance(value, float) else str(value))


@dataclasses.dataclass
class Options:
    width: float = cli.option(0.5, "width", group="shape", type=float, metavar="W")
    kind: str | None = cli.option(None, "kind", group="shape", choices=("a", "b"))
    smooth: bool = cli.option(True, "leave edges sharp", group="shape", flag="--sharp")
    measured: int = 3  # not an option


def test_options_are_declared_once():
    parser = new_parser()
    cli.add_options(parser, Options)
    assert cli.read_options(Options, parser.parse_args([])) == Options()
    arguments = parser.parse_args(["--width", "2", "--kind", "b", "--sharp"])
    assert cli.read_options(Options, arguments) == Options(2.0, "b", False)
    shown = parser.format_help()
    for line in ("shape:", "width (default: 0.5)", "kind (default: none)", "sharp (default: off)"):
        assert line in shown


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
