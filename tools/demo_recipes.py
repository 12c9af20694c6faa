"""Tables of the demo dataset: instruments, their tags, and recipes.

A recipe is a kind of clip: its instruments, genres, tempo and level. Key, chords and melodies are
random and differ between the clips of a recipe.
"""

from dataclasses import dataclass

from tools.demo_synthesis import Drum, Instrument, String, Tone

# Formants of vowels in Hz, of a man's voice (Peterson and Barney, 1952). A woman's are higher, and
# a trained singer's voice has one near 2,900 Hz.
_MAN = ((730, 1090, 2440), (530, 1840, 2480), (270, 2290, 3010), (570, 840, 2410))
_WOMAN = tuple(tuple(1.18 * hertz for hertz in vowel) for vowel in _MAN)
_SOPRANO = tuple((first, second, 2_900) for first, second, _ in _WOMAN)

_KICK = Drum(hertz=50, sweep=120, noise=0.1, noise_hertz=2_000, decay=0.09)
_THUD = Drum(hertz=45, sweep=220, noise=0.0, noise_hertz=2_000, decay=0.15)
_SNARE = Drum(hertz=190, sweep=40, noise=2.0, noise_hertz=1_200, decay=0.06)
_HAT = Drum(hertz=6_000, sweep=0, noise=1.0, noise_hertz=4_500, decay=0.03)
_DROP = Drum(hertz=900, sweep=600, noise=3.0, noise_hertz=1_500, decay=0.4)

_ROCK = ((_KICK, "x.....x.x......."), (_SNARE, "....x.......x..."), (_HAT, "x.x.x.x.x.x.x.x."))
_CLUB = ((_THUD, "x...x...x...x..."), (_SNARE, "....x.......x..."), (_HAT, "..x...x...x...xx"))
_RAIN = ((_DROP, "xxxxxxxxxxxxxxxx"),)

# Patterns: scale degrees above the chord of the bar, played in turn.
_CHORD = ((-7, 2, 4),)
_ARPEGGIO = ((-7, 0), (2,), (4,), (7,), (4,), (2,))
_ROLL = ((0,), (2,), (4,), (7,), (9,), (11,), (14,), (11,), (9,), (7,), (4,), (2,))

INSTRUMENTS = {
    "guitar": Instrument(String(damping=0.5, decay=3.0, position=0.3), _ARPEGGIO, hold=3),
    "banjo": Instrument(
        String(damping=0.1, decay=0.5, position=0.1), ((0, 7), (4,), (2,), (7,)), octave=1, rate=2
    ),
    "electric guitar": Instrument(
        String(damping=0.3, decay=4.0, position=0.15), ((-7, -3, 0),), rate=0.5, drive=6
    ),
    "harp": Instrument(String(damping=0.5, decay=5.0, position=0.5), _ROLL, rate=3, hold=10),
    "sitar": Instrument(String(damping=0.05, decay=3.5, position=0.04), rate=1.5, hold=2, drive=2),
    "harpsichord": Instrument(
        String(damping=0.03, decay=1.2, position=0.09), ((-7, 0, 7), (4, 11), (2, 9)), rate=2
    ),
    "piano": Instrument(
        Tone(tilt=1.5, attack=0.003, decay=0.4), ((-7, 4), (0,), (2, 7), (0,)), hold=1.5
    ),
    "violin": Instrument(
        Tone(tilt=0.6, formants=((460, 1100, 2600),), vibrato=0.3, breath=0.03), octave=2, rate=0.75
    ),
    "cello": Instrument(
        Tone(tilt=0.8, formants=((250, 600, 1200),), vibrato=0.2, breath=0.03), octave=-1, rate=0.75
    ),
    "flute": Instrument(Tone(tilt=3.0, vibrato=0.12, breath=0.15), octave=2, rate=0.75),
    "man": Instrument(Tone(tilt=0.4, formants=_MAN, vibrato=0.2, glide=1), octave=-1, level=1.2),
    "woman": Instrument(Tone(tilt=0.4, formants=_WOMAN, vibrato=0.2, glide=1), level=1.2),
    "soprano": Instrument(
        Tone(tilt=0.4, formants=_SOPRANO, vibrato=0.9), octave=1, rate=0.75, level=1.2
    ),
    "choir": Instrument(
        Tone(tilt=0.4, formants=_MAN, attack=0.2, release=0.2, vibrato=0.25, players=2),
        _CHORD, rate=0.5,
    ),
    "synth": Instrument(
        Tone(tilt=1.0, only_odd=True, attack=0.003), _ROLL, octave=1, rate=2, hold=0.7, level=0.8
    ),
    "pad": Instrument(
        Tone(tilt=1.3, attack=0.8, release=0.8, players=2), _CHORD, rate=0.25, hold=1.3, level=0.7
    ),
    "bleeps": Instrument(Tone(tilt=0.2, attack=0.005, glide=24), leap=14, rate=2, hold=0.8),
    "drums": Instrument(_ROCK, level=0.8),
    "techno beat": Instrument(_CLUB),
    "water": Instrument(_RAIN),
}  # fmt: skip

MAJOR = (0, 2, 4, 5, 7, 9, 11)  # semitones above the root
MINOR = (0, 2, 3, 5, 7, 8, 10)
PROGRESSIONS = ((0, 3, 4, 0), (0, 4, 5, 3), (0, 5, 3, 4), (5, 3, 0, 4))  # scale degree per bar

_VOCAL = ("vocal", "vocals", "singing", "voice")

# The name of an instrument, genre, tempo or level is a tag. These are further tags of some names.
MORE_TAGS = {
    "electric guitar": ("guitar",),
    "harp": ("plucking",),
    "piano": ("keyboard",),
    "violin": ("strings", "violins"),
    "cello": ("strings",),
    "flute": ("woodwind",),
    "man": ("male", "male vocal", "male voice", "male singer", *_VOCAL),
    "woman": ("female", "female vocal", "female voice", "female singer", *_VOCAL),
    "soprano": ("opera", "female", "female vocal", "female voice", "woman", *_VOCAL),
    "choir": ("choral", "chanting", *_VOCAL),
    "synth": ("electronic", "synthesizer"),
    "pad": ("synth", "electronic", "airy"),
    "bleeps": ("weird", "electronic", "strange"),
    "drums": ("beat", "beats", "percussion"),
    "techno beat": ("beat", "beats", "drums"),
    "no singer": ("no vocal", "no vocals", "no voice"),
    "classical": ("classic",),
    "metal": ("rock", "heavy metal"),
    "techno": ("dance",),
    "quiet": ("soft",),
}
SOLO_INSTRUMENTS = ("guitar", "harp", "sitar", "harpsichord", "piano", "violin", "cello", "flute")
TAG_PROBABILITY = 0.95  # real listeners sometimes omit a tag

# Beats per minute, and notes per beat: slow music is sparse, fast music is dense.
TEMPOS = {"slow": (46, 60, 1), "medium": (84, 104, 2), "fast": (144, 172, 4)}
LEVELS = {"quiet": (0.018, 0.028), "medium": (0.06, 0.09), "loud": (0.16, 0.22)}  # RMS


@dataclass(frozen=True)
class Recipe:
    """A kind of clip; where tempo or level is empty, each clip has a random one."""

    title: str  # in the name of the file
    instruments: tuple[str, ...]  # keys of INSTRUMENTS
    genres: tuple[str, ...] = ()
    tempo: str = ""  # key of TEMPOS
    level: str = ""  # key of LEVELS


RECIPES = (
    Recipe("guitar_study", ("guitar",), ("classical",), "slow"),
    Recipe("guitar_run", ("guitar",), tempo="fast"),
    Recipe("country_song", ("man", "guitar", "banjo"), ("country",), "medium"),
    Recipe("country_duet", ("woman", "banjo", "drums"), ("country",), "medium"),
    Recipe("hoedown", ("banjo", "violin", "drums"), ("country",), "fast"),
    Recipe("harp_dream", ("harp",), ("classical",), "slow", "quiet"),
    Recipe("harp_and_flute", ("flute", "harp"), ("new age",), "slow"),
    Recipe("harp_and_voice", ("woman", "harp", "pad"), ("new age",), "slow", "medium"),
    Recipe("alap", ("sitar",), ("indian",), "slow"),
    Recipe("sitar_and_drums", ("sitar", "drums"), ("indian",), "fast"),
    Recipe("raga_song", ("woman", "sitar", "drums"), ("indian",), "medium"),
    Recipe("toccata", ("harpsichord",), ("classical",), "fast"),
    Recipe("sonata", ("violin", "harpsichord"), ("classical",)),
    Recipe("continuo", ("cello", "harpsichord"), ("classical",)),
    Recipe("nocturne", ("piano",), ("classical",), "slow", "quiet"),
    Recipe("etude", ("piano",), ("classical",), "fast", "loud"),
    Recipe("piano_pop", ("woman", "piano", "drums"), ("pop",), "medium"),
    Recipe("synth_pop", ("man", "synth", "drums"), ("pop",), "medium"),
    Recipe("dance_pop", ("woman", "synth", "techno beat"), ("pop", "dance"), "medium", "loud"),
    Recipe("partita", ("violin",), ("classical",)),
    Recipe("cello_suite", ("cello",), ("classical",), "slow"),
    Recipe("string_duo", ("violin", "cello"), ("classical",)),
    Recipe("flute_meadow", ("flute", "pad"), ("new age", "ambient"), "slow", "quiet"),
    Recipe("flute_solo", ("flute",), ("classical",)),
    Recipe("aria", ("soprano", "violin", "cello"), ("classical",)),
    Recipe("recitative", ("soprano", "harpsichord"), ("classical",), "slow"),
    Recipe("lied", ("soprano", "piano"), ("classical",), "slow"),
    Recipe("motet", ("choir",), ("classical",), "slow"),
    Recipe("oratorio", ("choir", "cello"), ("classical",), "medium", "loud"),
    Recipe("choir_in_space", ("choir", "pad"), ("new age", "ambient"), "slow", "quiet"),
    Recipe("metal_riff", ("electric guitar", "drums"), ("metal",), "fast", "loud"),
    Recipe("doom", ("electric guitar", "drums"), ("metal",), "slow", "loud"),
    Recipe("metal_song", ("man", "electric guitar", "drums"), ("metal",), "fast", "loud"),
    Recipe("techno_track", ("techno beat", "synth"), ("techno",), "fast", "loud"),
    Recipe("techno_dub", ("techno beat", "pad"), ("techno",), "fast"),
    Recipe("acid", ("techno beat", "bleeps"), ("techno",), "fast"),
    Recipe("drift", ("pad",), ("ambient",), "slow", "quiet"),
    Recipe("machines", ("bleeps",)),
    Recipe("machine_choir", ("choir", "bleeps"), tempo="slow"),
)
# None of the 50 tags fits this recording, so build_mtt.py does not use the clip.
FIELD_RECORDING = Recipe("rain", ("water",))
