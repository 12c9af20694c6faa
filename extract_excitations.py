"""Extract the mean excitations of the test clips into a pandas DataFrame.

    python extract_excitations.py log/4 --data-dir ./dataset
    python extract_excitations.py se-multi-auc_0.9111-tfrmodel.hdf5 --out ./excitations.parquet

The table has one row per clip and depth, in the published form: ``ex``, the excitation of each
channel, averaged over the clip's segments; ``depth``, 0 for the first block to 8 for the last; one
column of 0 and 1 per tag. The index names the clip: ``clip_id`` and ``mp3_path``. The attributes
(``DataFrame.attrs``) name model, checkpoint and dataset. The name of the file ends in ``.pkl`` or
``.parquet``.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from input_data import hash_dataset, open_dataset
from toolkit import cli, messages
from toolkit.data.annotations import RESERVED_TAGS
from toolkit.errors import UsageError
from toolkit.files import replaced_whole
from toolkit.models import onnx_file
from toolkit.models.tags import read_tags
from toolkit.prediction import (
    DEFAULT_BATCH_SIZE,
    clip_mean,
    compile_for_prediction,
    load_for_dataset,
    predict_split,
)
from toolkit.provenance import describe

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".pkl", ".parquet")
# NumPy 1.26 and pandas 1.5 cannot read arrays that NumPy 2 has pickled with protocol 5.
_PICKLE_PROTOCOL = 4
COLUMNS = ("ex", "depth")
INDEX = ("clip_id", "mp3_path")


def extract(
    model_path: str | Path,
    data_dir: str | Path,
    batch_size: int = DEFAULT_BATCH_SIZE,
    tags_path: str | Path | None = None,
) -> "pd.DataFrame":
    """Compute the mean excitations of each test clip at each depth.

    Parameters
    ----------
    model_path : str or Path
        Model of se or rese blocks (see `toolkit.models.checkpoints.load`).
    data_dir : str or Path
        Folder of the dataset.
    batch_size : int
        Segments per batch.
    tags_path : str or Path or None
        File that names the tags of the model (see `toolkit.prediction.load_for_dataset`).

    Returns
    -------
    pd.DataFrame
        One row per clip and depth, with the columns and the index that the module describes.
        ``ex`` contains float32 arrays [shape=(n_channels,)].

    Raises
    ------
    ShardError, UsageError, CheckpointError
        The dataset has no test clips, a tag has the name of another column, the model has no
        excitations or does not fit the dataset, or a file is damaged.
    """
    import pandas as pd

    dataset = open_dataset(data_dir)
    if not dataset.splits["test"].num_clips:
        raise UsageError(f"{data_dir}: no test clips to extract excitations from")
    for tag in dataset.tags:
        if tag in RESERVED_TAGS:
            raise UsageError(
                f"{data_dir}: the tag {tag!r} has a reserved name ({', '.join(RESERVED_TAGS)}): "
                "rename the tag and build the dataset again"
            )
    checkpoint = load_for_dataset(model_path, dataset, tags_path=tags_path)
    from model import build_excitations  # load_for_dataset has selected Keras's backend

    excitations = build_excitations(checkpoint.network)
    compile_for_prediction(excitations, checkpoint.config.block)

    rows, labels, identities = [], [], []
    for prediction in predict_split(excitations, dataset, "test", batch_size, "extracting"):
        clip = prediction.clip
        for depth, output in enumerate(prediction.outputs):
            rows.append((clip_mean(output).astype(np.float32), depth))
            labels.append(clip.labels)
            identities.append((clip.clip_id, clip.mp3_path))
    # Use Python strings: to load pandas's own string type from a pickle, users need pyarrow.
    levels = [pd.Index(level, dtype=object) for level in zip(*identities, strict=True)]
    index = pd.MultiIndex.from_arrays(levels, names=INDEX)
    tags = pd.DataFrame(np.array(labels), columns=list(checkpoint.tags), index=index)
    table = pd.concat([pd.DataFrame(rows, columns=list(COLUMNS), index=index), tags], axis=1)
    num_clips = len(table) // table["depth"].nunique()
    test_hash = hash_dataset(dataset, ["test"])
    provenance = describe(model_path, data_dir, checkpoint.tags, num_clips, test_hash)
    table.attrs = provenance.to_json()
    return table


def write(path: str | Path, table: "pd.DataFrame") -> None:
    """Write a table of excitations, completely or not at all.

    Parameters
    ----------
    path : str or Path
        File to write: a pickle if the name ends in ``.pkl``, Parquet if it ends in ``.parquet``.
    table : pd.DataFrame
        Result of `extract`.

    Raises
    ------
    UsageError
        The name has another ending.
    """
    path = Path(path)
    check_suffix(path)
    with replaced_whole(path, path.suffix) as temporary:
        if path.suffix.lower() == ".parquet":
            table.to_parquet(temporary, engine="pyarrow")
        else:
            # Column names as Python strings, like the index in `extract`.
            plain = table.copy(deep=False)
            plain.columns = table.columns.astype(object)
            plain.to_pickle(temporary, compression=None, protocol=_PICKLE_PROTOCOL)


def check_suffix(path: Path) -> None:
    """Raise UsageError if the name of a table does not end in .pkl or .parquet."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--out {path}: expected a name that ends in {' or '.join(SUFFIXES)}")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Extract the mean excitations of the test clips into a pandas DataFrame.",
        "  python extract_excitations.py se-multi-auc_0.9111-tfrmodel.hdf5\n"
        "  python extract_excitations.py log/4 --out ./excitations.parquet",
    )
    data = parser.add_argument_group("model and data")
    cli.add_model(
        data,
        what="a .keras, .hdf5 or .h5 file of se or rese blocks, or a stage's folder (its best "
        "checkpoint is used)",
    )
    cli.add_data_dir(data)
    cli.add_tags(data)
    machine = parser.add_argument_group("machine")
    cli.add_batch_size(machine, DEFAULT_BATCH_SIZE)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        metavar="PATH",
        default="./excitations.pkl",
        help="file to write: .pkl for a pickle, or .parquet for Parquet, which cannot contain code "
        "(default: ./excitations.pkl)",
    )
    return cli.add_general(parser)


def main(argv: list[str] | None = None) -> int:
    return cli.run(_extract, build_parser().parse_args(argv))


def _extract(arguments: argparse.Namespace) -> None:
    cli.check_model(arguments.model_path)
    if Path(arguments.model_path).suffix == onnx_file.SUFFIX:
        raise UsageError(
            f"{arguments.model_path}: an {onnx_file.SUFFIX} file has no excitations: use the "
            "model it was exported from"
        )
    output = Path(arguments.out)
    check_suffix(output)
    cli.check_output(output)
    open_dataset(arguments.data_dir)  # report errors before the slow import of Keras
    if arguments.tags:
        read_tags(arguments.tags)
    table = extract(arguments.model_path, arguments.data_dir, arguments.batch_size, arguments.tags)
    write(output, table)
    num_depths = table["depth"].nunique()
    messages.say(
        f"{output}: {messages.count(len(table), 'row')}, "
        f"{messages.count(len(table) // num_depths, 'clip')} at {num_depths} depths, "
        f"{messages.size_on_disk(output)}"
    )


if __name__ == "__main__":
    sys.exit(main())
