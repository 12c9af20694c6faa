"""Decoding audio files and cutting them into segments.

A decoder turns a file into mono float32 samples at a given rate. ``av`` (PyAV) does it in
process; ``madmom`` is the published program's, kept as the reference.
"""

from pathlib import Path

from errors import AudioError, UsageError

import numpy as np

DECODERS = ("av", "madmom")
# MagnaTagATune's clips are 29.1 s long; the published program reads 29 s of each.
CLIP_SECONDS = 29.0


def decode(
    path: str | Path,
    sample_rate: int = 22050,
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
        Where to cut, in seconds from the start; None keeps everything.
    decoder : {'av', 'madmom'}
        Library to decode with; both give the same samples.

    Returns
    -------
    np.ndarray [shape=(n_samples,), dtype=float32]
        Samples, full scale being [-1, 1]; at most ``stop * sample_rate`` of them.

    Raises
    ------
    AudioError
        The file is missing, empty, not audio, or has no audio stream.
    """
    path = Path(path)
    if not path.is_file():
        raise AudioError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: the file is empty")
    read = {"av": _decode_av, "madmom": _decode_madmom}[decoder]
    samples = read(path, sample_rate, stop)
    if len(samples) == 0:
        raise AudioError(f"{path}: no audio could be decoded")
    return samples


def cut_segments(samples: np.ndarray, num_samples: int) -> np.ndarray:
    """Cut samples into consecutive segments and drop the rest.

    Parameters
    ----------
    samples : np.ndarray [shape=(n_samples,)]
        Mono samples.
    num_samples : int
        Length of a segment, in samples.

    Returns
    -------
    np.ndarray [shape=(n_segments, num_samples)]
        A view of the samples; no segments where they are fewer than `num_samples`.
    """
    num_segments = len(samples) // num_samples
    return samples[: num_segments * num_samples].reshape(num_segments, num_samples)


def _decode_av(path: Path, sample_rate: int, stop: float | None) -> np.ndarray:
    import av

    limit = None if stop is None else round(stop * sample_rate)
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise AudioError(f"{path}: no audio stream")
            # Gathering the decoded frames and resampling them in one call gives the same samples
            # as frame by frame and costs far fewer calls into the library.
            fifo = av.AudioFifo()
            frames = container.decode(container.streams.audio[0])
            for frame in frames:
                frame.pts = None
                fifo.write(frame)
                # A second more than is asked for, since the resampler's filter looks ahead.
                if stop is not None and fifo.samples >= (stop + 1) * frame.sample_rate:
                    break
            gathered = fifo.read()
            if gathered is None:
                raise AudioError(f"{path}: no audio could be decoded")
            resampler = av.AudioResampler(format="flt", layout="mono", rate=sample_rate)
            resampled = resampler.resample(gathered) + resampler.resample(None)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise AudioError(f"{path}: cannot be decoded: {reason}") from None
    samples = np.concatenate([frame.to_ndarray()[0] for frame in resampled])
    return samples[:limit]


def _decode_madmom(path: Path, sample_rate: int, stop: float | None) -> np.ndarray:
    madmom_signal = import_madmom()
    try:
        signal = madmom_signal.Signal(
            str(path), sample_rate=sample_rate, dtype=np.float32, stop=stop, num_channels=1
        )
    except Exception as error:  # madmom lets its programs' failures out as several types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AudioError(f"{path}: cannot be decoded: {reason}") from None
    return np.asarray(signal)


def import_madmom():
    """Import ``madmom.audio.signal``, which predates Python 3.10 and NumPy 1.24.

    Raises
    ------
    UsageError
        madmom is not installed.
    """
    import collections
    import collections.abc

    # madmom 0.16.1 uses these names at import; nothing else here sees them.
    replaced = {
        (collections, "MutableSequence"): collections.abc.MutableSequence,
        (np, "float"): float,
        (np, "int"): int,
    }
    missing = {key: value for key, value in replaced.items() if key[1] not in vars(key[0])}
    for (module, name), value in missing.items():
        setattr(module, name, value)
    try:
        from madmom.audio import signal
    except ImportError as error:
        raise UsageError(
            f"--decoder madmom: madmom cannot be imported ({error}): install it as "
            "requirements/madmom.txt says, or use --decoder av, which gives the same samples"
        ) from None
    return signal
