"""Predictions of clips: load a model, check that the model fits a dataset, predict in batches."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit import backend, messages
from toolkit.data.annotations import MTT_TOP_TAGS
from toolkit.data.clip import Clip
from toolkit.errors import UsageError
from toolkit.models import checkpoints, onnx_file
from toolkit.models.checkpoints import Checkpoint
from toolkit.models.onnx_file import OnnxNetwork
from toolkit.models.tags import choose_tags

import numpy as np

if TYPE_CHECKING:
    from input_data import Dataset

    import keras

DEFAULT_BATCH_SIZE = 32


@dataclass
class Prediction:
    """What a model computes for all segments of a clip.

    Attributes
    ----------
    clip : Clip
        Without its segments, so that their memory is freed.
    outputs : list of np.ndarray [shape=(n_segments, n_features), dtype=float32]
        Outputs of the model: the probabilities of the tags and, if requested, the embeddings; or
        the excitations at each depth.
    """

    clip: Clip
    outputs: list[np.ndarray]


def load(model_path: str | Path, embeddings: bool = False) -> Checkpoint:
    """Load a model to predict with: an ``.onnx`` file by ONNX Runtime, others by Keras.

    Parameters
    ----------
    model_path : str or Path
        Model file or a stage's folder (see `toolkit.models.checkpoints.load`), or an ``.onnx``
        file that tools.convert_model wrote.
    embeddings : bool
        Whether the network also outputs embeddings: the activations before the output layer, after
        ReLU and without dropout.

    Raises
    ------
    CheckpointError
        The file is not a model file.
    UsageError
        ONNX Runtime or Keras's backend is not installed, or an ``.onnx`` file of an earlier
        version has no embeddings.

    Examples
    --------
    >>> checkpoint = load("demo/log/1")
    >>> len(checkpoint.tags), checkpoint.sample_rate
    (50, 22050)
    """
    if Path(model_path).suffix == onnx_file.SUFFIX:
        return onnx_file.load(model_path, embeddings)
    backend.import_keras()
    checkpoint = checkpoints.load(model_path)
    if embeddings:
        from model import build_embeddings  # imports Keras

        checkpoint.network = build_embeddings(checkpoint.network)
    return checkpoint


def load_for_dataset(
    model_path: str | Path,
    dataset: "Dataset",
    say: Callable[[str], None] = messages.say,
    tags_path: str | Path | None = None,
) -> Checkpoint:
    """Load a model to use with a dataset.

    If the model file contains no tag names, the tags of the dataset are used, and a message says
    so. However, a file with 50 outputs is taken for a model of MagnaTagATune: on a dataset with
    50 other tags, its scores would be plausible and wrong.

    Parameters
    ----------
    model_path : str or Path
        Model file or a stage's folder (see `load`).
    dataset : Dataset
        Dataset with which the model is used.
    say : callable
        Prints a message.
    tags_path : str or Path or None
        File that names the tags of the model (see `toolkit.models.tags.read_tags`).

    Raises
    ------
    CheckpointError
        The file is not a model file.
    UsageError
        Segment length, sample rate or tags of the model and the dataset differ.
    """
    checkpoint = load(model_path)
    for what, of_model, of_data in (
        ("samples per segment", checkpoint.config.num_samples, dataset.num_samples),
        ("Hz", checkpoint.sample_rate, dataset.sample_rate),
        ("tags", checkpoint.config.num_tags, len(dataset.tags)),
    ):
        if of_model != of_data:
            raise UsageError(
                f"{model_path}: the model is for {of_model} {what}, but {dataset.path} has "
                f"{of_data}: use a dataset and a model that match"
            )
    if tags_path is not None:
        checkpoint.tags = choose_tags(model_path, checkpoint, tags_path)
    elif checkpoint.tags is None:
        if len(dataset.tags) == len(MTT_TOP_TAGS) and dataset.tags != MTT_TOP_TAGS:
            raise UsageError(
                f"{model_path}: the file contains no tag names, and {dataset.path} has other tags "
                "than MagnaTagATune: if the model was trained on these, name them with --tags FILE "
                "here or in tools.convert_model"
            )
        say(f"{model_path}: the file contains no tag names: using those of {dataset.path}")
        checkpoint.tags = dataset.tags
    for number, (of_model, of_data) in enumerate(zip(checkpoint.tags, dataset.tags, strict=True)):
        if of_model != of_data:
            raise UsageError(
                f"{model_path}: tag {number} is {of_model!r} in the model, but {of_data!r} in "
                f"{dataset.path}: use a dataset and a model that match"
            )
    return checkpoint


def compile_for_prediction(network: "keras.Model | OnnxNetwork", block: str) -> None:
    """Compile a Keras network, with XLA where `backend.choose_jit` does by default."""
    if not isinstance(network, OnnxNetwork):
        network.compile(jit_compile=backend.choose_jit("auto", block))


def predict_split(
    model: "keras.Model | OnnxNetwork",
    dataset: "Dataset",
    split: str,
    batch_size: int,
    doing: str,
    share: tuple[int, int] = (0, 1),
    after_batch: Callable[[], None] = lambda: None,
    is_repeated: bool = False,
) -> Iterator[Prediction]:
    """Predict the clips of a split and show the progress.

    Parameters
    ----------
    model : keras.Model or OnnxNetwork
        As for `predict_clips`.
    dataset : Dataset
        Dataset that contains the split.
    split : {'train', 'val', 'test'}
        Split to predict.
    batch_size : int
        Segments per batch.
    doing : str
        Label of the progress bar.
    share : (int, int)
        Number of this process, and number of the processes that divide the shards among them.
    after_batch, is_repeated
        As for `predict_clips`.

    Yields
    ------
    Prediction
        In the order of the shards.
    """
    from input_data import read_clips  # tag.py does not need the packages that read shards

    process, num_processes = share
    found = dataset.splits[split]
    shards = found.shards[process::num_processes]
    clips = read_clips(shards, dataset.num_samples, len(dataset.tags))
    return messages.progress(
        predict_clips(model, clips, batch_size, after_batch, is_repeated),
        total=found.num_clips if num_processes == 1 else None,
        unit="clip",
        desc=doing,
        leave=False,
        disable=process > 0,
    )


def predict_clips(
    model: "keras.Model | OnnxNetwork",
    clips: Iterable[Clip],
    batch_size: int = DEFAULT_BATCH_SIZE,
    after_batch: Callable[[], None] = lambda: None,
    is_repeated: bool = False,
) -> Iterator[Prediction]:
    """Predict clips in batches that extend across clips.

    Parameters
    ----------
    model : keras.Model or OnnxNetwork
        Maps segments to one or several arrays with one row per segment.
    clips : iterable of Clip
        Clips with any number of segments; long ones in parts (see `input_data.read_clips`).
    batch_size : int
        Segments per batch. The last batch is padded with silence, so that a compiled model
        receives only one shape.
    after_batch : callable
        Called after each batch.
    is_repeated : bool
        Whether the model predicts again later. If not, and if all segments are less than a batch,
        the model is called without compiling it, because compiling would take longer. On JAX it is
        always compiled: JAX would otherwise compile each operation on its own, which takes even
        longer.

    Yields
    ------
    Prediction
        In the order of the clips, as soon as all segments of the clip are predicted.
    """
    pending = deque()  # clips without their segments
    num_segments = deque()  # of each pending clip, so far
    rows = []  # outputs of each segment of the pending clips, so far
    batch = np.zeros((batch_size, model.input_shape[1]), np.float32)
    num_filled = 0
    is_compiled = is_repeated or _is_jax(model)

    def flush() -> None:
        nonlocal is_compiled, num_filled
        if is_compiled or num_filled == batch_size:
            outputs = model.predict_on_batch(batch)
        else:
            outputs = _call(model, batch[:num_filled])
        is_compiled = True
        outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
        outputs = [np.asarray(output, np.float32)[:num_filled] for output in outputs]
        rows.extend(zip(*outputs, strict=True))
        num_filled = 0
        batch.fill(0)
        after_batch()

    def predicted() -> Iterator[Prediction]:
        while pending and num_segments[0] <= len(rows):
            of_clip = slice(num_segments.popleft())
            outputs = [np.stack(output) for output in zip(*rows[of_clip], strict=True)]
            del rows[of_clip]
            yield Prediction(pending.popleft(), outputs)

    for clip in clips:
        if clip.part == 0:  # the clips before this one are complete
            yield from predicted()
            # A view of the segments would keep all of them in memory.
            pending.append(replace(clip, segments=clip.segments[:0].copy()))
            num_segments.append(0)
        num_segments[-1] += len(clip.segments)
        for segment in clip.segments:
            batch[num_filled] = segment
            num_filled += 1
            if num_filled == batch_size:
                flush()
    if num_filled:
        flush()
    yield from predicted()


def _call(model: "keras.Model | OnnxNetwork", batch: np.ndarray):
    """Call a model without compiling it; return its outputs as arrays."""
    outputs = model(batch, training=False)
    if isinstance(model, OnnxNetwork):
        return outputs
    import keras

    # NumPy cannot convert PyTorch's tensors while gradients are recorded.
    return keras.tree.map_structure(keras.ops.convert_to_numpy, outputs)


def _is_jax(model: "keras.Model | OnnxNetwork") -> bool:
    if isinstance(model, OnnxNetwork):
        return False
    import keras

    return keras.backend.backend() == "jax"


def clip_mean(outputs: np.ndarray) -> np.ndarray:
    """Average a clip's outputs over its segments, in float64 so that close values stay ordered.

    Parameters
    ----------
    outputs : np.ndarray [shape=(n_segments, n_features)]
        One of the outputs of a `Prediction`.

    Returns
    -------
    np.ndarray [shape=(n_features,), dtype=float64]

    Examples
    --------
    >>> clip_mean(np.array([[0.2, 1.0], [0.4, 0.0]]))
    array([0.3, 0.5])
    """
    return outputs.mean(axis=0, dtype=np.float64)
