"""A script that cannot start exits with one line: other systems, no packages, or Ctrl-C."""

import subprocess
import sys

import pytest
from conftest import ROOT, run_python

SCRIPTS = ("build_mtt.py", "train.py", "eval.py", "extract_excitations.py", "tag.py")
TOOLS = ("tools.benchmark", "tools.convert_model", "tools.make_demo_dataset")
# Modules that the scripts import before the toolkit. Some depend on the platform, so import them
# before the platform is replaced.
PROGRAM = """
import argparse, concurrent.futures, importlib.metadata, platform, runpy, shutil, sys
{pretend}
runpy.run_path(sys.argv[1], run_name="__main__")
"""
WINDOWS = """
sys.platform = "win32"
sys.modules["fcntl"] = sys.modules["resource"] = None  # not part of Python on Windows
"""


@pytest.mark.parametrize(
    ("script", "pretend", "part"),
    [
        *((script, WINDOWS, "Windows is not supported: run the") for script in SCRIPTS),
        ("train.py", "sys.version_info = (3, 10, 4)", "Python 3.11 to 3.14 is required, this is 3"),
        ("eval.py", "sys.version_info = (3, 15, 0)", "Python 3.11 to 3.14 is required, this is 3"),
    ],
)
def test_scripts_name_the_system_that_they_need(script, pretend, part):
    done = run_python("-c", PROGRAM.format(pretend=pretend), script, "--help")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1 and part in done.stderr


@pytest.mark.parametrize("command", [[script] for script in SCRIPTS] + [["-m", t] for t in TOOLS])
def test_without_its_packages_a_script_says_to_activate_the_environment(command):
    command = [sys._base_executable, "-S", *command]  # outside .venv, without site-packages
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    name = command[-1].removeprefix("tools.").removesuffix(".py")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"{name}.py: error: ")
    assert "is not installed: activate the environment with: . .venv/bin/activate" in done.stderr
    assert done.stderr.count("\n") == 1


def test_ctrl_c_while_packages_are_imported_is_one_line(tmp_path):
    (tmp_path / "numpy.py").write_text("import os, time\nos.kill(os.getpid(), 2)\ntime.sleep(9)\n")
    done = run_python("eval.py", "model.keras", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (130, "eval.py: error: interrupted\n")
