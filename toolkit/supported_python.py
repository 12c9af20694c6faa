"""Exit with one line on Windows or if Python is too old; imported before all other modules."""

import sys

MINIMUM_PYTHON = (3, 11)

if sys.platform == "win32":
    sys.exit(
        "Windows is not supported: run the toolkit in WSL, the Windows Subsystem for Linux "
        "(install it with wsl --install)"
    )
if sys.version_info < MINIMUM_PYTHON:
    sys.exit(
        "Python {}.{} or later is required, this is {}.{}: select one with make "
        "PYTHON=python3.12".format(*MINIMUM_PYTHON, *sys.version_info[:2])
    )
