"""The shards: their names, records and manifest, written and read here only; and training batches.

A shard is a TFRecord file: per record a little-endian uint64 length, its masked CRC-32C, the
bytes, and their masked CRC-32C. Training and validation shards hold one ``tf.train.Example`` a
segment, test shards one ``tf.train.SequenceExample`` a clip, or of a clip longer than
`audio.PART_SAMPLES` one a part:

==============  ==========================================  ===============================
feature         ``Example`` (train, val)                    ``SequenceExample`` (test)
==============  ==========================================  ===============================
raw_labels      bytes: one uint8 a tag                      the same, in the context
raw_segment(s)  bytes: float32 samples of the segment       feature list, one entry a segment
clip_id         bytes, ours only                            the same, in the context
mp3_path        bytes, ours only                            the same, in the context
encoding        bytes, only where samples are not float32   the same, in the context
==============  ==========================================  ===============================

``manifest.json`` beside the shards says what they hold. Shards without one, as the published
program leaves them, are counted from their record headers, and test clips by their names where
records have them.

Nothing here needs TensorFlow: records are random-accessed by an index of their headers, so an
epoch is a perfect shuffle that holds a few batches in memory.
"""

import json
import os
import re
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import BinaryIO

from toolkit.data.annotations import (
    ANNOTATIONS_NAME,
    MTT_TOP_TAGS,
    SPLITS,
    missing_dataset_message,
    read_mtt,
)
from toolkit.data.audio import SAMPLE_RATE, segments_a_part
from toolkit.errors import AnnotationsError, ShardError
from toolkit.files import allow_open_files, write_atomically, written_whole

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

SHARD_FOLDER = "tfrecord"
MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1

LABELS_FEATURE = "raw_labels"
SEGMENT_FEATURE = "raw_segment"
SEGMENTS_FEATURE = "raw_segments"
CLIP_ID_FEATURE = "clip_id"
MP3_PATH_FEATURE = "mp3_path"
ENCODING_FEATURE = "encoding"

# How samples are stored. As int16 they take half the space and are rounded to the nearest of
# 65,536 levels: at most 2^-16 away, or clipped where a resampled peak goes over full scale.
ENCODINGS = ("float32", "int16")
INT16_SCALE = 32768

_SHARD_NAME = re.compile(r"(train|val|test)-(\d{4,})-of-(\d{4,})(\.seq)?\.tfrecord")
_HEADER = struct.Struct("<QI")  # length, masked CRC of the length
_FOOTER = struct.Struct("<I")  # masked CRC of the bytes


@dataclass
class Clip:
    """A clip as the shards hold it, or a part of a long one.

    Attributes
    ----------
    segments : np.ndarray [shape=(n_segments, n_samples), dtype=float32]
        Consecutive segments.
    labels : np.ndarray [shape=(n_tags,), dtype=uint8]
        1 where the clip carries the tag.
    clip_id, mp3_path : str
        Its identity; empty in shards of the published program.
    part : int
        0 for a clip, or its first part; a part that follows goes on with the clip before it.
    """

    segments: np.ndarray
    labels: np.ndarray
    clip_id: str = ""
    mp3_path: str = ""
    part: int = 0


@dataclass
class Split:
    """One split's shards and what they hold."""

    shards: list[Path] = field(default_factory=list)
    num_clips: int | None = 0  # unknown (None) for training shards of the published program
    num_segments: int | None = 0  # unknown (None) for its test shards


@dataclass
class Dataset:
    """What a folder of shards holds: the tags in order, the segment's length, and the splits."""

    path: Path
    tags: tuple[str, ...]
    sample_rate: int
    num_samples: int
    splits: dict[str, Split]


def shard_name(split: str, shard: int, num_shards: int) -> str:
    """Name a shard, such as ``train-0000-of-0152.tfrecord``; a test shard ends in .seq.tfrecord."""
    suffix = ".seq.tfrecord" if split == "test" else ".tfrecord"
    return f"{split}-{shard:04d}-of-{num_shards:04d}{suffix}"


# --- Reading a folder of shards --------------------------------------------------------------


def open_dataset(data_dir: str | Path) -> Dataset:
    """Find the shards of a dataset and what they hold.

    Parameters
    ----------
    data_dir : str or Path
        The dataset's folder, which holds ``tfrecord/``.

    Returns
    -------
    Dataset
        From ``manifest.json`` where there is one; otherwise counted from record headers, with the
        tags of ``annotations_final.csv`` (or MagnaTagATune's, where 50 labels fit).

    Raises
    ------
    ShardError
        There are no shards, shards are missing, or the set is mixed.
    """
    data_dir = Path(data_dir)
    folder = data_dir / SHARD_FOLDER
    if not data_dir.is_dir() or not (folder.is_dir() or (data_dir / ANNOTATIONS_NAME).exists()):
        raise ShardError(missing_dataset_message(data_dir))
    shards = _find_shards(folder)
    if not any(shards.values()):
        raise ShardError(
            f"{folder}: no shards here: make them with: python build_mtt.py --data-dir {data_dir}"
        )
    manifest_path = folder / MANIFEST_NAME
    if manifest_path.exists():
        return _dataset_from_manifest(data_dir, shards, read_manifest(manifest_path))
    return _dataset_from_headers(data_dir, shards)


def read_manifest(path: str | Path) -> dict:
    """Read ``manifest.json``.

    Raises
    ------
    ShardError
        It is not a manifest of a format we know.
    """
    try:
        manifest = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ShardError(f"{path}: not JSON ({error}): build the shards again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise ShardError(f"{path}: not a manifest of format {MANIFEST_FORMAT}")
    missing = {"tags", "sample_rate", "num_samples", "splits"} - manifest.keys()
    if missing:
        raise ShardError(f"{path}: the manifest lacks {', '.join(sorted(missing))}")
    is_sound = (
        isinstance(manifest["tags"], list)
        and all(isinstance(tag, str) for tag in manifest["tags"])
        and all(_is_count(manifest[name]) for name in ("sample_rate", "num_samples"))
    )
    if not is_sound:
        raise ShardError(f"{path}: tags, sample_rate or num_samples are not what they should be")
    try:
        for split in manifest["splits"].values():
            is_sound &= _is_count(split["clips"]) and _is_count(split["segments"])
            for shard in split["shards"]:
                is_sound &= isinstance(shard["name"], str) and _is_count(shard.get("bytes", 0))
    except (AttributeError, KeyError, TypeError):
        is_sound = False
    if not is_sound:
        raise ShardError(f"{path}: the manifest does not list the splits' shards")
    return manifest


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def write_manifest(folder: str | Path, manifest: dict) -> None:
    """Write ``manifest.json``, whole or not at all."""
    content = json.dumps({"format": MANIFEST_FORMAT} | manifest, indent=1, ensure_ascii=False)
    # A name that is no UTF-8 has surrogates, which JSON knows as escapes.
    encoded = content.encode(errors="backslashreplace")
    write_atomically(Path(folder) / MANIFEST_NAME, encoded + b"\n")


def _find_shards(folder: Path) -> dict[str, list[Path]]:
    found = {split: {} for split in SPLITS}
    totals = {split: set() for split in SPLITS}
    for path in folder.glob("*.tfrecord"):
        match = _SHARD_NAME.fullmatch(path.name)
        if not match:
            continue
        split, shard, total, _ = match.groups()
        if path.name != shard_name(split, int(shard), int(total)) or int(shard) >= int(total):
            raise ShardError(
                f"{path}: a shard of no set, expected such as {shard_name(split, 0, int(total))}: "
                "keep one set or build again"
            )
        found[split][int(shard)] = path
        totals[split].add(int(total))
    for split, paths in found.items():
        if not paths:
            continue
        if len(totals[split]) > 1:
            sizes = " and ".join(f"of {total:04d}" for total in sorted(totals[split]))
            raise ShardError(
                f"{folder}: {split} shards of different sets ({sizes}): keep one set or build again"
            )
        missing = sorted(set(range(totals[split].pop())) - paths.keys())
        if missing:
            raise ShardError(
                f"{folder}: {len(missing)} of the {split} shards missing, the first is "
                f"{missing[0]:04d}: run build_mtt.py again, it makes the missing ones"
            )
    return {split: [paths[shard] for shard in sorted(paths)] for split, paths in found.items()}


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
                "do not belong together; build again"
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
    """A file that ends where a record does looks whole: the manifest knows better."""
    expected = {entry["name"]: entry.get("bytes") for entry in entries}
    for path in paths:
        num_bytes = path.stat().st_size
        # Manifests of earlier builds do not say it.
        if expected[path.name] not in (None, num_bytes):
            raise ShardError(
                f"{path}: {num_bytes} bytes, {MANIFEST_NAME} says {expected[path.name]}: cut short "
                "or of another build: run build_mtt.py again, it makes this shard anew"
            )


def _dataset_from_headers(data_dir: Path, shards: dict) -> Dataset:
    splits = {}
    for split in SPLITS:
        if split == "test":
            count = sum(_count_clips(path) for path in shards[split])
            splits[split] = Split(shards[split], num_clips=count, num_segments=None)
        else:
            count = sum(len(index_records(path)) for path in shards[split])
            splits[split] = Split(shards[split], num_clips=None, num_segments=count)
    first = next(path for split in SPLITS for path in shards[split])
    clip = next(read_clips([first]), None)
    if clip is None:
        raise ShardError(f"{first}: the shard holds no records")
    return Dataset(
        path=data_dir,
        tags=_tags_beside(data_dir, len(clip.labels)),
        sample_rate=SAMPLE_RATE,  # the published program's; its shards do not say
        num_samples=clip.segments.shape[1],
        splits=splits,
    )


def _tags_beside(data_dir: Path, num_tags: int) -> tuple[str, ...]:
    annotations_path = data_dir / ANNOTATIONS_NAME
    if annotations_path.exists():
        return read_mtt(annotations_path, num_tags)[1]
    if num_tags == len(MTT_TOP_TAGS):
        return MTT_TOP_TAGS
    raise AnnotationsError(
        f"{annotations_path}: no such file, and shards without a manifest do not say what their "
        f"{num_tags} tags are"
    )


# --- Records -----------------------------------------------------------------------------------


def index_records(path: str | Path) -> np.ndarray:
    """Find the records of a shard from their headers, without reading the samples.

    Parameters
    ----------
    path : str or Path
        A shard.

    Returns
    -------
    np.ndarray [shape=(n_records, 2), dtype=int64]
        Offset of each record's bytes in the file, and their number.

    Raises
    ------
    ShardError
        A header is damaged or the file is cut short.
    """
    records = []
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        position = 0
        while position < size:
            header = os.pread(file.fileno(), _HEADER.size, position)
            if len(header) < _HEADER.size:
                raise _damaged(path, len(records), "the file is cut short")
            length, length_crc = _HEADER.unpack(header)
            if _masked_crc(header[:8]) != length_crc:
                raise _damaged(path, len(records), "its length is damaged")
            start = position + _HEADER.size
            position = start + length + _FOOTER.size
            if position > size:
                raise _damaged(path, len(records), "the file is cut short")
            records.append((start, length))
    return np.array(records, dtype=np.int64).reshape(-1, 2)


def _count_clips(path: str | Path) -> int:
    """Count a test shard's clips: neighbouring records of one clip_id are one."""
    count, previous = 0, b""
    with open(path, "rb", buffering=0) as file:
        for start, length in index_records(path):
            clip_id = _peek_clip_id(file.fileno(), int(start), int(length))
            count += not clip_id or clip_id != previous
            previous = clip_id
    return count


def _peek_clip_id(fd: int, start: int, length: int) -> bytes:
    """Read a test record's clip_id from its context, which stands first; without its samples."""
    prefix = os.pread(fd, min(length, 11), start)  # field 1, and a length of up to ten bytes
    if prefix[:1] != b"\x0a":
        return b""
    size = position = 0
    for position, byte in enumerate(prefix[1:]):
        size |= (byte & 0x7F) << 7 * position
        if byte < 0x80:
            break
    content = os.pread(fd, min(size, length), start + position + 2)
    try:
        context = _messages()["Features"].FromString(content)
    except DecodeError:
        return b""  # who reads the record will say so
    values = context.feature[CLIP_ID_FEATURE].bytes_list.value
    return values[0] if values else b""


def read_records(path: str | Path) -> Iterator[bytes]:
    """Yield the records of a shard in order, each checked against its CRC."""
    index = index_records(path)
    with open(path, "rb", buffering=0) as file:
        for number, (start, length) in enumerate(index):
            yield _read_record(file.fileno(), path, number, int(start), int(length))


def write_records(path: str | Path, records: Iterable[bytes]) -> None:
    """Write a shard: it appears under its name only when complete and flushed to the disk."""
    with written_whole(Path(path)) as file:
        append_records(file, records)


def append_records(file: BinaryIO, records: Iterable[bytes]) -> None:
    """Write records where a shard's file stands (see `written_whole`)."""
    for record in records:
        header = struct.pack("<Q", len(record))
        file.write(header + _FOOTER.pack(_masked_crc(header)))
        file.write(record)
        file.write(_FOOTER.pack(_masked_crc(record)))


def encode_clip(clip: Clip, split: str, encoding: str = "float32") -> Iterator[bytes]:
    """Yield a clip's records: one ``Example`` a segment, or for test one ``SequenceExample``.

    Parameters
    ----------
    clip : Clip
        The clip, or a part of it (see `audio.cut_pieces`).
    split : {'train', 'val', 'test'}
        Which form its shard has.
    encoding : {'float32', 'int16'}
        How samples are stored; only readers of ours know int16.
    """
    context = {
        LABELS_FEATURE: np.asarray(clip.labels, np.uint8).tobytes(),
        CLIP_ID_FEATURE: clip.clip_id.encode(),
        MP3_PATH_FEATURE: clip.mp3_path.encode(),
    }
    if encoding == "int16":
        context[ENCODING_FEATURE] = encoding.encode()
        levels = np.clip(np.rint(clip.segments * INT16_SCALE), -INT16_SCALE, INT16_SCALE - 1)
        segments = (segment.tobytes() for segment in levels.astype("<i2"))
    else:
        segments = (np.ascontiguousarray(segment, "<f4").tobytes() for segment in clip.segments)
    if split == "test":
        record = _messages()["SequenceExample"]()
        for name, value in context.items():
            record.context.feature[name].bytes_list.value.append(value)
        for segment in segments:
            entry = record.feature_lists.feature_list[SEGMENTS_FEATURE].feature.add()
            entry.bytes_list.value.append(segment)
        yield record.SerializeToString(deterministic=True)
        return
    for segment in segments:
        record = _messages()["Example"]()
        for name, value in (context | {SEGMENT_FEATURE: segment}).items():
            record.features.feature[name].bytes_list.value.append(value)
        yield record.SerializeToString(deterministic=True)


def read_clips(
    shards: Iterable[str | Path], num_samples: int | None = None, num_tags: int | None = None
) -> Iterator[Clip]:
    """Yield the clips of shards in order.

    Parameters
    ----------
    shards : iterable of str or Path
        Shards of any split.
    num_samples, num_tags : int or None
        The length that every segment must have, and the number of labels; None takes the first
        record's.

    Yields
    ------
    Clip
        Consecutive segments of one ``clip_id`` make a clip, which comes in several parts where it
        is longer than `audio.PART_SAMPLES`; a segment that does not say its clip (the published
        training shards) is yielded alone.

    Raises
    ------
    ShardError
        A record is damaged, or unlike the others.
    """
    for path in shards:
        is_sequence = str(path).endswith(".seq.tfrecord")
        pending, num_pending = [], 0  # a part, which is yielded once it is known to be whole
        for number, record in enumerate(read_records(path)):
            clip = (_decode_sequence if is_sequence else _decode_example)(record, path, number)
            del record  # or it would be held while the next is read
            num_samples = clip.segments.shape[1] if num_samples is None else num_samples
            num_tags = len(clip.labels) if num_tags is None else num_tags
            _check_shape(clip, num_samples, num_tags, path, number)
            if pending:
                goes_on = clip.clip_id != "" and clip.clip_id == pending[0].clip_id
                is_full = num_pending + len(clip.segments) > segments_a_part(num_samples)
                if is_full or not goes_on:
                    yield _join(pending)
                    clip.part = pending[0].part + 1 if goes_on else 0
                    pending, num_pending = [], 0
            pending.append(clip)
            num_pending += len(clip.segments)
        if pending:
            yield _join(pending)


def _join(pending: list[Clip]) -> Clip:
    if len(pending) == 1:
        return pending[0]
    return replace(pending[0], segments=np.concatenate([clip.segments for clip in pending]))


def _read_record(fd: int, path: str | Path, number: int, start: int, length: int) -> bytes:
    record = os.pread(fd, length + _FOOTER.size, start)
    if len(record) < length + _FOOTER.size:
        raise _damaged(path, number, "the file is cut short")
    content = memoryview(record)[:length]
    if _masked_crc(content) != _FOOTER.unpack_from(record, length)[0]:
        raise _damaged(path, number, "its bytes do not match their checksum")
    return content


def _decode_example(record: bytes, path: str | Path, number: int) -> Clip:
    features = _parse("Example", record, path, number).features.feature
    segment = _bytes_of(features, SEGMENT_FEATURE, path, number)
    samples = _samples(segment, features, path, number)
    return _clip(samples[np.newaxis], features, path, number)


def _decode_sequence(record: bytes, path: str | Path, number: int) -> Clip:
    message = _parse("SequenceExample", record, path, number)
    entries = message.feature_lists.feature_list.get(SEGMENTS_FEATURE)
    if entries is None or not entries.feature:
        raise _damaged(path, number, f"no feature list {SEGMENTS_FEATURE!r}")
    values = [entry.bytes_list.value[0] for entry in entries.feature if entry.bytes_list.value]
    if len(values) != len(entries.feature) or len({len(value) for value in values}) > 1:
        raise _damaged(path, number, f"segments of different lengths in {SEGMENTS_FEATURE!r}")
    features = message.context.feature
    samples = _samples(b"".join(values), features, path, number)
    segments = samples.reshape(len(values), -1)  # (num_segments, num_samples)
    return _clip(segments, features, path, number)


def _parse(kind: str, record: bytes, path: str | Path, number: int) -> Message:
    message = _messages()[kind]()
    try:
        message.ParseFromString(record)
    except DecodeError:
        raise _damaged(path, number, f"not a tf.train.{kind}") from None
    return message


def _bytes_of(features, name: str, path: str | Path, number: int) -> bytes:
    feature = features.get(name)
    if feature is None or len(feature.bytes_list.value) != 1:
        raise _damaged(path, number, f"no feature {name!r} of bytes")
    return feature.bytes_list.value[0]


def _encoding_of(features, path: str | Path, number: int) -> str:
    encoding = "float32"
    if ENCODING_FEATURE in features:
        encoding = _bytes_of(features, ENCODING_FEATURE, path, number).decode(errors="replace")
    if encoding not in ENCODINGS:
        raise _damaged(path, number, f"samples are encoded as {encoding!r}")
    return encoding


def _samples(content: bytes, features, path: str | Path, number: int) -> np.ndarray:
    encoding = _encoding_of(features, path, number)
    itemsize = np.dtype(encoding).itemsize
    if not content or len(content) % itemsize:
        raise _damaged(path, number, f"{len(content)} bytes of samples are not {encoding} values")
    if encoding == "int16":
        return np.frombuffer(content, "<i2").astype(np.float32) / np.float32(INT16_SCALE)
    return np.frombuffer(content, "<f4")


def _clip(segments: np.ndarray, features, path: str | Path, number: int) -> Clip:
    labels = np.frombuffer(_bytes_of(features, LABELS_FEATURE, path, number), np.uint8)
    identity = [
        _bytes_of(features, name, path, number).decode(errors="replace") if name in features else ""
        for name in (CLIP_ID_FEATURE, MP3_PATH_FEATURE)
    ]
    return Clip(segments, labels, *identity)


def _check_shape(clip: Clip, num_samples: int, num_tags: int, path: str | Path, number: int):
    if clip.segments.shape[1] != num_samples:
        raise _damaged(
            path, number, f"segments of {clip.segments.shape[1]} samples, expected {num_samples}"
        )
    if len(clip.labels) != num_tags:
        raise _damaged(path, number, f"labels of {len(clip.labels)} tags, expected {num_tags}")


def _damaged(path: str | Path, number: int, reason: str) -> ShardError:
    return ShardError(
        f"{path}: record {number}: {reason}: delete this shard and run build_mtt.py again"
    )


def _masked_crc(content: bytes) -> int:
    # TFRecord's masking: a CRC of bytes that hold CRCs would else be a constant.
    crc = google_crc32c.value(bytes(content) if isinstance(content, memoryview) else content)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@cache
def _messages() -> dict[str, type[Message]]:
    """Describe ``tf.train.Example`` and ``SequenceExample`` to protobuf, without TensorFlow.

    The field numbers are those of TensorFlow's ``example.proto`` and ``feature.proto``; only
    bytes are ever stored, so the two other kinds of list are left undescribed.
    """
    file = descriptor_pb2.FileDescriptorProto(name="shard.proto", package="shard", syntax="proto3")
    field_type = descriptor_pb2.FieldDescriptorProto

    def message(name: str, *fields: tuple) -> descriptor_pb2.DescriptorProto:
        result = file.message_type.add(name=name)
        for field_name, number, kind, is_repeated in fields:
            added = result.field.add(name=field_name, number=number)
            added.label = field_type.LABEL_REPEATED if is_repeated else field_type.LABEL_OPTIONAL
            if kind == "bytes":
                added.type = field_type.TYPE_BYTES
            else:
                added.type, added.type_name = field_type.TYPE_MESSAGE, f".shard.{kind}"
        return result

    def string_map(name: str, field_name: str, value: str) -> None:
        owner = message(name, (field_name, 1, f"{name}.Entry", True))
        entry = owner.nested_type.add(name="Entry")
        entry.options.map_entry = True
        entry.field.add(
            name="key", number=1, type=field_type.TYPE_STRING, label=field_type.LABEL_OPTIONAL
        )
        entry.field.add(
            name="value", number=2, type=field_type.TYPE_MESSAGE, type_name=f".shard.{value}",
            label=field_type.LABEL_OPTIONAL,
        )  # fmt: skip

    message("BytesList", ("value", 1, "bytes", True))
    message("Feature", ("bytes_list", 1, "BytesList", False))
    message("FeatureList", ("feature", 1, "Feature", True))
    string_map("Features", "feature", "Feature")
    string_map("FeatureLists", "feature_list", "FeatureList")
    message("Example", ("features", 1, "Features", False))
    message(
        "SequenceExample",
        ("context", 1, "Features", False),
        ("feature_lists", 2, "FeatureLists", False),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"shard.{name}"))
        for name in ("Example", "SequenceExample", "Features")
    }


# --- Training batches --------------------------------------------------------------------------


class SegmentReader:
    """Random access to the segments of training shards.

    Parameters
    ----------
    dataset : Dataset
        What the shards hold.
    split : {'train', 'val'}
        Which shards.
    num_threads : int
        Threads that read records.

    Attributes
    ----------
    num_segments, num_samples, num_tags : int
        Segments of the split, samples a segment, and tags.
    """

    def __init__(self, dataset: Dataset, split: str = "train", num_threads: int = 8):
        self._paths = dataset.splits[split].shards
        self.num_samples = dataset.num_samples
        self.num_tags = len(dataset.tags)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="read")
        allow_open_files(len(self._paths))
        self._files = [open(path, "rb", buffering=0) for path in self._paths]  # noqa: SIM115
        indexes = list(self._threads.map(index_records, self._paths))
        # One row a segment: shard, number in the shard, offset, length.
        self._records = np.concatenate(
            [
                np.column_stack([np.full(len(index), shard), np.arange(len(index)), index])
                for shard, index in enumerate(indexes)
            ]
            or [np.zeros((0, 4), np.int64)]
        )
        expected = dataset.splits[split].num_segments
        if expected is not None and self.num_segments != expected:
            # A file that ends where a record does looks whole.
            self.close()
            raise ShardError(
                f"{dataset.path / SHARD_FOLDER}: holds {self.num_segments} {split} segments, "
                f"{MANIFEST_NAME} says {expected}: delete this folder and run build_mtt.py again"
            )

    @property
    def num_segments(self) -> int:
        return len(self._records)

    def is_int16(self) -> bool:
        """Whether all shards store samples as int16, by their first records."""
        firsts = self._records[self._records[:, 1] == 0]
        return all(self._encoding(row) == "int16" for row in firsts)

    def _encoding(self, row: np.ndarray) -> str:
        shard, number, start, length = (int(value) for value in row)
        path = self._paths[shard]
        record = _read_record(self._files[shard].fileno(), path, number, start, length)
        return _encoding_of(_parse("Example", record, path, number).features.feature, path, number)

    def close(self) -> None:
        """Close the shards and end the threads."""
        self._threads.shutdown(cancel_futures=True)
        for file in self._files:
            file.close()

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read segments by number.

        Parameters
        ----------
        rows : np.ndarray [shape=(n,), dtype=int]
            Which segments, from 0 to ``num_segments`` - 1.

        Returns
        -------
        segments : np.ndarray [shape=(n, n_samples), dtype=float32]
            Samples.
        labels : np.ndarray [shape=(n, n_tags), dtype=float32]
            0 or 1.
        """
        segments = np.empty((len(rows), self.num_samples), np.float32)
        labels = np.empty((len(rows), self.num_tags), np.float32)
        for place, row in enumerate(rows):
            shard, number, start, length = (int(value) for value in self._records[row])
            path = self._paths[shard]
            record = _read_record(self._files[shard].fileno(), path, number, start, length)
            clip = _decode_example(record, path, number)
            _check_shape(clip, self.num_samples, self.num_tags, path, number)
            segments[place] = clip.segments[0]
            labels[place] = clip.labels
        return segments, labels

    def batches(
        self,
        batch_size: int,
        order: np.ndarray,
        prefetch: int = 4,
        drop_remainder: bool = True,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield batches of segments in the given order, read ahead by the threads.

        Parameters
        ----------
        batch_size : int
            Segments a batch.
        order : np.ndarray [shape=(n,), dtype=int]
            Segments of the epoch (see `shuffled_order`).
        prefetch : int
            Batches to hold ready.
        drop_remainder : bool
            Leave out a smaller last batch.
        """
        stop = len(order) - batch_size + 1 if drop_remainder else len(order)
        starts = range(0, stop, batch_size)
        pending = []
        for start in starts:
            rows = order[start : start + batch_size]
            pending.append(self._threads.submit(self.read, rows))
            if len(pending) > prefetch:
                yield pending.pop(0).result()
        for batch in pending:
            yield batch.result()


def shuffled_order(num_segments: int, seed: int, stage: int, epoch: int) -> np.ndarray:
    """Shuffle an epoch's segments perfectly; the same for the same seed, stage and epoch."""
    return np.random.default_rng((seed, stage, epoch)).permutation(num_segments)
