"""A folder per tag, as in GTZAN: the first folder of an audio file is its tag.

genres/blues/a.wav
genres/jazz/b.wav
"""

import os
from collections import Counter
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from toolkit.data.annotations import NUM_TAGS, SPLITS, draw_splits
from toolkit.data.clip import ClipTable, describe_clips, is_inside, keep_top_tags
from toolkit.data.csv_file import Row, listed
from toolkit.data.tables import FOLDER, TableForm, check_tag
from toolkit.errors import UsageError
from toolkit.files import walk_files
from toolkit.messages import count

# fmt: off
AUDIO_SUFFIXES = (
    ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".amr", ".ape", ".au", ".caf", ".flac", ".m4a",
    ".m4b", ".mka", ".mp2", ".mp3", ".mp4", ".mpc", ".oga", ".ogg", ".opus", ".snd", ".tta",
    ".w64", ".wav", ".webm", ".wma", ".wv",
)
# fmt: on


def read_folders(
    audio_dir: str | Path, num_tags: int = NUM_TAGS, form: TableForm | None = None
) -> tuple[ClipTable, list[str], list[str]]:
    """List the audio files of a folder, and take the first folder of each as its tag.

    A file is audio if its name ends in one of `AUDIO_SUFFIXES` and neither it nor a folder above it
    is hidden. Each tag's files are divided among the splits at random, in the same shares.

    Parameters
    ----------
    audio_dir : str or Path
        Folder of the tags' folders.
    num_tags : int
        Number of most frequent tags to keep; all if there are fewer.
    form : TableForm or None
        Seed of the split, and whether the files of a second folder stay in one split
        (``split_by='folder'``).

    Returns
    -------
    clips : ClipTable
        Clips in the order of their paths, which also identify them.
    notes : list of str
        What was found, for the user.
    files : list of str
        Paths of all audio files, sorted.

    Raises
    ------
    AnnotationsError
        There are no audio files, or a name is invalid.
    UsageError
        `form` divides the files by anything but folders.
    OSError
        A folder cannot be read.
    """
    form = form or TableForm()
    if form.split_by not in (None, FOLDER):
        raise UsageError(
            f"--split-by {form.split_by}: with --tags-from folders, only {FOLDER} is possible: the "
            "second folder of the path"
        )
    place = Row(Path(audio_dir), 0)
    found = sorted(path.relative_to(audio_dir).as_posix() for path in walk_files(audio_dir, _raise))
    files = list(filter(_is_audio, found))
    others = [path for path in found if not _is_audio(path)]
    paths = [path for path in files if "/" in path]
    if not paths:
        example = PurePosixPath("blues", "a.wav")
        raise place.error("", f"no audio files in folders: expected files such as {example}")
    for path in files:
        if not is_inside(path):
            raise place.error(
                "", f"{path!r}: names must be UTF-8 without control characters and backslashes"
            )
    rows_of, groups = {}, []
    for number, path in enumerate(paths):
        # macOS may write "é" as two characters. Spaces at the ends are dropped as in tables.
        tag, *folders, _ = (part.strip() for part in normalize("NFC", path).split("/"))
        check_tag(tag, place, "")
        rows_of.setdefault(tag, []).append(number)
        if form.split_by and not folders:
            raise place.error("", f"{path!r}: the path has no second folder for --split-by")
        groups.append(folders[0] if form.split_by else path)
    splits = _draw_splits(rows_of, groups, form.split_seed)
    columns = (paths, paths, splits, [place] * len(paths))
    clips = keep_top_tags(dict(sorted(rows_of.items())), num_tags, columns, "")

    kept_together = ", files of a second folder together" if form.split_by else ""
    notes = [
        f"{count(len(files), 'audio file')}; tags are the first folders, of which each is divided "
        f"among the splits (seed {form.split_seed}{kept_together})",
        *describe_clips(clips, len(files), rows_of),
    ]
    few = [tag for tag, rows in rows_of.items() if len({splits[row] for row in rows}) < len(SPLITS)]
    if few := sorted(set(few) & set(clips.tags)):
        notes.append(f"tags without clips in every split: {listed(few)}")
    if len(paths) < len(files):
        notes.append(f"audio files in no folder: {listed([p for p in files if '/' not in p])}")
    if others:
        number = count(len(others), "file")
        notes.append(f"{number} without the name of an audio file, or hidden: {listed(others)}")
    used = {path.partition("/")[0] for path in paths}
    tops = sorted(one.name for one in os.scandir(audio_dir) if one.is_dir())
    if unused := [name for name in tops if name not in used and not name.startswith(".")]:
        notes.append(f"folders without audio files, or links to other folders: {listed(unused)}")
    return clips, notes, files


def _raise(error: OSError) -> None:
    raise error


def _is_audio(path: str) -> bool:
    # macOS writes a file ._a.wav beside a.wav on other file systems.
    is_hidden = any(part.startswith(".") for part in path.split("/"))
    return not is_hidden and PurePosixPath(path).suffix.lower() in AUDIO_SUFFIXES


def _draw_splits(rows_of: dict[str, list[int]], groups: list[str], seed: int) -> list[str]:
    """Return the split of each file, which is that of all files of its group."""
    tags_of = {}
    for tag, rows in rows_of.items():
        for row in rows:
            tags_of.setdefault(groups[row], Counter())[tag] += 1
    # An artist with several tags is drawn once: with the tag of most of their files.
    sizes = {tag: {} for tag in rows_of}
    for group, tags in tags_of.items():
        sizes[tags.most_common(1)[0][0]][group] = tags.total()
    split_of = {}
    for of_tag in filter(None, sizes.values()):
        split_of |= draw_splits(of_tag, seed)
    return [split_of[group] for group in groups]
