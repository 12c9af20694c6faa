"""Selecting and importing the Keras backend."""

import importlib.util
import json
import os
import sys
from types import SimpleNamespace

from toolkit import backend
from toolkit.errors import UsageError

import pytest
from conftest import ROOT, run_python


def test_import_quietly_discards_log_output_but_not_failures(tmp_path, monkeypatch, capfd):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "chatty_module.py").write_text("import os\nos.write(2, b'chatter\\n')\n")
    (tmp_path / "broken_module.py").write_text(
        "import os\nos.write(2, b'why\\n')\nraise ImportError"
    )
    backend.import_quietly("chatty_module")
    assert "chatty_module" in sys.modules
    assert capfd.readouterr().err == ""
    with pytest.raises(ImportError):
        backend.import_quietly("broken_module")
    assert capfd.readouterr().err == "why\n"
    os.write(2, b"still there\n")
    assert capfd.readouterr().err == "still there\n"


def test_an_unknown_backend_is_an_error_of_one_line(golden):
    model = golden / "checkpoints" / "basic-multi.hdf5"
    done = run_python("eval.py", model, "--data-dir", golden, KERAS_BACKEND="nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "eval.py: error: KERAS_BACKEND=nonsense: expected one of tensorflow, jax, torch\n"
    )


@pytest.mark.parametrize(
    ("variable", "settings", "missing", "requirements"),
    [
        (None, None, "tensorflow", "requirements.txt"),
        ("torch", None, "torch", "requirements/backends.txt"),
        ("", '{"backend": "jax"}', "jax", "requirements/backends.txt"),
    ],
)
def test_the_error_of_a_missing_backend_names_its_requirements_file(
    tmp_path, monkeypatch, variable, settings, missing, requirements
):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    if settings:  # Keras's own configuration file
        (tmp_path / "keras.json").write_text(settings)
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    if variable is not None:
        monkeypatch.setenv("KERAS_BACKEND", variable)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        backend.import_keras()
    assert str(caught.value).startswith(f"{missing}, the selected Keras backend, is not installed")
    assert f"pip install -r {requirements}, " in str(caught.value)
    assert (ROOT / requirements).is_file()


@pytest.mark.parametrize(
    ("installed", "configured", "selected"),
    [
        (("tensorflow", "jax", "torch"), None, "tensorflow"),
        (("jax", "torch"), None, "jax"),
        (("torch",), None, "torch"),
        # Keras writes "tensorflow" to its configuration file when it is first imported.
        (("torch",), "tensorflow", "torch"),
        (("tensorflow", "jax", "torch"), "torch", "torch"),
    ],
)
def test_without_a_selection_the_first_installed_backend_is_used(
    tmp_path, monkeypatch, installed, configured, selected
):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    if configured:
        (tmp_path / "keras.json").write_text(f'{{"backend": "{configured}"}}')
    monkeypatch.setenv("KERAS_BACKEND", "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    imported = []
    monkeypatch.setattr(
        backend, "import_quietly", lambda name: imported.append((name, os.environ["KERAS_BACKEND"]))
    )
    backend.import_keras()
    assert imported == [("keras", selected)]


_CONFIGURATION = """if True:
    from toolkit import backend
    backend.import_keras()
    from keras import config
    print(config.floatx(), config.dtype_policy().name, config.epsilon(), config.image_data_format())
    print(config.max_epochs(), config.max_steps_per_epoch())
"""


def test_the_configuration_of_keras_has_no_effect(tmp_path):
    settings = {"floatx": "float16", "epsilon": 0.1, "image_data_format": "channels_first"}
    path = tmp_path / "keras.json"
    path.write_text(json.dumps(settings))
    variables = {"KERAS_MAX_EPOCHS": "1", "KERAS_MAX_STEPS_PER_EPOCH": "none"}
    done = run_python("-c", _CONFIGURATION, KERAS_HOME=str(tmp_path), **variables)
    assert done.stdout == "float32 float32 1e-07 channels_last\nNone None\n"
    assert done.stderr == ("KERAS_MAX_EPOCHS=1: ignored\nKERAS_MAX_STEPS_PER_EPOCH=none: ignored\n")
    assert json.loads(path.read_text()) == settings


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "expected a JSON object"),
        ("backend = jax", "Expecting value"),
        ('{"backend": ["jax"]}', "backend ['jax'] is not one of tensorflow, jax, torch"),
        (None, "Is a directory"),
    ],
)
def test_a_broken_configuration_file_is_ignored(tmp_path, monkeypatch, capsys, content, reason):
    path = tmp_path / "keras.json"
    path.mkdir() if content is None else path.write_text(content)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("KERAS_BACKEND", "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "torch" or None)
    monkeypatch.setattr(backend, "import_quietly", lambda name: None)
    monkeypatch.setitem(sys.modules, "tensorflow", sys.modules.get("tensorflow"))
    backend.import_keras()
    assert os.environ["KERAS_BACKEND"] == "torch" and os.environ["KERAS_HOME"] == str(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: ignored: {reason}")


def test_the_gpu_of_a_mac_is_named_with_pytorch(monkeypatch):
    keras = SimpleNamespace(backend=SimpleNamespace(backend=lambda: "torch"))
    mps = SimpleNamespace(is_available=lambda: True)
    torch = SimpleNamespace(backends=SimpleNamespace(mps=mps))
    monkeypatch.setitem(sys.modules, "keras", keras)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert backend.device_names() == ["Apple GPU (MPS)"]
