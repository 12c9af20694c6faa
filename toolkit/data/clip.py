"""Clips: what the scripts pass to each other, and the clips of a dataset's tables or folders."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import compress
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from toolkit.data.annotations import SPLITS, top_tags
from toolkit.data.csv_file import Row, listed
from toolkit.errors import BuildError

import numpy as np

_NUM_SHOWN = 6  # first and last tags of a long list


@dataclass
class Clip:
    """A clip, or a part of a long clip.

    Attributes
    ----------
    segments : np.ndarray [shape=(n_segments, n_samples), dtype=float32]
        Consecutive segments.
    labels : np.ndarray [shape=(n_tags,), dtype=uint8]
        1 where the clip carries the tag.
    clip_id, mp3_path : str
        Identity of the clip; empty in shards of the published program.
    part : int
        Number of the part within the clip, from 0.
    """

    segments: np.ndarray
    labels: np.ndarray
    clip_id: str = ""
    mp3_path: str = ""
    part: int = 0


@dataclass
class ClipTable:
    """The clips of a dataset, in the order of its tables.

    Attributes
    ----------
    tags : tuple of str
        Tags in model order.
    labels : np.ndarray [shape=(n_clips, n_tags), dtype=uint8]
        1 where the clip carries the tag.
    clip_ids, paths, splits : list of str
        Identity, path relative to the audio folder, and split of each clip.
    rows : list of Row
        Row of each clip, for errors.
    path_column : str
        Column of the paths, for errors.
    shards : np.ndarray [shape=(n_clips,), dtype=int] or None
        Number of each clip's shard within its split (see `annotations.assign_shards`).
    """

    tags: tuple[str, ...]
    labels: np.ndarray
    clip_ids: list[str]
    paths: list[str]
    splits: list[str]
    rows: list[Row]
    path_column: str
    shards: np.ndarray | None = None

    def sha256(self) -> str:
        """Return a hash of everything that the shards take from the tables."""
        # File systems may store the same path in another Unicode form.
        paths = [normalize("NFC", path) for path in self.paths]
        columns = (self.tags, self.clip_ids, paths, self.splits, self.shards.tolist())
        return hashlib.sha256(json.dumps(columns).encode() + self.labels.tobytes()).hexdigest()

    def replace_suffixes(self, suffix: str) -> None:
        """Replace the file name extension of each path, for example with ``.low.mp3``.

        Raises
        ------
        BuildError
            A path becomes invalid, or two paths become equal.
        """
        changed = [str(PurePosixPath(path).with_suffix("")) + suffix for path in self.paths]
        for path, other in zip(self.paths, changed, strict=True):
            if not is_inside(other):
                raise BuildError(
                    f"--audio-suffix {suffix!r}: {path} becomes {other!r}, which is not a path "
                    "inside the audio folder"
                )
        repeated = [path for path, count in Counter(changed).items() if count > 1]
        if repeated:
            raise BuildError(f"--audio-suffix {suffix!r}: two clips become {repeated[0]}")
        self.paths = changed

    def match_files(self, audio_dir: Path) -> None:
        """Use the Unicode form of each path that names a file, such as macOS's for "é"."""
        for number, path in enumerate(self.paths):
            # ASCII has only one form. A path that exists as written needs no other form.
            if path.isascii() or os.path.exists(audio_dir / path):
                continue
            for form in ("NFC", "NFD"):
                if os.path.exists(audio_dir / normalize(form, path)):
                    self.paths[number] = normalize(form, path)

    def check_links(self, audio_dir: Path) -> None:
        """Check that no symbolic link leads out of the audio folder, which may itself be a link.

        Raises
        ------
        AnnotationsError
            A link leads out; the message names row and column.
        """
        inside = os.path.realpath(audio_dir)
        resolve_folder = cache(os.path.realpath)  # slow on network file systems
        for path, row in zip(self.paths, self.rows, strict=True):
            place = audio_dir / path
            target = Path(resolve_folder(place.parent), place.name)
            if os.path.islink(target):
                target = Path(os.path.realpath(target))
            if not target.is_relative_to(inside):
                raise row.error(
                    self.path_column,
                    f"a link leads from {path} out of {audio_dir}, to {target}: replace the link "
                    "with the file",
                )


def keep_top_tags(
    rows_of: dict[str, list[int]], num_tags: int, columns: Sequence[list], path_column: str
) -> ClipTable:
    """Select the most frequent tags, and the clips that carry at least one of them.

    Parameters
    ----------
    rows_of : dict of str to list of int
        Numbers of the rows that carry each tag, in the order in which ties are broken.
    num_tags : int
        Number of tags to keep; all if there are fewer.
    columns : sequence of list
        Fields ``clip_ids``, ``paths``, ``splits`` and ``rows`` of the `ClipTable`, for all rows.
    path_column : str
        As in `ClipTable`.
    """
    tags = top_tags(np.array([len(rows) for rows in rows_of.values()]), list(rows_of), num_tags)
    labels = np.zeros((len(columns[0]), len(tags)), np.uint8)
    for number, tag in enumerate(tags):
        labels[rows_of[tag], number] = 1
    # As in the published program, clips without any of the tags are left out.
    is_kept = labels.any(axis=1)
    kept = (list(compress(column, is_kept)) for column in columns)
    return ClipTable(tags, labels[is_kept], *kept, path_column)


def describe_clips(clips: ClipTable, num_rows: int, names: Collection[str]) -> list[str]:
    """Describe the clips and their tags; `names` are all tags, also those that are not kept."""
    counts = zip(clips.tags, clips.labels.sum(axis=0), strict=True)
    # Model order is ascending by count; the user looks for the most frequent tags first.
    shown = [f"{tag} ({count})" for tag, count in counts][::-1]
    if len(shown) > 2 * _NUM_SHOWN:
        shown[_NUM_SHOWN:-_NUM_SHOWN] = ["…"]
    notes = [
        f"{len(clips.paths)} of {num_rows} clips carry one or more of the {len(clips.tags)} most "
        f"frequent of {len(names)} tags: {', '.join(shown)}"
    ]
    if empty := [split for split in SPLITS if split not in clips.splits]:
        notes.append(f"splits without clips: {', '.join(empty)}")
    # The network cannot learn these tags, but their scores enter the mean.
    is_untrained = ~clips.labels[np.array(clips.splits) == "train"].any(axis=0)
    if untrained := list(compress(clips.tags, is_untrained)):
        notes.append(f"tags without training clips: {', '.join(untrained)}")
    # Probably one tag, whose clips are divided between several outputs.
    similar = {}
    for name in names:
        visible = "".join(filter(str.isprintable, normalize("NFKC", name).casefold()))
        similar.setdefault(" ".join(visible.split()), []).append(name)
    groups = [group for group in similar.values() if len(group) > 1]
    if alike := [name for group in groups if set(group) & set(clips.tags) for name in group]:
        notes.append(f"tags that differ only in case or spaces: {listed(alike)}")
    return notes


def is_inside(path: str) -> bool:
    """Return whether a path in a table names a file inside the audio folder."""
    # Control characters would break progress files, messages and reports into lines. Surrogates
    # stand for bytes that are not UTF-8, which records cannot contain.
    parts = PurePosixPath(path).parts
    leaves_folder = not parts or path.startswith("/") or ".." in parts or "\\" in path
    return not leaves_folder and not re.search(r"[\x00-\x1f\ud800-\udfff]", path)
