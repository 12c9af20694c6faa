"""Names of the tags of models whose files contain none."""

import json
from pathlib import Path

from toolkit.data.annotations import MTT_TOP_TAGS
from toolkit.errors import UsageError
from toolkit.messages import say
from toolkit.models.checkpoints import Checkpoint


def read_tags(path: str | Path) -> tuple[str, ...]:
    """Read the names of tags.

    Parameters
    ----------
    path : str or Path
        A text file with one tag per line, or a dataset's ``manifest.json``.

    Raises
    ------
    UsageError
        The file cannot be read, contains no names, or contains a name twice.
    """
    try:
        # Windows' editors begin UTF-8 with a byte order mark, which would enter the first tag.
        text = Path(path).read_text(encoding="utf-8-sig")
        is_manifest = text.lstrip().startswith("{")
        names = list(json.loads(text)["tags"]) if is_manifest else text.rstrip().split("\n")
        tags = tuple(name.strip() for name in names)
    except OSError as error:
        raise UsageError(f"--tags {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"--tags {path}: expected one tag per line, or a manifest.json: {error}"
        ) from None
    if not any(tags):
        raise UsageError(f"--tags {path}: the file contains no tag names")
    place = "tag" if is_manifest else "line"
    lines = {}
    for number, tag in enumerate(tags, 1):
        if not tag:
            raise UsageError(f"--tags {path}: {place} {number} is empty: expected a tag name")
        if (first := lines.setdefault(tag, number)) < number:
            raise UsageError(f"--tags {path}: {place} {number}: {tag!r} is already {place} {first}")
    return tags


def choose_tags(
    model_path: str | Path, checkpoint: Checkpoint, tags_path: str | Path | None
) -> tuple[str, ...]:
    """Return the tags of a model that is used without a dataset.

    Parameters
    ----------
    model_path : str or Path
        The model's file, for messages.
    checkpoint : Checkpoint
        The loaded model.
    tags_path : str or Path or None
        File that names the tags (see `read_tags`), or None for the tags of the model. If the
        model's file contains no tag names, MagnaTagATune's 50 are assumed and a message is printed.

    Raises
    ------
    UsageError
        The number of tags is not the model's number of outputs, or the tags are unknown.
    """
    num_tags = checkpoint.config.num_tags
    if tags_path is not None:
        tags = read_tags(tags_path)
        if len(tags) != num_tags:
            raise UsageError(
                f"--tags {tags_path}: {len(tags)} tags, but {model_path} has {num_tags} outputs"
            )
        # The names in the file come from the training, so others would be wrong.
        if checkpoint.tags not in (None, tags):
            raise UsageError(f"--tags {tags_path}: {model_path} names other tags: omit --tags")
        return tags
    if checkpoint.tags is not None:
        return checkpoint.tags
    # Published .hdf5 files contain no tag names; their 50 outputs are MagnaTagATune's.
    if num_tags != len(MTT_TOP_TAGS):
        raise UsageError(
            f"{model_path}: the file contains no tag names for its {num_tags} outputs: name them "
            "with --tags FILE"
        )
    say(
        f"{model_path}: the file contains no tag names: assuming MagnaTagATune's {num_tags}; "
        "--tags FILE replaces them"
    )
    return MTT_TOP_TAGS
