"""Build TFRecord shards from MagnaTagATune's annotations and MP3s, or from your own tables.

    python build_mtt.py --data-dir ./dataset
    python build_mtt.py --data-dir ./dataset --num-workers 8 --num-audios-per-shard 50
    python build_mtt.py --data-dir ./mine --annotations songs.csv --audio-dir ./songs \\
      --split-by artist --stop none
    python build_mtt.py --data-dir /shared/dataset --scheduler tcp://node1:8786

Reads ``annotations_final.csv`` and ``mp3/`` in the dataset's folder, or the files that the options
name, and writes ``tfrecord/``. After an interruption, run the same command again to build the
missing shards.
"""

import argparse
import dataclasses
import errno
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from toolkit import cli, messages
from toolkit.cli import option
from toolkit.data.annotations import (
    ANNOTATIONS_NAME,
    AUDIO_FOLDER,
    CLIP_ID,
    NUM_TAGS,
    assign_shards,
    missing_dataset,
)
from toolkit.data.audio import (
    CLIP_SECONDS,
    DECODERS,
    SAMPLE_RATE,
    SAMPLES_PER_SEGMENT,
    import_madmom,
)
from toolkit.data.clip import ClipTable
from toolkit.data.folders import read_folders
from toolkit.data.manifest import (
    SHARD_FOLDER,
    as_typed,
    check_data_dir,
    check_options,
    gather,
    hash_lines,
    hash_tables,
    remove_progress,
    start_progress,
    write_manifest,
    write_progress,
)
from toolkit.data.records import ENCODINGS
from toolkit.data.shards import finished_shards, make_shard, plan_shards
from toolkit.data.tables import TableForm, read_tables
from toolkit.errors import BuildError, UsageError
from toolkit.files import exists, only_run, remove_leftovers
from toolkit.signals import stop_on_signals
from toolkit.workers import local_workers, run_tasks

# A full disk, a quota and a limit of file sizes: after these, a build can be resumed.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class BuildOptions:
    """Options of build_mtt.py, except for the format of tables (`tables.TableForm`)."""

    # fmt: off
    data_dir: str = option(
        "./dataset", f"folder of the dataset: {ANNOTATIONS_NAME} and {AUDIO_FOLDER}/ are read from "
        f"this folder unless other options name them, and {SHARD_FOLDER}/ is written to it",
        group="data", metavar="PATH",
    )
    num_tags: int = option(
        NUM_TAGS, "number of most frequent tags to keep; all if there are fewer",
        group="data", type=cli.positive_int, metavar="N",
    )
    max_skipped: float = option(
        5.0, "maximum percentage of skipped clips; if more are skipped, all shards are built but "
        "the exit status is 1",
        group="data", type=cli.percentage, metavar="PERCENT",
    )
    sample_rate: int = option(
        SAMPLE_RATE, "rate to resample to", group="shards", type=cli.positive_int, metavar="HZ"
    )
    num_samples: int = option(
        SAMPLES_PER_SEGMENT, "samples per segment",
        group="shards", type=cli.positive_int, metavar="N",
    )
    stop: float | None = option(
        CLIP_SECONDS, "seconds to read from each file, or none for whole files",
        group="shards", type=cli.seconds_or_none, metavar="SECONDS",
    )
    num_audios_per_shard: int = option(
        100, "clips per shard", group="shards", type=cli.positive_int, metavar="N"
    )
    encoding: str = option(
        "float32", "type of the stored samples; int16 halves the size, rounds to 2^-15 of full "
        "scale, and cannot be read by the published program",
        group="shards", choices=ENCODINGS,
    )
    num_workers: int | None = option(
        None, "processes that decode audio", shown="one per core",
        group="machine", type=cli.positive_int, metavar="N",
    )
    scheduler: str | None = option(
        None, "address of the scheduler of a Dask cluster whose workers build the shards",
        shown="processes of this machine", group="machine", metavar="ADDRESS",
    )
    decoder: str = option(
        "av", "decoding library; madmom gives the same samples of undamaged MP3s, but loads whole "
        "files into memory",
        group="machine", choices=DECODERS,
    )
    annotations: tuple[str, ...] = option(
        (), "CSV or TSV tables with the same columns and one row per clip; several tables may be "
        "named after their splits, as in x-train.tsv x-validation.tsv x-test.tsv",
        shown=f"{ANNOTATIONS_NAME} in --data-dir",
        group="your own data", nargs="+", metavar="FILE",
    )
    audio_dir: str | None = option(
        None, "folder to which paths in the tables are relative",
        shown=f"{AUDIO_FOLDER}/ in --data-dir", group="your own data", metavar="PATH",
    )
    audio_suffix: str | None = option(
        None, "file name extension that replaces those in the tables, such as .low.mp3",
        shown="as in the tables", group="your own data", metavar="SUFFIX",
    )
    # fmt: on
    form: TableForm = TableForm()  # noqa: RUF009  # its options are declared in its own class

    @property
    def tables(self) -> list[Path]:
        """Tables to read; none if the tags are folders."""
        if self.form.tags_from:
            return []
        paths = self.annotations or [Path(self.data_dir) / ANNOTATIONS_NAME]
        return [Path(path) for path in paths]

    @property
    def is_own_data(self) -> bool:
        """Whether this is a dataset of the user, and not MagnaTagATune."""
        return bool(self.annotations or self.form.tags_from)

    @property
    def audio_folder(self) -> Path:
        """Folder to which paths in the tables are relative."""
        if self.audio_dir is None:
            return Path(self.data_dir) / AUDIO_FOLDER
        return Path(self.audio_dir)

    def recorded(self) -> dict:
        """Return the options that determine the content of the shards, for the manifest."""
        # Without --audio-dir, record mp3/ even if mp3/ is a link to another folder.
        audio_dir = AUDIO_FOLDER
        if self.audio_dir is not None:
            # Relative, so that a dataset can be moved together with its audio.
            audio_dir = os.path.relpath(self.audio_folder.resolve(), Path(self.data_dir).resolve())
        return {
            "sample_rate": self.sample_rate,
            "num_samples": self.num_samples,
            "stop": self.stop,
            "num_audios_per_shard": self.num_audios_per_shard,
            "decoder": self.decoder,
            "encoding": self.encoding,
            "audio_dir": audio_dir,
            "audio_suffix": self.audio_suffix,
            "num_tags": self.num_tags,
            **dataclasses.asdict(self.form),
        }


# Options that earlier versions did not record, with the values that these versions used.
_UNRECORDED = {
    "stop": CLIP_SECONDS,
    "encoding": "float32",
    "audio_dir": AUDIO_FOLDER,
    "audio_suffix": None,
    "num_tags": NUM_TAGS,
    **dataclasses.asdict(TableForm()),
}

# Options of tables, which do not fit --tags-from folders.
# fmt: off
_OF_TABLES = (
    "annotations", "audio_suffix", "path_column", "tags_column", "tags_delimiter",
    "exclude_columns", "split_column",
)
# fmt: on


def build(data_dir: str | Path, **options) -> dict:
    """Build the shards of a dataset, except for those that an earlier run finished.

    Parameters
    ----------
    data_dir : str or Path
        Folder of the dataset, to which ``tfrecord/`` is written.
    **options
        Other fields of `BuildOptions`, such as ``num_workers=2``.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    AnnotationsError, BuildError, UsageError
        The dataset is missing, the tables and options are inconsistent, shards of another build
        exist, another build is running, a worker died, or the cluster cannot be used.
    Interrupted
        A signal arrived.
    """
    options = BuildOptions(data_dir, **options)
    _check_input(options)
    if options.scheduler is not None:
        _import_dask_cluster()
        # Workers have another working directory, so they need absolute paths.
        absolute = options.audio_dir and Path(options.audio_dir).absolute()
        options = dataclasses.replace(
            options, data_dir=Path(data_dir).absolute(), audio_dir=absolute
        )
    clips, source = _read_clips(options)
    clips.shards = assign_shards(clips.splits, options.num_audios_per_shard)
    # Besides the hash of the tables, because another version may read the same tables differently.
    of_clips = {"tags": list(clips.tags), "clips_sha256": clips.sha256()}
    recorded = options.recorded() | source | of_clips

    folder = Path(options.data_dir) / SHARD_FOLDER
    # MagnaTagATune's folder exists, since it contains the table. Your own may be new.
    folder.mkdir(exist_ok=True, parents=options.is_own_data)
    # A second build would remove the temporary files of the first.
    with only_run(folder, "build", BuildError):
        # Check everything before the first write: a refused build leaves the folder as it was.
        earlier = check_options(folder, recorded, _UNRECORDED, options.tables)
        remove_leftovers(folder)  # of builds that were killed
        tasks = plan_shards(clips, folder, options.audio_folder, recorded)
        done = finished_shards(folder, tasks, recorded, earlier)
        start_progress(folder, recorded)
        try:
            _make_shards(tasks, done, options)
        finally:
            remove_leftovers(folder)  # of workers that were killed
        manifest = gather(tasks, done, recorded)
        write_manifest(folder, manifest)
        # After the manifest: a build that is killed before can still be resumed.
        remove_progress(folder)
    return manifest


# --- Input ---------------------------------------------------------------------------------------


def _check_input(options: BuildOptions) -> None:
    """Check options and folders before anything is read or written."""
    if options.scheduler is not None and options.num_workers is not None:
        raise UsageError(
            "--num-workers sets the processes of this machine, but with --scheduler the workers of "
            "the cluster build the shards: omit one of the two options"
        )
    seconds = options.num_samples / options.sample_rate
    # Otherwise every clip would be decoded, and then skipped because it is too short.
    if options.stop is not None and options.stop * options.sample_rate < options.num_samples:
        raise UsageError(
            f"--stop {as_typed(options.stop)}: shorter than one segment of {options.num_samples} "
            f"samples, {seconds:.3g} s at {options.sample_rate} Hz"
        )
    if options.form.tags_from:
        given = vars(options) | vars(options.form)
        for name in filter(given.get, _OF_TABLES):
            raise UsageError(
                f"--{name.replace('_', '-')}: is for tables, which --tags-from folders does not "
                "read: omit one of the two options"
            )
    check_data_dir(options.data_dir)
    for table in options.tables:
        if not exists(table):
            if not options.annotations:
                raise missing_dataset(options.data_dir)
            raise UsageError(f"--annotations {table}: no such file")
    if not exists(options.audio_folder) or not options.audio_folder.is_dir():
        if not options.is_own_data and options.audio_dir is None:
            raise missing_dataset(options.data_dir)
        raise UsageError(
            f"{options.audio_folder}: no such folder: give the audio folder with --audio-dir"
        )
    if options.decoder == "madmom":
        import_madmom()  # report an error here rather than in a worker


def _read_clips(options: BuildOptions) -> tuple[ClipTable, dict]:
    """Read the clips and check their paths; also return what the manifest records of the source."""
    if options.form.tags_from:
        clips, notes, files = read_folders(options.audio_folder, options.num_tags, options.form)
        source = {"annotations_sha256": hash_lines(files), "files": files}
        names = options.audio_folder
    else:
        clips, notes = read_tables(options.tables, options.num_tags, options.form)
        source = {"annotations_sha256": hash_tables(options.tables)}
        names = ", ".join(table.name for table in options.tables)
    # Printed before the build, so that a misread source is noticed at once.
    for note in notes:
        messages.say(f"{names}: {note}")
    if options.audio_suffix is not None:
        clips.replace_suffixes(options.audio_suffix)
    folder = options.audio_folder
    clips.match_files(folder)
    # os.path.isfile returns False for invalid paths and for paths without read permission.
    if not any(os.path.isfile(folder / path) for path in clips.paths):
        exists(folder / clips.paths[0])  # raises the error of a missing permission
        raise BuildError(
            f"{folder}: contains none of the {len(clips.paths)} clips: expected files such as "
            f"{folder / clips.paths[0]}"
        )
    clips.check_links(folder)
    return clips, source


# --- Workers -------------------------------------------------------------------------------------


def _make_shards(tasks: list, done: dict[str, dict], options: BuildOptions) -> None:
    """Build the missing shards on the workers and record each finished shard."""
    to_do = [task for task in tasks if task.path.name not in done]
    num_clips = sum(len(task.clips) for task in tasks)
    num_done = num_clips - sum(len(task.clips) for task in to_do)
    if not to_do:
        return

    def so_far() -> str:
        return f"{len(done)} of {len(tasks)} shards are complete"

    if options.scheduler is None:
        # More workers than cores are slower: 79 instead of 87 clips/s on two cores.
        num_workers = min(options.num_workers or os.cpu_count() or 1, len(to_do))
        workers = local_workers(make_shard, num_workers, so_far)
    else:
        connect = _import_dask_cluster().connect
        workers = connect(options.scheduler, tasks, so_far, messages.say)
    with (
        workers as (submit, num_counted),
        messages.progress(
            total=num_clips, initial=num_done, unit="clip", desc="building", smoothing=0.1
        ) as bar,
        stop_on_signals() as stop,
    ):

        def on_wait() -> None:
            stop.check()
            bar.update(num_done + num_counted() - bar.n)

        try:
            for entry in run_tasks(submit, to_do, on_wait):
                # After each shard, so that a killed build loses only shards that are not finished.
                write_progress(to_do[0].path.parent, entry)
                done[entry["name"]] = entry
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            raise BuildError(
                f"{cli.describe_os_error(error)} ({so_far()}): free some space and run the same "
                "command again to resume"
            ) from None


def _import_dask_cluster():
    try:
        from toolkit.data import dask_cluster
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--scheduler: {error.name.partition('.')[0]} is not installed: python -m pip install "
            "-r requirements/cluster.txt"
        ) from None
    return dask_cluster


# --- Command line --------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Build TFRecord shards from MagnaTagATune's annotations and MP3s, or from your own tables.",
        "  python build_mtt.py --data-dir ./dataset\n"
        "  python build_mtt.py --data-dir ./dataset --num-workers 8 --num-audios-per-shard 50\n"
        "  python build_mtt.py --data-dir ./mine --annotations songs.csv --audio-dir ./songs "
        "--split-by artist --stop none\n"
        "  python build_mtt.py --data-dir /shared/dataset --scheduler tcp://node1:8786",
    )
    cli.add_options(parser, BuildOptions, TableForm)
    return cli.add_general(parser)


def main(argv: list[str] | None = None) -> int:
    return cli.run(_run, build_parser().parse_args(argv))


def _run(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    options = dataclasses.replace(
        cli.read_options(BuildOptions, arguments), form=cli.read_options(TableForm, arguments)
    )
    manifest = build(**vars(options))
    skipped, splits = manifest["skipped"], manifest["splits"]
    for row in skipped:
        messages.say(f"skipped clip {row[CLIP_ID]}: {row['reason']}")
    for name, split in splits.items():
        messages.say(
            f"{name}: {messages.count(split['clips'], 'clip')}, "
            f"{messages.count(split['segments'], 'segment')}, "
            f"{messages.count(len(split['shards']), 'shard')}"
        )
    folder = Path(options.data_dir) / SHARD_FOLDER
    shards = [folder / entry["name"] for split in splits.values() for entry in split["shards"]]
    messages.say(
        f"{folder}: complete in {messages.duration(time.monotonic() - started)}, "
        f"{messages.size_on_disk(*shards)}, {messages.count(len(skipped), 'clip')} skipped"
    )
    num_clips = len(skipped) + sum(split["clips"] for split in splits.values())
    percent = 100 * len(skipped) / num_clips
    if percent > options.max_skipped:
        raise BuildError(
            f"{len(skipped):,} of {num_clips:,} clips ({percent:.1f} %) were skipped, more than "
            f"--max-skipped {options.max_skipped:g}: all shards were built without them; add or "
            "replace the files and run the same command again, or use a higher --max-skipped"
        )


if __name__ == "__main__":
    sys.exit(main())
