"""A small synthesiser for the clips of the demo dataset.

`synthesise` mixes instruments that share key, chords and beat. Sounds are float64 arrays
[shape=(n_samples,)] at 16 kHz. Every random number comes from the clip's generator, which makes a
clip reproducible.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

SAMPLE_RATE = 16_000  # Hz, as MagnaTagATune's MP3s
CLIP_SAMPLES = 465_600  # 29.1 s: the clips of MagnaTagATune are slightly longer than 29 s
_BEATS_PER_BAR = 4
_SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10))  # major and minor, in semitones
_PROGRESSIONS = ((0, 3, 4, 0), (0, 4, 5, 3), (0, 5, 3, 4), (5, 3, 0, 4))  # scale degree per bar
_TOP_HZ = 7_000  # an MP3 of 32 kb/s contains little above this frequency
_CYCLE_SAMPLES = 2_048  # samples in a tone's wave table
_VIBRATO_HZ = 5.5
_RELEASE = 0.06  # seconds in which a note fades out
_NOISE_FLOOR = 0.002  # relative to the RMS of a clip


@dataclass(frozen=True)
class Instrument:
    """A sound, and the notes that it plays."""

    # Scale degrees relative to the chord of the bar. The groups are played in turn, the notes of a
    # group together. Without a pattern the instrument plays a melody.
    pattern: tuple[tuple[int, ...], ...] = ()
    octave: int = 0
    rate: float = 1.0  # notes relative to those of the tempo
    hold: float = 1.0  # length of a note relative to the time until the next note
    hertz: float = 0.0  # of a drum, which plays 4 notes per beat without a pitch
    tilt: float = 1.0  # harmonic k has the amplitude k ** -tilt
    position: float = 0.0  # of a pluck, relative to the string; 0.5 leaves only odd harmonics
    formants: tuple[tuple[float, ...], ...] = ()  # Hz; each note has one set of resonances
    attack: float = 0.005  # seconds
    decay: float = 0.0  # time constant of a struck or plucked sound, in seconds; 0 for a held one
    vibrato: float = 0.0  # semitones
    glide: float = 0.0  # semitones below the note at which the note starts
    breath: float = 0.0  # amplitude of noise relative to the harmonics
    distortion: float = 0.0  # gain of a distorting amplifier; 0 for none
    level: float = 1.0  # RMS in the mixture


def synthesise(
    instruments: list[Instrument], beat: float, notes_per_beat: float, rms: float, random: Generator
) -> np.ndarray:
    """Mix the instruments of a clip, which play in a random key.

    Parameters
    ----------
    instruments : list of Instrument
        Instruments; each plays for the whole clip.
    beat : float
        Length of a beat, in seconds.
    notes_per_beat : float
        Notes per beat of an instrument of rate 1.
    rms : float
        Level: root mean square of the samples before the limiter.
    random : Generator
        Source of all random numbers.

    Returns
    -------
    np.ndarray [shape=(465600,), dtype=float32]
        Samples at 16 kHz between -0.5 and 0.5. After encoding, peaks may be nearly twice as high.
    """
    root, scale = random.integers(48, 60), random.choice(_SCALES)
    chords = np.repeat(random.choice(_PROGRESSIONS), _BEATS_PER_BAR)
    num_beats = CLIP_SAMPLES / SAMPLE_RATE / beat
    mixture = _NOISE_FLOOR * random.standard_normal(CLIP_SAMPLES)
    for instrument in instruments:
        step = 1 / (4 if instrument.hertz else instrument.rate * notes_per_beat)  # in beats
        track = np.zeros(CLIP_SAMPLES)
        sounds = {}  # struck sounds of the same pitch are equal: compute them once
        for start, degree in _notes(instrument, np.arange(0, num_beats, step), chords, random):
            octaves, note = divmod(degree, len(scale))
            pitch = root + scale[note] + 12 * (octaves + instrument.octave)  # of MIDI
            hertz = instrument.hertz or 440.0 * 2.0 ** ((pitch - 69) / 12)
            seconds = 5 * instrument.decay if instrument.hertz else instrument.hold * step * beat
            if not instrument.decay or hertz not in sounds:
                sounds[hertz] = _tone(instrument, hertz, seconds, random)
            place = track[round(start * beat * SAMPLE_RATE) :][: len(sounds[hertz])]
            place += sounds[hertz][: len(place)]
        if instrument.distortion:
            track = np.tanh(instrument.distortion * _normalise(track))
        mixture += instrument.level * random.uniform(0.85, 1.15) * _normalise(track)
    return (0.5 * np.tanh(rms * _normalise(mixture) / 0.5)).astype(np.float32)


def _notes(
    instrument: Instrument, beats: np.ndarray, chords: np.ndarray, random: Generator
) -> Iterator[tuple[float, int]]:
    """Yield the beat and the scale degree of each note."""
    offset = 0 if instrument.hertz else random.integers(8)  # start within the pattern
    degree = 0
    for index, beat in enumerate(beats):
        chord = chords[int(beat) % len(chords)]
        if instrument.pattern:
            for above in instrument.pattern[(index + offset) % len(instrument.pattern)]:
                yield beat, chord + above
        else:
            step = random.integers(-2, 2, endpoint=True)
            degree = chord if beat % _BEATS_PER_BAR == 0 else min(max(degree + step, -7), 14)
            yield beat, degree


def _tone(instrument: Instrument, hertz: float, seconds: float, random: Generator) -> np.ndarray:
    """Synthesise a tone by reading a table of one cycle at a varying speed."""
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    semitones = instrument.vibrato * np.sin(2 * np.pi * (_VIBRATO_HZ * time + random.random()))
    semitones += 0.05 * random.standard_normal()  # out of tune
    semitones -= instrument.glide * np.exp(-time / 0.06)
    phase = np.cumsum(hertz * 2.0 ** (semitones / 12)) / SAMPLE_RATE
    places = (phase * _CYCLE_SAMPLES).astype(int) % _CYCLE_SAMPLES

    k = np.arange(1.0, max(2, int(_TOP_HZ / hertz) + 1))  # numbers of harmonics
    amplitudes = k**-instrument.tilt * np.exp(2j * np.pi * random.random(len(k)))
    if instrument.position:
        amplitudes *= np.sin(np.pi * k * instrument.position)
    if instrument.formants:
        centres = random.choice(instrument.formants)[:, np.newaxis]
        peaks = 1 / (1 + ((k * hertz - centres) / (60 + 0.06 * centres)) ** 2)
        amplitudes *= 0.02 + peaks.sum(axis=0)
    amplitudes *= _CYCLE_SAMPLES / np.sqrt(2) / np.linalg.norm(amplitudes)  # for an RMS of 1

    def play(amplitudes: np.ndarray) -> np.ndarray:
        spectrum = np.zeros(_CYCLE_SAMPLES // 2 + 1, complex)
        spectrum[1 : len(k) + 1] = amplitudes
        return np.fft.irfft(spectrum)[places]

    sound = play(amplitudes)
    if instrument.breath:
        sound += instrument.breath * random.standard_normal(len(time))
    if instrument.decay:  # the high harmonics of a string decay faster than the low ones
        fall, dull = np.exp(-time / instrument.decay), play(amplitudes / k)
        sound = fall * (dull + fall**4 * (sound - dull))
    return sound * np.minimum(time / instrument.attack, 1) * np.minimum(time[::-1] / _RELEASE, 1)


def _normalise(sound: np.ndarray) -> np.ndarray:
    """Scale a sound to an RMS of 1."""
    return sound / np.sqrt(np.mean(sound**2))
