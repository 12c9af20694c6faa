"""Make a small synthetic dataset in MagnaTagATune's format, to try every stage.

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
from dataclasses import dataclass, replace
from pathlib import Path

from toolkit import cli, messages
from toolkit.cli import option
from toolkit.data.annotations import ANNOTATIONS_NAME, CLIP_ID, MP3_PATH, MTT_TOP_TAGS
from toolkit.errors import UsageError
from toolkit.files import write_atomically
from toolkit.signals import stop_on_signals
from toolkit.workers import local_workers, run_tasks
from tools import demo_recipes
from tools.demo_recipes import FIELD_RECORDING, INSTRUMENTS, MORE_TAGS, RECIPES, Recipe
from tools.demo_synthesis import SAMPLE_RATE, Score, synthesise

import numpy as np
from numpy.random import Generator, default_rng

TRAIN_FOLDERS, VALIDATION_FOLDERS, TEST_FOLDERS = "0123456789ab", "c", "def"
MIN_CLIPS = 16  # one per folder
VALIDATION_SHARE = 1 / 6  # higher than in MagnaTagATune: each tag needs several clips per split
FIELD_RECORDING_SHARE = 1 / 40  # of each split

# The tag columns of MagnaTagATune's annotations_final.csv, in their order.
MTT_TAGS = tuple(
    """
    no voice, singer, duet, plucking, hard rock, world, bongos, harpsichord, female singing,
    clasical, sitar, chorus, female opera, male vocal, vocals, clarinet, heavy, silence, beats,
    men, woodwind, funky, no strings, chimes, foreign, no piano, horns, classical, female,
    no voices, soft rock, eerie, spacey, jazz, guitar, quiet, no beat, banjo, electric, solo,
    violins, folk, female voice, wind, happy, ambient, new age, synth, funk, no singing,
    middle eastern, trumpet, percussion, drum, airy, voice, repetitive, birds, space, strings,
    bass, harpsicord, medieval, male voice, girl, keyboard, acoustic, loud, classic, string,
    drums, electronic, not classical, chanting, no violin, not rock, no guitar, organ, no vocal,
    talking, choral, weird, opera, soprano, fast, acoustic guitar, electric guitar, male singer,
    man singing, classical guitar, country, violin, electro, reggae, tribal, dark, male opera,
    no vocals, irish, electronica, horn, operatic, arabic, lol, low, instrumental, trance, chant,
    strange, drone, synthesizer, heavy metal, modern, disco, bells, man, deep, fast beat,
    industrial, hard, harp, no flute, jungle, pop, lute, female vocal, oboe, mellow, orchestral,
    viola, light, echo, piano, celtic, male vocals, orchestra, eastern, old, flutes, punk,
    spanish, sad, sax, slow, male, blues, vocal, indian, no singer, scary, india, woman,
    woman singing, rock, dance, piano solo, guitars, no drums, jazzy, singing, cello, calm,
    female vocals, voices, different, techno, clapping, house, monks, flute, not opera,
    not english, oriental, beat, upbeat, soft, noise, choir, female singer, rap, metal, hip hop,
    quick, water, baroque, women, fiddle, english
    """.strip()
    .replace(",\n    ", ", ")
    .split(", ")
)


@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    clips: int = option(
        240, f"number of clips, at least {MIN_CLIPS}; with 160 or more, each of the 50 tags occurs",
        group="data", type=cli.positive_int, metavar="N",
    )  # fmt: skip
    seed: int = option(
        0, "random seed; the same seed gives the same bytes",
        group="data", type=cli.non_negative_int, metavar="N",
    )  # fmt: skip
    num_workers: int | None = option(
        None, "worker processes", shown="one per core",
        group="machine", type=cli.positive_int, metavar="N",
    )  # fmt: skip
    out: str = option("demo/dataset", "folder to write to", group="output", metavar="PATH")


@dataclass(frozen=True)
class Clip:
    """A planned clip."""

    clip_id: int
    mp3_path: str  # such as c/artist_c-demo-001-nocturne-0-29.mp3
    recipe: Recipe  # with tempo and level
    tags: frozenset[str]
    seed: tuple[int, ...]  # of the samples


def plan_clips(num_clips: int = Options.clips, seed: int = Options.seed) -> list[Clip]:
    """Select path, recipe and tags of each clip; return the clips by ascending clip id."""
    if num_clips < MIN_CLIPS:
        raise UsageError(f"--clips must be at least {MIN_CLIPS}, one per folder; got {num_clips}")
    random = default_rng((seed, 0))
    placed = _place_recipes(num_clips, random)
    clip_ids = np.cumsum(1 + random.geometric(1 / 100, num_clips))  # with gaps, as the real ids
    given_rare = set()
    clips = []
    for index, clip_id in enumerate(clip_ids):
        folder, recipe = placed[index]
        recipe = replace(
            recipe,
            tempo=recipe.tempo or str(random.choice(list(demo_recipes.TEMPOS))),
            level=recipe.level or str(random.choice(list(demo_recipes.LEVELS))),
        )
        tags = _draw_tags(recipe, random)
        rare = tags - set(MTT_TOP_TAGS)
        tags -= given_rare  # a tag outside the 50 is given to only one clip
        given_rare |= rare
        clips.append(
            Clip(
                clip_id=int(clip_id),
                mp3_path=f"{folder}/artist_{folder}-demo-{index + 1:03d}-{recipe.title}-0-29.mp3",
                recipe=recipe,
                tags=frozenset(tags),
                seed=(seed, 1, index),
            )
        )
    return clips


def _place_recipes(num_clips: int, random: Generator) -> list[tuple[str, Recipe]]:
    """Return folder and recipe of each clip; all recipes are about equally frequent in a split."""
    num_validation = min(int(num_clips * VALIDATION_SHARE), num_clips - MIN_CLIPS + 1)
    others = TRAIN_FOLDERS + TEST_FOLDERS
    folders = [others[index % len(others)] for index in range(num_clips - num_validation)]
    folders += VALIDATION_FOLDERS * num_validation
    placed = []
    for split in TRAIN_FOLDERS, VALIDATION_FOLDERS, TEST_FOLDERS:
        of_split = [folder for folder in folders if folder in split]
        num_recordings = int(len(of_split) * FIELD_RECORDING_SHARE)
        recipes = [FIELD_RECORDING] * num_recordings
        while len(recipes) < len(of_split):
            recipes += [RECIPES[index] for index in random.permutation(len(RECIPES))]
        of_split = [of_split[index] for index in random.permutation(len(of_split))]
        placed += zip(of_split, recipes, strict=False)
    return [placed[index] for index in random.permutation(num_clips)]


def _draw_tags(recipe: Recipe, random: Generator) -> set[str]:
    """Return the tags that fit a recipe; each tag is omitted with a small probability."""
    heard = [*recipe.instruments, *recipe.genres]
    if recipe.title != FIELD_RECORDING.title:
        heard += [recipe.tempo, recipe.level]
        if not any("singing" in MORE_TAGS.get(name, ()) for name in recipe.instruments):
            heard.append("no singer")
    if len(recipe.instruments) == 1 and recipe.instruments[0] in demo_recipes.SOLO_INSTRUMENTS:
        heard.append("solo")
    fitting = {tag for what in heard for tag in (what, *MORE_TAGS.get(what, ()))}
    # Draw in the order of columns: the order of a set differs between processes.
    return {
        tag for tag in MTT_TAGS if tag in fitting and random.random() < demo_recipes.TAG_PROBABILITY
    }


def synthesise_clip(clip: Clip) -> np.ndarray:
    """Compute the samples of a clip; see `demo_synthesis.synthesise`."""
    recipe = clip.recipe
    random = default_rng(clip.seed)
    slowest, fastest, notes_per_beat = demo_recipes.TEMPOS[recipe.tempo]
    score = Score(
        root=int(random.integers(48, 60)),
        scale=(demo_recipes.MAJOR, demo_recipes.MINOR)[random.integers(2)],
        chords=demo_recipes.PROGRESSIONS[random.integers(len(demo_recipes.PROGRESSIONS))],
        beat=60 / random.uniform(slowest, fastest),
        notes_per_beat=notes_per_beat,
    )
    instruments = [INSTRUMENTS[name] for name in recipe.instruments]
    rms = random.uniform(*demo_recipes.LEVELS[recipe.level])
    return synthesise(instruments, score, rms, random)


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
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def encode_annotations(clips: list[Clip]) -> bytes:
    """Return the content of ``annotations_final.csv`` in MagnaTagATune's format."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerow((CLIP_ID, *MTT_TAGS, MP3_PATH))
    for clip in clips:
        labels = (int(tag in clip.tags) for tag in MTT_TAGS)
        writer.writerow((clip.clip_id, *labels, clip.mp3_path))
    return file.getvalue().encode("ascii")


def make_demo_dataset(options: Options) -> list[Clip]:
    """Write the MP3s of the dataset, then its annotations.

    Parameters
    ----------
    options : Options
        Options of the command line.

    Returns
    -------
    list of Clip
        The clips, by ascending clip id.

    Raises
    ------
    UsageError, BuildError, Interrupted, OSError
        There are fewer clips than folders, a worker died, a signal arrived, or a file cannot be
        written.
    """
    clips = plan_clips(options.clips, options.seed)
    mp3_dir = Path(options.out) / "mp3"
    for folder in TRAIN_FOLDERS + VALIDATION_FOLDERS + TEST_FOLDERS:
        (mp3_dir / folder).mkdir(parents=True, exist_ok=True)
    tasks = [(mp3_dir / clip.mp3_path, clip) for clip in clips]
    num_workers = options.num_workers or os.cpu_count() or 1
    with (
        messages.progress(total=len(clips), unit="clip", desc="synthesising") as bar,
        local_workers(_write_mp3, num_workers, lambda: f"{bar.n} of {bar.total} clips") as workers,
        stop_on_signals() as stop,
    ):
        submit, _ = workers
        for _ in run_tasks(submit, tasks, stop.check):
            bar.update()
    write_atomically(Path(options.out) / ANNOTATIONS_NAME, encode_annotations(clips))
    return clips


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
    return cli.run(_run, build_parser().parse_args(argv))


def _run(arguments: argparse.Namespace) -> None:
    clips = make_demo_dataset(cli.read_options(Options, arguments))
    num_tags = len(frozenset().union(*(clip.tags for clip in clips)))
    mp3s = [Path(arguments.out, "mp3", clip.mp3_path) for clip in clips]
    messages.say(
        f"{arguments.out}: {messages.count(len(clips), 'clip')} of 29 s with "
        f"{messages.count(num_tags, 'tag')}, {messages.size_on_disk(*mp3s)}"
    )


if __name__ == "__main__":
    sys.exit(main())
