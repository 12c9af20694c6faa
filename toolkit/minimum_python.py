"""Exit with one line if this Python is too old; imported before code that needs a newer one."""

import sys

MINIMUM_PYTHON = (3, 11)

if sys.version_info < MINIMUM_PYTHON:
    sys.exit(
        "Python {}.{} or later is required, this is {}.{}: select one with make "
        "PYTHON=python3.12".format(*MINIMUM_PYTHON, *sys.version_info[:2])
    )
