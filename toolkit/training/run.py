"""The record of a training, ``run.json``: what was trained, and what another call may change.

Keras is not needed, so that changes are refused before it is imported.
"""

import json
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import toolkit
from input_data import Dataset, hash_dataset
from toolkit.data.manifest import as_typed
from toolkit.errors import UsageError
from toolkit.files import write_atomically
from toolkit.models import checkpoints
from toolkit.models.config import NetworkConfig
from toolkit.training.options import TrainingOptions
from toolkit.training.state import check_stages, last_file, list_stages

RECORD_NAME = "run.json"
_FORMAT = 1
_ROOT = Path(__file__).resolve().parents[2]

_NEXT = "used from the next epoch"
_NOW = "used from now on"
_KEPT = "finished stages stay as they are"
_SAME = "used from now on; results stay the same"
_ROUNDING = "used from now on; results differ by rounding"
# What a changed option means while stages are left to train, and when all stages are finished.
# None: refused. --initial-stage belongs to a call and is not compared. docs/contributing.md shows
# this table.
CHANGES = {
    "block": (None, None),
    "multi": (None, None),
    "alpha": (None, None),
    "init_features": (None, None),
    "initializer": (None, None),
    "dropout": (_NEXT, None),
    # The validation loss contains the penalty, so the best epoch so far may stay the best.
    "weight_decay": (f"{_NEXT}; losses before and after contain different penalties", None),
    "batch_size": (_NEXT, None),
    "momentum": (_NEXT, None),  # refused if one of the values is 0
    "lr": (_NEXT, None),
    "lr_decay": (f"{_NEXT} of a stage after 0", None),
    "seed": (f"{_NEXT} for shuffling and dropout; the initial weights are kept", None),
    "mixed_precision": (_NEXT, None),
    "patience": (_NOW, _KEPT),
    "max_epochs": (_NOW, _KEPT),
    "num_lr_decays": (_NOW, _KEPT),
    "jit": (_ROUNDING, _ROUNDING),
    "distribute": (_ROUNDING, _ROUNDING),
    "device_cache": (_SAME, _SAME),
    "num_read_threads": (_SAME, _SAME),
}


@dataclass(frozen=True)
class RunRecord:
    """The content of ``run.json``, up to and including this call."""

    path: Path
    content: dict
    changes: list[str]  # one line per changed option

    @property
    def dataset_hash(self) -> str:
        return self.content["dataset"]["sha256"]

    def lines(self, device: str) -> list[str]:
        """Return the lines to print; `device` describes the backend and devices of this call."""
        lines = list(self.changes)
        before = self.content["calls"][-1:]
        if before and before[0].get("device") != device:
            device = before[0].get("device")
            lines.append(f"the last call used {device}: results differ by rounding")
        return lines

    def write(self, device: str) -> None:
        """Write the record."""
        import keras

        backend = sys.modules[keras.backend.backend()]
        self.content["calls"].append(
            {
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "device": device,
                "changes": self.changes,
                "toolkit": toolkit.__version__,
                "commit": _commit(),
                "versions": {
                    "python": platform.python_version(),
                    "keras": keras.__version__,
                    backend.__name__: backend.__version__,
                },
            }
        )
        content = json.dumps(self.content, indent=1, ensure_ascii=False) + "\n"
        write_atomically(self.path, content.encode(errors="backslashreplace"))


def compare_run(
    train_dir: Path, dataset: Dataset, config: NetworkConfig, options: TrainingOptions
) -> RunRecord:
    """Compare a call with the training in its folder.

    Raises
    ------
    UsageError
        The call would continue with another dataset, changes an option that cannot change, or
        changes an option that no stage would use; or the stages do not belong together.
    """
    path = train_dir / RECORD_NAME
    now = {
        "format": _FORMAT,
        "dataset": {
            "path": str(dataset.path.resolve()),
            "sha256": hash_dataset(dataset),
            "tags": len(dataset.tags),
        },
        "network": config.to_json(),
        "options": asdict(options),
        "calls": [],
    }
    stages = list_stages(train_dir)
    if not stages:
        return RunRecord(path, now, [])
    before = _read_record(path) if path.exists() else _describe_stage(train_dir / str(stages[-1]))
    _check_dataset(train_dir, before.get("dataset"), now["dataset"])
    all_finished = check_stages(train_dir, options)
    changes = []
    for flag, name, was, value in _differences(before, now):
        change = f"--{flag} was {was}, now {value}"
        effect = CHANGES[name][all_finished]
        why = "all stages are finished, so no stage would use it"
        if CHANGES[name][0] is None:
            why = f"{train_dir} contains checkpoints of another network"
        elif name == "momentum" and "0" in (was, value):
            effect, why = None, "without momentum, Keras stores no velocities"
        if effect is None:
            raise UsageError(f"{change}: {why}: use the same value or another --train-dir")
        changes.append(f"{change}: {effect}")
    now["calls"] = before.get("calls", [])
    return RunRecord(path, now, changes)


def _read_record(path: Path) -> dict:
    parts = {"dataset": dict, "network": dict, "options": dict, "calls": list}
    with suppress(ValueError, TypeError, KeyError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(record[name], kind) for name, kind in parts.items()):
            return record
    raise UsageError(f"{path}: not a record of a training: restore or delete the file")


def _describe_stage(stage_dir: Path) -> dict:
    """Describe a training of an earlier version, which has no record, by its last stage."""
    path = last_file(stage_dir)
    if path.suffix == ".hdf5":
        return {}
    description = checkpoints.read_description(path)
    return {
        "network": description.get("network", {}),
        "options": (description.get("training") or {}).get("options", {}),
    }


def _check_dataset(train_dir: Path, before: dict | None, now: dict) -> None:
    if before and before.get("sha256") != now["sha256"]:
        was, is_now = (
            f"{part.get('path')} ({part.get('tags')} tags, SHA-256 {str(part.get('sha256'))[:8]}…)"
            for part in (before, now)
        )
        raise UsageError(
            f"{train_dir}: was trained on another dataset: {was}, now {is_now}: use the same "
            "dataset or another --train-dir"
        )


def _differences(before: dict, now: dict):
    """Yield flag, name, earlier and present value of the options that differ."""
    for part, options_class in (("network", NetworkConfig), ("options", TrainingOptions)):
        for field in fields(options_class):
            was, value = before.get(part, {}).get(field.name), now[part][field.name]
            if field.name in CHANGES and was not in (None, value):
                flag = field.metadata["flag"] or f"--{field.name.replace('_', '-')}"
                if isinstance(value, bool):
                    was, value = ("off" if each == field.default else "on" for each in (was, value))
                yield flag.removeprefix("--"), field.name, as_typed(was), as_typed(value)


def _commit() -> str | None:
    """Return the commit of the toolkit, with -dirty if files have changed; None outside git."""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    if not (_ROOT / ".git").exists():
        return None
    with suppress(OSError):
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True)
        return done.stdout.strip() or None
    return None
