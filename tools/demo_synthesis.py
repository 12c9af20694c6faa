"""A small synthesiser for the clips of the demo dataset.

`synthesise` mixes instruments that share key, chords and beat (`Score`). An instrument has a sound:
a plucked `String`, a held `Tone` or `Drums`. Its notes follow a pattern or a random melody.

Sounds are float64 arrays [shape=(n_samples,)] at 16 kHz. Every random number comes from the clip's
generator, which makes a clip reproducible.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from scipy import signal

SAMPLE_RATE = 16_000  # Hz, as MagnaTagATune's MP3s
CLIP_SAMPLES = 465_600  # 29.1 s: the clips of MagnaTagATune are slightly longer than 29 s
BEATS_PER_BAR = 4
_TOP_HZ = 7_000  # an MP3 of 32 kb/s contains little above this frequency
_CYCLE_SAMPLES = 2_048  # samples in a tone's wave table
_VIBRATO_HZ = 5.5
_PLUCK_SAMPLES = 40_000  # 2.5 s
_NOISE_FLOOR = 0.002  # relative to the RMS of a clip


@dataclass(frozen=True)
class String:
    """A plucked string."""

    damping: float  # loss of high frequencies, 0 (bright) to 0.5 (dull)
    decay: float  # seconds until the sound has fallen by 60 dB
    position: float  # where the string is plucked, relative to its length


@dataclass(frozen=True)
class Tone:
    """A held tone with harmonics, as of a bowed or blown instrument, a voice or a synthesiser."""

    tilt: float  # harmonic k has the amplitude k ** -tilt
    formants: tuple[tuple[float, ...], ...] = ()  # Hz; each note has one set of resonances
    attack: float = 0.05  # seconds
    release: float = 0.06  # seconds
    decay: float = np.inf  # time constant, in seconds
    vibrato: float = 0.0  # semitones
    glide: float = 0.0  # semitones below the note at which the note starts
    breath: float = 0.0  # amplitude of noise relative to the harmonics
    players: int = 1  # several players are slightly out of tune with each other
    only_odd: bool = False  # odd harmonics only, as of a square wave


@dataclass(frozen=True)
class Drum:
    """A drum: a sine that falls in pitch, and noise."""

    hertz: float  # pitch after the stroke
    sweep: float  # Hz above this pitch at the stroke
    noise: float  # amplitude of the noise; the sine has 1
    noise_hertz: float  # lowest frequency of the noise
    decay: float  # time constant, in seconds


# Drums and their rhythms: for each drum a bar of 16 steps, where "x" is a stroke.
Drums = tuple[tuple[Drum, str], ...]


@dataclass(frozen=True)
class Instrument:
    """A sound and its notes."""

    sound: String | Tone | Drums
    # Scale degrees relative to the chord of the bar. The groups are played in turn, the notes of a
    # group together. Without a pattern the instrument plays a melody.
    pattern: tuple[tuple[int, ...], ...] = ()
    leap: int = 2  # largest interval of a melody, in scale degrees
    octave: int = 0
    rate: float = 1.0  # notes relative to `Score.notes_per_beat`
    hold: float = 1.0  # length of a note relative to the time until the next note
    drive: float = 0.0  # gain of a distorting amplifier; 0 for none
    level: float = 1.0  # RMS in the mixture


@dataclass(frozen=True)
class Score:
    """Key, chords and beat of a clip."""

    root: int  # MIDI pitch
    scale: tuple[int, ...]  # semitones above the root
    chords: tuple[int, ...]  # scale degree of each bar's chord, repeated
    beat: float  # seconds
    notes_per_beat: float

    @property
    def num_beats(self) -> int:
        return int(np.ceil(CLIP_SAMPLES / SAMPLE_RATE / self.beat))

    def chord(self, beat: float) -> int:
        return self.chords[int(beat // BEATS_PER_BAR) % len(self.chords)]

    def hertz(self, degree: int, octave: int) -> float:
        """Return the frequency of a scale degree."""
        octaves, step = divmod(degree, len(self.scale))
        pitch = self.root + self.scale[step] + 12 * (octaves + octave)
        return 440.0 * 2.0 ** ((pitch - 69) / 12)


def synthesise(
    instruments: list[Instrument], score: Score, rms: float, random: Generator
) -> np.ndarray:
    """Mix the instruments of a clip.

    Parameters
    ----------
    instruments : list of Instrument
        Instruments; each plays for the whole clip.
    score : Score
        Key, chords and beat.
    rms : float
        Level: root mean square of the samples before the limiter.
    random : Generator
        Source of all random numbers.

    Returns
    -------
    np.ndarray [shape=(465600,), dtype=float32]
        Samples at 16 kHz between -0.5 and 0.5. After encoding, peaks may be nearly twice as high.
    """
    mixture = np.zeros(CLIP_SAMPLES)
    for instrument in instruments:
        level = instrument.level * random.uniform(0.85, 1.15)
        mixture += level * _normalise(_play(instrument, score, random))
    mixture = _normalise(mixture) + _NOISE_FLOOR * random.standard_normal(CLIP_SAMPLES)
    return (0.5 * np.tanh(rms * mixture / 0.5)).astype(np.float32)


def _play(instrument: Instrument, score: Score, random: Generator) -> np.ndarray:
    if isinstance(instrument.sound, tuple):
        return _drums(instrument.sound, score, random)
    track = np.zeros(CLIP_SAMPLES)
    plucked = {}  # plucking is slow: compute each pitch once
    for beat, num_beats, degree in _notes(instrument, score, random):
        hertz = score.hertz(degree, instrument.octave)
        seconds = num_beats * score.beat
        if isinstance(instrument.sound, Tone):
            for _ in range(instrument.sound.players):
                _add(track, _tone(instrument.sound, hertz, seconds, random), beat * score.beat)
        else:
            if hertz not in plucked:
                plucked[hertz] = _pluck(instrument.sound, hertz, random)
            sound = plucked[hertz][: int(seconds * SAMPLE_RATE)]
            _add(track, _fade(sound, 0.001, 0.03), beat * score.beat)
    if instrument.drive:
        track = np.tanh(instrument.drive * _normalise(track))
    return track


def _notes(
    instrument: Instrument, score: Score, random: Generator
) -> Iterator[tuple[float, float, int]]:
    """Yield start and length in beats, and scale degree, of each note."""
    step = 1 / (instrument.rate * score.notes_per_beat)
    length = instrument.hold * step
    offset = int(random.integers(8))  # start within the pattern
    degree = 0
    for index, beat in enumerate(np.arange(0, score.num_beats, step)):
        if instrument.pattern:
            for above in instrument.pattern[(index + offset) % len(instrument.pattern)]:
                yield beat, length, score.chord(beat) + above
        else:
            degree += int(random.integers(-instrument.leap, instrument.leap, endpoint=True))
            if beat % BEATS_PER_BAR == 0:
                degree = score.chord(beat)
            degree = min(max(degree, -7), 14)  # within three octaves
            yield beat, length, degree


def _pluck(string: String, hertz: float, random: Generator) -> np.ndarray:
    """Pluck a string by the algorithm of Karplus and Strong (1983): noise in a filtered loop."""
    period = SAMPLE_RATE / hertz
    delay = int(period - string.damping)
    fraction = period - string.damping - delay
    gain = 10.0 ** (-3.0 / (string.decay * hertz))  # per period
    loop = gain * np.convolve((1 - string.damping, string.damping), (1 - fraction, fraction))
    burst = random.uniform(-1.0, 1.0, delay)
    burst -= np.roll(burst, max(1, round(string.position * delay)))
    excitation = np.zeros(_PLUCK_SAMPLES)
    excitation[:delay] = _normalise(burst - burst.mean())
    return signal.lfilter((1.0,), np.concatenate(((1.0,), np.zeros(delay - 1), -loop)), excitation)


def _tone(tone: Tone, hertz: float, seconds: float, random: Generator) -> np.ndarray:
    """Synthesise a tone by reading a table of one cycle at a varying speed."""
    k = np.arange(1, max(2, int(_TOP_HZ / hertz) + 1))  # numbers of harmonics
    amplitudes = k**-tone.tilt
    if tone.only_odd:
        amplitudes *= k % 2
    if tone.formants:
        centres = np.array(tone.formants[random.integers(len(tone.formants))])[:, np.newaxis]
        peaks = 1 / (1 + ((k * hertz - centres) / (60 + 0.06 * centres)) ** 2)
        amplitudes *= 0.02 + peaks.sum(axis=0)
    spectrum = np.zeros(_CYCLE_SAMPLES // 2 + 1, complex)
    spectrum[k] = amplitudes * np.exp(2j * np.pi * random.random(len(k)))
    cycle = _normalise(np.fft.irfft(spectrum))

    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    semitones = tone.vibrato * np.sin(2 * np.pi * (_VIBRATO_HZ * time + random.random()))
    semitones += 0.05 * random.standard_normal() * tone.players  # out of tune
    semitones -= tone.glide * np.exp(-time / 0.06)
    phase = np.cumsum(hertz * 2.0 ** (semitones / 12)) / SAMPLE_RATE
    sound = cycle[(phase * _CYCLE_SAMPLES).astype(int) % _CYCLE_SAMPLES]
    if tone.breath:
        sound = sound + tone.breath * random.standard_normal(len(sound))
    return _fade(sound * np.exp(-time / tone.decay), tone.attack, tone.release)


def _drums(drums: Drums, score: Score, random: Generator) -> np.ndarray:
    track = np.zeros(CLIP_SAMPLES)
    for drum, rhythm in drums:
        time = np.arange(int(5 * drum.decay * SAMPLE_RATE)) / SAMPLE_RATE
        fall = drum.sweep * 0.03 * (1 - np.exp(-time / 0.03))
        highpass = signal.butter(2, drum.noise_hertz, "highpass", fs=SAMPLE_RATE, output="sos")
        noise = signal.sosfilt(highpass, random.standard_normal(len(time)))
        sound = np.sin(2 * np.pi * (drum.hertz * time + fall)) + drum.noise * noise
        sound *= np.exp(-time / drum.decay)
        step = BEATS_PER_BAR / len(rhythm)
        for index, beat in enumerate(np.arange(0, score.num_beats, step)):
            if rhythm[index % len(rhythm)] == "x":
                _add(track, random.uniform(0.8, 1.0) * sound, beat * score.beat)
    return track


def _add(track: np.ndarray, sound: np.ndarray, start: float) -> None:
    """Add a sound to a track in place, from a start in seconds; cut it at the track's end."""
    place = track[round(start * SAMPLE_RATE) :][: len(sound)]
    place += sound[: len(place)]


def _fade(sound: np.ndarray, attack: float, release: float) -> np.ndarray:
    """Fade a sound in and out; times are in seconds."""
    time = np.arange(len(sound)) / SAMPLE_RATE
    rise = np.minimum(time / attack, 1)
    fall = np.minimum((len(sound) / SAMPLE_RATE - time) / release, 1)
    return sound * rise * fall


def _normalise(sound: np.ndarray) -> np.ndarray:
    """Scale a sound to an RMS of 1."""
    return sound / np.sqrt(np.mean(sound**2))
