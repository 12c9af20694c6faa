"""The records of shards: TFRecord framing, checksums, and the messages that hold clips.

A shard is a TFRecord file. Each record consists of its length (little-endian uint64), the masked
CRC-32C of the length, the bytes, and the masked CRC-32C of the bytes. Training and validation
shards contain one ``tf.train.Example`` per segment. Test shards contain one
``tf.train.SequenceExample`` per clip; a clip longer than `audio.PART_SAMPLES` is divided into
several.

==============  ==========================================  =================================
feature         ``Example`` (train, val)                    ``SequenceExample`` (test)
==============  ==========================================  =================================
raw_labels      bytes: one uint8 per tag                    the same, in the context
raw_segment(s)  bytes: samples of the segment               feature list, one entry per segment
clip_id         bytes; not in published shards              the same, in the context
mp3_path        bytes; not in published shards              the same, in the context
encoding        bytes; only if samples are not float32      the same, in the context
==============  ==========================================  =================================
"""

import os
import struct
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO

from toolkit.data.clip import Clip
from toolkit.data.example_pb2 import Example, Features, SequenceExample
from toolkit.errors import ShardError

import crc32c
import numpy as np
from google.protobuf.message import DecodeError, Message

LABELS_FEATURE = "raw_labels"
SEGMENT_FEATURE = "raw_segment"
SEGMENTS_FEATURE = "raw_segments"
CLIP_ID_FEATURE = "clip_id"
MP3_PATH_FEATURE = "mp3_path"
ENCODING_FEATURE = "encoding"

# int16 halves the size. Samples are rounded to the nearest of 65,536 levels, with an error of at
# most 2^-16, or clipped where resampling raised a peak above full scale.
ENCODINGS = ("float32", "int16")
INT16_SCALE = 32768

_HEADER = struct.Struct("<QI")  # length, masked CRC of the length
_FOOTER = struct.Struct("<I")  # masked CRC of the bytes
_CHECKSUM_DIFFERS = "its bytes do not match their checksum"
# Full scale is 1. Larger samples come from damaged float files, and would dominate the training.
_LARGEST_SAMPLE = 100

# --- Framing -------------------------------------------------------------------------------------


def index_records(path: str | Path) -> np.ndarray:
    """Find the records of a shard by reading only their headers.

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
        A header is damaged or the file is truncated.
    """
    records = []
    # Without a buffer, which would read samples after each header of 12 bytes.
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        position = 0
        while position < size:
            header = os.pread(file.fileno(), _HEADER.size, position)
            if len(header) < _HEADER.size:
                raise _damaged(path, len(records), "the file is truncated")
            length, length_crc = _HEADER.unpack(header)
            if _masked_crc(header[:8]) != length_crc:
                raise _damaged(path, len(records), "the length field is damaged")
            start = position + _HEADER.size
            position = start + length + _FOOTER.size
            if position > size:
                raise _damaged(path, len(records), "the file is truncated")
            records.append((start, length))
    return np.array(records, dtype=np.int64).reshape(-1, 2)


def read_checksums(path: str | Path) -> bytes:
    """Return the checksums that follow the records of a shard, without reading the records."""
    index = index_records(path).tolist()
    with open(path, "rb", buffering=0) as file:
        return b"".join(
            os.pread(file.fileno(), _FOOTER.size, start + length) for start, length in index
        )


def read_records(path: str | Path) -> Iterator[memoryview]:
    """Yield the records of a shard in order; their checksums are verified."""
    index = index_records(path)
    with open(path, "rb", buffering=0) as file:
        for number, (start, length) in enumerate(index):
            yield read_record(file, path, number, int(start), int(length))


def read_record(
    file: BinaryIO, path: str | Path, number: int, start: int, length: int
) -> memoryview:
    """Read one record and verify its checksum.

    Parameters
    ----------
    file : binary file
        The open shard. Threads may share the file, because reads do not use its position.
    path : str or Path
        Name of the shard, for errors.
    number, start, length : int
        Number of the record in the shard, and the two values of its row in `index_records`.

    Raises
    ------
    ShardError
        The record is damaged.
    """
    try:
        record = os.pread(file.fileno(), length + _FOOTER.size, start)
    except OSError as error:
        error.filename = str(path)
        raise
    if len(record) < length + _FOOTER.size:
        raise _damaged(path, number, "the file is truncated")
    # A slice of bytes would copy the samples.
    content = memoryview(record)[:length]
    if _masked_crc(content) != _FOOTER.unpack_from(record, length)[0]:
        raise _damaged(path, number, _CHECKSUM_DIFFERS)
    return content


def append_records(file: BinaryIO, records: Iterable[bytes]) -> None:
    """Write records to an open shard."""
    for record in records:
        header = struct.pack("<Q", len(record))
        file.write(header + _FOOTER.pack(_masked_crc(header)))
        file.write(record)
        file.write(_FOOTER.pack(_masked_crc(record)))


def _masked_crc(*parts) -> int:
    """Return the masked CRC-32C of consecutive buffers."""
    crc = 0
    for part in parts:
        crc = crc32c.crc32c(part, crc)
    # TFRecord masks checksums because the CRC of data that contains its own CRC is a constant.
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _damaged(path: str | Path, number: int, reason: str) -> ShardError:
    return ShardError(
        f"{path}: record {number}: {reason}: delete this shard and run build_mtt.py again"
    )


# --- Clips to records ----------------------------------------------------------------------------


def encode_clip(clip: Clip, split: str, encoding: str = "float32") -> Iterator[bytes]:
    """Yield the records of a clip: one ``Example`` per segment, or one ``SequenceExample``.

    Parameters
    ----------
    clip : Clip
        A clip, or a part of a long one (see `audio.cut_pieces`).
    split : {'train', 'val', 'test'}
        Split of the shard, which selects the type of message.
    encoding : {'float32', 'int16'}
        Type of the stored samples; the published program reads only float32.

    Yields
    ------
    bytes
        A record.
    """
    context = {
        LABELS_FEATURE: np.asarray(clip.labels, np.uint8).tobytes(),
        CLIP_ID_FEATURE: clip.clip_id.encode(),
        MP3_PATH_FEATURE: clip.mp3_path.encode(),
    }
    if encoding == "int16":
        # Records without this feature are float32, as published ones are.
        context[ENCODING_FEATURE] = encoding.encode()
        levels = np.clip(np.rint(clip.segments * INT16_SCALE), -INT16_SCALE, INT16_SCALE - 1)
        segments = (segment.tobytes() for segment in levels.astype("<i2"))
    else:
        # Little-endian on every machine, as the published program reads them.
        segments = (np.ascontiguousarray(segment, "<f4").tobytes() for segment in clip.segments)
    if split == "test":
        record = SequenceExample()
        _set_features(record.context, context)
        for segment in segments:
            entry = record.feature_lists.feature_list[SEGMENTS_FEATURE].feature.add()
            entry.bytes_list.value.append(segment)
        yield record.SerializeToString(deterministic=True)
        return
    for segment in segments:
        record = Example()
        _set_features(record.features, context | {SEGMENT_FEATURE: segment})
        # Features are sorted by name, so builds are reproducible and the samples come last.
        yield record.SerializeToString(deterministic=True)


def _set_features(features: Features, values: dict[str, bytes]) -> None:
    for name, value in values.items():
        features.feature[name].bytes_list.value.append(value)


# --- Records to clips ----------------------------------------------------------------------------


class _InvalidError(Exception):
    """The content of a record is invalid; the caller adds the shard and the record's number."""


def decode_record(
    record: bytes | memoryview,
    path: str | Path,
    number: int,
    num_samples: int | None = None,
    num_tags: int | None = None,
) -> Clip:
    """Decode a record.

    Parameters
    ----------
    record : bytes or memoryview
        Content of the record.
    path : str or Path
        Shard of the record; its name selects the type of message.
    number : int
        Number of the record in the shard, for errors.
    num_samples, num_tags : int or None
        Expected samples per segment and number of labels; None accepts any.

    Returns
    -------
    Clip
        A clip with one segment from a training or validation shard, or with all segments of a
        record of a test shard.

    Raises
    ------
    ShardError
        The record is damaged or has another shape.
    """
    try:
        clip = _decode_sequence(record) if _is_test_shard(path) else _decode_example(record)
        if num_samples not in (None, clip.segments.shape[1]):
            raise _InvalidError(
                f"segments of {clip.segments.shape[1]} samples, expected {num_samples}"
            )
        if num_tags not in (None, len(clip.labels)):
            raise _InvalidError(f"labels of {len(clip.labels)} tags, expected {num_tags}")
    except _InvalidError as error:
        raise _damaged(path, number, str(error)) from None
    return clip


def read_segment(
    file: BinaryIO,
    path: str | Path,
    number: int,
    start: int,
    length: int,
    samples: np.ndarray,
    labels: np.ndarray,
) -> None:
    """Read a training or validation record into rows of a batch, and verify its checksum.

    Samples at the end of a record, where `encode_clip` and the published program write them, are
    read directly into the row. A record of another layout is parsed.

    Parameters
    ----------
    file, path, number, start, length
        As for `read_record`.
    samples : np.ndarray [shape=(n_samples,), dtype=float32 or int16]
        Array to fill with the samples: full scale is 1 in float32, 32,768 in int16.
    labels : np.ndarray [shape=(n_tags,), dtype=float32]
        Array to fill with the labels.

    Raises
    ------
    ShardError
        The record is damaged, has another shape, or stores float32 and the array is int16.
    """
    # Samples are read into the batch without a copy. Parsing each record by protobuf was three
    # times slower.
    before = bytearray(max(0, length - samples.nbytes))  # everything before the samples
    footer = bytearray(_FOOTER.size)
    # A shorter record cannot contain the samples; parsing gives the reason.
    if before:
        num_read = os.preadv(file.fileno(), [before, samples, footer], start)
        if num_read < length + len(footer):
            raise _damaged(path, number, "the file is truncated")
        if _masked_crc(before, samples) != _FOOTER.unpack(footer)[0]:
            raise _damaged(path, number, _CHECKSUM_DIFFERS)
        if _read_labels(before, samples, labels) and _is_audio(samples):
            return
    record = read_record(file, path, number, start, length)
    clip = decode_record(record, path, number, len(samples), len(labels))
    labels[:] = clip.labels
    segment = clip.segments[0]
    if samples.dtype == np.int16:
        # Converting float32 to int16 would round the samples.
        if record_encoding(record, path, number) != "int16":
            raise _damaged(path, number, "float32 samples after records with int16")
        # Exact, since `decode_record` has divided by this power of two.
        segment = segment * INT16_SCALE
    samples[:] = segment


def _read_labels(before: bytearray, samples: np.ndarray, labels: np.ndarray) -> bool:
    """Read the labels that precede the samples; return False if the record has another layout.

    The header of a feature contains its name and size, so a record with another number of labels
    or samples has another layout.
    """
    labels_header = _feature_header(LABELS_FEATURE, len(labels))
    samples_header = _feature_header(SEGMENT_FEATURE, samples.nbytes)
    place = len(before) - len(samples_header) - len(labels)
    # A segment of int16 has as many bytes as one of half as many float32 samples.
    if samples.dtype == np.int16:
        has_type = _feature_header(ENCODING_FEATURE, 5) + b"int16" in before
    else:
        has_type = ENCODING_FEATURE.encode() not in before
    if not (
        has_type
        and place > 0
        and before.endswith(samples_header)
        and before.endswith(labels_header, 0, place)
    ):
        return False
    labels[:] = np.frombuffer(before, np.uint8, len(labels), place)
    return True


@cache
def _feature_header(name: str, num_bytes: int) -> bytes:
    """Return the bytes before the content of a feature of this size."""
    features = Features()
    _set_features(features, {name: bytes(num_bytes)})
    return features.SerializeToString()[:-num_bytes]


def record_encoding(record: bytes | memoryview, path: str | Path, number: int) -> str:
    """Return the encoding of the samples of a training or validation record."""
    try:
        return _encoding(_parse(Example, record).features)
    except _InvalidError as error:
        raise _damaged(path, number, str(error)) from None


def _is_test_shard(path: str | Path) -> bool:
    return str(path).endswith(".seq.tfrecord")


def _decode_example(record: bytes | memoryview) -> Clip:
    features = _parse(Example, record).features
    samples = _samples(_value(features, SEGMENT_FEATURE), features)
    return _clip(samples[np.newaxis], features)


def _decode_sequence(record: bytes | memoryview) -> Clip:
    message = _parse(SequenceExample, record)
    entries = message.feature_lists.feature_list.get(SEGMENTS_FEATURE)
    if entries is None or not entries.feature:
        raise _InvalidError(f"no feature list {SEGMENTS_FEATURE!r}")
    values = [entry.bytes_list.value[0] for entry in entries.feature if entry.bytes_list.value]
    if len(values) != len(entries.feature) or len({len(value) for value in values}) > 1:
        raise _InvalidError(f"segments of different lengths in {SEGMENTS_FEATURE!r}")
    samples = _samples(b"".join(values), message.context)
    segments = samples.reshape(len(values), -1)  # (num_segments, num_samples)
    return _clip(segments, message.context)


def _parse(message_type: type[Message], record: bytes | memoryview) -> Message:
    try:
        return message_type.FromString(record)
    except DecodeError:
        raise _InvalidError(f"not a tf.train.{message_type.__name__}") from None


def _value(features: Features, name: str) -> bytes:
    feature = features.feature.get(name)
    if feature is None or len(feature.bytes_list.value) != 1:
        raise _InvalidError(f"no feature {name!r} of bytes")
    return feature.bytes_list.value[0]


def _encoding(features: Features) -> str:
    encoding = "float32"
    if ENCODING_FEATURE in features.feature:
        # Bytes that are not UTF-8 are refused below, with the record's number.
        encoding = _value(features, ENCODING_FEATURE).decode(errors="replace")
    if encoding not in ENCODINGS:
        raise _InvalidError(
            f"samples are encoded as {encoding!r}, expected {' or '.join(ENCODINGS)}"
        )
    return encoding


def _samples(content: bytes, features: Features) -> np.ndarray:
    encoding = _encoding(features)
    if not content or len(content) % np.dtype(encoding).itemsize:
        raise _InvalidError(f"{len(content)} bytes of samples are not {encoding} values")
    if encoding == "int16":
        return np.frombuffer(content, "<i2").astype(np.float32) / np.float32(INT16_SCALE)
    samples = np.frombuffer(content, "<f4")
    if not _is_audio(samples):
        place = np.flatnonzero(~(np.abs(samples) <= _LARGEST_SAMPLE))[0]
        clip_id, mp3_path = _identity(features)
        name = f"clip {clip_id} ({mp3_path}): " if clip_id else ""
        raise _InvalidError(
            f"{name}sample {place} is {samples[place]:g}, expected at most {_LARGEST_SAMPLE} times "
            "full scale"
        )
    return samples


def _is_audio(samples: np.ndarray) -> bool:
    """Return whether float32 samples are finite and not far beyond full scale."""
    if samples.dtype == np.int16:
        return True
    # One pass, twice as fast as minimum and maximum: bit 30 is set only in NaN, infinity, and
    # numbers of at least 2.
    if not np.bitwise_or.reduce(samples.view(np.uint32)) & 0x40000000:
        return True
    # Comparisons with NaN are false.
    return bool(samples.min() >= -_LARGEST_SAMPLE and samples.max() <= _LARGEST_SAMPLE)


def _clip(segments: np.ndarray, features: Features) -> Clip:
    labels = np.frombuffer(_value(features, LABELS_FEATURE), np.uint8)
    return Clip(segments, labels, *_identity(features))


def _identity(features: Features) -> tuple[str, str]:
    """Return clip_id and mp3_path; empty in shards of the published program."""
    return tuple(
        _value(features, name).decode(errors="replace") if name in features.feature else ""
        for name in (CLIP_ID_FEATURE, MP3_PATH_FEATURE)
    )
