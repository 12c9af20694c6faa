"""Decode audio files and cut them into segments.

A decoder converts a file to mono float32 samples at a given rate. ``av`` (PyAV) is the default;
``madmom`` is the decoder of the published program, kept as the reference.

Memory does not grow with the length of a file: ``av`` decodes it in pieces, and segments are
yielded in parts.
"""

import errno
import io
import os
import stat
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path

from toolkit.errors import AudioError, UsageError

import numpy as np

DECODERS = ("av", "madmom")
SAMPLE_RATE = 22050  # Hz, of the published program
SAMPLES_PER_SEGMENT = 59049  # 3^10: 2.68 s at 22,050 Hz
# MagnaTagATune's clips are 29.1 s long; the published program reads 29 s of each.
CLIP_SECONDS = 29.0

# Samples beyond this multiple of full scale are refused. Clipped float files reach about 2.
MAX_LEVEL = 100.0

# Maximum samples per part: 6 minutes at 22,050 Hz, 34 MB. Test shards contain one record per part,
# so another value changes the shards of long clips.
PART_SAMPLES = 1 << 23

# Samples per resampling call: enough to save calls into the library, and few enough for a core's
# cache.
_GATHERED_SAMPLES = 1 << 16

# First bytes of playlists and scripts. FFmpeg would read the files that they name.
_PLAYLISTS = (b"#EXTM3U", b"ffconcat")


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
        The file is missing, empty, a playlist, or not audio; most of it is damaged or missing; or a
        sample is NaN, infinite, or beyond `MAX_LEVEL`.
    OSError
        The file system failed, which is not the fault of this file.
    """
    return np.concatenate(list(decode_pieces(path, sample_rate, stop, decoder)))


def check_file(path: str | Path) -> None:
    """Raise AudioError if a file does not exist, cannot be read, is empty, or is a playlist."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe may never end
            raise AudioError(f"{path}: not a file")
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null character
        raise AudioError(f"{path}: no such file") from None
    except OSError as error:
        # Other errors, such as EIO, ESTALE, or EACCES of a folder, are not the fault of this file.
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise AudioError(f"{path}: cannot be read: {error.strerror}") from None
    with _opened(path) as file:
        start = file.read(max(map(len, _PLAYLISTS)))
    if not start:
        raise AudioError(f"{path}: the file is empty")
    if start.startswith(_PLAYLISTS):
        raise AudioError(f"{path}: a playlist is not audio: use the files that it names")


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


class _File(io.FileIO):
    """A file that PyAV reads through Python.

    FFmpeg then opens no file by its name, and an error of the file system is an OSError of Python,
    whereas decoders use the same error codes for damaged data.
    """

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with suppress(OSError):  # a damaged header may name a place beyond any file
            return super().seek(offset, whence)
        return -1

    def read(self, size: int = -1) -> bytes:
        try:
            return super().read(size)
        except OSError as error:
            error.filename = self.name
            raise


@contextmanager
def _opened(path: str | Path) -> Iterator[_File]:
    try:
        file = _File(str(path))
    except PermissionError as error:
        raise AudioError(f"{path}: cannot be decoded: {error.strerror}") from None
    with file:
        yield file


@contextmanager
def _container(path: str | Path):
    """Open a file with PyAV; turn errors of the library into AudioError."""
    import av

    # Without protocols, a playlist or script cannot open other files.
    options = {"protocol_whitelist": "none"}
    try:
        with _opened(path) as file:
            start = file.read(12)
            file.seek(0)
            if start.startswith(b"RIFF") and start.endswith(b"WAVE"):
                # FFmpeg searches 16-bit WAV files for compressed audio, by default in the first
                # 5 MB, which takes longer than decoding 20 s.
                options["probesize"] = "32768"
            # Comments need not be UTF-8.
            with av.open(file, container_options=options, metadata_errors="replace") as container:
                if not container.streams.audio:
                    raise AudioError(f"{path}: no audio stream")
                yield container
    except AudioError:
        raise
    except Exception as error:
        raise AudioError(f"{path}: cannot be decoded: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Describe an error of PyAV; raise errors of the file system and lack of memory."""
    import av

    if not isinstance(error, av.error.FFmpegError):
        if isinstance(error, OSError | MemoryError):
            raise error
        return str(error) or type(error).__name__
    if isinstance(error, MemoryError):
        bytearray(1 << 26)  # raises MemoryError, unless only a damaged file asked for too much
    # Some decoders return codes that FFmpeg has no text for.
    has_text = not error.strerror.startswith("Error number")
    return error.strerror if has_text else "unknown error of the decoding library"


def _decode_av(path: str | Path, sample_rate: int, stop: float | None) -> Iterator[np.ndarray]:
    import av

    with _container(path) as container:
        num_samples, seconds = 0, 0.0
        frames = _decoded_frames(container, path, stop)
        # The format may change within a stream; each part has its own resampler.
        for _, part in groupby(frames, lambda f: (f.sample_rate, f.layout.name, f.format.name)):
            resampler = av.AudioResampler(format="flt", layout="mono", rate=sample_rate)
            for frame in _gathered(part):
                _check_frame(path, frame, num_samples, seconds)
                num_samples += frame.samples
                seconds += frame.samples / frame.sample_rate
                samples = _samples(resampler.resample(frame))
                del frame  # frees memory that the next frame can use
                yield samples
            yield _samples(resampler.resample(None))


def _gathered(frames: Iterable) -> Iterator:
    """Join frames: resampling many in one call returns the same samples and is faster."""
    import av

    fifo = av.AudioFifo()
    for frame in frames:
        frame.pts = None
        fifo.write(frame)
        if fifo.samples >= _GATHERED_SAMPLES:
            yield fifo.read()
    if fifo.samples:
        yield fifo.read()


def _samples(frames: list) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.float32), *(frame.to_ndarray()[0] for frame in frames)])


def _check_frame(path: str | Path, frame, num_before: int, seconds: float) -> None:
    """Check the samples of a frame before they are resampled, which spreads a NaN."""
    kind = frame.format.name[:3]
    if kind not in ("flt", "dbl"):  # integers cannot exceed full scale
        return
    # Views: copying a frame takes eight times as long as this check.
    for plane in frame.planes:
        samples = np.frombuffer(plane, np.float32 if kind == "flt" else np.float64)
        channels = 1 if frame.format.is_planar else frame.layout.nb_channels
        samples = samples[: frame.samples * channels].reshape(-1, channels)
        _check_samples(path, samples, frame.sample_rate, num_before, seconds)


def _check_samples(
    path: str | Path, samples: np.ndarray, rate: int, num_before: int = 0, seconds: float = 0.0
) -> None:
    """Raise AudioError if a sample [shape=(n_samples, channels)] cannot be audio."""
    # Comparisons with NaN are false.
    if samples.min() >= -MAX_LEVEL and samples.max() <= MAX_LEVEL:
        return
    at, channel = np.argwhere(~(np.abs(samples) <= MAX_LEVEL))[0]
    value = samples[at, channel]
    what = f"{value:.3g}".replace("nan", "NaN").replace("inf", "infinity")
    if np.isfinite(value):
        what += f", beyond {MAX_LEVEL:g} times full scale"
    raise AudioError(f"{path}: sample {num_before + at} ({seconds + at / rate:.2f} s) is {what}")


def _decoded_frames(container, path: str | Path, stop: float | None) -> Iterator:
    """Yield the frames of an audio stream; skip damaged packets like the program ``ffmpeg``."""
    import av

    stream = container.streams.audio[0]
    num_good = num_bad = 0
    seconds = 0.0
    reason = None

    def packets() -> Iterator:
        nonlocal reason
        try:
            yield from container.demux(stream)
        except Exception as error:
            reason = _reason(error)

    for packet in packets():
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:
            _reason(error)
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
    if reason is not None:
        _check_length(container, path, seconds, stop, reason)


def _check_length(container, path: str | Path, seconds: float, stop: float | None, reason: str):
    """Raise AudioError if reading failed before a third of the samples that would be used."""
    stream = container.streams.audio[0]
    declared = stream.duration and float(stream.duration * stream.time_base)
    declared = declared or (container.duration and container.duration / 1e6)
    needed, of = SAMPLES_PER_SEGMENT / SAMPLE_RATE, ""
    if declared:
        needed, of = min(declared, stop or declared) / 3, f" of {declared:.1f} s"
    if seconds < needed:
        raise AudioError(f"{path}: breaks off after {seconds:.1f} s{of}: {reason}")


def _decode_madmom(path: str | Path, sample_rate: int, stop: float | None) -> Iterator[np.ndarray]:
    madmom_signal = import_madmom()
    with _container(path):  # refuses files that would make madmom's ffmpeg open other files
        pass
    try:
        signal = madmom_signal.Signal(
            str(path), sample_rate=sample_rate, dtype=np.float32, stop=stop, num_channels=1
        )
    except (OSError, MemoryError):
        raise
    except Exception as error:  # madmom raises several types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AudioError(f"{path}: cannot be decoded: {reason}") from None
    if len(signal):
        _check_samples(path, np.asarray(signal)[:, np.newaxis], sample_rate)
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
