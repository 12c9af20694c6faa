"""Datasets of shards: open one, read its clips, and read shuffled batches of training segments.

    dataset = open_dataset("./dataset")
    for clip in read_clips(dataset.splits["test"].shards):
        ...

``manifest.json`` describes the shards. Datasets of the published program have no manifest: their
clips and segments are counted from the record headers. TensorFlow is not needed: an index of the
record headers gives random access to the segments, so each epoch is perfectly shuffled with only a
few batches in memory.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from toolkit.data.annotations import (
    ANNOTATIONS_NAME,
    MTT_TOP_TAGS,
    SPLITS,
    missing_dataset,
)
from toolkit.data.audio import SAMPLE_RATE, segments_per_part
from toolkit.data.clip import Clip
from toolkit.data.manifest import (
    MANIFEST_NAME,
    SHARD_FOLDER,
    check_data_dir,
    find_shards,
    read_manifest,
)
from toolkit.data.records import (
    decode_record,
    index_records,
    read_checksums,
    read_record,
    read_records,
    read_segment,
    record_encoding,
)
from toolkit.data.tables import read_tables
from toolkit.errors import AnnotationsError, ShardError
from toolkit.files import allow_open_files, exists

import numpy as np

ALIGNMENT = 64  # bytes; the memory of a batch starts at a multiple


@dataclass
class Split:
    """The shards of one split and their content."""

    shards: list[Path] = field(default_factory=list)
    num_clips: int | None = 0  # None: unknown, in training shards of the published program
    num_segments: int | None = 0  # None: unknown, in test shards of the published program


@dataclass
class Dataset:
    """A folder of shards: its tags in model order, the format of its segments, and its splits."""

    path: Path
    tags: tuple[str, ...]
    sample_rate: int  # Hz
    num_samples: int  # per segment
    splits: dict[str, Split]


# --- Opening a dataset ---------------------------------------------------------------------------


def open_dataset(data_dir: str | Path) -> Dataset:
    """Find and check the shards of a dataset.

    Parameters
    ----------
    data_dir : str or Path
        Folder of the dataset, which contains ``tfrecord/``.

    Returns
    -------
    Dataset
        Read from ``manifest.json`` if this file exists. Otherwise clips and segments are counted
        from the record headers, and the tags are those of ``annotations_final.csv`` or, if this
        file is missing and there are 50 labels, those of MagnaTagATune.

    Raises
    ------
    UsageError
        There is no dataset, or the folder is that of the shards.
    ShardError
        There are no shards, shards are missing, the shards belong to different sets, or only the
        manifest of a build of this toolkit is missing.
    AnnotationsError
        There is no manifest and the tags are unknown.
    """
    check_data_dir(data_dir)
    given, data_dir = data_dir, Path(data_dir)
    folder = data_dir / SHARD_FOLDER
    if not exists(folder) and not exists(data_dir / ANNOTATIONS_NAME):
        raise missing_dataset(given)  # Path would drop a slash of an address
    shards = find_shards(folder) if exists(folder) else {}
    if not any(shards.values()):
        raise ShardError(
            f"{folder}: no shards: build them with: python build_mtt.py --data-dir {data_dir}"
        )
    manifest_path = folder / MANIFEST_NAME
    if manifest_path.exists():
        return _dataset_from_manifest(data_dir, shards, read_manifest(manifest_path))
    return _dataset_from_headers(data_dir, shards)


def _dataset_from_manifest(data_dir: Path, shards: dict, manifest: dict) -> Dataset:
    splits = {}
    for split in SPLITS:
        listed = manifest["splits"].get(split, {"clips": 0, "segments": 0, "shards": []})
        names = {shard["name"] for shard in listed["shards"]}
        found = {path.name for path in shards[split]}
        if names != found:
            odd = sorted(names ^ found)[0]
            state = "missing" if odd in names else f"not in {MANIFEST_NAME}"
            raise ShardError(
                f"{data_dir / SHARD_FOLDER}: {odd} is {state}: the {split} shards and the manifest "
                "do not match: run build_mtt.py again"
            )
        _check_file_sizes(shards[split], listed["shards"])
        splits[split] = Split(shards[split], listed["clips"], listed["segments"])
    return Dataset(
        path=data_dir,
        tags=tuple(manifest["tags"]),
        sample_rate=manifest["sample_rate"],
        num_samples=manifest["num_samples"],
        splits=splits,
    )


def _check_file_sizes(paths: list[Path], entries: list[dict]) -> None:
    """Compare sizes with the manifest: headers do not show truncation at the end of a record."""
    # Manifests of earlier versions do not contain sizes.
    expected = {entry["name"]: entry.get("bytes") for entry in entries}
    for path in paths:
        num_bytes = path.stat().st_size
        if expected[path.name] not in (None, num_bytes):
            raise ShardError(
                f"{path}: {num_bytes} bytes, but {MANIFEST_NAME} lists {expected[path.name]}: the "
                "shard is truncated or belongs to another build: run build_mtt.py again to rebuild "
                "this shard"
            )


def _dataset_from_headers(data_dir: Path, shards: dict) -> Dataset:
    splits = {}
    for split in SPLITS:
        count = sum(len(index_records(path)) for path in shards[split])
        if split == "test":
            splits[split] = Split(shards[split], num_clips=count, num_segments=None)
        else:
            splits[split] = Split(shards[split], num_clips=None, num_segments=count)
    first = next(path for split in SPLITS for path in shards[split])
    clip = next(read_clips([first]), None)
    if clip is None:
        raise ShardError(f"{first}: the shard contains no records: run build_mtt.py again")
    # Only records of this toolkit contain a clip_id. Without their manifest, they would be trained
    # as MagnaTagATune at 22,050 Hz.
    if clip.clip_id:
        raise ShardError(
            f"{data_dir / SHARD_FOLDER}: {MANIFEST_NAME} is missing: run build_mtt.py again, or "
            "copy the file from where the shards come from"
        )
    return Dataset(
        path=data_dir,
        tags=_tags_of_annotations(data_dir, len(clip.labels)),
        sample_rate=SAMPLE_RATE,  # published shards do not contain their sample rate
        num_samples=clip.segments.shape[1],
        splits=splits,
    )


def _tags_of_annotations(data_dir: Path, num_tags: int) -> tuple[str, ...]:
    annotations_path = data_dir / ANNOTATIONS_NAME
    if annotations_path.exists():
        return read_tables([annotations_path], num_tags)[0].tags
    if num_tags == len(MTT_TOP_TAGS):
        return MTT_TOP_TAGS
    raise AnnotationsError(
        f"{annotations_path}: no such file, but shards without a manifest do not name their "
        f"{num_tags} tags: copy the table that the shards were built from to this path"
    )


def hash_dataset(dataset: Dataset, splits: Iterable[str] = SPLITS) -> str:
    """Return a hash that identifies the content of splits, as 64 hexadecimal digits.

    The hash covers tags, sample rate, length of segments, and the names and record checksums of all
    shards. It does not depend on path, time or package versions; the options of the build matter
    through the records.
    """
    described = json.dumps([dataset.tags, dataset.sample_rate, dataset.num_samples])
    digest = hashlib.sha256(described.encode())
    for split in splits:
        for path in dataset.splits[split].shards:
            digest.update(path.name.encode() + read_checksums(path))
    return digest.hexdigest()


# --- Clips ---------------------------------------------------------------------------------------


def read_clips(
    shards: Iterable[str | Path], num_samples: int | None = None, num_tags: int | None = None
) -> Iterator[Clip]:
    """Yield the clips of shards in order.

    Parameters
    ----------
    shards : iterable of str or Path
        Shards of any split.
    num_samples, num_tags : int or None
        Expected samples per segment and number of labels; None for those of the first record.

    Yields
    ------
    Clip
        Consecutive segments with the same ``clip_id``. A clip longer than `audio.PART_SAMPLES`
        comes in several parts. Each segment without a ``clip_id``, as in training shards of
        the published program, is yielded as a clip.

    Raises
    ------
    ShardError
        A record is damaged or has another shape.
    """
    for path in shards:
        pending, num_pending = [], 0  # records of a part, which is yielded when complete
        for number, record in enumerate(read_records(path)):
            clip = decode_record(record, path, number, num_samples, num_tags)
            del record  # free its memory before the next record is read
            num_samples, num_tags = clip.segments.shape[1], len(clip.labels)
            if pending:
                # Published training records have no identity: neighbours may be of different clips.
                is_same = clip.clip_id != "" and clip.clip_id == pending[0].clip_id
                # A track of several hours would fill the memory.
                is_full = num_pending + len(clip.segments) > segments_per_part(num_samples)
                if is_full or not is_same:
                    yield _join(pending)
                    clip.part = pending[0].part + 1 if is_same else 0
                    pending, num_pending = [], 0
            pending.append(clip)
            num_pending += len(clip.segments)
        if pending:
            yield _join(pending)


def _join(pending: list[Clip]) -> Clip:
    if len(pending) == 1:
        return pending[0]
    return replace(pending[0], segments=np.concatenate([clip.segments for clip in pending]))


# --- Training batches ----------------------------------------------------------------------------


class SegmentReader:
    """Random access to the segments of training or validation shards.

    Parameters
    ----------
    dataset : Dataset
        Dataset to read.
    split : {'train', 'val'}
        Split to read.
    num_threads : int
        Threads that read records.

    Attributes
    ----------
    num_segments, num_samples, num_tags : int
        Segments of the split, samples per segment, and number of tags.

    Raises
    ------
    ShardError
        A shard is damaged, or the number of segments differs from that in the manifest.
    """

    def __init__(self, dataset: Dataset, split: str = "train", num_threads: int = 8):
        self._paths = dataset.splits[split].shards
        self.num_samples = dataset.num_samples
        self.num_tags = len(dataset.tags)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="read")
        allow_open_files(len(self._paths))
        # A shuffled batch reads from any shard, so all stay open.
        self._files = [open(path, "rb", buffering=0) for path in self._paths]  # noqa: SIM115
        indexes = list(self._threads.map(index_records, self._paths))
        # One row per segment: shard, record number in the shard, offset and length in bytes.
        self._records = np.concatenate(
            [
                np.column_stack([np.full(len(index), shard), np.arange(len(index)), index])
                for shard, index in enumerate(indexes)
            ]
            or [np.zeros((0, 4), np.int64)]  # np.concatenate needs an array
        )
        # Manifests of earlier versions contain counts, but no sizes.
        expected = dataset.splits[split].num_segments
        if expected is not None and self.num_segments != expected:
            self.close()
            raise ShardError(
                f"{dataset.path / SHARD_FOLDER}: {self.num_segments} {split} segments, but "
                f"{MANIFEST_NAME} lists {expected}: delete this folder and run build_mtt.py again"
            )

    @property
    def num_segments(self) -> int:
        return len(self._records)

    @cached_property
    def stored_type(self) -> type:
        """np.int16 if the first record of every shard stores int16, otherwise np.float32."""
        # int16 is converted on the device, since half the bytes are copied until then.
        firsts = self._records[self._records[:, 1] == 0]
        for shard, *place in firsts.tolist():
            path = self._paths[shard]
            record = read_record(self._files[shard], path, *place)
            if record_encoding(record, path, place[0]) != "int16":
                return np.float32
        return np.int16

    def close(self) -> None:
        """Close the shards and stop the threads."""
        self._threads.shutdown(cancel_futures=True)
        for file in self._files:
            file.close()

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read segments by number.

        Parameters
        ----------
        rows : np.ndarray [shape=(n,), dtype=int]
            Numbers of the segments, from 0 to ``num_segments`` - 1.

        Returns
        -------
        segments : np.ndarray [shape=(n, n_samples), dtype=float32 or int16]
            Samples of `stored_type`: full scale is 1 in float32, 32,768 in int16.
        labels : np.ndarray [shape=(n, n_tags), dtype=float32]
            0 or 1.

        Raises
        ------
        ShardError
            A record is damaged or has another shape.
        """
        # TensorFlow uses aligned memory without copying it, which would take as long as reading.
        size = len(rows) * self.num_samples * np.dtype(self.stored_type).itemsize
        memory = np.empty(size + ALIGNMENT, np.uint8)
        memory = memory[-memory.ctypes.data % ALIGNMENT :][:size]
        segments = memory.view(self.stored_type).reshape(len(rows), self.num_samples)
        labels = np.empty((len(rows), self.num_tags), np.float32)
        for place, (shard, *record) in enumerate(self._records[rows].tolist()):
            file, path = self._files[shard], self._paths[shard]
            read_segment(file, path, *record, segments[place], labels[place])
        return segments, labels

    def batches(
        self,
        batch_size: int,
        order: np.ndarray,
        prefetch: int = 4,
        drop_remainder: bool = True,
        place: Callable[[np.ndarray, np.ndarray], tuple] | None = None,
    ) -> Iterator[tuple]:
        """Yield batches in the given order, prefetched by the threads.

        Parameters
        ----------
        batch_size : int
            Segments per batch.
        order : np.ndarray [shape=(n,), dtype=int]
            Numbers of the segments (see `shuffled_order`).
        prefetch : int
            Number of batches to read ahead.
        drop_remainder : bool
            Drop the last batch if it is smaller.
        place : callable or None
            Called with the segments and labels of each batch, in the thread that read them. Its
            result is yielded instead.

        Yields
        ------
        segments, labels : np.ndarray
            As `read` returns them.
        """
        # A compiled network needs batches of one size.
        stop = len(order) - batch_size + 1 if drop_remainder else len(order)
        pending = []

        def read(rows: np.ndarray) -> tuple:
            return place(*self.read(rows)) if place else self.read(rows)

        for start in range(0, stop, batch_size):
            rows = order[start : start + batch_size]
            pending.append(self._threads.submit(read, rows))
            if len(pending) > prefetch:
                # In order, so that the result does not depend on the number of threads.
                yield pending.pop(0).result()
        for batch in pending:
            yield batch.result()


def shuffled_order(num_segments: int, seed: int, stage: int, epoch: int) -> np.ndarray:
    """Return a random permutation of the segments; equal for equal seed, stage and epoch."""
    # No state from earlier epochs, so that a resumed training continues in the same order.
    return np.random.default_rng((seed, stage, epoch)).permutation(num_segments)
