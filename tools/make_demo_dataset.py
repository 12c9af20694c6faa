"""Make a small synthetic dataset in MagnaTagATune's shape, to try every stage without the real one.

    python make_demo_dataset.py --out demo/dataset
    python make_demo_dataset.py --out demo/dataset --clips 160 --seed 1 --num-workers 2

It writes what a downloaded MagnaTagATune has, under the folder given by --out:

    mp3/0 ... mp3/f         29 s MP3s, 16 kHz mono 32 kb/s; 0-b train, c validation, d-f test
    annotations_final.csv   tab-separated, quoted: clip_id, 188 tags ("0" or "1"), mp3_path

The sounds are synthesised (plucked and bowed strings, voices, drums, synthesizers ...) so that
each tag given to a clip can be heard in it. As in the real data, a tag that fits may be missing
where its synonym is given, a few clips carry none of the 50 top tags, and every other tag is rare.
The same seed gives the same bytes, with any number of workers.

This module owns the recipes: which layers of sound a clip has, and which tags follow from them.
"""

import argparse
import concurrent.futures.process
import csv
import dataclasses
import functools
import io
import multiprocessing
import os
import sys
from pathlib import Path

from toolkit import cli, messages
from toolkit.errors import BuildError, UsageError
from toolkit.files import write_atomically

import numpy as np
from numpy.random import Generator, SeedSequence, default_rng

SAMPLE_RATE = 16_000  # Hz, of the MP3s
CLIP_SAMPLES = 465_600  # 29.1 s: MagnaTagATune's clips run a little over 29 s
BIT_RATE = 32_000  # bit/s
TOP_HZ = 7_000.0  # an MP3 of this bit rate keeps little above

DEFAULT_CLIPS = 248
FOLDERS = "0123456789abcdef"
VALIDATION_FOLDER = "c"  # one folder is the whole split, so it holds more clips than the others
VALIDATION_SHARE = 0.153
MIN_CLIPS = len(FOLDERS)
UNTAGGED_CLIPS = 6  # fewer where there are fewer than 96 clips

# The columns of MagnaTagATune's annotations_final.csv, in their order.
MTT_TAGS = tuple(
    tag.strip()
    for tag in """
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
    """.replace("\n", " ").split(",")
)

# A listener names what stands out and picks among its synonyms, and never names what is absent.
NAMED = 0.97  # probability that a plain tag is given
SYNONYM = 0.9  # probability of each of several names for one thing

VOCAL_TAGS = ("vocal", "vocals", "singing", "voice")
NO_VOCAL_TAGS = ("no vocal", "no vocals", "no voice")
MALE_TAGS = ("male", "male vocal", "male voice", "man", *VOCAL_TAGS)
FEMALE_TAGS = ("female", "female vocal", "female voice", "woman", *VOCAL_TAGS)
DRUM_TAGS = ("beat", "beats", "drums")

# What is heard in a layer: (tags that name it, tags that are synonyms of each other).
LAYER_TAGS = {
    "guitar": (("guitar",), ()),
    "country guitar": (("guitar",), ()),
    "distorted guitar": (("guitar",), ()),
    "harp": (("harp",), ()),
    "sitar": (("sitar",), ()),
    "harpsichord": (("harpsichord",), ()),
    "piano": (("piano",), ()),
    "violin": (("violin", "strings"), ()),
    "cello": (("cello", "strings"), ()),
    "strings": (("strings",), ()),
    "flute": (("flute",), ()),
    "man": ((), MALE_TAGS),
    "woman": ((), FEMALE_TAGS),
    "opera man": (("opera",), MALE_TAGS),
    "opera woman": (("opera",), FEMALE_TAGS),
    "choir": (("choir", "choral"), VOCAL_TAGS),
    "drums": ((), DRUM_TAGS),
    "metal drums": ((), DRUM_TAGS),
    "tabla": (("drums",), ("beat", "beats")),
    "techno beat": ((), DRUM_TAGS),
    "bass": ((), ()),
    "synth": (("synth", "electronic"), ()),
    "pad": (("synth", "electronic"), ()),
    "bleeps": (("weird", "electronic"), ()),
    "wind": ((), ()),
    "water": ((), ()),
    "birds": ((), ()),
    "noise": ((), ()),
}
GENRE_TAGS = {
    "ambient": (("ambient",), ()),
    "classical": (("classical",), ("classic",)),
    "country": (("country",), ()),
    "dance": (("dance",), ()),
    "indian": (("indian",), ()),
    "metal": (("metal", "rock"), ()),
    "new age": (("new age",), ()),
    "pop": (("pop",), ()),
    "rock": (("rock",), ()),
    "techno": (("techno", "dance"), ()),
    "weird": (("weird",), ()),
}
TEMPO_TAGS = {"slow": (("slow",), ()), "medium": ((), ()), "fast": (("fast",), ())}
LEVEL_TAGS = {
    "quiet": (("quiet",), ("soft",)),
    "medium": ((), ()),
    "loud": (("loud",), ()),
}
# Layers that one player can play, so that a clip with no other is a solo.
SOLO_LAYERS = frozenset(
    {"guitar", "harp", "sitar", "harpsichord", "piano", "violin", "cello", "flute"}
)
# Tags outside the 50, each given to at most RARE_TAG_CLIPS of the clips with the layer.
RARE_TAGS = {
    "acoustic guitar": "country guitar",
    "electric guitar": "distorted guitar",
    "plucking": "harp",
    "tribal": "tabla",
    "keyboard": "harpsichord",
    "piano solo": "piano",
    "violins": "violin",
    "orchestra": "strings",
    "chanting": "choir",
    "male singer": "man",
    "female singer": "woman",
    "soprano": "opera woman",
    "male opera": "opera man",
    "percussion": "drums",
    "electronica": "techno beat",
    "synthesizer": "synth",
    "airy": "pad",
    "strange": "bleeps",
    "wind": "wind",
    "water": "water",
    "birds": "birds",
    "noise": "noise",
}
RARE_TAG_CLIPS = 2

TEMPO_BPM = {"slow": (46.0, 60.0), "medium": (84.0, 104.0), "fast": (144.0, 172.0)}
LEVEL_RMS = {"quiet": (0.018, 0.028), "medium": (0.06, 0.09), "loud": (0.16, 0.22)}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A kind of clip: the layers mixed in it, its genres, and its tempo and level where it has one.

    Where `tempo` or `level` is ``"any"``, each clip draws its own.
    """

    title: str
    layers: tuple[str, ...]  # keys of LAYER_TAGS, the leading layer first
    genres: tuple[str, ...] = ()  # keys of GENRE_TAGS
    tempo: str = "any"  # "slow", "medium", "fast" or "any"
    level: str = "any"  # "quiet", "medium", "loud" or "any"
    reverberation: float = 0.0  # share of a hall's reverberation in the mixture


RECIPES = (
    Recipe("guitar study", ("guitar",), ("classical",), tempo="slow"),
    Recipe("guitar run", ("guitar",), tempo="fast"),
    Recipe("guitar and flute", ("flute", "guitar"), tempo="medium"),
    Recipe("country ballad", ("man", "country guitar", "bass"), ("country",), "medium"),
    Recipe("country song", ("woman", "country guitar", "drums"), ("country",), "medium"),
    Recipe("country picking", ("country guitar", "drums", "bass"), ("country",), "fast"),
    Recipe("harp dream", ("harp",), ("classical",), "slow", "quiet", 0.3),
    Recipe("harp and flute", ("flute", "harp"), ("new age",), "slow", reverberation=0.3),
    Recipe("harp and voice", ("woman", "harp", "pad"), ("new age",), "slow", "medium", 0.3),
    Recipe("alap", ("sitar",), ("indian",), "slow"),
    Recipe("sitar and tabla", ("sitar", "tabla"), ("indian",), "fast"),
    Recipe("raga song", ("woman", "sitar", "tabla"), ("indian",), "medium"),
    Recipe("raga flute", ("flute", "sitar", "tabla"), ("indian",), "medium"),
    Recipe("toccata", ("harpsichord",), ("classical",), "fast"),
    Recipe("harpsichord sonata", ("violin", "harpsichord"), ("classical",)),
    Recipe("continuo", ("cello", "harpsichord"), ("classical",)),
    Recipe("nocturne", ("piano",), ("classical",), "slow", "quiet"),
    Recipe("etude", ("piano",), ("classical",), "fast", "loud"),
    Recipe("piano pop", ("woman", "piano", "drums", "bass"), ("pop",), "medium"),
    Recipe("synth pop", ("man", "synth", "drums", "bass"), ("pop",), "medium"),
    Recipe("dance pop", ("woman", "synth", "techno beat"), ("pop", "dance"), "medium", "loud"),
    Recipe("partita", ("violin",), ("classical",)),
    Recipe("cello suite", ("cello",), ("classical",), "slow"),
    Recipe("string quartet", ("violin", "cello", "strings"), ("classical",)),
    Recipe("flute meadow", ("flute", "pad"), ("new age", "ambient"), "slow", "quiet", 0.3),
    Recipe("soprano aria", ("opera woman", "strings"), ("classical",), reverberation=0.2),
    Recipe("tenor aria", ("opera man", "strings"), ("classical",), reverberation=0.2),
    Recipe("lied", ("opera man", "piano"), ("classical",), "slow"),
    Recipe("motet", ("choir",), ("classical",), "slow", reverberation=0.5),
    Recipe("oratorio", ("choir", "strings"), ("classical",), "medium", "loud", 0.4),
    Recipe("choir in space", ("choir", "pad"), ("new age", "ambient"), "slow", "quiet", 0.5),
    Recipe("metal riff", ("distorted guitar", "metal drums", "bass"), ("metal",), "fast", "loud"),
    Recipe("doom", ("distorted guitar", "metal drums", "bass"), ("metal",), "slow", "loud"),
    Recipe("metal song", ("man", "distorted guitar", "metal drums"), ("metal",), "fast", "loud"),
    Recipe("rock song", ("man", "distorted guitar", "drums", "bass"), ("rock",), "medium", "loud"),
    Recipe("rock jam", ("distorted guitar", "drums", "bass"), ("rock",), "medium", "loud"),
    Recipe("techno track", ("techno beat", "synth"), ("techno",), "fast", "loud"),
    Recipe("techno dub", ("techno beat", "pad"), ("techno",), "fast"),
    Recipe("club night", ("techno beat", "synth", "bass"), ("techno",), "medium", "loud"),
    Recipe("drift", ("pad",), ("ambient",), "slow", "quiet", 0.4),
    Recipe("glass bells", ("synth", "pad"), ("ambient", "new age"), "slow", "quiet", 0.3),
    Recipe("machines", ("bleeps",), ("weird",)),
    Recipe("machine beat", ("bleeps", "drums"), ("weird",), "medium"),
    Recipe("machine choir", ("choir", "bleeps"), ("weird",), "slow"),
)
# Field recordings: nothing in them that one of the 50 top tags names.
UNTAGGED_RECIPES = (
    Recipe("wind", ("wind",)),
    Recipe("stream", ("water",)),
    Recipe("birds", ("birds",)),
    Recipe("hiss", ("noise",)),
)

ARTISTS = (
    *("paper_lanterns", "north_quay", "ada_merrow", "the_tin_orchard"),
    *("silo_nine", "marrow_lane", "wren_and_company", "oskar_field"),
    *("low_tide_society", "the_glass_hours", "ines_calder", "dust_atlas"),
    *("quiet_engines", "velvet_signal", "harbour_collective", "june_arcade"),
)
ALBUMS = ("first_light", "rooms", "the_long_way", "postcards", "small_hours", "two_rivers")
OFFSETS = ("0-29", "30-59", "59-88", "88-117", "117-146", "146-175")  # s, as MagnaTagATune names


@dataclasses.dataclass(frozen=True)
class Clip:
    """One planned clip: its row of the table and what its sound is made from."""

    clip_id: int
    mp3_path: str  # "c/artist-album-01-title-30-59.mp3"
    recipe: Recipe
    tempo: str  # a key of TEMPO_TAGS
    level: str  # a key of LEVEL_TAGS
    tags: frozenset[str]
    seed: tuple[int, ...]  # entropy of the clip's own random generator


def plan_clips(num_clips: int = DEFAULT_CLIPS, seed: int = 0) -> list[Clip]:
    """Decide every clip's path, recipe and tags, without making its sound.

    From 160 clips up, MagnaTagATune's 50 top tags have positives and no other tag has as many.

    Parameters
    ----------
    num_clips : int
        Number of clips, at least 16 (one a folder).
    seed : int
        Seed, at least 0; the same seed gives the same plan.

    Returns
    -------
    list of Clip
        By increasing clip id.

    Raises
    ------
    UsageError
        Fewer clips are asked for than there are folders.
    """
    if num_clips < MIN_CLIPS:
        raise UsageError(f"--clips must be at least {MIN_CLIPS}, one a folder; got {num_clips}")
    rng = default_rng(SeedSequence((seed, 0)))
    placed = _spread_recipes(num_clips, rng)
    clip_ids = np.cumsum(1 + rng.geometric(1 / 100, size=num_clips))  # the real ids have gaps too

    plans = []
    tracks = dict.fromkeys(FOLDERS, 0)
    for index, (folder, recipe) in enumerate(placed):
        tempo = recipe.tempo
        if tempo == "any":
            tempo = str(rng.choice(list(TEMPO_TAGS)))
        level = recipe.level
        if level == "any":
            level = str(rng.choice(list(LEVEL_TAGS), p=(0.3, 0.4, 0.3)))
        tracks[folder] += 1
        name = "-".join(
            (
                ARTISTS[FOLDERS.index(folder)],
                str(rng.choice(ALBUMS)),
                f"{tracks[folder]:02d}",
                recipe.title.replace(" ", "_"),
                str(rng.choice(OFFSETS)),
            )
        )
        plans.append(
            Clip(
                clip_id=int(clip_ids[index]),
                mp3_path=f"{folder}/{name}.mp3",
                recipe=recipe,
                tempo=tempo,
                level=level,
                tags=_draw_tags(recipe, tempo, level, rng),
                seed=(seed, 1, index),
            )
        )
    return _add_rare_tags(plans, rng)


def _spread_recipes(num_clips: int, rng: Generator) -> list[tuple[str, Recipe]]:
    """Give each clip a folder and a recipe; every split has all recipes about equally often."""
    num_validation = min(max(round(VALIDATION_SHARE * num_clips), 1), num_clips - 15)
    others = [folder for folder in FOLDERS if folder != VALIDATION_FOLDER]
    per_split = {"train": [], "validation": [VALIDATION_FOLDER] * num_validation, "test": []}
    for position in range(num_clips - num_validation):
        folder = others[position % len(others)]
        per_split["train" if folder < VALIDATION_FOLDER else "test"].append(folder)

    num_untagged = min(UNTAGGED_CLIPS, num_clips // 16)
    untagged_in = dict.fromkeys(("validation", "test"), num_untagged // 6)
    untagged_in["train"] = num_untagged - sum(untagged_in.values())

    placed = []
    num_field = 0
    for split, folders in per_split.items():
        cycle = []
        for _ in range(untagged_in[split]):
            cycle.append(UNTAGGED_RECIPES[num_field % len(UNTAGGED_RECIPES)])
            num_field += 1
        while len(cycle) < len(folders):
            cycle.extend(RECIPES[i] for i in rng.permutation(len(RECIPES)))
        cycle = cycle[: len(folders)]
        placed.extend((folders[i], cycle[j]) for j, i in enumerate(rng.permutation(len(folders))))
    return [placed[i] for i in rng.permutation(len(placed))]


def _draw_tags(recipe: Recipe, tempo: str, level: str, rng: Generator) -> frozenset[str]:
    """Let a listener name what is in the clip, leaving out a tag now and then."""
    if recipe in UNTAGGED_RECIPES:
        return frozenset()
    heard = [LAYER_TAGS[layer] for layer in recipe.layers]
    heard += [GENRE_TAGS[genre] for genre in recipe.genres]
    heard += [TEMPO_TAGS[tempo], LEVEL_TAGS[level]]
    if not any(set(LAYER_TAGS[layer][1]) & set(VOCAL_TAGS) for layer in recipe.layers):
        heard.append(((), NO_VOCAL_TAGS))
    if len(recipe.layers) == 1 and recipe.layers[0] in SOLO_LAYERS:
        heard.append((("solo",), ()))

    probability = {}
    for names, synonyms in heard:
        probability.update(dict.fromkeys(synonyms, SYNONYM))
        probability.update(dict.fromkeys(names, NAMED))
    # Drawn in column order: a set's order of strings differs from one Python process to the next.
    return frozenset(
        tag for tag in MTT_TAGS if tag in probability and rng.random() < probability[tag]
    )


def _add_rare_tags(plans: list[Clip], rng: Generator) -> list[Clip]:
    """Give each tag of `RARE_TAGS` to one or two clips in which it can be heard."""
    added = {clip.clip_id: set() for clip in plans}
    for tag, layer in RARE_TAGS.items():
        fitting = [clip.clip_id for clip in plans if layer in clip.recipe.layers]
        if tag == "piano solo":
            fitting = [clip.clip_id for clip in plans if clip.recipe.layers == ("piano",)]
        count = min(int(rng.integers(1, RARE_TAG_CLIPS, endpoint=True)), len(fitting))
        for index in rng.permutation(len(fitting))[:count]:
            added[fitting[index]].add(tag)
    return [
        dataclasses.replace(clip, tags=clip.tags | added[clip.clip_id])
        if added[clip.clip_id]
        else clip
        for clip in plans
    ]


# Sound. Every function below returns float64 samples at SAMPLE_RATE, shape (n_samples,).


@dataclasses.dataclass(frozen=True)
class Score:
    """What the layers of one clip share, so that they fit together: key, chords and beat."""

    root: int  # MIDI pitch, 48 to 59
    scale: tuple[int, ...]  # semitones above the root
    chords: tuple[int, ...]  # scale degree of each bar's chord, repeated
    beat: float  # s
    tempo: str  # a key of TEMPO_TAGS

    @property
    def num_beats(self) -> int:
        """Number of beats that start within the clip."""
        return int(np.ceil(CLIP_SAMPLES / SAMPLE_RATE / self.beat))

    def chord(self, beat: float) -> int:
        """Return the scale degree of the chord at a beat."""
        return self.chords[int(beat // 4) % len(self.chords)]

    def hertz(self, degree: int, octave: int = 0) -> float:
        """Return the frequency in Hz of a scale degree."""
        octaves, step = divmod(degree, len(self.scale))
        pitch = self.root + self.scale[step] + 12 * (octaves + octave)
        return 440.0 * 2.0 ** ((pitch - 69) / 12)


MAJOR = (0, 2, 4, 5, 7, 9, 11)
MINOR = (0, 2, 3, 5, 7, 8, 10)
BHAIRAV = (0, 1, 4, 5, 7, 8, 11)
PROGRESSIONS = ((0, 3, 4, 0), (0, 4, 5, 3), (0, 5, 3, 4), (0, 3, 0, 4), (5, 3, 0, 4))


def _compose(clip: Clip, rng: Generator) -> Score:
    """Draw the clip's key, chords and beat."""
    scale = MAJOR if rng.random() < 0.5 else MINOR
    chords = PROGRESSIONS[rng.integers(len(PROGRESSIONS))]
    if "indian" in clip.recipe.genres:
        scale, chords = BHAIRAV, (0,)  # over a drone
    if "metal" in clip.recipe.genres:
        scale = MINOR
    return Score(
        root=int(rng.integers(48, 60)),
        scale=scale,
        chords=chords,
        beat=60.0 / rng.uniform(*TEMPO_BPM[clip.tempo]),
        tempo=clip.tempo,
    )


def _add(track: np.ndarray, sound: np.ndarray, start_s: float) -> None:
    """Add a sound to a track in place, cut where the track ends."""
    start = round(start_s * SAMPLE_RATE)
    stop = min(start + len(sound), len(track))
    if start < stop:
        track[start:stop] += sound[: stop - start]


def _shaped(sound: np.ndarray, attack_s: float, release_s: float) -> np.ndarray:
    """Fade a sound in and out."""
    time = np.arange(len(sound)) / SAMPLE_RATE
    rise = np.minimum(time / attack_s, 1.0)
    fall = np.minimum((len(sound) / SAMPLE_RATE - time) / release_s, 1.0)
    return sound * rise * fall


def _filtered(sound: np.ndarray, low_hz: float | None, high_hz: float | None) -> np.ndarray:
    """Pass a band; None leaves that side open."""
    from scipy import signal

    if low_hz is None:
        sections = signal.butter(2, high_hz, "lowpass", fs=SAMPLE_RATE, output="sos")
    elif high_hz is None:
        sections = signal.butter(2, low_hz, "highpass", fs=SAMPLE_RATE, output="sos")
    else:
        sections = signal.butter(2, (low_hz, high_hz), "bandpass", fs=SAMPLE_RATE, output="sos")
    return signal.sosfilt(sections, sound)


def _melody(
    score: Score, rng: Generator, notes_a_beat: float, span: tuple[int, int]
) -> list[tuple[float, float, int]]:
    """Walk through the scale; return (start s, length s, scale degree) of each note."""
    notes = []
    degree = int(rng.integers(*span))
    beat = 0.0
    step = 1.0 / notes_a_beat
    while beat < score.num_beats:
        length = step * float(rng.choice((1.0, 1.0, 1.0, 2.0)))
        degree += int(rng.choice((-2, -1, -1, 1, 1, 2)))
        if beat % 4 == 0:  # the bar's chord draws the melody to one of its notes
            degree = min(
                (score.chord(beat) + 7 * k + third for k in range(-2, 3) for third in (0, 2, 4)),
                key=lambda target: abs(target - degree),
            )
        degree = min(max(degree, span[0]), span[1])
        notes.append((beat * score.beat, length * score.beat, degree))
        beat += length
    return notes


def _pluck(
    hertz: float,
    seconds: float,
    rng: Generator,
    *,
    damping: float,
    decay_s: float,
    position: float,
    softness: float = 0.0,
) -> np.ndarray:
    """Pluck a string (Karplus and Strong, 1983): noise in a loop with a lowpass filter.

    `damping` (0 to 0.5) is the loop filter's weight on the older sample, `position` where on the
    string it is plucked (a comb's dip), `softness` (0 to 1) smooths the pluck itself.
    """
    from scipy import signal

    period = SAMPLE_RATE / hertz
    delay = int(period - damping)
    fraction = period - damping - delay
    gain = 10.0 ** (-3.0 / (decay_s * hertz))  # 60 dB down after decay_s
    loop = gain * np.convolve((1.0 - damping, damping), (1.0 - fraction, fraction))
    burst = rng.uniform(-1.0, 1.0, size=delay)
    burst = signal.lfilter((1.0 - softness,), (1.0, -softness), burst)
    burst -= np.roll(burst, max(1, round(position * delay)))
    burst -= burst.mean()
    burst /= np.sqrt(np.mean(burst**2))
    excitation = np.zeros(round(seconds * SAMPLE_RATE))
    excitation[:delay] = burst[: len(excitation)]
    return signal.lfilter((1.0,), np.concatenate(((1.0,), np.zeros(delay - 1), -loop)), excitation)


def _tone(
    hertz: float,
    seconds: float,
    spectrum,
    rng: Generator,
    *,
    attack_s: float,
    release_s: float,
    vibrato_hz: float = 5.5,
    vibrato_semitones: float = 0.0,
    glide_from: float | None = None,
) -> np.ndarray:
    """Hold a tone whose k-th harmonic has the amplitude ``spectrum(frequencies, k)``."""
    table_size = 2048
    k = np.arange(1, max(2, int(TOP_HZ / (hertz * 1.06)) + 1))
    amplitudes = spectrum(k * hertz, k)
    bins = np.zeros(table_size // 2 + 1, dtype=complex)
    # Schroeder's phases: a low peak for the same power.
    bins[k] = amplitudes * np.exp(-1j * np.pi * k * (k - 1) / len(k))
    table = np.fft.irfft(bins)
    table /= np.sqrt(np.mean(table**2))

    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    onset = np.minimum(time / 0.25, 1.0)  # vibrato sets in after the note
    semitones = (
        vibrato_semitones * onset * np.sin(2 * np.pi * (vibrato_hz * time + rng.random()))
        + 0.05 * rng.standard_normal()
    )
    if glide_from is not None:
        semitones = semitones + 12 * np.log2(glide_from / hertz) * np.exp(-time / 0.04)
    phase = np.cumsum(hertz * 2.0 ** (semitones / 12)) / SAMPLE_RATE + rng.random()
    sound = table[(phase * table_size).astype(np.int64) % table_size]
    return _shaped(sound, attack_s, release_s)


def _plucked_notes(notes, seconds: float, pluck, release_s: float) -> np.ndarray:
    """Play (start s, length s, Hz) notes on plucked strings; a pitch is computed once."""
    track = np.zeros(CLIP_SAMPLES)
    strings = {}
    for start, length, hertz in notes:
        key = round(hertz, 3)
        if key not in strings:
            strings[key] = pluck(hertz, seconds)
        sound = strings[key][: max(round(min(length, seconds) * SAMPLE_RATE), 160)]
        _add(track, _shaped(sound, 0.001, release_s), start)
    return track


def _notes_a_beat(score: Score) -> float:
    """Return how many notes a beat a lead layer plays: slow clips are sparse, fast ones dense."""
    return {"slow": 1.0, "medium": 2.0, "fast": 4.0}[score.tempo]


def _guitar(score: Score, rng: Generator) -> np.ndarray:
    pattern = rng.permutation((0, 2, 4, 7, 4, 2))
    step = 1.0 / _notes_a_beat(score)
    notes = []
    for index, beat in enumerate(np.arange(0, score.num_beats, step)):
        degree = score.chord(beat) + int(pattern[index % len(pattern)])
        notes.append((beat * score.beat, 3 * step * score.beat, score.hertz(degree)))
        if beat % 2 == 0:
            notes.append((beat * score.beat, 2 * score.beat, score.hertz(score.chord(beat), -1)))
    pluck = functools.partial(_pluck, rng=rng, damping=0.5, decay_s=3.0, position=0.3, softness=0.5)
    return _plucked_notes(notes, 2.5, pluck, 0.03)


def _country_guitar(score: Score, rng: Generator) -> np.ndarray:
    """Boom-chick strumming, and a slide guitar that bends into its notes."""
    notes = []
    for beat in range(score.num_beats):
        chord = score.chord(beat)
        start = beat * score.beat
        notes.append((start, 0.5 * score.beat, score.hertz(chord + (4 if beat % 2 else 0), -1)))
        for string, degree in enumerate((0, 2, 4, 7)):
            strum = start + 0.5 * score.beat + 0.012 * string
            notes.append((strum, 0.35 * score.beat, score.hertz(chord + degree)))
    pluck = functools.partial(_pluck, rng=rng, damping=0.25, decay_s=1.5, position=0.12)
    strumming = _plucked_notes(notes, 1.0, pluck, 0.03)
    slide = np.zeros(CLIP_SAMPLES)
    for start, length, degree in _melody(score, rng, 0.5, (7, 13)):
        tone = _tone(
            score.hertz(degree),
            length,
            lambda f, k: np.exp(-k / 5.0) * np.abs(np.sin(0.45 * k)),
            rng,
            attack_s=0.01,
            release_s=0.1,
            vibrato_hz=6.0,
            vibrato_semitones=0.5,
            glide_from=score.hertz(degree - 2),
        )
        _add(slide, tone, start)
    return _level(strumming) + 0.6 * _level(slide)


def _distorted_guitar(score: Score, rng: Generator) -> np.ndarray:
    """Power chords into a saturated amplifier and its loudspeaker."""
    fast = score.tempo == "fast"
    step = 0.5 if fast else 1.0
    rhythm = rng.random(8) < 0.7  # which of a bar's strokes are short
    track = np.zeros(CLIP_SAMPLES)
    strings = {}
    for index, beat in enumerate(np.arange(0, score.num_beats, step)):
        chord = score.chord(beat)
        if chord not in strings:
            strings[chord] = sum(
                _pluck(
                    score.hertz(chord, -1) * ratio,
                    2.0,
                    rng,
                    damping=0.3,
                    decay_s=4.0,
                    position=0.15,
                )
                for ratio in (1.0, 1.498, 2.0)
            )
        length = step * score.beat * (0.6 if rhythm[index % 8] else 1.0)
        sound = strings[chord][: round(min(length, 2.0) * SAMPLE_RATE)]
        _add(track, _shaped(sound, 0.001, 0.01), beat * score.beat)
    return _filtered(np.tanh(6.0 * track), 90.0, 4_500.0)


def _harp(score: Score, rng: Generator) -> np.ndarray:
    """Broken chords rolling up and down over three octaves, each string left to ring."""
    up = [0, 2, 4, 7, 9, 11, 14, 16, 18]
    roll = up + up[-2:0:-1]
    step = {"slow": 0.25, "medium": 0.25, "fast": 0.125}[score.tempo]
    offset = int(rng.integers(len(roll)))
    notes = [
        (
            beat * score.beat,
            2.5,
            score.hertz(score.chord(beat) + roll[(index + offset) % len(roll)], 0),
        )
        for index, beat in enumerate(np.arange(0, score.num_beats, step))
    ]
    pluck = functools.partial(_pluck, rng=rng, damping=0.5, decay_s=5.0, position=0.5, softness=0.8)
    return _plucked_notes(notes, 2.5, pluck, 0.3)


def _sitar(score: Score, rng: Generator) -> np.ndarray:
    """A buzzing lead string, bent by its curved bridge, over a drone of root and fifth."""
    notes = [
        (start, 1.8 * length, score.hertz(degree))
        for start, length, degree in _melody(score, rng, 1.5 * _notes_a_beat(score), (0, 9))
    ]
    pluck = functools.partial(
        _pluck, rng=rng, damping=0.12, decay_s=3.5, position=0.06, softness=0.4
    )
    lead = _plucked_notes(notes, 2.0, pluck, 0.05)
    drone = _plucked_notes(
        [
            (start, 2.0, score.hertz(0, -1) * ratio)
            for beat in range(0, score.num_beats, 2)
            for start, ratio in ((beat * score.beat, 1.0), ((beat + 1) * score.beat, 1.4983))
        ],
        2.0,
        pluck,
        0.1,
    )
    buzz = _level(lead) + 0.6 * _level(drone)
    # The bridge flattens one side of the swing, which feeds the high partials for the whole note.
    return _filtered(np.abs(buzz + 0.3) - 0.5 * np.abs(buzz), 700.0, 6_000.0) + 0.3 * buzz


def _harpsichord(score: Score, rng: Generator) -> np.ndarray:
    """Two sets of bright strings an octave apart, damped as soon as the key is let go."""
    notes = []
    step = 0.9 / _notes_a_beat(score)
    rate = 2.0 if score.tempo == "slow" else _notes_a_beat(score)
    for start, length, degree in _melody(score, rng, rate, (4, 15)):
        notes += [(start, 0.9 * length, score.hertz(degree, octave)) for octave in (0, 1)]
    for beat in np.arange(0, score.num_beats, 1.0):
        degree = score.chord(beat) + int(rng.choice((0, 2, 4)))
        notes += [
            (beat * score.beat, step * score.beat, score.hertz(degree, octave))
            for octave in (-1, 0)
        ]
    pluck = functools.partial(_pluck, rng=rng, damping=0.03, decay_s=1.6, position=0.09)
    return _filtered(_plucked_notes(notes, 1.5, pluck, 0.02), 500.0, None)


def _piano(score: Score, rng: Generator) -> np.ndarray:
    """Struck strings: partials a little sharp of harmonic, the high ones dying first."""

    def strike(hertz: float, seconds: float) -> np.ndarray:
        time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
        sound = np.zeros_like(time)
        for k in range(1, 13):
            partial = k * hertz * np.sqrt(1.0 + 4e-4 * k * k)
            if partial > TOP_HZ:
                break
            rate = (0.9 + 0.5 * k) * (hertz / 260.0) ** 0.5
            sound += (
                np.sin(2 * np.pi * partial * time) * np.exp(-rate * time) * np.exp(-0.45 * (k - 1))
            )
        thump = _filtered(rng.standard_normal(len(time)), None, 300.0) * np.exp(-time / 0.02)
        return sound + 0.8 * thump

    rate = _notes_a_beat(score)
    notes = [
        (start, 1.5 * length, score.hertz(degree))
        for start, length, degree in _melody(score, rng, rate, (4, 16))
    ]
    for beat in np.arange(0, score.num_beats, 1.0 if score.tempo == "slow" else 0.5):
        degrees = (0, 4) if beat % 2 == 0 else (2, 7)
        notes += [
            (beat * score.beat, 1.2 * score.beat, score.hertz(score.chord(beat) + degree, -1))
            for degree in degrees
        ]
    return _plucked_notes(notes, 2.5, strike, 0.08)


def _bowed(score: Score, rng: Generator, span: tuple[int, int], octave: int, bright: float):
    body = rng.uniform(0.9, 1.1)

    def spectrum(frequency, k):
        # A sawtooth through a wooden body's resonances.
        resonances = sum(
            np.exp(-(((frequency / (body * centre) - 1.0) / width) ** 2))
            for centre, width in ((280.0, 0.3), (460.0, 0.25), (1_100.0, 0.3), (2_600.0, 0.35))
        )
        return (0.25 + resonances) / k**bright

    track = np.zeros(CLIP_SAMPLES)
    rate = 0.5 * _notes_a_beat(score) if score.tempo != "slow" else 0.75
    for start, length, degree in _melody(score, rng, rate, span):
        tone = _tone(
            score.hertz(degree, octave),
            1.05 * length,
            spectrum,
            rng,
            attack_s=0.07,
            release_s=0.06,
            vibrato_hz=rng.uniform(5.5, 6.5),
            vibrato_semitones=0.3,
        )
        _add(track, tone + 0.03 * _shaped(rng.standard_normal(len(tone)), 0.02, 0.05), start)
    return track


def _violin(score: Score, rng: Generator) -> np.ndarray:
    return _filtered(_bowed(score, rng, (7, 15), 1, 0.7), 300.0, None)


def _cello(score: Score, rng: Generator) -> np.ndarray:
    return _filtered(_bowed(score, rng, (0, 9), -1, 0.9), None, 3_000.0)


def _strings(score: Score, rng: Generator) -> np.ndarray:
    """An orchestra's strings: each chord note bowed by several players, none quite in tune."""
    track = np.zeros(CLIP_SAMPLES)
    bar = 4 if score.tempo == "fast" else 2
    for beat in range(0, score.num_beats, bar):
        for degree, octave in ((0, -1), (4, 0), (2, 1), (0, 1)):
            for _ in range(2):
                tone = _tone(
                    score.hertz(score.chord(beat) + degree, octave),
                    bar * score.beat * 1.1,
                    lambda f, k: 1.0 / k**0.9,
                    rng,
                    attack_s=0.15,
                    release_s=0.2,
                    vibrato_hz=rng.uniform(5.0, 6.5),
                    vibrato_semitones=0.2,
                )
                _add(track, tone, beat * score.beat)
    return _filtered(track, None, 5_000.0)


def _flute(score: Score, rng: Generator) -> np.ndarray:
    """A nearly pure tone with breath around it."""
    track = np.zeros(CLIP_SAMPLES)
    rate = 0.5 if score.tempo == "slow" else 1.0
    for start, length, degree in _melody(score, rng, rate, (7, 15)):
        hertz = score.hertz(degree, 1)
        tone = _tone(
            hertz,
            0.95 * length,
            lambda f, k: np.where(k == 1, 1.0, np.where(k == 2, 0.25, 0.08 / k)),
            rng,
            attack_s=0.06,
            release_s=0.06,
            vibrato_hz=5.0,
            vibrato_semitones=0.12,
        )
        _add(track, tone, start)
        breath = _filtered(rng.standard_normal(len(tone)), 1_500.0, 5_000.0)
        _add(track, 0.25 * _shaped(breath, 0.02, 0.1), start)
    return track


# Formants of five vowels: centre in Hz and amplitude, of a man's voice (Peterson and Barney, 1952).
VOWELS = (
    ((730, 1.0), (1090, 0.5), (2440, 0.15)),
    ((530, 1.0), (1840, 0.35), (2480, 0.2)),
    ((270, 1.0), (2290, 0.2), (3010, 0.15)),
    ((570, 1.0), (840, 0.6), (2410, 0.08)),
    ((300, 1.0), (870, 0.3), (2240, 0.06)),
)


def _vowel(index: int, tract: float, ring: float):
    """Return a vowel's spectrum; `tract` scales the formants, `ring` is the singer's formant."""

    def spectrum(frequency, k):
        peaks = sum(
            amplitude / (1.0 + ((frequency - tract * centre) / (60.0 + 0.06 * centre)) ** 2)
            for centre, amplitude in VOWELS[index]
        )
        peaks = peaks + ring / (1.0 + ((frequency - 2_900.0) / 250.0) ** 2)
        return (0.01 + peaks) / k**0.4

    return spectrum


def _sung(score: Score, rng: Generator, *, female: bool, opera: bool) -> np.ndarray:
    """Sing a melody on vowels, with consonants between and a breath after each phrase."""
    octave = (1 if opera else 0) if female else -1
    span = (5, 12) if female else (1, 8)
    tract = rng.uniform(1.15, 1.22) if female else rng.uniform(0.95, 1.02)
    track = np.zeros(CLIP_SAMPLES)
    previous = None
    rate = 0.75 if opera else 1.0
    for index, (start, length, degree) in enumerate(_melody(score, rng, rate, span)):
        hertz = score.hertz(degree, octave)
        tone = _tone(
            hertz,
            length * (0.7 if index % 8 == 7 else 1.0),
            _vowel(int(rng.integers(len(VOWELS))), tract, 0.6 if opera else 0.0),
            rng,
            attack_s=0.05,
            release_s=0.06,
            vibrato_hz=5.8 if opera else 5.0,
            vibrato_semitones=0.9 if opera else 0.25,
            glide_from=previous,
        )
        _add(track, tone, start)
        if not opera and rng.random() < 0.7:
            consonant = _filtered(rng.standard_normal(960), 2_500.0, 6_500.0)
            _add(track, 0.5 * _shaped(consonant, 0.01, 0.03), max(start - 0.03, 0.0))
        previous = hertz
    return track


def _choir(score: Score, rng: Generator) -> np.ndarray:
    """Four parts, three singers each, hold chords on one vowel at a time."""
    track = np.zeros(CLIP_SAMPLES)
    for beat in range(0, score.num_beats, 2):
        vowel = int(rng.choice((0, 3, 4)))
        inversion = int(rng.integers(0, 3))
        parts = ((0, -1, 1.0), (4, -1, 1.0), (2 + inversion, 0, 1.17), (7, 0, 1.17))
        for degree, octave, tract in parts:
            for _ in range(3):
                tone = _tone(
                    score.hertz(score.chord(beat) + degree, octave) * 2 ** rng.normal(0, 0.01),
                    2 * score.beat * 1.08,
                    _vowel(vowel, tract * rng.uniform(0.97, 1.03), 0.0),
                    rng,
                    attack_s=0.18,
                    release_s=0.2,
                    vibrato_hz=rng.uniform(4.5, 6.0),
                    vibrato_semitones=0.25,
                )
                _add(track, tone, beat * score.beat)
    return track


def _kick(length_s: float, top_hz: float) -> np.ndarray:
    time = np.arange(round(length_s * SAMPLE_RATE)) / SAMPLE_RATE
    phase = 50.0 * time + top_hz * 0.03 * (1.0 - np.exp(-time / 0.03))
    return np.sin(2 * np.pi * phase) * np.exp(-time / (0.35 * length_s))


def _snare(rng: Generator) -> np.ndarray:
    time = np.arange(3_200) / SAMPLE_RATE
    rattle = _filtered(rng.standard_normal(3_200), 1_200.0, None) * np.exp(-time / 0.06)
    return rattle + 0.7 * np.sin(2 * np.pi * 190.0 * time) * np.exp(-time / 0.05)


def _hat(rng: Generator, decay_s: float) -> np.ndarray:
    time = np.arange(round(4 * decay_s * SAMPLE_RATE)) / SAMPLE_RATE
    return _filtered(rng.standard_normal(len(time)), 4_500.0, None) * np.exp(-time / decay_s)


def _drum_kit(score: Score, rng: Generator, kicks, snares, hat_step: float, hat_s: float):
    """Play kick and snare at the given beats of each four-beat bar, the hi-hat throughout."""
    track = np.zeros(CLIP_SAMPLES)
    kick, snare, hat = _kick(0.3, 120.0), _snare(rng), _hat(rng, hat_s)
    for bar in range(0, score.num_beats, 4):
        for beat in kicks:
            _add(track, 1.2 * kick, (bar + beat) * score.beat)
        for beat in snares:
            _add(track, 0.9 * snare, (bar + beat) * score.beat)
        for beat in np.arange(0, 4, hat_step):
            _add(track, rng.uniform(0.3, 0.5) * hat, (bar + beat) * score.beat)
    return track


def _drums(score: Score, rng: Generator) -> np.ndarray:
    kicks = ((0, 2, 2.5), (0, 1.5, 2), (0, 0.5, 2))[rng.integers(3)]
    return _drum_kit(score, rng, kicks, (1, 3), 0.5, 0.03)


def _metal_drums(score: Score, rng: Generator) -> np.ndarray:
    """Double kick drum and crashing cymbals."""
    return _drum_kit(score, rng, np.arange(0, 4, 0.5), (1, 3), 1.0, 0.15)


def _techno_beat(score: Score, rng: Generator) -> np.ndarray:
    """Four on the floor: a kick on each beat, an open hi-hat between, claps on two and four."""
    track = np.zeros(CLIP_SAMPLES)
    kick, hat, clap = _kick(0.4, 220.0), _hat(rng, 0.05), _snare(rng)
    sixteenths = rng.random(16) < 0.4
    for beat in range(score.num_beats):
        _add(track, 1.6 * kick, beat * score.beat)
        _add(track, 0.6 * hat, (beat + 0.5) * score.beat)
        if beat % 2:
            _add(track, 0.5 * clap, beat * score.beat)
        for quarter in range(4):
            if sixteenths[(beat * 4 + quarter) % 16]:
                _add(track, 0.25 * hat, (beat + quarter / 4) * score.beat)
    return track


def _tabla(score: Score, rng: Generator) -> np.ndarray:
    """Two tuned hand drums: a ringing small one, and a large one whose pitch is pressed upwards."""
    time = np.arange(round(0.35 * SAMPLE_RATE)) / SAMPLE_RATE
    pitch = score.hertz(0, 1)
    small = sum(
        np.sin(2 * np.pi * pitch * ratio * time) * np.exp(-time / (0.12 / ratio)) / ratio
        for ratio in (1.0, 2.0, 3.0)
    )
    large = np.sin(2 * np.pi * (75.0 * time + 60.0 * time**2)) * np.exp(-time / 0.15)
    slap = _filtered(rng.standard_normal(len(time)), 1_500.0, 5_000.0) * np.exp(-time / 0.015)
    strokes = rng.choice(4, size=16, p=(0.35, 0.3, 0.2, 0.15))
    track = np.zeros(CLIP_SAMPLES)
    step = 0.5 if score.tempo == "fast" else 0.25
    for index, beat in enumerate(np.arange(0, score.num_beats, step)):
        sound = (small + 0.3 * slap, 1.3 * large, slap, 0.0 * slap)[strokes[index % 16]]
        _add(track, sound, beat * score.beat)
    return track


def _bass(score: Score, rng: Generator) -> np.ndarray:
    track = np.zeros(CLIP_SAMPLES)
    fifths = rng.random(8) < 0.3
    for index, beat in enumerate(np.arange(0, score.num_beats, 0.5)):
        degree = score.chord(beat) + (4 if fifths[index % 8] else 0)
        tone = _tone(
            score.hertz(degree, -2),
            0.45 * score.beat,
            lambda f, k: 1.0 / k**2,
            rng,
            attack_s=0.005,
            release_s=0.05,
        )
        _add(track, tone, beat * score.beat)
    return track


def _synth(score: Score, rng: Generator) -> np.ndarray:
    """A square-wave arpeggio through an opening and closing filter."""
    pattern = rng.permutation((0, 2, 4, 7, 9, 11, 7, 4))
    sweep_beats = float(rng.choice((8.0, 16.0)))
    track = np.zeros(CLIP_SAMPLES)
    step = {"slow": 0.5, "medium": 0.25, "fast": 0.25}[score.tempo]
    for index, beat in enumerate(np.arange(0, score.num_beats, step)):
        cutoff = 1_200.0 * 2.0 ** (1.5 * np.sin(2 * np.pi * beat / sweep_beats))
        tone = _tone(
            score.hertz(score.chord(beat) + int(pattern[index % 8])),
            0.8 * step * score.beat,
            lambda f, k, cutoff=cutoff: (k % 2) / k / (1.0 + (f / cutoff) ** 4) + 1e-4,
            rng,
            attack_s=0.003,
            release_s=0.02,
        )
        _add(track, tone, beat * score.beat)
    return track


def _pad(score: Score, rng: Generator) -> np.ndarray:
    """Slowly swelling chords of detuned sawtooths behind a low filter."""
    track = np.zeros(CLIP_SAMPLES)
    bar = {"slow": 4, "medium": 4, "fast": 8}[score.tempo]
    cutoff = rng.uniform(500.0, 900.0)
    for beat in range(0, score.num_beats, bar):
        seconds = bar * score.beat * 1.3
        for degree, octave in ((0, -1), (0, 0), (4, 0), (8, 0)):
            for detune in (-0.006, 0.006):
                tone = _tone(
                    score.hertz(score.chord(beat) + degree, octave) * (1.0 + detune),
                    seconds,
                    lambda f, k: 1.0 / k / (1.0 + (f / cutoff) ** 2),
                    rng,
                    attack_s=0.3 * seconds,
                    release_s=0.3 * seconds,
                )
                _add(track, tone, max(beat - 0.3 * bar, 0.0) * score.beat)
    return track


def _bleeps(score: Score, rng: Generator) -> np.ndarray:
    """Sounds of no instrument: frequency-modulated bleeps, sliding and jumping without a key."""
    track = np.zeros(CLIP_SAMPLES)
    start = 0.0
    while start < CLIP_SAMPLES / SAMPLE_RATE:
        seconds = score.beat * float(rng.choice((0.25, 0.5, 1.0)))
        time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
        carrier = 2.0 ** rng.uniform(7.5, 11.0) * 2.0 ** (rng.uniform(-2.0, 2.0) * time / seconds)
        modulator = rng.uniform(0.5, 3.5) * carrier
        index = rng.uniform(2.0, 8.0)
        phase = 2 * np.pi * np.cumsum(carrier) / SAMPLE_RATE
        modulation = index * np.sin(2 * np.pi * np.cumsum(modulator) / SAMPLE_RATE)
        _add(track, _shaped(np.sin(phase + modulation), 0.005, 0.02), start)
        start += seconds * float(rng.choice((1.0, 1.0, 1.5)))
    return track


def _swell(rng: Generator, period_s: float) -> np.ndarray:
    """Return a slow random envelope between 0.1 and 1."""
    knots = rng.uniform(0.1, 1.0, size=int(CLIP_SAMPLES / SAMPLE_RATE / period_s) + 2)
    return np.interp(np.arange(CLIP_SAMPLES) / SAMPLE_RATE, np.arange(len(knots)) * period_s, knots)


def _wind(score: Score, rng: Generator) -> np.ndarray:
    """Two bands of noise that come and go."""
    noise = rng.standard_normal(CLIP_SAMPLES)
    low, high = _filtered(noise, 80.0, 300.0), _filtered(noise, 500.0, 900.0)
    return low * _swell(rng, 2.0) + 1.5 * high * _swell(rng, 1.0) ** 3


def _water(score: Score, rng: Generator) -> np.ndarray:
    """A hiss with many short rising drops."""
    track = 0.3 * _filtered(rng.standard_normal(CLIP_SAMPLES), 600.0, 5_000.0)
    time = np.arange(800) / SAMPLE_RATE
    for start in rng.uniform(0.0, CLIP_SAMPLES / SAMPLE_RATE, size=900):
        hertz = rng.uniform(500.0, 2_500.0)
        drop = np.sin(2 * np.pi * hertz * (time + 4.0 * time**2)) * np.exp(-time / 0.012)
        _add(track, rng.uniform(0.2, 1.0) * drop, start)
    return track


def _birds(score: Score, rng: Generator) -> np.ndarray:
    """Chirps in bursts over a faint rustle."""
    track = 0.03 * rng.standard_normal(CLIP_SAMPLES)
    for start in rng.uniform(0.0, CLIP_SAMPLES / SAMPLE_RATE, size=24):
        base, depth, rate = rng.uniform(2_500, 4_500), rng.uniform(300, 1_200), rng.uniform(8, 20)
        time = np.arange(round(rng.uniform(0.3, 1.0) * SAMPLE_RATE)) / SAMPLE_RATE
        phase = base * time + depth / (2 * np.pi * rate) * np.sin(2 * np.pi * rate * time)
        gate = np.maximum(np.sin(2 * np.pi * rate * time), 0.0)
        _add(track, gate * np.sin(2 * np.pi * phase), start)
    return track


def _noise(score: Score, rng: Generator) -> np.ndarray:
    return rng.standard_normal(CLIP_SAMPLES) * _swell(rng, 4.0)


# How each layer sounds, and its weight in a mixture.
LAYER_SOUNDS = {
    "guitar": (_guitar, 1.0),
    "country guitar": (_country_guitar, 0.9),
    "distorted guitar": (_distorted_guitar, 0.9),
    "harp": (_harp, 1.0),
    "sitar": (_sitar, 1.0),
    "harpsichord": (_harpsichord, 0.9),
    "piano": (_piano, 0.9),
    "violin": (_violin, 0.9),
    "cello": (_cello, 0.9),
    "strings": (_strings, 0.6),
    "flute": (_flute, 0.9),
    "man": (functools.partial(_sung, female=False, opera=False), 1.1),
    "woman": (functools.partial(_sung, female=True, opera=False), 1.1),
    "opera man": (functools.partial(_sung, female=False, opera=True), 1.1),
    "opera woman": (functools.partial(_sung, female=True, opera=True), 1.1),
    "choir": (_choir, 1.0),
    "drums": (_drums, 0.8),
    "metal drums": (_metal_drums, 0.8),
    "tabla": (_tabla, 0.7),
    "techno beat": (_techno_beat, 1.1),
    "bass": (_bass, 0.5),
    "synth": (_synth, 0.8),
    "pad": (_pad, 0.6),
    "bleeps": (_bleeps, 0.8),
    "wind": (_wind, 1.0),
    "water": (_water, 1.0),
    "birds": (_birds, 1.0),
    "noise": (_noise, 1.0),
}


def _level(sound: np.ndarray) -> np.ndarray:
    """Scale to a root mean square of 1."""
    return sound / np.sqrt(np.mean(sound**2))


def synthesize(clip: Clip) -> np.ndarray:
    """Make a clip's sound.

    Parameters
    ----------
    clip : Clip
        A clip of `plan_clips`.

    Returns
    -------
    np.ndarray [shape=(465600,), dtype=float32]
        Samples at 16 kHz within -1 and 1.
    """
    from scipy import signal

    rng = default_rng(SeedSequence(clip.seed))
    score = _compose(clip, rng)
    mixture = np.zeros(CLIP_SAMPLES)
    for layer in clip.recipe.layers:
        play, weight = LAYER_SOUNDS[layer]
        mixture += weight * rng.uniform(0.85, 1.15) * _level(play(score, rng))
    mixture = _level(mixture)
    if clip.recipe.reverberation:
        time = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
        hall = rng.standard_normal(len(time)) * np.exp(-time / 0.35)
        wet = _level(signal.fftconvolve(mixture, hall)[:CLIP_SAMPLES])
        mixture = _level(mixture + clip.recipe.reverberation * 2.0 * wet)
    mixture += 10.0 ** rng.uniform(-3.0, -2.4) * rng.standard_normal(CLIP_SAMPLES)
    mixture = rng.uniform(*LEVEL_RMS[clip.level]) * _level(mixture)
    # The MP3 drops what is above TOP_HZ; dropped here, it cannot raise the peaks there.
    sections = signal.butter(8, TOP_HZ, "lowpass", fs=SAMPLE_RATE, output="sos")
    mixture = signal.sosfilt(sections, mixture)
    # Peaks bend above a quarter of full scale and stay below half: an MP3 of this bit rate may
    # overshoot by nearly as much again.
    excess = np.maximum(np.abs(mixture) - 0.25, 0.0)
    mixture = np.sign(mixture) * (np.minimum(np.abs(mixture), 0.25) + 0.25 * np.tanh(excess / 0.25))
    return mixture.astype(np.float32)


def encode_mp3(samples: np.ndarray) -> bytes:
    """Encode samples as MagnaTagATune's MP3s are: 16 kHz, mono, 32 kb/s.

    Parameters
    ----------
    samples : np.ndarray [shape=(n_samples,), dtype=float32]
        Samples at 16 kHz within -1 and 1.

    Returns
    -------
    bytes
        The MP3 file. It names no encoder version, so it does not change with one.
    """
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp3", options={"fflags": "+bitexact"}) as container:
        # Level 7 of 9 takes half the time of the default.
        options = {"compression_level": "7"}
        stream = container.add_stream(
            "libmp3lame", rate=SAMPLE_RATE, layout="mono", options=options
        )
        stream.bit_rate = BIT_RATE
        stream.codec_context.format = "fltp"
        frame = av.AudioFrame.from_ndarray(samples[np.newaxis, :], format="fltp", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def _write_clip(clip: Clip, mp3_dir: Path) -> None:
    write_atomically(mp3_dir / clip.mp3_path, encode_mp3(synthesize(clip)))


def annotations_csv(clips: list[Clip]) -> bytes:
    """Return the table of clips in the form of MagnaTagATune's ``annotations_final.csv``."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerow(("clip_id", *MTT_TAGS, "mp3_path"))
    for clip in clips:
        labels = (int(tag in clip.tags) for tag in MTT_TAGS)
        writer.writerow((clip.clip_id, *labels, clip.mp3_path))
    return file.getvalue().encode("ascii")


def make_demo_dataset(
    out: str | os.PathLike,
    num_clips: int = DEFAULT_CLIPS,
    seed: int = 0,
    num_workers: int | None = None,
) -> list[Clip]:
    """Write the dataset's MP3s, then its table.

    Parameters
    ----------
    out : path
        Folder to write to, made where missing. Files of the same name are replaced; those of a
        run with other numbers stay, and the table does not name them.
    num_clips, seed : int
        As for `plan_clips`.
    num_workers : int, optional
        Processes, at least 1; by default one a CPU core. It changes no byte of the result.

    Returns
    -------
    list of Clip
        The clips written, by increasing clip id.

    Raises
    ------
    UsageError
        Fewer clips are asked for than there are folders.
    BuildError
        A worker died.
    OSError
        A file cannot be written.
    """
    if num_workers is None:
        num_workers = os.cpu_count() or 1
    clips = plan_clips(num_clips, seed)
    out = Path(out)
    mp3_dir = out / "mp3"
    for folder in FOLDERS:
        (mp3_dir / folder).mkdir(parents=True, exist_ok=True)

    write = functools.partial(_write_clip, mp3_dir=mp3_dir)
    spawn = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(
            num_workers, mp_context=spawn, initializer=cli.end_with_parent
        ) as pool:
            written = pool.map(write, clips, chunksize=2)
            for _ in messages.progress(written, total=len(clips), unit="clip", desc="synthesising"):
                pass
    except concurrent.futures.process.BrokenProcessPool:
        raise BuildError(
            "a worker process died: perhaps for lack of memory; run the same command again, with "
            "fewer --num-workers if it dies again"
        ) from None
    write_atomically(out / "annotations_final.csv", annotations_csv(clips))
    return clips


def build_parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    parser = cli.new_parser(
        "Make a small synthetic dataset in MagnaTagATune's shape.",
        "  python make_demo_dataset.py --out demo/dataset\n"
        "  python make_demo_dataset.py --out demo/dataset --clips 160 --seed 1 --num-workers 2",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--clips",
        type=cli.positive_int,
        default=DEFAULT_CLIPS,
        metavar="N",
        help=f"number of clips, at least {MIN_CLIPS}; from 160 up every top tag has positives "
        f"(default: {DEFAULT_CLIPS})",
    )
    data.add_argument(
        "--seed",
        type=cli.non_negative_int,
        default=0,
        metavar="N",
        help="seed; the same one gives the same bytes (default: 0)",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--num-workers",
        type=cli.positive_int,
        default=None,
        metavar="N",
        help="processes (default: one a CPU core)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        default=Path("demo/dataset"),
        metavar="PATH",
        help="folder to write to (default: demo/dataset)",
    )
    return cli.add_general(parser)


def _stage(arguments: argparse.Namespace) -> None:
    clips = make_demo_dataset(arguments.out, arguments.clips, arguments.seed, arguments.num_workers)
    num_tags = len(frozenset().union(*(clip.tags for clip in clips)))
    mp3s = [arguments.out / "mp3" / clip.mp3_path for clip in clips]
    messages.say(
        f"{arguments.out}: {messages.count(len(clips), 'clip')} of 29 s with "
        f"{messages.count(num_tags, 'tag')}, {messages.size_on_disk(*mp3s)}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return cli.run(_stage, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
