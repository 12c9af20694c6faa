"""Plan shards as tasks, find the finished shards, and build a shard.

To build a shard, a worker decodes its clips, cuts them into segments, and writes the records.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from toolkit import messages
from toolkit.data.annotations import CLIP_ID, MP3_PATH, SPLITS
from toolkit.data.audio import cut_pieces, decode_pieces
from toolkit.data.clip import Clip, ClipTable
from toolkit.data.manifest import another_build, changed_option, read_progress, shard_name
from toolkit.data.records import append_records, decode_record, encode_clip, read_records
from toolkit.errors import AudioError
from toolkit.files import written_whole

import numpy as np


@dataclass(frozen=True)
class ShardTask:
    """Everything a worker needs to build one shard."""

    path: Path
    split: str
    audio_dir: Path
    clips: list[tuple[str, str, bytes]]  # clip_id, mp3_path, labels as uint8 bytes
    sample_rate: int  # Hz
    num_samples: int  # per segment
    stop: float | None  # seconds
    decoder: str
    encoding: str


def plan_shards(clips: ClipTable, folder: Path, audio_dir: Path, options: dict) -> list[ShardTask]:
    """Plan one task per shard.

    Parameters
    ----------
    clips : ClipTable
        Clips with their shards.
    folder : Path
        Folder of the shards.
    audio_dir : Path
        Folder to which the paths of the clips are relative.
    options : dict
        Values of the other fields of `ShardTask`; additional options are ignored.

    Returns
    -------
    list of ShardTask
        Shards of train, val and test in order.
    """
    names = ("sample_rate", "num_samples", "stop", "decoder", "encoding")
    decoding = {name: options[name] for name in names}
    tasks = []
    members = [
        (clip_id, path, labels.tobytes())
        for clip_id, path, labels in zip(clips.clip_ids, clips.paths, clips.labels, strict=True)
    ]
    for split in SPLITS:
        rows = np.flatnonzero(np.array(clips.splits) == split)
        # A split without clips has no shards.
        num_shards = clips.shards[rows].max(initial=-1) + 1
        for shard in range(num_shards):
            path = folder / shard_name(split, shard, num_shards)
            in_shard = [members[row] for row in rows[clips.shards[rows] == shard]]
            tasks.append(ShardTask(path, split, audio_dir, in_shard, **decoding))
    return tasks


def finished_shards(
    folder: Path, tasks: list[ShardTask], recorded: dict, earlier: dict
) -> dict[str, dict]:
    """Return the entries of shards that an earlier run finished and that need no rebuilding.

    Parameters
    ----------
    folder : Path
        Folder of the shards.
    tasks : list of ShardTask
        All shards.
    recorded, earlier : dict
        Options of this build, and of an earlier build (see `manifest.check_options`).

    Raises
    ------
    BuildError
        The tables are read differently than by an earlier version, or the audio folder is another
        with other files.
    ShardError
        A record is damaged.
    """
    shard_of = {clip_id: task.path.name for task in tasks for clip_id, _, _ in task.clips}
    entries = read_progress(folder, shard_of)
    # Earlier versions recorded no hash of the clips and may have read the tables differently.
    must_compare = bool(entries) and "clips_sha256" not in earlier
    if must_compare:
        messages.say(f"{folder}: comparing the shards of an earlier version with the tables")
    if must_compare and (unknown := sorted(entries.keys() - set(shard_of.values()))):
        what = f"this version of the toolkit reads the tables differently: no {unknown[0]}"
        raise another_build(folder, what, "use the other version")
    done = {}
    for task in tasks:
        entry = entries.get(task.path.name)
        if entry is None or not task.path.exists():
            continue
        # A truncated shard has another size. Earlier versions recorded none.
        is_complete = entry.get("bytes") in (None, task.path.stat().st_size)
        if not is_complete:
            continue
        if must_compare:
            _compare_records(task, entry)
        has_same_audio = _has_same_audio(task, entry)
        # In another folder, only equal sizes show that the files are the same, so unknown sizes
        # (None) are refused, too.
        if recorded["audio_dir"] != earlier["audio_dir"] and not has_same_audio:
            what = changed_option("audio_dir", earlier["audio_dir"], recorded["audio_dir"])
            what += f", where the files of {task.path.name} are missing or have other sizes"
            raise another_build(folder, what)
        # None keeps the shard: its audio may have been removed after the build.
        if has_same_audio is False:
            messages.say(f"{task.path.name}: rebuilt, since its audio files have other sizes")
        elif not _gains_clips(task, entry):
            done[task.path.name] = entry
    return done


def _has_same_audio(task: ShardTask, entry: dict) -> bool | None:
    """Return whether the audio files of a shard have the sizes that they had when it was built.

    Returns None if they cannot be compared: a file is missing, or an earlier version built the
    shard, which did not record sizes.
    """
    skipped = {row[CLIP_ID] for row in entry["skipped"]}
    paths = [path for clip_id, path, _ in task.clips if clip_id not in skipped]
    try:
        num_bytes = sum(os.path.getsize(task.audio_dir / path) for path in paths)
    except OSError:
        return None
    return num_bytes == entry["audio_bytes"] if "audio_bytes" in entry else None


def _compare_records(task: ShardTask, entry: dict) -> None:
    """Check that a shard contains the clips of its task, except for the skipped ones."""
    found = set()
    for number, record in enumerate(read_records(task.path)):
        clip = decode_record(record, task.path, number)
        found.add((clip.clip_id, clip.mp3_path, clip.labels.tobytes()))
    skipped = {row[CLIP_ID] for row in entry["skipped"]}
    planned = {clip for clip in task.clips if clip[0] not in skipped}
    if differing := sorted(found ^ planned):
        what = f"this version of the toolkit reads clip {differing[0][0]} differently"
        raise another_build(task.path.parent, what, "use the other version")


def _gains_clips(task: ShardTask, entry: dict) -> bool:
    """Return whether rebuilding a shard adds a skipped clip and loses no other clip."""
    skipped = {row[MP3_PATH] for row in entry["skipped"]}
    gained = [row[MP3_PATH] for row in entry["skipped"] if _can_decode(task, row[MP3_PATH])]
    # Rebuilding must not lose clips whose audio was removed after the build.
    kept = (mp3_path for _, mp3_path, _ in task.clips if mp3_path not in skipped)
    if not gained or not all(os.path.isfile(task.audio_dir / mp3_path) for mp3_path in kept):
        return False
    messages.say(f"{task.path.name}: rebuilt, since {', '.join(gained)} can be decoded now")
    return True


def _can_decode(task: ShardTask, mp3_path: str) -> bool:
    """Return whether a clip of a shard can be decoded and has at least one segment."""
    try:
        # Decode the whole clip, because decoding may fail late.
        for _ in _decode_clip(task, mp3_path):
            pass
    except AudioError:
        return False
    return True


def make_shard(task: ShardTask, count_clip: Callable[[], None] = lambda: None) -> dict:
    """Build a shard.

    Parameters
    ----------
    task : ShardTask
        The shard.
    count_clip : callable
        Called after each clip.

    Returns
    -------
    dict
        Entry of the shard: its name and its numbers of clips, segments, bytes of audio files and
        bytes, as in the manifest, and the skipped clips with the reason for each.
    """
    counts = {"clips": 0, "segments": 0, "audio_bytes": 0}
    skipped = []
    with written_whole(task.path) as shard:
        for clip_id, mp3_path, labels in task.clips:
            start, num_segments = shard.tell(), 0
            try:
                for segments in _decode_clip(task, mp3_path):
                    clip = Clip(segments, np.frombuffer(labels, np.uint8), clip_id, mp3_path)
                    append_records(shard, encode_clip(clip, task.split, task.encoding))
                    num_segments += len(segments)
            # Other errors, such as a full disk, say nothing about the clip and end the build.
            except AudioError as error:
                # Decoding may fail late; remove the clip's records.
                shard.seek(start)
                shard.truncate()
                # The same command gives the same manifest on a cluster, where paths are absolute.
                reason = str(error).removeprefix(f"{task.audio_dir}{os.sep}")
                skipped.append({CLIP_ID: clip_id, MP3_PATH: mp3_path, "reason": reason})
            else:
                counts["clips"] += 1
                counts["segments"] += num_segments
                counts["audio_bytes"] += os.path.getsize(task.audio_dir / mp3_path)
            count_clip()
    num_bytes = task.path.stat().st_size
    return {"name": task.path.name, **counts, "bytes": num_bytes, "skipped": skipped}


def _decode_clip(task: ShardTask, mp3_path: str) -> Iterator[np.ndarray]:
    """Yield a clip's segments in parts; AudioError may be raised after some parts."""

    def pieces() -> Iterator[np.ndarray]:
        num_decoded = 0
        path = task.audio_dir / mp3_path
        for piece in decode_pieces(path, task.sample_rate, task.stop, task.decoder):
            num_decoded += len(piece)
            yield piece
        if num_decoded < task.num_samples:
            raise AudioError(
                f"{mp3_path}: {num_decoded} samples are less than one segment of {task.num_samples}"
            )

    return cut_pieces(pieces(), task.num_samples)
