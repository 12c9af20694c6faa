"""One line instead of a traceback when a script cannot import its modules or is interrupted then.

Imported before all modules that need other packages. Has no effect in other programs, such as a
notebook, that import the toolkit.
"""

import os
import signal
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def _fail(message: str) -> None:
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)


def _exit_at_once(number, frame) -> None:
    # Not an exception: C code that is being imported can replace it by an ImportError.
    _fail("interrupted")
    os._exit(128 + number)


def _name_missing_package(kind: type, error: BaseException, traceback) -> None:
    if isinstance(error, ModuleNotFoundError) and error.name:
        hint = "python -m pip install -r requirements.txt"
        if sys.prefix == sys.base_prefix:
            hint = "activate the environment with: . .venv/bin/activate (make demo creates it)"
        _fail(f"{error.name.partition('.')[0]} is not installed: {hint}")
    else:
        sys.__excepthook__(kind, error, traceback)


def _is_script() -> bool:
    path = getattr(sys.modules["__main__"], "__file__", None)
    return path is not None and Path(path).resolve().parent in (_ROOT, _ROOT / "tools")


if _is_script():
    sys.excepthook = _name_missing_package
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_at_once)  # until toolkit.cli.run
