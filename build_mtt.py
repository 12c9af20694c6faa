"""Build TFRecord shards from MagnaTagATune's annotations and MP3s, or from tables of your own.

    python build_mtt.py --data-dir ./dataset
    python build_mtt.py --data-dir ./dataset --num-workers 8 --num-audios-per-shard 50
    python build_mtt.py --data-dir ./mine --annotations songs.csv --audio-dir ./songs \\
      --split-by artist --stop none
    python build_mtt.py --data-dir /shared/dataset --scheduler tcp://node1:8786

Reads ``annotations_final.csv`` and ``mp3/`` in the dataset's folder, or what the options name, and
writes ``tfrecord/`` there. Run again after an interruption, it goes on with the shards that are
missing.
"""

import argparse
import csv
import errno
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from toolkit import cli, messages
from toolkit.data.annotations import (
    ANNOTATIONS_NAME,
    CLIP_ID,
    MP3_PATH,
    NUM_TAGS,
    SPLITS,
    assign_shards,
    is_inside,
    missing_dataset_message,
    read_mtt,
)
from toolkit.data.audio import (
    CLIP_SECONDS,
    DECODERS,
    SAMPLE_RATE,
    SAMPLES_PER_SEGMENT,
    cut_pieces,
    decode_pieces,
    import_madmom,
)
from toolkit.data.manifest import (
    MANIFEST_NAME,
    SHARD_FOLDER,
    read_manifest,
    shard_name,
    write_manifest,
)
from toolkit.data.records import ENCODINGS, Clip, append_records, encode_clip
from toolkit.data.tables import (
    FOLDER,
    PATH_COLUMNS,
    SPLIT_COLUMN,
    SPLIT_NAMES,
    TAGS_COLUMN,
    TableForm,
    read_tables,
)
from toolkit.errors import AnnotationsError, AudioError, BuildError, UsageError
from toolkit.files import only_run, remove_leftovers, write_atomically, written_whole
from toolkit.signals import stop_on_signals
from toolkit.workers import local_workers, run_tasks

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

AUDIO_FOLDER = "mp3"
# What a build that does not say them was made with: it was made before they could be chosen.
_EARLIER_OPTIONS = {
    "stop": CLIP_SECONDS,
    "encoding": "float32",
    "audio_dir": AUDIO_FOLDER,
    "audio_suffix": None,
    "num_tags": NUM_TAGS,
    **asdict(TableForm()),
}
# One small file a finished shard, gathered into the manifest at the end.
_PROGRESS_FOLDER = ".progress"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class ShardTask:
    """All that a worker needs to make one shard."""

    path: Path
    split: str
    audio_dir: Path
    clips: list[tuple[str, str, bytes]]  # clip_id, mp3_path, labels as uint8 bytes
    sample_rate: int
    num_samples: int
    stop: float | None
    decoder: str
    encoding: str


def build(
    data_dir: str | Path,
    sample_rate: int = SAMPLE_RATE,
    num_samples: int = SAMPLES_PER_SEGMENT,
    num_audios_per_shard: int = 100,
    num_workers: int | None = None,
    decoder: str = "av",
    encoding: str = "float32",
    annotations: Sequence[str | Path] = (),
    audio_dir: str | Path | None = None,
    audio_suffix: str | None = None,
    num_tags: int = NUM_TAGS,
    form: TableForm | None = None,
    stop: float | None = CLIP_SECONDS,
    scheduler: str | None = None,
) -> dict:
    """Build the shards of a dataset, or those that are missing.

    Parameters
    ----------
    data_dir : str or Path
        Where ``tfrecord/`` is made; holds ``annotations_final.csv`` and ``mp3/`` unless the next
        parameters say otherwise.
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
    annotations : sequence of str or Path
        Tables of one's own (see `tables.read_tables`); none for ``annotations_final.csv``.
    audio_dir : str or Path or None
        Folder that the tables' paths start from; None for ``mp3/``.
    audio_suffix : str or None
        Ending of the audio files, such as ``.low.mp3``, in place of the one in the tables.
    num_tags : int
        How many of the most frequent tags to keep; fewer where there are fewer.
    form : TableForm or None
        How the tables are written; None leaves it to what they show.
    stop : float or None
        Where to cut the audio, in seconds from its start; None takes it whole.
    scheduler : str or None
        Address of a Dask cluster's scheduler, whose workers make the shards and see the folders
        under the same paths; None for processes of this machine.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    AnnotationsError, BuildError, UsageError
        The dataset is not there, the tables and options do not fit, the options changed since
        the last run, another build is at work, a worker died, or the cluster cannot be used.
    Interrupted
        SIGTERM asked for an end.
    """
    data_dir = Path(data_dir)
    if scheduler is not None:
        if num_workers is not None:
            raise UsageError(
                "--num-workers is of this machine's processes, with --scheduler the cluster's "
                "workers are used: leave one of the two out"
            )
        _import_cluster()
        # Workers have another working directory.
        data_dir = data_dir.absolute()
        audio_dir = None if audio_dir is None else Path(audio_dir).absolute()
    if stop is not None and stop * sample_rate < num_samples:
        raise UsageError(
            f"--stop {_as_typed(stop)}: at {sample_rate} Hz that is less than one segment of "
            f"{num_samples} samples, {num_samples / sample_rate:.3g} s"
        )
    form = form or TableForm()
    is_mtt = not annotations and form == TableForm()
    tables = [Path(path) for path in annotations] or [data_dir / ANNOTATIONS_NAME]
    audio_folder = data_dir / AUDIO_FOLDER if audio_dir is None else Path(audio_dir)
    if not annotations and not tables[0].exists():
        raise BuildError(missing_dataset_message(data_dir))
    if not audio_folder.is_dir():
        if not annotations and audio_dir is None:
            raise BuildError(missing_dataset_message(data_dir))
        raise BuildError(f"{audio_folder}: no such folder: name that of the audio by --audio-dir")
    if decoder == "madmom":
        import_madmom()  # say at once, not in a worker, that it is missing
    if is_mtt:
        clips, tags = read_mtt(tables[0], num_tags)
    else:
        clips, tags, found = read_tables(tables, num_tags, form)
        for sentence in found:
            messages.say(sentence)
    named = list(clips[MP3_PATH])
    if audio_suffix is not None:
        clips[MP3_PATH] = _with_suffix(clips[MP3_PATH], audio_suffix)
    # os.path's tests are False, not an error, for what may not be looked at or has no such name.
    if not any(os.path.isfile(audio_folder / mp3_path) for mp3_path in clips[MP3_PATH]):
        raise BuildError(
            f"{audio_folder}: none of the {len(clips)} clips is here: unpack them so that "
            f"{audio_folder / clips[MP3_PATH].iloc[0]} is one of them"
        )
    _check_links(clips[MP3_PATH], named, audio_folder, tables)
    clips = assign_shards(clips, num_audios_per_shard)
    options = {
        "sample_rate": sample_rate,
        "num_samples": num_samples,
        "stop": stop,
        "num_audios_per_shard": num_audios_per_shard,
        "decoder": decoder,
        "encoding": encoding,
        "annotations_sha256": _hash_tables(tables),
        # A folder's own link may be put elsewhere: mp3/ stays mp3/.
        "audio_dir": AUDIO_FOLDER
        if audio_dir is None
        else os.path.relpath(audio_folder.resolve(), data_dir.resolve()),
        "audio_suffix": audio_suffix,
        "num_tags": num_tags,
        **asdict(form),
    }

    folder = data_dir / SHARD_FOLDER
    folder.mkdir(exist_ok=True, parents=bool(annotations))
    with only_run(folder, "build", BuildError):
        _check_options(folder, options, tables)
        remove_leftovers(folder)
        progress_dir = folder / _PROGRESS_FOLDER
        progress_dir.mkdir(exist_ok=True)
        write_atomically(progress_dir / "options.json", json.dumps(options).encode())
        tasks = _plan(clips, tags, folder, audio_folder, options)
        done = _finished_shards(folder, progress_dir, tasks)
        try:
            _make_shards(tasks, done, progress_dir, num_workers, scheduler)
        finally:
            remove_leftovers(folder)  # of workers that were ended
        manifest = _gather(tasks, done, tags, options)
        write_manifest(folder, manifest)
        shutil.rmtree(progress_dir)
    return manifest


def _import_cluster():
    try:
        from toolkit.data import cluster
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--scheduler: {error.name.partition('.')[0]} is not installed: python -m pip install "
            "-r requirements/cluster.txt"
        ) from None
    return cluster


def _hash_tables(paths: list[Path]) -> str:
    """Hash one table's bytes, or the names and hashes of several: a name may say the split."""
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    if len(paths) == 1:
        return hashes[0]
    lines = [f"{path.name} {digest}\n" for path, digest in zip(paths, hashes, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _check_links(
    paths: Iterable[str], named: Iterable[str], audio_dir: Path, tables: list[Path]
) -> None:
    """Refuse a clip that a link takes out of the audio's folder, which may be a link itself."""
    inside = os.path.realpath(audio_dir)
    resolve_folder = cache(os.path.realpath)
    for path, name in zip(paths, named, strict=True):
        place = audio_dir / path
        target = Path(resolve_folder(place.parent), place.name)
        if os.path.islink(target):
            target = Path(os.path.realpath(target))
        if not target.is_relative_to(inside):
            raise AnnotationsError(
                f"{_place_in(tables, name)}: a link takes {path} out of {audio_dir}, to {target}: "
                "put the file itself there"
            )


def _place_in(tables: list[Path], value: str) -> str:
    """Name the table, row and column that a value stands in."""
    for table in tables:
        for delimiter in "\t,;":
            with open(table, encoding="utf-8-sig", newline="") as file:
                rows = list(csv.reader(file, delimiter=delimiter))
            for number, row in enumerate(rows, start=1):
                if value in row:
                    return f"{table}: row {number}, column {rows[0][row.index(value)]!r}"
    return str(tables[0])


def _with_suffix(paths: "pd.Series", suffix: str) -> list[str]:
    changed = [str(PurePosixPath(path).with_suffix("")) + suffix for path in paths]
    for path, other in zip(paths, changed, strict=True):
        if not is_inside(other):
            raise BuildError(f"--audio-suffix {suffix!r}: {path} becomes {other!r}, no audio file")
    if len(set(changed)) < len(changed):
        first = next(path for path in changed if changed.count(path) > 1)
        raise BuildError(f"--audio-suffix {suffix!r}: two clips become {first}")
    return changed


def make_shard(task: ShardTask, count_clip: Callable[[], None] = lambda: None) -> dict:
    """Decode a shard's clips, cut them into segments and write them.

    Parameters
    ----------
    task : ShardTask
        What to make and where.
    count_clip : callable
        Called after each clip.

    Returns
    -------
    dict
        The shard's entry in the manifest: name, clips, segments, and the clips skipped with the
        reason of each.
    """
    counts = {"clips": 0, "segments": 0}
    skipped = []
    with written_whole(task.path) as shard:
        for clip_id, mp3_path, labels in task.clips:
            start, num_segments = shard.tell(), 0
            try:
                for segments in _decode_clip(task, mp3_path):
                    clip = Clip(segments, np.frombuffer(labels, np.uint8), clip_id, mp3_path)
                    append_records(shard, encode_clip(clip, task.split, task.encoding))
                    num_segments += len(segments)
            except AudioError as error:
                shard.seek(start)  # no half of a clip that breaks on the way
                shard.truncate()
                reason = str(error).removeprefix(f"{task.audio_dir}{os.sep}")
                skipped.append({CLIP_ID: clip_id, MP3_PATH: mp3_path, "reason": reason})
            else:
                counts["clips"] += 1
                counts["segments"] += num_segments
            count_clip()
    num_bytes = task.path.stat().st_size
    return {"name": task.path.name, **counts, "bytes": num_bytes, "skipped": skipped}


def _decode_clip(task: ShardTask, mp3_path: str) -> Iterator[np.ndarray]:
    """Yield a clip's segments in parts; what is wrong with it may be found at its end only."""

    def pieces() -> Iterator[np.ndarray]:
        num_decoded = 0
        path = task.audio_dir / mp3_path
        for piece in decode_pieces(path, task.sample_rate, task.stop, task.decoder):
            num_decoded += len(piece)
            yield piece
        if num_decoded < task.num_samples:
            raise AudioError(
                f"{mp3_path}: {num_decoded} samples are less than one segment of {task.num_samples}"
            )

    return cut_pieces(pieces(), task.num_samples)


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
                    stop=options["stop"],
                    decoder=options["decoder"],
                    encoding=options["encoding"],
                )
            )
    return tasks


def _make_shards(
    tasks: list[ShardTask],
    done: dict[str, dict],
    progress_dir: Path,
    num_workers: int | None,
    scheduler: str | None,
) -> None:
    """Make the shards that are not done, and note each as it appears."""
    to_do = [task for task in tasks if task.path.name not in done]
    num_clips = sum(len(task.clips) for task in tasks)
    num_done = num_clips - sum(len(task.clips) for task in to_do)
    if not to_do:
        return

    def so_far() -> str:
        return f"{len(done)} of {len(tasks)} shards are complete"

    if scheduler is None:
        num_workers = min(num_workers or os.cpu_count() or 1, len(to_do))
        workers = local_workers(make_shard, num_workers, so_far)
    else:
        cluster = _import_cluster()
        first = to_do[0]
        paths = (clip[1] for task in tasks for clip in task.clips)
        clip = next(path for path in paths if os.path.isfile(first.audio_dir / path))
        agreed = cluster.terms(first.path.parent, first.audio_dir, clip, first.decoder)
        workers = cluster.connect(scheduler, agreed, so_far, messages.say)
    with (
        workers as (submit, watch),
        messages.progress(
            total=num_clips, initial=num_done, unit="clip", desc="building", smoothing=0.1
        ) as bar,
        stop_on_signals() as stop,
    ):

        def on_wait() -> None:
            stop.check()
            bar.update(num_done + watch() - bar.n)

        try:
            for entry in run_tasks(submit, to_do, on_wait):
                # A name that is no UTF-8 has surrogates, which JSON knows as escapes.
                note = json.dumps(entry, ensure_ascii=False).encode(errors="backslashreplace")
                write_atomically(progress_dir / f"{entry['name']}.json", note)
                done[entry["name"]] = entry
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            raise BuildError(
                f"{cli.describe_os_error(error)} ({so_far()}): make space and run the same command "
                "again to go on"
            ) from None


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


def _check_options(folder: Path, options: dict, tables: list[Path]) -> None:
    """Refuse to mix shards of other options with ours."""
    path = folder / _PROGRESS_FOLDER / "options.json"
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
    elif (folder / MANIFEST_NAME).exists():
        earlier = read_manifest(folder / MANIFEST_NAME).get("options", {})
    else:
        return
    earlier = _EARLIER_OPTIONS | earlier
    for name, value in options.items():
        if earlier.get(name) != value:
            what = (
                f"{tables[0].name} has changed since"
                if name == "annotations_sha256" and len(tables) == 1
                else "the tables or their order have changed since"
                if name == "annotations_sha256"
                else f"--{name.replace('_', '-')} was {_as_typed(earlier.get(name))}, now "
                f"{_as_typed(value)}"
            )
            raise BuildError(
                f"{folder}: holds shards of another build: {what}: use the same options, or "
                "delete this folder to build afresh"
            )


def _as_typed(value: object) -> str:
    if value is None:
        return "none"
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


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
        entry = json.loads(path.read_text(encoding="utf-8"))
        noted[entry["name"]] = entry
    done = {}
    for task in tasks:
        entry = noted.get(task.path.name)
        if entry is None or not task.path.exists():
            continue
        is_whole = entry.get("bytes") in (None, task.path.stat().st_size)
        if is_whole and not _can_do_better(task, entry):
            done[task.path.name] = entry
    return done


def _can_do_better(task: ShardTask, entry: dict) -> bool:
    """Tell whether a clip that the shard had to skip has been mended or put in its place since."""
    mended = []
    for row in entry["skipped"]:
        try:
            for _ in _decode_clip(task, row[MP3_PATH]):
                pass
        except AudioError:
            continue
        mended.append(row[MP3_PATH])
    skipped = {row[MP3_PATH] for row in entry["skipped"]}
    # Audio that was taken away after the build must not cost the shard what it holds.
    if not mended or not all(
        os.path.isfile(task.audio_dir / mp3_path)
        for _, mp3_path, _ in task.clips
        if mp3_path not in skipped
    ):
        return False
    messages.say(f"{task.path.name}: made again, for {', '.join(mended)} can be decoded now")
    return True


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Build TFRecord shards from MagnaTagATune's annotations and MP3s, or from your own.",
        "  python build_mtt.py --data-dir ./dataset\n"
        "  python build_mtt.py --data-dir ./dataset --num-workers 8 --num-audios-per-shard 50\n"
        "  python build_mtt.py --data-dir ./mine --annotations songs.csv --audio-dir ./songs "
        "--split-by artist --stop none\n"
        "  python build_mtt.py --data-dir /shared/dataset --scheduler tcp://node1:8786",
    )
    data = parser.add_argument_group("data")
    cli.add_data_dir(
        data,
        f"folder that {SHARD_FOLDER}/ is made in; holds {ANNOTATIONS_NAME} and {AUDIO_FOLDER}/ "
        "unless other options name them",
    )
    add = data.add_argument
    add(
        "--num-tags",
        metavar="N",
        type=cli.positive_int,
        default=NUM_TAGS,
        help="most frequent tags to keep, fewer where there are fewer (default: %(default)s)",
    )
    add(
        "--max-skipped",
        metavar="PERCENT",
        type=cli.percentage,
        default=5.0,
        help="clips that may be skipped; beyond that the shards are complete, but the exit status "
        "is 1 (default: 5)",
    )
    shards = parser.add_argument_group("shards")
    add = shards.add_argument
    add(
        "--sample-rate",
        metavar="HZ",
        type=cli.positive_int,
        default=SAMPLE_RATE,
        help="rate to resample to (default: %(default)s)",
    )
    add(
        "--num-samples",
        metavar="N",
        type=cli.positive_int,
        default=SAMPLES_PER_SEGMENT,
        help="samples a segment (default: %(default)s)",
    )
    add(
        "--stop",
        metavar="SECONDS",
        type=cli.seconds_or_none,
        default=CLIP_SECONDS,
        help="where to cut the audio, from its start; none for whole tracks of any length "
        f"(default: {CLIP_SECONDS:g})",
    )
    add(
        "--num-audios-per-shard",
        metavar="N",
        type=cli.positive_int,
        default=100,
        help="clips a shard (default: 100)",
    )
    add(
        "--encoding",
        choices=ENCODINGS,
        default="float32",
        help="how shards store samples: int16 takes half the space and rounds to 2^-16 of full "
        "scale, and the published program cannot read it (default: float32)",
    )
    machine = parser.add_argument_group("machine")
    add = machine.add_argument
    add(
        "--num-workers",
        metavar="N",
        type=cli.positive_int,
        default=None,
        help="processes that decode (default: one a core)",
    )
    add(
        "--scheduler",
        metavar="ADDRESS",
        default=None,
        help="make the shards on the workers of a Dask cluster, this being its scheduler's address "
        "(default: on this machine's processes)",
    )
    add(
        "--decoder",
        choices=DECODERS,
        default="av",
        help="library to decode with; the samples are the same, but madmom holds a whole file in "
        "memory (default: av)",
    )
    own = parser.add_argument_group("your own data")
    own.add_argument(
        "--annotations",
        metavar="FILE",
        nargs="+",
        default=[],
        help="CSV or TSV tables of the same columns, a row a clip; the names of several may say "
        f"the split, as in x-train.tsv x-validation.tsv x-test.tsv (default: {ANNOTATIONS_NAME} "
        "in --data-dir)",
    )
    own.add_argument(
        "--audio-dir",
        metavar="PATH",
        default=None,
        help=f"folder that the tables' paths start from (default: {AUDIO_FOLDER}/ in --data-dir)",
    )
    own.add_argument(
        "--audio-suffix",
        metavar="SUFFIX",
        default=None,
        help="ending of the audio files, such as .low.mp3, in place of that in the tables "
        "(default: as in the tables)",
    )
    own.add_argument(
        "--path-column",
        metavar="NAME",
        default=None,
        help=f"column of the audio files (default: the one of {', '.join(PATH_COLUMNS)} that is "
        "there, in any case)",
    )
    own.add_argument(
        "--tags-column",
        metavar="NAME",
        default=None,
        help=f"column that lists a clip's tags (default: one named {TAGS_COLUMN}, or else each "
        "column of 0 and 1 is a tag)",
    )
    own.add_argument(
        "--tags-delimiter",
        metavar="TEXT",
        default=None,
        help="what stands between the tags of a list (default: a comma; or each stands in a "
        "column, to the end of the row)",
    )
    own.add_argument(
        "--split-column",
        metavar="NAME",
        default=None,
        help=f"column that says the split: {', '.join(SPLIT_NAMES)} (default: the names of the "
        f"tables, or a column named {SPLIT_COLUMN})",
    )
    own.add_argument(
        "--split-by",
        metavar="NAME",
        default=None,
        help=f"column, or {FOLDER} for the first folder of the path, whose groups of clips are "
        "dealt to train, val and test at random, 75, 8 and 17 %% of the clips, and stay together "
        "(default: no)",
    )
    own.add_argument(
        "--split-seed",
        metavar="N",
        type=cli.non_negative_int,
        default=0,
        help="seed of --split-by (default: 0)",
    )
    return cli.add_general(parser)


def main(argv: list[str] | None = None) -> int:
    return cli.run(_build, build_parser().parse_args(argv))


def _build(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    manifest = build(
        arguments.data_dir,
        sample_rate=arguments.sample_rate,
        num_samples=arguments.num_samples,
        num_audios_per_shard=arguments.num_audios_per_shard,
        num_workers=arguments.num_workers,
        stop=arguments.stop,
        decoder=arguments.decoder,
        encoding=arguments.encoding,
        annotations=arguments.annotations,
        audio_dir=arguments.audio_dir,
        audio_suffix=arguments.audio_suffix,
        num_tags=arguments.num_tags,
        form=TableForm(
            path_column=arguments.path_column,
            tags_column=arguments.tags_column,
            tags_delimiter=arguments.tags_delimiter,
            split_column=arguments.split_column,
            split_by=arguments.split_by,
            split_seed=arguments.split_seed,
        ),
        scheduler=arguments.scheduler,
    )
    for skipped in manifest["skipped"]:
        messages.say(f"skipped clip {skipped[CLIP_ID]}: {skipped['reason']}")
    for split, found in manifest["splits"].items():
        messages.say(
            f"{split}: {messages.count(found['clips'], 'clip')}, "
            f"{messages.count(found['segments'], 'segment')}, {messages.count(len(found['shards']), 'shard')}"
        )
    folder = Path(arguments.data_dir) / SHARD_FOLDER
    shards = [
        folder / entry["name"] for found in manifest["splits"].values() for entry in found["shards"]
    ]
    messages.say(
        f"{folder}: complete in {messages.duration(time.monotonic() - started)}, "
        f"{messages.size_on_disk(*shards)}, {messages.count(len(manifest['skipped']), 'clip')} skipped"
    )
    num_skipped = len(manifest["skipped"])
    num_clips = num_skipped + sum(found["clips"] for found in manifest["splits"].values())
    if 100 * num_skipped > arguments.max_skipped * num_clips:
        messages.say(
            f"{Path(sys.argv[0]).name}: error: {num_skipped:,} of {num_clips:,} clips "
            f"({100 * num_skipped / num_clips:.1f} %) were skipped, more than --max-skipped "
            f"{arguments.max_skipped:g}: the shards are complete without them; put the files in "
            "their place and run the same command again, or allow more"
        )
        return 1
    return 0


if __name__ == "__main__":
    # By its own name, under which workers know its tasks.
    import build_mtt

    sys.exit(build_mtt.main())
