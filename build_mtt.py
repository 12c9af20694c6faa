"""Build TFRecord shards from MagnaTagATune's annotations and MP3s.

    python build_mtt.py --data-dir ./dataset
    python build_mtt.py --data-dir ./dataset --num-workers 8 --num-audios-per-shard 50

Reads ``annotations_final.csv`` and ``mp3/`` in the dataset's folder, writes ``tfrecord/`` beside
them. Run again after an interruption, it goes on with the shards that are missing.
"""

import argparse
import fcntl
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import cli
from annotations import (
    ANNOTATIONS_NAME,
    CLIP_ID,
    MP3_PATH,
    SPLITS,
    assign_shards,
    missing_dataset_message,
    read_mtt,
)
from audio import DECODERS, cut_segments, decode, import_madmom
from errors import AudioError, BuildError
from input_data import (
    ENCODINGS,
    MANIFEST_NAME,
    SHARD_FOLDER,
    Clip,
    encode_clip,
    read_manifest,
    remove_leftovers,
    shard_name,
    write_atomically,
    write_manifest,
    write_records,
)

import numpy as np

if TYPE_CHECKING:
    from tqdm import tqdm

AUDIO_FOLDER = "mp3"
# One small file a finished shard, gathered into the manifest at the end.
_PROGRESS_FOLDER = ".progress"
_LOCK_NAME = ".lock"


@dataclass(frozen=True)
class ShardTask:
    """All that a worker needs to make one shard."""

    path: Path
    split: str
    audio_dir: Path
    clips: list[tuple[str, str, bytes]]  # clip_id, mp3_path, labels as uint8 bytes
    sample_rate: int
    num_samples: int
    decoder: str
    encoding: str


def build(
    data_dir: str | Path,
    sample_rate: int = 22050,
    num_samples: int = 59049,
    num_audios_per_shard: int = 100,
    num_workers: int | None = None,
    decoder: str = "av",
    encoding: str = "float32",
) -> dict:
    """Build the shards of a dataset, or those that are missing.

    Parameters
    ----------
    data_dir : str or Path
        Holds ``annotations_final.csv`` and ``mp3/``; ``tfrecord/`` is made in it.
    sample_rate : int
        Rate to resample to, in Hz.
    num_samples : int
        Samples a segment.
    num_audios_per_shard : int
        Clips a shard.
    num_workers : int or None
        Processes; None for one a core.
    decoder : {'av', 'madmom'}
        See `audio.decode`.
    encoding : {'float32', 'int16'}
        See `input_data.encode_clip`.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    AnnotationsError, BuildError
        The dataset is not there, the options changed since the last run, another build is at
        work, or a worker died.
    """
    data_dir = Path(data_dir)
    annotations_path = data_dir / ANNOTATIONS_NAME
    audio_dir = data_dir / AUDIO_FOLDER
    if not annotations_path.exists() or not audio_dir.is_dir():
        raise BuildError(missing_dataset_message(data_dir))
    if decoder == "madmom":
        import_madmom()  # say at once, not in a worker, that it is missing
    clips, tags = read_mtt(annotations_path)
    if not any((audio_dir / mp3_path).exists() for mp3_path in clips[MP3_PATH]):
        raise BuildError(
            f"{audio_dir}: none of the {len(clips)} clips is here: unpack them so that "
            f"{audio_dir / clips[MP3_PATH].iloc[0]} is one of them"
        )
    clips = assign_shards(clips, num_audios_per_shard)
    options = {
        "sample_rate": sample_rate,
        "num_samples": num_samples,
        "num_audios_per_shard": num_audios_per_shard,
        "decoder": decoder,
        "encoding": encoding,
        "annotations_sha256": hashlib.sha256(annotations_path.read_bytes()).hexdigest(),
    }

    folder = data_dir / SHARD_FOLDER
    folder.mkdir(exist_ok=True)
    with _only_build(folder):
        _check_options(folder, options)
        remove_leftovers(folder)
        progress_dir = folder / _PROGRESS_FOLDER
        progress_dir.mkdir(exist_ok=True)
        write_atomically(progress_dir / "options.json", json.dumps(options).encode())
        tasks = _plan(clips, tags, folder, audio_dir, options)
        done = _finished_shards(folder, progress_dir, tasks)
        _make_shards(tasks, done, progress_dir, num_workers)
        manifest = _gather(tasks, done, tags, options)
        write_manifest(folder, manifest)
        shutil.rmtree(progress_dir)
    return manifest


def make_shard(task: ShardTask) -> dict:
    """Decode a shard's clips, cut them into segments and write them.

    Parameters
    ----------
    task : ShardTask
        What to make and where.

    Returns
    -------
    dict
        The shard's entry in the manifest: name, clips, segments, and the clips skipped with the
        reason of each.
    """
    counts = {"clips": 0, "segments": 0}
    skipped = []

    def records():
        for clip_id, mp3_path, labels in task.clips:
            try:
                samples = decode(task.audio_dir / mp3_path, task.sample_rate, decoder=task.decoder)
                segments = cut_segments(samples, task.num_samples)
                if not len(segments):
                    raise AudioError(
                        f"{mp3_path}: {len(samples)} samples are less than one segment "
                        f"of {task.num_samples}"
                    )
            except AudioError as error:
                reason = str(error).removeprefix(f"{task.audio_dir}{os.sep}")
                skipped.append({CLIP_ID: clip_id, MP3_PATH: mp3_path, "reason": reason})
                _count_clip()
                continue
            counts["clips"] += 1
            counts["segments"] += len(segments)
            clip = Clip(segments, np.frombuffer(labels, np.uint8), clip_id, mp3_path)
            yield from encode_clip(clip, task.split, task.encoding)
            _count_clip()

    write_records(task.path, records())
    return {"name": task.path.name, **counts, "skipped": skipped}


def _plan(clips, tags, folder: Path, audio_dir: Path, options: dict) -> list[ShardTask]:
    labels = clips[list(tags)].to_numpy(np.uint8)  # (num_clips, num_tags)
    tasks = []
    for split in SPLITS:
        in_split = clips[clips["split"] == split]
        num_shards = int(in_split["shard"].max()) + 1 if len(in_split) else 0
        for shard, rows in sorted(in_split.groupby("shard").groups.items()):
            members = clips.loc[rows, [CLIP_ID, MP3_PATH]].itertuples(index=False)
            tasks.append(
                ShardTask(
                    path=folder / shard_name(split, shard, num_shards),
                    split=split,
                    audio_dir=audio_dir,
                    clips=[
                        (*member, labels[row].tobytes())
                        for row, member in zip(rows, members, strict=True)
                    ],
                    sample_rate=options["sample_rate"],
                    num_samples=options["num_samples"],
                    decoder=options["decoder"],
                    encoding=options["encoding"],
                )
            )
    return tasks


def _make_shards(
    tasks: list[ShardTask], done: dict[str, dict], progress_dir: Path, num_workers: int | None
) -> None:
    """Make the shards that are not done, and note each as it appears."""
    to_do = [task for task in tasks if task.path.name not in done]
    num_clips = sum(len(task.clips) for task in tasks)
    num_done = num_clips - sum(len(task.clips) for task in to_do)
    if not to_do:
        return
    # Started afresh, not forked: a fork would copy whatever threads and locks we hold.
    context = multiprocessing.get_context("spawn")
    clips_counted = context.Value("q", 0)
    num_workers = min(num_workers or os.cpu_count() or 1, len(to_do))
    with (
        ProcessPoolExecutor(
            num_workers, context, initializer=_start_worker, initargs=(clips_counted,)
        ) as executor,
        cli.progress(
            total=num_clips, initial=num_done, unit="clip", desc="building", smoothing=0.1
        ) as bar,
    ):
        try:
            for entry in _run_tasks(executor, to_do, lambda: _show(bar, num_done, clips_counted)):
                note = json.dumps(entry, ensure_ascii=False).encode()
                write_atomically(progress_dir / f"{entry['name']}.json", note)
                done[entry["name"]] = entry
        except BrokenProcessPool:
            raise BuildError(
                f"a worker process died ({len(done)} of {len(tasks)} shards are complete): "
                "perhaps for lack of memory; run the same command again to go on, with fewer "
                "--num-workers if it dies again"
            ) from None
        except BaseException:
            for process in (executor._processes or {}).values():
                process.terminate()
            executor.shutdown(cancel_futures=True)
            raise


def _run_tasks(executor: Executor, tasks: list[ShardTask], on_wait):
    """Yield each shard's entry as it is finished, by any executor."""
    # Workers start here and inherit what is blocked: Ctrl-C is for us, who then end them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    pending = {executor.submit(make_shard, task) for task in tasks}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    while pending:
        finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
        for future in finished:
            yield future.result()
        on_wait()


_clips_counted = None  # of this worker's pool: clips finished by all its workers


def _start_worker(clips_counted) -> None:
    global _clips_counted
    _clips_counted = clips_counted
    # A pool's workers outlive a parent that was killed: they would wait for tasks for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _count_clip() -> None:
    if _clips_counted is not None:
        with _clips_counted.get_lock():
            _clips_counted.value += 1


def _show(bar: "tqdm", num_done: int, clips_counted) -> None:
    bar.update(num_done + clips_counted.value - bar.n)


def _gather(tasks: list[ShardTask], done: dict[str, dict], tags, options: dict) -> dict:
    splits = {split: {"clips": 0, "segments": 0, "shards": []} for split in SPLITS}
    skipped = []
    for task in tasks:
        entry = dict(done[task.path.name])
        skipped += entry.pop("skipped")
        split = splits[task.split]
        split["shards"].append(entry)
        split["clips"] += entry["clips"]
        split["segments"] += entry["segments"]
    return {
        "tags": list(tags),
        "sample_rate": options["sample_rate"],
        "num_samples": options["num_samples"],
        "splits": splits,
        "skipped": skipped,
        "options": options,
        "versions": {"python": platform.python_version()} | _versions("av", "numpy", "madmom"),
    }


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def _only_build(folder: Path):
    """Hold the folder's lock; it is freed even when the process is killed."""
    with open(folder / _LOCK_NAME, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildError(f"{folder}: another build is at work here") from None
        yield


def _check_options(folder: Path, options: dict) -> None:
    """Refuse to mix shards of other options with ours."""
    path = folder / _PROGRESS_FOLDER / "options.json"
    if path.exists():
        earlier = json.loads(path.read_text())
    elif (folder / MANIFEST_NAME).exists():
        earlier = read_manifest(folder / MANIFEST_NAME).get("options", {})
    else:
        return
    for name, value in options.items():
        if earlier.get(name) != value:
            what = (
                f"{ANNOTATIONS_NAME} has changed since"
                if name == "annotations_sha256"
                else f"--{name.replace('_', '-')} was {earlier.get(name)}, now {value}"
            )
            raise BuildError(
                f"{folder}: holds shards of another build: {what}: use the same options, or "
                "delete this folder to build afresh"
            )


def _finished_shards(folder: Path, progress_dir: Path, tasks: list[ShardTask]) -> dict[str, dict]:
    """Find the shards that an earlier run completed, with their entries."""
    noted = {}
    if (folder / MANIFEST_NAME).exists():
        manifest = read_manifest(folder / MANIFEST_NAME)
        shard_of = {clip[0]: task.path.name for task in tasks for clip in task.clips}
        for split in manifest["splits"].values():
            for entry in split["shards"]:
                noted[entry["name"]] = entry | {"skipped": []}
        for row in manifest["skipped"]:
            noted[shard_of[row[CLIP_ID]]]["skipped"].append(row)
    for path in progress_dir.glob("*.tfrecord.json"):
        entry = json.loads(path.read_text())
        noted[entry["name"]] = entry
    return {name: entry for name, entry in noted.items() if (folder / name).exists()}


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Build TFRecord shards from MagnaTagATune's annotations and MP3s.",
        "  python build_mtt.py --data-dir ./dataset\n"
        "  python build_mtt.py --data-dir ./dataset --num-workers 8 --num-audios-per-shard 50",
    )
    parser.add_argument(
        "--data-dir",
        metavar="PATH",
        default="./dataset",
        help=f"folder of {ANNOTATIONS_NAME} and {AUDIO_FOLDER}/ (default: ./dataset)",
    )
    parser.add_argument(
        "--sample-rate",
        metavar="HZ",
        type=cli.positive_int,
        default=22050,
        help="rate to resample to (default: 22050)",
    )
    parser.add_argument(
        "--num-samples",
        metavar="N",
        type=cli.positive_int,
        default=59049,
        help="samples a segment (default: 59049)",
    )
    parser.add_argument(
        "--num-audios-per-shard",
        metavar="N",
        type=cli.positive_int,
        default=100,
        help="clips a shard (default: 100)",
    )
    parser.add_argument(
        "--num-workers",
        metavar="N",
        type=cli.positive_int,
        default=None,
        help="processes that decode (default: one a core)",
    )
    parser.add_argument(
        "--decoder",
        choices=DECODERS,
        default="av",
        help="library to decode with; the samples are the same (default: av)",
    )
    parser.add_argument(
        "--encoding",
        choices=ENCODINGS,
        default="float32",
        help="how shards store samples: int16 takes half the space and rounds to 2^-16 of full "
        "scale, and the published program cannot read it (default: float32)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    return cli.run(_build, build_parser().parse_args(argv))


def _build(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    manifest = build(
        arguments.data_dir,
        sample_rate=arguments.sample_rate,
        num_samples=arguments.num_samples,
        num_audios_per_shard=arguments.num_audios_per_shard,
        num_workers=arguments.num_workers,
        decoder=arguments.decoder,
        encoding=arguments.encoding,
    )
    for skipped in manifest["skipped"]:
        cli.say(f"skipped clip {skipped[CLIP_ID]}: {skipped['reason']}")
    for split, found in manifest["splits"].items():
        cli.say(
            f"{split}: {found['clips']} clips, {found['segments']} segments, "
            f"{len(found['shards'])} shards"
        )
    cli.say(
        f"{Path(arguments.data_dir) / SHARD_FOLDER}: complete in "
        f"{time.monotonic() - started:.0f} s, {len(manifest['skipped'])} clips skipped"
    )


if __name__ == "__main__":
    sys.exit(main())
