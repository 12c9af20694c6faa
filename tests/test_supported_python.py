"""Every script exits with one clear line on Windows and on versions of Python without packages."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("build_mtt.py", "train.py", "eval.py", "extract_excitations.py", "tag.py")
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
