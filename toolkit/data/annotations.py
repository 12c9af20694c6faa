"""What MagnaTagATune and the paper define: tags and their order, splits, and shards."""

from collections.abc import Sequence
from pathlib import Path

from toolkit.errors import UsageError

import numpy as np

ANNOTATIONS_NAME = "annotations_final.csv"
AUDIO_FOLDER = "mp3"
CLIP_ID = "clip_id"
MP3_PATH = "mp3_path"
# Names of columns beside the tags in tables that the toolkit writes or its notebook computes.
RESERVED_TAGS = (CLIP_ID, MP3_PATH, "segment", "ex", "depth", "rms")
SPLITS = ("train", "val", "test")
# As in the paper.
NUM_TAGS = 50

# Order of the 50 outputs of published checkpoints: ascending by count in the original annotations,
# with ties in the order of the published program's unstable sort.
# fmt: off
MTT_TOP_TAGS = (
    "choral", "female voice", "metal", "country", "weird", "no voice", "cello", "harp", "beats",
    "female vocal", "male voice", "dance", "new age", "voice", "choir", "classic", "man", "solo",
    "sitar", "soft", "pop", "no vocal", "male vocal", "woman", "flute", "quiet", "loud",
    "harpsichord", "no vocals", "vocals", "singing", "male", "opera", "indian", "female", "synth",
    "vocal", "violin", "beat", "ambient", "piano", "fast", "rock", "electronic", "drums",
    "strings", "techno", "slow", "classical", "guitar",
)
# fmt: on

# Shares of the clips, as in MagnaTagATune.
SPLIT_SHARES = {"train": 0.75, "val": 0.08, "test": 0.17}
# Limits of `draw_splits`: number of draws, and number of assigned groups in all draws together.
_NUM_DRAWS = 200
_MAX_GROUPS_DRAWN = 50_000

# Split of each folder of MagnaTagATune's audio, as in the published program.
FOLDER_SPLITS = dict.fromkeys("0123456789ab", "train") | {"c": "val"} | dict.fromkeys("def", "test")


def top_tags(counts: np.ndarray, names: list[str], num_tags: int = NUM_TAGS) -> tuple[str, ...]:
    """Select the most frequent tags and return them in model order.

    Parameters
    ----------
    counts : np.ndarray [shape=(len(names),)]
        Number of clips that carry each tag.
    names : list of str
        Tags in column order.
    num_tags : int
        Number of tags to select.

    Returns
    -------
    tuple of str
        MagnaTagATune's published order if the selected tags are its top 50; otherwise ascending by
        count, ties in column order.
    """
    # NumPy's default sort orders ties differently in different versions.
    ascending = np.argsort(np.asarray(counts), kind="stable")
    chosen = tuple(names[column] for column in ascending[-num_tags:])
    # Some counts in the original annotations are equal. Keep the published 50 tags even if one of
    # them shares the lowest count with another tag.
    cutoff = counts[ascending[-num_tags:][0]]
    count_of = dict(zip(names, counts, strict=True))
    if num_tags == len(MTT_TOP_TAGS) and all(
        count_of.get(tag, -1) >= cutoff for tag in MTT_TOP_TAGS
    ):
        above = {name for name, count in count_of.items() if count > cutoff}
        if above <= set(MTT_TOP_TAGS):
            return MTT_TOP_TAGS
    return chosen


def assign_shards(splits: Sequence[str], num_audios_per_shard: int) -> np.ndarray:
    """Assign the clips of each split to shards at random, as the published program does.

    Parameters
    ----------
    splits : sequence of str
        Split of each clip.
    num_audios_per_shard : int
        Clips per shard. The remainder is distributed, so shards have this many or a few more.

    Returns
    -------
    np.ndarray [shape=(n_clips,), dtype=int64]
        Number of each clip's shard within its split.
    """
    # NumPy guarantees that RandomState's stream never changes, so the same clips are in the same
    # shards on every machine. The splits use one stream, in this order.
    random = np.random.RandomState(0)
    shards = np.zeros(len(splits), dtype=np.int64)
    for split in SPLITS:
        rows = np.flatnonzero(np.array(splits) == split)
        # Rounded down as published: MagnaTagATune's 15,250 training clips are in 152 shards.
        num_shards = max(1, len(rows) // num_audios_per_shard)
        shards[rows] = random.permutation(len(rows)) % num_shards
    return shards


def draw_splits(sizes: dict[str, int], seed: int) -> dict[str, str]:
    """Assign groups of clips to splits at random, close to `SPLIT_SHARES` of the clips.

    Parameters
    ----------
    sizes : dict of str to int
        Number of clips of each group.
    seed : int
        Seed of the order in which groups are assigned.

    Returns
    -------
    dict of str to str
        Split of each group; equal for equal sizes and seed, in any order of the groups. Every
        split has at least one group. Of fewer than three groups, the first is in train and the
        second in test.
    """
    num_clips = sum(sizes.values())
    names = sorted(sizes)
    random = np.random.RandomState(seed)  # NumPy guarantees that its stream never changes
    best, smallest_error = {}, np.inf
    # Few groups of different sizes rarely match the shares, so use the best of many draws.
    for _ in range(max(1, min(_NUM_DRAWS, _MAX_GROUPS_DRAWN // len(names)))):
        missing = {split: share * num_clips for split, share in SPLIT_SHARES.items()}
        split_of, empty = {}, list(SPLITS)
        for num_assigned, place in enumerate(random.permutation(len(names))):
            candidates = empty if len(names) - num_assigned <= len(empty) else SPLITS
            split = max(candidates, key=lambda one: missing[one])
            split_of[names[place]] = split
            missing[split] -= sizes[names[place]]
            if split in empty:
                empty.remove(split)
        error = sum(map(abs, missing.values()))
        if error < smallest_error:
            best, smallest_error = split_of, error
    return best


def missing_dataset(data_dir: str | Path) -> UsageError:
    """Return an error that says what to download and where to put it."""
    return UsageError(
        f"{data_dir}: no dataset found: download {ANNOTATIONS_NAME} and mp3.zip.001-003 from "
        "mirg.city.ac.uk/codeapps/the-magnatagatune-dataset and, in this folder, unpack the audio: "
        f"cat mp3.zip.* > mp3_all.zip; unzip mp3_all.zip -d {AUDIO_FOLDER}"
    )
