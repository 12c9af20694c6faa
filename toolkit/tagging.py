"""Predict the tags of audio files: files in, probabilities out.

    checkpoint = toolkit.prediction.load("model.onnx")
    for path, probabilities in tag_files(checkpoint, ["song.mp3", "talk.ogg"]):
        print(path, clip_mean(probabilities))  # (n_tags,)

One thread decodes the next files, long ones in parts, while the network predicts. Batches extend
across files.
"""

import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from toolkit import messages
from toolkit.data.audio import cut_pieces, decode_pieces
from toolkit.data.clip import Clip
from toolkit.errors import AudioError, CheckpointError
from toolkit.files import walk_files
from toolkit.models.checkpoints import Checkpoint
from toolkit.prediction import DEFAULT_BATCH_SIZE, compile_for_prediction, predict_clips

import numpy as np


def find_files(
    paths: str | Path | Iterable[str | Path],
) -> tuple[list[tuple[Path, bool]], list[AudioError]]:
    """List files, and all files in folders.

    Parameters
    ----------
    paths : str, Path, or iterable of them
        Files and folders.

    Returns
    -------
    files : list of (Path, bool)
        Files in the given order. Files of a folder and its subfolders are sorted. Each folder that
        links name is read once. The second value is True if the file itself was given.
    errors : list of AudioError
        Folders that cannot be read.

    Examples
    --------
    >>> files, errors = find_files(["demo/dataset/mp3/d", "demo/medley.mp3"])
    >>> files[-1], len(errors)
    ((PosixPath('demo/medley.mp3'), True), 0)
    """
    files, errors = [], []

    def refuse(error: OSError) -> None:
        errors.append(AudioError(f"{error.filename}: cannot be read: {error.strerror}"))

    # Iterating over the characters of "/music" would list the whole file system.
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        if os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
            files += [(found, False) for found in sorted(walk_files(path, refuse))]
        else:
            files.append((path, True))
    return files, errors


def tag_files(
    checkpoint: Checkpoint,
    paths: Iterable[str | Path],
    hop: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    refused: Callable[[Path, AudioError], None] | None = None,
) -> Iterator[tuple[Path, *tuple[np.ndarray, ...]]]:
    """Predict the tags of every segment of audio files, and show the progress.

    Audio shorter than a segment is padded with silence.

    Parameters
    ----------
    checkpoint : Checkpoint
        Model (see `toolkit.prediction.load`).
    paths : iterable of str or Path
        Audio files.
    hop : int or None
        Hop length in samples; None for the length of a segment.
    batch_size : int
        Segments per batch.
    refused : callable or None
        Called with each file that cannot be decoded and its error; None to raise the error.

    Yields
    ------
    path : Path
        In the given order.
    probabilities : np.ndarray [shape=(n_segments, n_tags), dtype=float32]
        Probabilities of the model's tags in each segment.
    embeddings : np.ndarray [shape=(n_segments, n_features), dtype=float32]
        Only if the model was loaded with embeddings.

    Raises
    ------
    AudioError
        A file cannot be decoded, and `refused` is None.
    CheckpointError
        The predictions contain NaN or infinity.

    Examples
    --------
    >>> checkpoint = load("demo/log/1", embeddings=True)
    >>> for path, probabilities, embeddings in tag_files(checkpoint, ["demo/medley.mp3"]):
    ...     print(path, probabilities.shape, embeddings.shape)
    demo/medley.mp3 (150, 50) (150, 128)
    """
    network, config = checkpoint.network, checkpoint.config
    compile_for_prediction(network, config.block)
    paths = [Path(path) for path in paths]
    broken = set()  # files that failed, possibly after their first parts were predicted
    found = predicted = 0
    # Count files: the number of segments is unknown until all files are decoded.
    shown = messages.progress(total=len(paths), unit="file", desc="tagging", miniters=0)
    decoded = _decode_ahead(paths, checkpoint.sample_rate, config.num_samples, hop)

    def clips() -> Iterator[Clip]:
        nonlocal found
        for path, clip in decoded:
            if isinstance(clip, Clip):
                found += len(clip.segments)
                yield clip
            elif refused is None or not isinstance(clip, AudioError):
                raise clip
            else:
                refused(path, clip)
                broken.add(str(path))
                shown.update()

    def after_batch() -> None:
        nonlocal predicted
        predicted = min(predicted + batch_size, found)
        shown.set_postfix_str(f"{predicted} of {found} segments", refresh=False)
        shown.update(0)

    with shown, closing(decoded):
        for prediction in predict_clips(network, clips(), batch_size, after_batch):
            path, outputs = prediction.clip.mp3_path, prediction.outputs
            if path in broken:
                continue
            if not all(np.isfinite(output).all() for output in outputs):
                raise CheckpointError(f"{path}: the predictions contain NaN or infinity")
            shown.update()
            yield Path(path), *outputs


def _decode_ahead(*files) -> Iterator[tuple[Path, Clip | Exception]]:
    """Decode files (see `_decode`) in a thread, up to two parts before they are requested."""
    ready = queue.Queue(maxsize=1)  # the thread holds a second part
    is_abandoned = False

    def produce() -> None:
        for part in _decode(*files):
            ready.put(part)
            if is_abandoned:
                return
        ready.put(None)

    # A daemon: Python would wait at exit for the thread of an iterator that is still referenced.
    # One thread: PyAV holds the interpreter lock for each frame, so two threads are slower.
    thread = threading.Thread(target=produce, name="decode", daemon=True)
    thread.start()
    try:
        yield from iter(ready.get, None)
    finally:
        is_abandoned = True
        with suppress(queue.Empty):
            ready.get_nowait()  # the thread may be waiting for this place
        if not sys.is_finalizing():  # Python stops daemon threads at exit, so join could hang
            thread.join()


def _decode(
    paths: list[Path], sample_rate: int, num_samples: int, hop: int | None
) -> Iterator[tuple[Path, Clip | Exception]]:
    """Yield the parts of each file, or the exception that ended its decoding."""
    for path in paths:
        try:
            pieces = _fill_up(decode_pieces(path, sample_rate, stop=None), num_samples)
            for part, segments in enumerate(cut_pieces(pieces, num_samples, hop)):
                yield path, Clip(segments, np.zeros(0, np.uint8), mp3_path=str(path), part=part)
        except Exception as error:  # raised in the thread that asked for the file
            yield path, error


def _fill_up(pieces: Iterable[np.ndarray], num_samples: int) -> Iterator[np.ndarray]:
    """Pad audio that is shorter than a segment with silence."""
    num_missing = num_samples
    for piece in pieces:
        num_missing -= len(piece)
        yield piece
    if num_missing > 0:
        yield np.zeros(num_missing, np.float32)
