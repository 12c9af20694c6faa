"""Tables of the demo dataset: instruments, recipes, and their tags.

A recipe is a kind of clip. Key, chords and melodies are random and differ between its clips.
"""

from tools.demo_synthesis import Instrument

# Formants of vowels in Hz, of a man's voice (Peterson and Barney, 1952). A woman's are higher, and
# a trained singer's voice has one near 2,900 Hz.
_MAN = ((730, 1090, 2440), (530, 1840, 2480), (270, 2290, 3010), (570, 840, 2410))
_WOMAN = tuple(tuple(1.18 * hertz for hertz in vowel) for vowel in _MAN)
_SOPRANO = tuple((first, second, 2_900) for first, second, _ in _WOMAN)
_VIOLIN, _CELLO = ((460, 1100, 2600),), ((250, 600, 1200),)

# Patterns: scale degrees above the chord of the bar, played in turn; () is a rest.
_CHORD, _POWER = ((-7, 2, 4),), ((-7, -3, 0),)
_ARPEGGIO = ((-7, 0), (2,), (4,), (7,), (4,), (2,))
_ROLL = ((0,), (2,), (4,), (7,), (9,), (11,), (14,), (11,), (9,), (7,), (4,), (2,))
_CHORDS = ((-7, 0, 7), (4, 11), (2, 9))
_BROKEN = ((-7, 4), (0,), (2, 7), (0,))
_LEAPS = ((0,), (13,), (-4,), (8,), (3,), (-7,), (10,))


def _rhythm(steps: str) -> tuple[tuple[int, ...], ...]:
    """Return the pattern of a drum, from four steps per beat; "x" is a stroke."""
    return tuple((0,) if step == "x" else () for step in steps)


# fmt: off
INSTRUMENTS = {
    "guitar": Instrument(_ARPEGGIO, position=0.3, decay=0.5, hold=3),
    "banjo": Instrument(_BROKEN, tilt=0.4, position=0.1, decay=0.08, octave=1, rate=2),
    "electric guitar": Instrument(_POWER, tilt=0.7, decay=0.7, rate=0.5, distortion=6),
    "harp": Instrument(_ROLL, tilt=1.4, position=0.5, decay=0.7, rate=3, hold=6),
    "sitar": Instrument(tilt=0.1, decay=0.5, glide=0.5, rate=1.5, hold=2, distortion=2),
    "harpsichord": Instrument(_CHORDS, tilt=0.3, position=0.09, decay=0.25, rate=2),
    "piano": Instrument(_BROKEN, tilt=1.5, decay=0.4, hold=1.5),
    "violin": Instrument(tilt=0.6, formants=_VIOLIN, vibrato=0.3, octave=2, rate=0.75),
    "cello": Instrument(tilt=0.8, formants=_CELLO, vibrato=0.2, octave=-1, rate=0.75),
    "flute": Instrument(tilt=3.0, vibrato=0.12, breath=0.15, octave=2, rate=0.75),
    "man": Instrument(tilt=0.4, formants=_MAN, vibrato=0.2, glide=1, octave=-1, level=1.2),
    "woman": Instrument(tilt=0.4, formants=_WOMAN, vibrato=0.2, glide=1, level=1.2),
    "soprano": Instrument(tilt=0.4, formants=_SOPRANO, vibrato=0.9, octave=1, level=1.2),
    "choir": Instrument(_CHORD, tilt=0.4, formants=_MAN, attack=0.2, vibrato=0.25, rate=0.5),
    "synth": Instrument(_ROLL, position=0.5, octave=1, rate=2, hold=0.7, level=0.8),
    "pad": Instrument(_CHORD, tilt=1.3, attack=0.8, rate=0.25, hold=1.3, level=0.7),
    "bleeps": Instrument(_LEAPS, tilt=0.2, glide=24, rate=2, hold=0.8),
    "kick": Instrument(_rhythm("x.....x."), tilt=3, hertz=50, glide=-20, decay=0.09, level=0.6),
    "snare": Instrument(_rhythm("....x..."), hertz=190, breath=3, decay=0.06, level=0.5),
    "hat": Instrument(_rhythm("x."), hertz=6_000, breath=10, decay=0.03, level=0.2),
    "thud": Instrument(_rhythm("x..."), tilt=3, hertz=45, glide=-30, decay=0.15),
    "off-beat hat": Instrument(_rhythm("..x."), hertz=6_000, breath=10, decay=0.03, level=0.3),
    "drops": Instrument(_rhythm("x"), hertz=900, glide=-8, breath=3, decay=0.4),
}
# Words of recipes that stand for several instruments.
GROUPS = {"drums": ("kick", "snare", "hat"), "techno beat": ("thud", "snare", "off-beat hat")}

# Words of each recipe: instruments, genres, and a tempo or a level. Where these two are missing,
# each clip has random ones. None of the 50 tags fits rain, so build_mtt.py leaves its clips out.
RECIPES = {
    "guitar_study": ("guitar", "classical", "slow"),
    "guitar_run": ("guitar", "fast"),
    "country_song": ("man", "guitar", "banjo", "country"),
    "hoedown": ("violin", "banjo", "drums", "country", "fast"),
    "country_duet": ("woman", "banjo", "drums", "country"),
    "harp_dream": ("harp", "classical", "slow", "quiet"),
    "harp_and_flute": ("flute", "harp", "new age", "slow"),
    "harp_and_voice": ("woman", "harp", "pad", "new age"),
    "alap": ("sitar", "indian", "slow"),
    "raga_song": ("woman", "sitar", "drums", "indian"),
    "sitar_and_drums": ("sitar", "drums", "indian", "fast"),
    "toccata": ("harpsichord", "classical", "fast"),
    "continuo": ("cello", "harpsichord", "classical"),
    "nocturne": ("piano", "classical", "slow", "quiet"),
    "etude": ("piano", "classical", "fast", "loud"),
    "piano_pop": ("woman", "piano", "drums", "pop"),
    "synth_pop": ("man", "synth", "drums", "pop"),
    "dance_pop": ("woman", "synth", "techno beat", "pop", "dance", "loud"),
    "partita": ("violin", "classical"),
    "cello_suite": ("cello", "classical", "slow"),
    "string_duo": ("violin", "cello", "classical"),
    "flute_meadow": ("flute", "pad", "new age", "ambient", "slow", "quiet"),
    "flute_solo": ("flute", "classical", "quiet"),
    "aria": ("soprano", "violin", "classical"),
    "recitative": ("soprano", "harpsichord", "classical", "slow"),
    "lied": ("soprano", "piano", "classical", "slow"),
    "motet": ("choir", "classical", "slow"),
    "choir_in_space": ("choir", "pad", "new age", "ambient", "slow", "quiet"),
    "machine_choir": ("choir", "bleeps"),
    "metal_song": ("man", "electric guitar", "drums", "metal", "loud"),
    "metal_riff": ("electric guitar", "drums", "metal", "fast", "loud"),
    "techno_track": ("techno beat", "synth", "techno", "fast", "loud"),
    "techno_dub": ("techno beat", "pad", "techno", "fast"),
    "acid": ("techno beat", "bleeps", "techno", "fast"),
    "drift": ("pad", "ambient", "slow", "quiet"),
    "machines": ("bleeps",),
    "rain": ("drops", "water"),
}

_VOCAL = ("vocal", "vocals", "singing", "voice")
_FEMALE = ("female", "female vocal", "female voice", *_VOCAL)
# Words of recipes are tags if MagnaTagATune has them. These are further tags of some words.
MORE_TAGS = {
    "electric guitar": ("guitar",), "harp": ("plucking",), "piano": ("keyboard",),
    "violin": ("strings", "violins"), "cello": ("strings",), "flute": ("woodwind",),
    "man": ("male", "male vocal", "male voice", "male singer", *_VOCAL),
    "woman": ("female singer", *_FEMALE), "soprano": ("opera", "woman", *_FEMALE),
    "choir": ("choral", "chanting", *_VOCAL), "no vocals": ("no vocal", "no voice"),
    "synth": ("electronic", "synthesizer"), "pad": ("synth", "electronic"),
    "bleeps": ("weird", "electronic", "strange"), "quiet": ("soft",),
    "drums": ("beat", "beats"), "techno beat": ("beat", "beats", "drums"),
    "classical": ("classic",), "metal": ("rock", "heavy metal"), "techno": ("dance",),
}
# fmt: on
SINGERS = {"man", "woman", "soprano", "choir"}
SOLO_INSTRUMENTS = {"guitar", "harp", "sitar", "harpsichord", "piano", "violin", "cello", "flute"}
# Beats per minute, and notes per beat: slow music is sparse, fast music is dense.
TEMPOS = {"slow": (46, 60, 1), "moderate": (84, 104, 2), "fast": (144, 172, 4)}
LEVELS = {"quiet": (0.018, 0.028), "medium": (0.06, 0.09), "loud": (0.16, 0.22)}  # RMS
