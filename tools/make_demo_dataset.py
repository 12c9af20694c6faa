"""Make a small synthetic dataset in MagnaTagATune's format, to try every script.

    python -m tools.make_demo_dataset --out demo/dataset
    python -m tools.make_demo_dataset --out demo/dataset --clips 160 --seed 1 --num-workers 2

Writes what a download of MagnaTagATune contains:

    mp3/0 ... mp3/f         29 s MP3s, 16 kHz mono 32 kb/s; 0-b train, c validation, d-f test
    annotations_final.csv   tab-separated, quoted: clip_id, 188 tags ("0" or "1"), mp3_path

A clip's tags can be heard in the clip. As in the real data, some tags are missing, a few clips have
none of the 50 most frequent tags, and all other tags are rare. The same seed gives the same bytes
for any number of workers. Existing files are overwritten.

`tools/demo_recipes.py` contains recipes and tags, `tools/demo_synthesis.py` computes the samples.
"""

import argparse
import csv
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from toolkit import cli, messages
from toolkit.cli import option
from toolkit.data.annotations import ANNOTATIONS_NAME, CLIP_ID, MP3_PATH, MTT_TOP_TAGS
from toolkit.errors import UsageError
from toolkit.files import write_atomically
from toolkit.signals import stop_on_signals
from toolkit.workers import local_workers, run_tasks
from tools import demo_recipes as recipes
from tools.demo_recipes import INSTRUMENTS, LEVELS, RECIPES, TEMPOS
from tools.demo_synthesis import SAMPLE_RATE, synthesise

import numpy as np
from numpy.random import default_rng

TRAIN, VALIDATION, TEST = "0123456789ab", "c", "def"
# Folders of the clips of a recipe, in turn. Validation has a larger share than in MagnaTagATune,
# because most tags need several clips in each split.
FOLDERS = (TRAIN, VALIDATION, TRAIN, TEST, TRAIN, TRAIN)
MIN_CLIPS = 16
TAG_PROBABILITY = 0.95  # real listeners sometimes omit a tag


# fmt: off
@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    clips: int = option(
        240, f"number of clips, at least {MIN_CLIPS}; with 160 or more, each of the 50 tags occurs",
        group="data", type=cli.positive_int, metavar="N")
    seed: int = option(
        0, "random seed; the same seed gives the same bytes",
        group="data", type=cli.non_negative_int, metavar="N")
    num_workers: int | None = option(
        None, "worker processes", shown="one per core",
        group="machine", type=cli.positive_int, metavar="N")
    out: str = option("demo/dataset", "folder to write to", group="output", metavar="PATH")
# fmt: on


@dataclass(frozen=True)
class Clip:
    """A planned clip."""

    clip_id: int
    mp3_path: str  # such as c/artist_c-demo-013-partita-0-29.mp3
    instruments: tuple[str, ...]  # keys of INSTRUMENTS
    tempo: str  # key of TEMPOS
    level: str  # key of LEVELS
    tags: frozenset[str]
    seed: tuple[int, ...]  # of the samples


@cache
def tag_columns() -> tuple[str, ...]:
    """Return the 188 tag columns of MagnaTagATune's annotations_final.csv, in their order."""
    return tuple(Path(__file__).with_name("mtt_tags.txt").read_text("ascii").splitlines())


def plan_clips(num_clips: int = Options.clips, seed: int = Options.seed) -> list[Clip]:
    """Select path, recipe and tags of each clip; return the clips by ascending clip id."""
    if num_clips < MIN_CLIPS:
        raise UsageError(f"--clips must be at least {MIN_CLIPS}, got {num_clips}")
    return [_plan_clip(index, seed) for index in range(num_clips)]


def _plan_clip(index: int, seed: int) -> Clip:
    # A generator per clip, so that clips do not depend on the number of clips or workers.
    random = default_rng((seed, index, 0))
    turn, number = divmod(index, len(RECIPES))
    title, words = list(RECIPES.items())[number]
    parts = [part for word in words for part in recipes.GROUPS.get(word, (word,))]
    instruments = tuple(part for part in parts if part in INSTRUMENTS)
    tempo, level = (
        next((word for word in words if word in choices), str(random.choice([*choices])))
        for choices in (TEMPOS, LEVELS)
    )
    heard = {*words, tempo, level}
    if not heard & recipes.SINGERS:
        heard.add("no vocals")
    if len(instruments) == 1 and heard & recipes.SOLO_INSTRUMENTS:
        heard.add("solo")
    # Tags such as slow, quiet and no vocals are among the 50.
    if title == "rain":
        heard = {*words}
    fitting = {tag for word in heard for tag in (word, *recipes.MORE_TAGS.get(word, ()))}
    # Only the first clip of a recipe has tags outside the 50, so that these are more frequent. The
    # order of a set differs between processes, that of columns does not.
    columns = MTT_TOP_TAGS if turn else tag_columns()
    tags = [tag for tag in columns if tag in fitting and random.random() < TAG_PROBABILITY]
    folder = random.choice([*FOLDERS[(turn + number) % len(FOLDERS)]])
    # Named as in MagnaTagATune: artist, album, track, title, first and last second.
    mp3_path = f"{folder}/artist_{folder}-demo-{index + 1:03d}-{title}-0-29.mp3"
    clip_id = 2 + 107 * index  # with gaps, as the real ids
    return Clip(clip_id, mp3_path, instruments, tempo, level, frozenset(tags), (seed, index, 1))


def synthesise_clip(clip: Clip) -> np.ndarray:
    """Compute the samples of a clip; see `demo_synthesis.synthesise`."""
    random = default_rng(clip.seed)
    slowest, fastest, notes_per_beat = TEMPOS[clip.tempo]
    beat = 60 / random.uniform(slowest, fastest)
    rms = random.uniform(*LEVELS[clip.level])
    instruments = [INSTRUMENTS[name] for name in clip.instruments]
    return synthesise(instruments, beat, notes_per_beat, rms, random)


def encode_mp3(samples: np.ndarray) -> bytes:
    """Encode samples at 16 kHz as mono MP3 of 32 kb/s, the format of MagnaTagATune's clips."""
    import av

    file = io.BytesIO()
    # Without bitexact, the file would name the version of the encoder.
    with av.open(file, "w", format="mp3", options={"fflags": "+bitexact"}) as container:
        # Level 7 of 9 takes half the time of the default.
        stream = container.add_stream(
            "libmp3lame", rate=SAMPLE_RATE, layout="mono", options={"compression_level": "7"}
        )
        stream.bit_rate = 32_000
        stream.codec_context.format = "fltp"
        frame = av.AudioFrame.from_ndarray(samples[np.newaxis, :], format="fltp", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        for each in (frame, None):
            container.mux(stream.encode(each))
    return file.getvalue()


def encode_annotations(clips: list[Clip]) -> bytes:
    """Return the content of ``annotations_final.csv`` in MagnaTagATune's format."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerow((CLIP_ID, *tag_columns(), MP3_PATH))
    for clip in clips:
        labels = (int(tag in clip.tags) for tag in tag_columns())
        writer.writerow((clip.clip_id, *labels, clip.mp3_path))
    return file.getvalue().encode("ascii")


def make_demo_dataset(options: Options) -> None:
    """Write the MP3s of the dataset, then its annotations.

    Parameters
    ----------
    options : Options
        Options of the command line.

    Raises
    ------
    UsageError, BuildError, Interrupted, OSError
        There are too few clips, a worker died, a signal arrived, or a file cannot be
        written.
    """
    clips = plan_clips(options.clips, options.seed)
    mp3_dir = Path(options.out) / "mp3"
    for folder in TRAIN + VALIDATION + TEST:
        (mp3_dir / folder).mkdir(parents=True, exist_ok=True)
    tasks = {mp3_dir / clip.mp3_path: clip for clip in clips}
    num_workers = options.num_workers or os.cpu_count() or 1
    with (
        messages.progress(total=len(clips), unit="clip", desc="synthesising") as bar,
        local_workers(_write_mp3, num_workers, lambda: f"{bar.n} of {bar.total} clips") as workers,
        stop_on_signals() as stop,
    ):
        submit, _ = workers
        for _ in run_tasks(submit, list(tasks.items()), stop.check):
            bar.update()
    write_atomically(Path(options.out) / ANNOTATIONS_NAME, encode_annotations(clips))
    num_tags = len(frozenset().union(*(clip.tags for clip in clips)))
    messages.say(
        f"{options.out}: {messages.count(len(clips), 'clip')} of 29 s with "
        f"{messages.count(num_tags, 'tag')}, {messages.size_on_disk(*tasks)}"
    )


def _write_mp3(task: tuple[Path, Clip], count: Callable[[], None]) -> None:
    """Write a clip in a worker process."""
    path, clip = task
    write_atomically(path, encode_mp3(synthesise_clip(clip)))


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Make a small synthetic dataset in MagnaTagATune's format.",
        "  python -m tools.make_demo_dataset --out demo/dataset\n"
        "  python -m tools.make_demo_dataset --out demo/dataset --clips 160 --seed 1",
    )
    cli.add_options(parser, Options)
    return cli.add_general(parser)


def main(argv: list[str] | None = None) -> int:
    return cli.run(_make, build_parser().parse_args(argv))


def _make(arguments: argparse.Namespace) -> None:
    cli.check_output(arguments.out, "--out", is_folder=True)
    make_demo_dataset(cli.read_options(Options, arguments))


if __name__ == "__main__":
    sys.exit(main())
