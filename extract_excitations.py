"""Extract the excitations of the test clips into a pandas DataFrame.

    python extract_excitations.py log/4 --data-dir ./dataset
    python extract_excitations.py se-multi-auc_0.9111-tfrmodel.hdf5 --out ./excitations.parquet
    python extract_excitations.py log/4 --segments --depths 0 --out ./segments.parquet

The table has one row per clip and depth, in the published form: ``ex``, the excitation of each
channel, averaged over the clip's segments; ``depth``, 0 for the first block to 8 for the last; one
column of 0 and 1 per tag. The index names the clip: ``clip_id`` and ``mp3_path``. With
``--segments``, the table has one row per segment and depth: ``ex`` is not averaged, the index has a
third level ``segment``, the number of the segment in its clip, and the last column is ``rms``, the
root mean square of the segment's samples. The attributes (``DataFrame.attrs``) name model,
checkpoint and dataset. The name of the file ends in ``.pkl`` or ``.parquet``.
"""

import argparse
import itertools
import json
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from input_data import hash_dataset, open_dataset, read_clips
from toolkit import cli, messages
from toolkit.blocks import WIDTHS
from toolkit.data.annotations import RESERVED_TAGS
from toolkit.data.clip import Clip
from toolkit.errors import UsageError
from toolkit.files import replaced_whole
from toolkit.models import onnx_file
from toolkit.models.tags import read_tags
from toolkit.prediction import (
    DEFAULT_BATCH_SIZE,
    clip_mean,
    compile_for_prediction,
    load_for_dataset,
    predict_clips,
)
from toolkit.provenance import describe

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".pkl", ".parquet")
# NumPy 1.26 and pandas 1.5 cannot read arrays that NumPy 2 has pickled with protocol 5.
_PICKLE_PROTOCOL = 4
# Bytes of the excitations in a pickle of segments, which is held in memory several times.
_MAX_PICKLE = 300e6
_ROWS_PER_PART = 10_000  # 10 MB of excitations of the full-size network; a row group of Parquet
INDEX = ("clip_id", "mp3_path")


def extract(
    model_path: str | Path,
    data_dir: str | Path,
    batch_size: int = DEFAULT_BATCH_SIZE,
    tags_path: str | Path | None = None,
    per_segment: bool = False,
    depths: Collection[int] | None = None,
) -> "pd.DataFrame":
    """Compute the excitations of each test clip, or of each of its segments, at each depth.

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
    per_segment : bool
        Whether to return the excitations of segments, instead of their means per clip.
    depths : collection of int or None
        Depths to extract; None for all.

    Returns
    -------
    pd.DataFrame
        One row per clip or segment and depth, with the columns and the index that the module
        describes. ``ex`` contains float32 arrays [shape=(n_channels,)].

    Raises
    ------
    ShardError, UsageError, CheckpointError
        The dataset has no test clips, a tag has the name of another column, the model has no
        excitations or does not fit the dataset, or a file is damaged.
    """
    import pandas as pd

    return pd.concat(_parts(model_path, data_dir, batch_size, tags_path, per_segment, depths))


def _parts(model_path, data_dir, batch_size, tags_path, per_segment, depths):
    """Yield the table of `extract` in parts of consecutive rows, to write it with little memory."""
    dataset = open_dataset(data_dir)
    test = dataset.splits["test"]
    if not test.num_clips:
        raise UsageError(f"{data_dir}: no test clips to extract excitations from")
    for tag in dataset.tags:
        if tag in RESERVED_TAGS:
            raise UsageError(
                f"{data_dir}: the tag {tag!r} has a reserved name ({', '.join(RESERVED_TAGS)}): "
                "rename the tag and build the dataset again"
            )
    checkpoint = load_for_dataset(model_path, dataset, tags_path=tags_path)
    from model import build_excitations  # load_for_dataset has selected Keras's backend

    depths = sorted(set(range(len(WIDTHS)) if depths is None else depths))
    excitations = build_excitations(checkpoint.network, depths)
    compile_for_prediction(excitations, checkpoint.config.block)
    test_hash = hash_dataset(dataset, ["test"])
    provenance = describe(model_path, data_dir, checkpoint.tags, test.num_clips, test_hash)
    levels = deque()  # root mean square of each segment, from reading to prediction

    def measured() -> Iterator[Clip]:
        for clip in read_clips(test.shards, dataset.num_samples, len(dataset.tags)):
            if per_segment:
                levels.extend(np.sqrt(np.square(s, dtype=float).mean()) for s in clip.segments)
            yield clip

    rows = []
    predictions = predict_clips(excitations, measured(), batch_size)
    progress = {"total": test.num_clips, "unit": "clip", "desc": "extracting", "leave": False}
    for prediction in messages.progress(predictions, **progress):
        outputs = prediction.outputs
        if not per_segment:
            outputs = [clip_mean(output)[np.newaxis].astype(np.float32) for output in outputs]
        for segment, at_depths in enumerate(zip(*outputs, strict=True)):
            rms = levels.popleft() if per_segment else None
            for depth, ex in zip(depths, at_depths, strict=True):
                rows.append((prediction.clip, segment, rms, depth, ex))
        if len(rows) >= _ROWS_PER_PART:
            yield _make_table(rows, checkpoint.tags, provenance.to_json())
            rows = []
    if rows:
        yield _make_table(rows, checkpoint.tags, provenance.to_json())


def _make_table(rows: list[tuple], tags: Iterable[str], attributes: dict) -> "pd.DataFrame":
    import pandas as pd

    clips, segments, rms, depths, ex = zip(*rows, strict=True)
    # Use Python strings: to load pandas's own string type from a pickle, users need pyarrow.
    levels = [pd.Index([getattr(clip, name) for clip in clips], dtype=object) for name in INDEX]
    index = pd.MultiIndex.from_arrays(levels, names=INDEX)
    labels = np.array([clip.labels for clip in clips])
    table = pd.DataFrame(labels, columns=list(tags), index=index)
    table.insert(0, "ex", ex)
    table.insert(1, "depth", depths)
    if rms[0] is not None:
        table["rms"] = rms
        table = table.set_index(pd.Index(segments, name="segment"), append=True)
    table.attrs = attributes
    return table


def write(path: str | Path, table: "pd.DataFrame | Iterable[pd.DataFrame]") -> int:
    """Write a table of excitations, completely or not at all.

    Parameters
    ----------
    path : str or Path
        File to write: a pickle if the name ends in ``.pkl``, Parquet if it ends in ``.parquet``.
    table : pd.DataFrame or iterable of pd.DataFrame
        Result of `extract`, or its parts, which are written to Parquet one by one.

    Returns
    -------
    int
        Number of rows.

    Raises
    ------
    UsageError
        The name has another ending, or the table is too large for a pickle.
    """
    import pandas as pd

    path = Path(path)
    check_suffix(path)
    is_whole = isinstance(table, pd.DataFrame)
    parts = iter([table] if is_whole else table)
    first = next(parts)  # errors before the first row are not errors of the file
    parts = itertools.chain([first], parts)
    if path.suffix.lower() == ".pkl":
        if not is_whole and "segment" in first.index.names:
            _check_pickle(path, first)
        table = pd.concat(parts)
        # Column names as Python strings, like the index in `_make_table`.
        table.columns = table.columns.astype(object)
        with replaced_whole(path, path.suffix) as temporary:
            table.to_pickle(temporary, compression=None, protocol=_PICKLE_PROTOCOL)
        return len(table)
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    num_rows = 0
    schema = pyarrow.Table.from_pandas(first).schema
    # pandas reads the attributes of a table from this entry.
    schema = schema.with_metadata(schema.metadata | {"PANDAS_ATTRS": json.dumps(first.attrs)})
    # Excitations do not repeat: a dictionary of their values would add 14 % to the file.
    repeated = [name for name in schema.names if name != "ex"]
    with (
        replaced_whole(path, path.suffix) as temporary,
        ParquetWriter(temporary, schema, use_dictionary=repeated) as file,
    ):
        for part in parts:
            file.write_table(pyarrow.Table.from_pandas(part))
            num_rows += len(part)
    return num_rows


def _check_pickle(path: Path, first: "pd.DataFrame") -> None:
    """Raise UsageError if the table of segments that begins with a part is too large."""
    num_clips = (first.index.get_level_values("segment") == 0).sum() / first["depth"].nunique()
    num_bytes = sum(ex.nbytes for ex in first["ex"])
    size = round(num_bytes / num_clips * first.attrs["num_clips"])
    if size > _MAX_PICKLE:
        raise UsageError(
            f"--out {path}: about {messages.size(size)} of excitations, but at most "
            f"{messages.size(_MAX_PICKLE)} fit into a pickle: write .parquet, or fewer --depths"
        )


def check_suffix(path: Path) -> None:
    """Raise UsageError if the name of a table does not end in .pkl or .parquet."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--out {path}: expected a name that ends in {' or '.join(SUFFIXES)}")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Extract the excitations of the test clips into a pandas DataFrame.",
        "  python extract_excitations.py se-multi-auc_0.9111-tfrmodel.hdf5\n"
        "  python extract_excitations.py log/4 --out ./excitations.parquet\n"
        "  python extract_excitations.py log/4 --segments --depths 0 --out ./segments.parquet",
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
    what = "one row per segment, with its root mean square, instead of means of clips"
    output.add_argument("--segments", action="store_true", help=f"{what} (default: off)")
    what = "blocks to extract, 0 for the first to 8 for the last (default: all)"
    depths = {"nargs": "+", "type": int, "choices": range(len(WIDTHS)), "metavar": "N"}
    output.add_argument("--depths", **depths, help=what)
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
    given = arguments.model_path, arguments.data_dir, arguments.batch_size, arguments.tags
    num_rows = write(output, _parts(*given, arguments.segments, arguments.depths))
    num_depths = len(set(arguments.depths or range(len(WIDTHS))))
    of = messages.count(num_rows // num_depths, "segment" if arguments.segments else "clip")
    messages.say(
        f"{output}: {messages.count(num_rows, 'row')}, {of} at "
        f"{messages.count(num_depths, 'depth')}, {messages.size_on_disk(output)}"
    )


if __name__ == "__main__":
    sys.exit(main())
