"""Select Keras's backend, import Keras without log output, and name the backend's devices."""

import ctypes
import importlib.util
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from toolkit.blocks import BLOCKS
from toolkit.errors import UsageError
from toolkit.messages import say

# Keras's backends in order of preference, and the requirements file that installs each.
_BACKENDS = {
    "tensorflow": "requirements.txt",
    "jax": "requirements/backends.txt",
    "torch": "requirements/backends.txt",
}
# Settings of Keras that would shorten a training or exchange the classes of variables.
_IGNORED_VARIABLES = ("KERAS_MAX_EPOCHS", "KERAS_MAX_STEPS_PER_EPOCH", "KERAS_NNX_ENABLED")


def import_keras() -> None:
    """Import Keras and its backend without their log output.

    The environment variable KERAS_BACKEND selects the backend, or else Keras's configuration file.
    Without either, the backend is the first installed one of TensorFlow, JAX and PyTorch. With
    another backend than TensorFlow, this process can no longer import TensorFlow. No other setting
    of Keras has an effect: networks compute in float32 with the channels last.

    Raises
    ------
    UsageError
        The backend is unknown or not installed.
    """
    backend = os.environ.get("KERAS_BACKEND") or _default_backend()
    if backend not in _BACKENDS:
        raise UsageError(f"KERAS_BACKEND={backend}: expected one of {', '.join(_BACKENDS)}")
    if not _is_installed(backend):
        raise UsageError(
            f"{backend}, the selected Keras backend, is not installed: python -m pip install -r "
            f"{_BACKENDS[backend]}, or select another with KERAS_BACKEND ({', '.join(_BACKENDS)})"
        )
    os.environ["KERAS_BACKEND"] = backend
    if backend != "tensorflow":
        # Keras and TensorBoard would import TensorFlow for several seconds without using it.
        sys.modules.setdefault("tensorflow", None)
    keep_freed_memory()
    _import_without_configuration()


def choose_jit(choice: str, block: str) -> bool:
    """Return whether to compile a network with XLA.

    Parameters
    ----------
    choice : {'auto', 'on', 'off'}
        ``auto`` always compiles on JAX, never on PyTorch, and with TensorFlow on a GPU where
        `toolkit.blocks.BLOCKS` says so (docs/performance.md; no GPU was measured).
    block : str
        The network's building block.
    """
    import keras

    if choice != "auto":
        return choice == "on"
    name = keras.backend.backend()
    if name == "tensorflow":
        return BLOCKS[block].jit_on_gpu and bool(device_names())
    return name == "jax"


def device_names() -> list[str]:
    """Return the names of the backend's accelerators; an empty list on the CPU."""
    import keras

    name = keras.backend.backend()
    if name == "torch":
        import torch

        if torch.backends.mps.is_available():  # Keras prefers Apple's GPU to others
            return ["Apple GPU (MPS)"]
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if name == "jax":
        import jax

        return [device.device_kind for device in jax.devices() if device.platform != "cpu"]
    import tensorflow as tf

    return [
        tf.config.experimental.get_device_details(device).get("device_name", device.name)
        for device in tf.config.list_physical_devices("GPU")
    ]


def keep_freed_memory() -> None:
    """Let the C library reuse large blocks of memory instead of returning them to the system.

    On a CPU, a training step of JAX or PyTorch allocates and frees gigabytes, and mapping and
    clearing these pages takes up to 38 % of the processor time (docs/performance.md).
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # Parameters of glibc's malloc.h; other C libraries ignore them.
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
    mallopt(mmap_max, 0)  # no block is mapped on its own
    mallopt(trim_threshold, -1)  # freed memory is never returned
    mallopt(top_pad, 2**26)
    mallopt(arena_max, 1)  # other arenas cannot hold large blocks


def _import_without_configuration() -> None:
    """Import Keras so that its settings are the same for every user."""
    for name in _IGNORED_VARIABLES:
        if value := os.environ.pop(name, None):
            say(f"{name}={value}: ignored")
    imported_before = sys.modules.get("keras")
    # Keras reads keras.json while it is imported; an invalid file would be a traceback.
    home = os.environ.get("KERAS_HOME")
    try:
        with tempfile.TemporaryDirectory() as os.environ["KERAS_HOME"]:
            import_quietly("keras")
    finally:
        del os.environ["KERAS_HOME"]
        if home is not None:
            os.environ["KERAS_HOME"] = home
    if imported_before is not None:  # with a configuration of another program
        config = imported_before.config
        if config.floatx() != "float32":
            config.set_floatx("float32")
            config.set_dtype_policy("float32")
        config.set_epsilon(1e-7)
        config.set_image_data_format("channels_last")
        config.set_max_epochs(None)
        config.set_max_steps_per_epoch(None)


def _default_backend() -> str:
    """Return the backend of Keras's configuration file, or else the first installed one."""
    preferred = next(iter(_BACKENDS))
    path = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras").expanduser() / "keras.json"
    configured = preferred
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
        configured = settings.get("backend", preferred)
        if configured not in tuple(_BACKENDS):
            raise ValueError(f"backend {configured!r} is not one of {', '.join(_BACKENDS)}")
    except FileNotFoundError:
        pass
    except OSError as error:
        say(f"{path}: ignored: {error.strerror}")
    except AttributeError:
        say(f"{path}: ignored: expected a JSON object")
    except (ValueError, TypeError, RecursionError) as error:
        say(f"{path}: ignored: {error}")
        configured = preferred
    # When first imported, Keras writes "tensorflow" to the file, whatever the backend.
    if configured != preferred:
        return configured
    return next(filter(_is_installed, _BACKENDS), preferred)


def _is_installed(backend: str) -> bool:
    return importlib.util.find_spec(backend) is not None


def import_quietly(*modules: str) -> None:
    """Import libraries; suppress log output that a user cannot act on.

    Parameters
    ----------
    *modules : str
        Names of modules that log while they are first imported, such as ``keras``.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # TensorFlow warns of retracing for the best checkpoint of each stage, which is intended.
    for name in ("absl", "tensorflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with stderr_held():
        for module in modules:
            importlib.import_module(module)


@contextmanager
def stderr_held() -> Iterator[None]:
    """Discard the output of libraries to stderr, but print the output if an exception is raised."""
    # TensorFlow's C++ code writes to the file descriptor before it reads any setting.
    with tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except Exception:  # not for Ctrl-C
            sys.stderr.flush()
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
