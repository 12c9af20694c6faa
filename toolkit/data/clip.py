"""A clip: what the stages pass to each other."""

from dataclasses import dataclass

import numpy as np


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
