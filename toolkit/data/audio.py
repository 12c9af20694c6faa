"""Decode audio files and cut them into segments.

A decoder converts a file to mono float32 samples at a given rate. ``av`` (PyAV) is the default;
``madmom`` is the decoder of the published program, kept as the reference.

Memory does not grow with the length of a file: ``av`` decodes it in pieces, and segments are
yielded in parts.
"""

import sys
import warnings
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from toolkit.errors import AudioError, UsageError

import numpy as np

DECODERS = ("av", "madmom")
SAMPLE_RATE = 22050  # Hz, of the published program
SAMPLES_PER_SEGMENT = 59049  # 3^10: 2.68 s at 22,050 Hz
# MagnaTagATune's clips are 29.1 s long; the published program reads 29 s of each.
CLIP_SECONDS = 29.0

# Maximum samples per part: 6 minutes at 22,050 Hz, 34 MB. Test shards contain one record per part,
# so another value changes the shards of long clips.
PART_SAMPLES = 1 << 23

# Samples per resampling call: enough to save calls into the library, and few enough for a core's
# cache.
_GATHERED_SAMPLES = 1 << 16


def decode(
    path: str | Path,
    sample_rate: int = SAMPLE_RATE,
    stop: float | None = CLIP_SECONDS,
    decoder: str = "av",
) -> np.ndarray:
    """Decode an audio file to mono samples.

    Parameters
    ----------
    path : str or Path
        Any file that FFmpeg's libraries read.
    sample_rate : int
        Rate to resample to, in Hz.
    stop : float or None
        Seconds to keep from the start; None keeps everything.
    decoder : {'av', 'madmom'}
        Decoding library. Both return the same samples for an intact MP3, WAV or FLAC file. Both
        skip damaged packets, but for 'madmom' these count towards `stop`.

    Returns
    -------
    np.ndarray [shape=(n_samples,), dtype=float32]
        At most ``stop * sample_rate`` samples; full scale is [-1, 1]. As in the published program,
        two equal channels are sqrt(2) times as loud as one.

    Raises
    ------
    AudioError
        The file is missing, empty, not audio, or has no audio stream.
    """
    return np.concatenate(list(decode_pieces(path, sample_rate, stop, decoder)))


def check_file(path: Path) -> None:
    """Raise AudioError if a file does not exist, cannot be read, or is empty."""
    try:
        if not path.is_file():
            raise AudioError(f"{path}: no such file")
        is_empty = path.stat().st_size == 0
    except OSError as error:  # for example, the name is too long
        raise AudioError(f"{path}: cannot be read: {error.strerror}") from None
    if is_empty:
        raise AudioError(f"{path}: the file is empty")


def decode_pieces(
    path: str | Path,
    sample_rate: int = SAMPLE_RATE,
    stop: float | None = CLIP_SECONDS,
    decoder: str = "av",
) -> Iterator[np.ndarray]:
    """Decode an audio file to mono samples in pieces.

    Parameters
    ----------
    path, sample_rate, stop, decoder
        As for `decode`; 'madmom' decodes the whole file in memory.

    Yields
    ------
    np.ndarray [shape=(n_samples,), dtype=float32]
        Consecutive samples; their concatenation is what `decode` returns.

    Raises
    ------
    AudioError
        As `decode`. For a damaged file, the error may be raised after some pieces.
    """
    path = Path(path)
    check_file(path)
    read = {"av": _decode_av, "madmom": _decode_madmom}[decoder]
    num_decoded = 0
    end = sys.maxsize if stop is None else round(min(stop * sample_rate, sys.maxsize))
    for piece in read(path, sample_rate, stop):
        piece = piece[: end - num_decoded]
        if len(piece):
            yield piece
        num_decoded += len(piece)
    if not num_decoded:
        raise AudioError(f"{path}: no audio could be decoded")


def cut_segments(samples: np.ndarray, num_samples: int, hop: int | None = None) -> np.ndarray:
    """Cut samples into segments and drop the remainder.

    Parameters
    ----------
    samples : np.ndarray [shape=(n_samples,)]
        Mono samples.
    num_samples : int
        Length of a segment, in samples.
    hop : int or None
        Distance between the starts of two segments, in samples; None for `num_samples`.

    Returns
    -------
    np.ndarray [shape=(n_segments, num_samples)]
        A read-only view of the samples; empty if there are fewer than `num_samples`.
    """
    if len(samples) < num_samples:
        return np.zeros((0, num_samples), samples.dtype)
    return np.lib.stride_tricks.sliding_window_view(samples, num_samples)[:: hop or num_samples]


def segments_per_part(num_samples: int, hop: int | None = None) -> int:
    """Return the number of segments per part (see `cut_pieces`), at least one."""
    return max(1, 1 + (PART_SAMPLES - num_samples) // (hop or num_samples))


def cut_pieces(
    pieces: Iterable[np.ndarray], num_samples: int, hop: int | None = None
) -> Iterator[np.ndarray]:
    """Cut samples that arrive in pieces into the same segments as `cut_segments`.

    Parameters
    ----------
    pieces : iterable of np.ndarray [shape=(n_samples,)]
        Consecutive samples (see `decode_pieces`).
    num_samples, hop
        As for `cut_segments`.

    Yields
    ------
    np.ndarray [shape=(n_segments, num_samples)]
        The next part: `segments_per_part` segments, or fewer in the last part.
    """
    hop = hop or num_samples
    num_segments = segments_per_part(num_samples, hop)
    # step: samples from the start of a part to the start of the next part. span: samples to gather
    # before a part is cut, so that both the part and a whole step are available.
    step = num_segments * hop
    span = max(step, step - hop + num_samples)
    gathered, num_gathered = [], 0
    for piece in pieces:
        gathered.append(piece)
        num_gathered += len(piece)
        if num_gathered < span:
            continue
        samples = np.concatenate(gathered)
        gathered.clear()
        while len(samples) >= span:
            yield cut_segments(samples[: step - hop + num_samples], num_samples, hop)
            samples = samples[step:]
        gathered.append(samples.copy())  # a view would keep all samples in memory
        num_gathered = len(samples)
    if num_gathered >= num_samples:
        samples = gathered[0] if len(gathered) == 1 else np.concatenate(gathered)
        yield cut_segments(samples, num_samples, hop)


def _decode_av(path: Path, sample_rate: int, stop: float | None) -> Iterator[np.ndarray]:
    import av

    try:
        # Without "file:", "a:b.mp3" would be parsed as a protocol. Comments need not be UTF-8.
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            if not container.streams.audio:
                raise AudioError(f"{path}: no audio stream")
            frames = _decoded_frames(container, path, stop)
            # The format may change within a stream; each part has its own resampler.
            for _, part in groupby(frames, lambda f: (f.sample_rate, f.layout.name, f.format.name)):
                resampler = av.AudioResampler(format="flt", layout="mono", rate=sample_rate)
                # Resampling many frames in one call returns the same samples as frame by frame
                # and is faster.
                fifo = av.AudioFifo()
                for frame in part:
                    frame.pts = None
                    fifo.write(frame)
                    if fifo.samples >= _GATHERED_SAMPLES:
                        yield _samples(resampler.resample(fifo.read()))
                resampled = resampler.resample(fifo.read()) if fifo.samples else []
                yield _samples(resampled + resampler.resample(None))
    except (av.error.FFmpegError, OSError, OverflowError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise AudioError(f"{path}: cannot be decoded: {reason}") from None


def _samples(frames: list) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.float32), *(frame.to_ndarray()[0] for frame in frames)])


def _decoded_frames(container, path: Path, stop: float | None):
    """Yield the frames of an audio stream; skip damaged packets like the program ``ffmpeg``."""
    import av

    num_good = num_bad = 0
    seconds = 0.0
    for packet in container.demux(container.streams.audio[0]):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            num_bad += 1
            continue
        num_good += 1
        for frame in frames:
            yield frame
            seconds += frame.samples / frame.sample_rate
        # Decode one more second, since the resampler's filter looks ahead.
        if stop is not None and seconds >= stop + 1:
            break
    if num_bad > 2 * num_good:  # ffmpeg's default limit, an error rate of 2/3
        raise AudioError(f"{path}: {num_bad} of {num_good + num_bad} audio packets are damaged")


def _decode_madmom(path: Path, sample_rate: int, stop: float | None) -> Iterator[np.ndarray]:
    madmom_signal = import_madmom()
    try:
        signal = madmom_signal.Signal(
            str(path), sample_rate=sample_rate, dtype=np.float32, stop=stop, num_channels=1
        )
    except Exception as error:  # madmom raises several types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AudioError(f"{path}: cannot be decoded: {reason}") from None
    yield np.asarray(signal)


def import_madmom():
    """Import ``madmom.audio.signal``, which was written for Python < 3.10 and NumPy < 1.24.

    Raises
    ------
    UsageError
        madmom is not installed.
    """
    import collections
    import collections.abc

    # Removed names that madmom 0.16.1 uses at import.
    replaced = {
        (collections, "MutableSequence"): collections.abc.MutableSequence,
        (np, "float"): float,
        (np, "int"): int,
    }
    missing = {key: value for key, value in replaced.items() if key[1] not in vars(key[0])}
    for (module, name), value in missing.items():
        setattr(module, name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation warnings that users cannot fix
            from madmom.audio import signal
    except ImportError as error:
        raise UsageError(
            f"--decoder madmom: madmom cannot be imported ({error}): install it as "
            "described in requirements/madmom.txt, or use --decoder av, which returns the same "
            "samples"
        ) from None
    return signal
