"""Exit with one line on Windows or another Python; imported before all other modules."""

import sys

# The pinned packages exist for these versions (requirements.txt).
OLDEST, NEWEST = (3, 11), (3, 14)

if sys.platform == "win32":
    sys.exit(
        "Windows is not supported: run the toolkit in WSL, the Windows Subsystem for Linux "
        "(install it with wsl --install)"
    )
if not OLDEST <= sys.version_info[:2] <= NEWEST:
    # SystemExit would end a Dask worker; a build names the worker that raises ImportError.
    raise (ImportError if "distributed" in sys.modules else SystemExit)(
        "Python {}.{} to {}.{} is required, this is {}.{}: select one with make "
        "PYTHON=python3.12".format(*OLDEST, *NEWEST, *sys.version_info[:2])
    )
