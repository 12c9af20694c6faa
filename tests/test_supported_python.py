"""A script that cannot start exits with one line: other systems, no packages, or Ctrl-C."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
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


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("pretend", "part"),
    [
        (WINDOWS, "Windows is not supported: run the toolkit in WSL"),
        ("sys.version_info = (3, 10, 4)", "Python 3.11 to 3.14 is required, this is 3.10"),
        ("sys.version_info = (3, 15, 0)", "Python 3.11 to 3.14 is required, this is 3.15"),
    ],
)
def test_scripts_name_the_system_that_they_need(script, pretend, part):
    command = [sys.executable, "-c", PROGRAM.format(pretend=pretend), script, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert part in done.stderr


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
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "eval.py", "model.keras"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "eval.py: error: interrupted\n")
