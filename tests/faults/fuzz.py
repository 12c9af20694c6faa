"""Read many damaged model files or shards in child processes, and count the outcomes.

A mutant is a damaged copy of a valid file; it depends only on its number and the seed. Reading a
mutant must return a result or raise a `ToolkitError`, within the limits below. A mutant that kills
the reading process is recorded, and a new process continues with the next one.
"""

import copy
import gc
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

GOLDEN = TESTS / "golden"
MAX_SECONDS = 20  # per mutant, also on a busy machine
MUTANTS_PER_PROCESS = 250  # Keras does not free all memory of a network
MAX_BYTES = 1 << 30  # memory that reading may add to that of the loaded libraries


# --- Mutations -----------------------------------------------------------------------------------


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """Change, copy, insert or delete bytes; half of the changes are near the start or the end.

    Files declare sizes and offsets in their headers and footers.
    """
    changed = bytearray(content)

    def place() -> int:
        if not changed:
            return 0
        where = draw.random()
        if where < 0.4:
            return draw.randrange(min(4096, len(changed)))
        if where < 0.5:
            return len(changed) - 1 - draw.randrange(min(1024, len(changed)))
        return draw.randrange(len(changed))

    for _ in range(draw.choice((1, 1, 2, 4, 16, 64))):
        at = place()
        kind = draw.random()
        if kind < 0.5:
            changed[at : at + 1] = bytes([draw.choice((0, 1, 127, 255, draw.randrange(256)))])
        elif kind < 0.65 and changed:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind < 0.8:
            width = draw.choice((2, 4, 8))
            value = draw.choice(
                (0, 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1, 2**14, len(changed))
            )
            changed[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
        elif kind < 0.9:
            source, length = place(), draw.randrange(1, 257)
            changed[at : at + length] = changed[source : source + length]
        elif kind < 0.95:
            del changed[at : at + draw.choice((1, 4, 8, 512))]
        elif kind < 0.98:
            changed[at:at] = draw.randbytes(draw.choice((1, 4, 8, 512)))
        else:
            del changed[at:]
    return bytes(changed)


_ODD_NUMBERS = (True, 0, -1, 1e308, float("nan"), float("inf"), 2**70)
_ODD_TEXTS = ("", "x" * 5000, "../../etc/passwd", "\0", "se")
_ODD_VALUES = (None, [], {}, [[]] * 50, {"class_name": "Lambda"}, *_ODD_NUMBERS, *_ODD_TEXTS)


def mutate_json(content: bytes, draw: random.Random) -> bytes:
    """Replace values or keys anywhere in a JSON document."""
    document = json.loads(content)
    for _ in range(draw.choice((1, 1, 2, 5))):
        owner, key = None, None
        at = document
        while isinstance(at, dict | list) and at and (owner is None or draw.random() < 0.8):
            owner, key = at, draw.choice(list(at) if isinstance(at, dict) else range(len(at)))
            at = owner[key]
        if owner is None:
            return json.dumps(draw.choice(_ODD_VALUES)).encode()
        if isinstance(owner, dict) and draw.random() < 0.25:
            value = owner.pop(key)
            if draw.random() < 0.5:
                owner[draw.choice(("", "format", "x", "network", "tags"))] = value
        else:
            owner[key] = copy.deepcopy(draw.choice(_ODD_VALUES))  # may be changed in the next step
    return json.dumps(document).encode()


def mutate_keras(content: bytes, draw: random.Random) -> bytes:
    """Damage a .keras archive, or a file in the archive."""
    if draw.random() < 0.3:
        return mutate_bytes(content, draw)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = draw.choice(("model.weights.h5", "model.weights.h5", "network.json"))
    if name == "network.json" and draw.random() < 0.8:
        members[name] = mutate_json(members[name], draw)
    else:
        members[name] = mutate_bytes(members[name], draw)
    mutant = io.BytesIO()
    compression = draw.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))
    with zipfile.ZipFile(mutant, "w", compression) as archive:
        for member, value in members.items():
            archive.writestr(
                draw.choice(("../", "/")) + member if draw.random() < 0.02 else member, value
            )
    return mutant.getvalue()


def mutate_shard(content: bytes, draw: random.Random) -> bytes:
    """Damage a shard, or its records before their checksums are computed."""
    from toolkit.data.records import append_records, index_records

    if draw.random() < 0.4:
        return mutate_bytes(content, draw)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard"
        path.write_bytes(content)
        records = [content[start : start + length] for start, length in index_records(path)]
        for _ in range(draw.choice((1, 1, 3))):
            place = draw.randrange(len(records))
            what = draw.random()
            if what < 0.7:
                records[place] = mutate_bytes(records[place], draw)
            elif what < 0.8:
                records[place] = draw.randbytes(draw.choice((0, 1, 100)))
            elif what < 0.9 and len(records) > 1:
                del records[place]
            else:
                records.insert(place, draw.choice(records))
        with open(path, "wb") as file:
            append_records(file, records)
        return path.read_bytes()


# --- Reading -------------------------------------------------------------------------------------


def checkpoint_cases(folder: Path):
    """Return the original model files, and a function that mutates and loads one."""
    from model import build_network
    from toolkit.blocks import BLOCKS
    from toolkit.data.annotations import MTT_TOP_TAGS
    from toolkit.models.checkpoints import Checkpoint, load, save
    from toolkit.models.config import NetworkConfig

    import keras

    originals = sorted((GOLDEN / "checkpoints").glob("*.hdf5"))
    for block in BLOCKS:
        config = NetworkConfig(block=block, init_features=3, alpha=2)
        checkpoint = Checkpoint(build_network(config), config, MTT_TOP_TAGS)
        originals.append(folder / f"{block}.keras")
        save(originals[-1], checkpoint)
    originals.append(folder / "se.h5")
    load(folder / "se.keras").network.save(originals[-1])

    def read(original: Path, draw: random.Random) -> None:
        mutate = mutate_keras if original.suffix == ".keras" else mutate_bytes
        mutant = folder / f"mutant{original.suffix}"
        mutant.write_bytes(mutate(original.read_bytes(), draw))
        try:
            load(mutant)
        finally:
            keras.backend.clear_session()

    return originals, read


def shard_cases(folder: Path):
    """Return the original shards and the manifest, and a function that mutates and reads one."""
    from input_data import SegmentReader, open_dataset, read_clips

    from shards import add_manifest

    originals = [*sorted((GOLDEN / "tfrecord").glob("*.tfrecord")), Path("manifest.json")]
    shutil.copytree(GOLDEN / "tfrecord", folder / "tfrecord")
    add_manifest(folder, num_samples=59049)
    manifest = (folder / "tfrecord" / "manifest.json").read_bytes()

    def read(original: Path, draw: random.Random) -> None:
        data_dir = folder / "dataset"
        shutil.rmtree(data_dir, ignore_errors=True)
        shutil.copytree(GOLDEN / "tfrecord", data_dir / "tfrecord")
        if original.name == "manifest.json":
            mutate = mutate_json if draw.random() < 0.8 else mutate_bytes
            (data_dir / "tfrecord" / original.name).write_bytes(mutate(manifest, draw))
        else:
            path = data_dir / "tfrecord" / original.name
            path.write_bytes(mutate_shard(original.read_bytes(), draw))
        dataset = open_dataset(data_dir)
        for split in dataset.splits.values():
            for clip in read_clips(split.shards, dataset.num_samples, len(dataset.tags)):
                assert clip.segments.shape[1] == dataset.num_samples
        reader = SegmentReader(dataset, "train", num_threads=1)
        try:
            for first in range(reader.num_segments):
                reader.read([first])
        finally:
            reader.close()

    return originals, read


CASES = {"checkpoints": checkpoint_cases, "shards": shard_cases}


def read_mutants(what: str, numbers: range, seed: int) -> None:
    """Read mutants; print a line of JSON before each (its number) and after it (the outcome)."""
    from toolkit.errors import ToolkitError

    with tempfile.TemporaryDirectory() as folder:
        originals, read = CASES[what](Path(folder))
        gc.freeze()  # `clear_session` collects garbage; skip the objects of the libraries
        resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + 2 * MAX_BYTES,) * 2)
        resident = _memory("VmHWM")
        # A Python handler would not run while a C library loops, so the timer kills the process.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for number in numbers:
            original = originals[number % len(originals)]
            print(json.dumps({"number": number, "of": original.name}), flush=True)
            signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
            started = time.monotonic()
            outcome, message = "result", ""
            try:
                read(original, random.Random(f"{seed}/{number}"))
            except ToolkitError as error:
                is_line = str(error) and "\n" not in str(error)
                outcome, message = "refused" if is_line else "failed", repr(error)[:500]
            except Exception as error:
                outcome, message = "failed", repr(error)[:500]
            signal.setitimer(signal.ITIMER_REAL, 0)
            seconds, num_bytes = time.monotonic() - started, _memory("VmHWM") - resident
            report = {"outcome": outcome, "message": message, "seconds": seconds}
            print(json.dumps(report | {"bytes": num_bytes}), flush=True)


def _memory(name: str) -> int:
    """Return an entry of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def fuzz(what: str, count: int, seed: int) -> list[dict]:
    """Read mutants of 'checkpoints' or 'shards' in child processes; return a report of each.

    A report contains ``number``, ``of`` (the original file), ``outcome`` (result, refused or
    failed), ``message``, and the ``seconds`` and ``bytes`` of memory that reading needed.
    """
    reports = []
    while len(reports) < count:
        first = len(reports)
        numbers = (first, min(first + MUTANTS_PER_PROCESS, count), seed)
        done = subprocess.run(
            [sys.executable, __file__, what, *map(str, numbers)],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"},
            capture_output=True,
            text=True,
        )
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        if len(lines) % 2:  # the last mutant has begun and not ended
            message = f"killed the process: status {done.returncode}"
            lines.append({"outcome": "failed", "message": message, "seconds": 0, "bytes": 0})
        elif done.returncode:
            raise RuntimeError(f"the process ended with {done.returncode}: {done.stderr[-2000:]}")
        reports += [begun | end for begun, end in zip(lines[::2], lines[1::2], strict=True)]
    return reports


if __name__ == "__main__":
    what, first, last, seed = sys.argv[1], *map(int, sys.argv[2:])
    read_mutants(what, range(first, last), seed)
