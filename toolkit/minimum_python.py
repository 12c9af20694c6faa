"""Says in one line that a Python is too old; imported before anything that it could not run."""

import sys

MINIMUM_PYTHON = (3, 11)

if sys.version_info < MINIMUM_PYTHON:
    sys.exit(
        "Python {}.{} or later is needed, this is {}.{}: name one with make PYTHON=python3.12, or "
        "make a virtual environment with it".format(*MINIMUM_PYTHON, *sys.version_info[:2])
    )
