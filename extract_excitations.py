"""Extract the mean excitations of the test clips into a pandas DataFrame.

    python extract_excitations.py log/4 --data-dir ./dataset
    python extract_excitations.py se-multi-auc_0.9111-tfrmodel.hdf5 --out ./excitations.parquet

One row a clip and depth: ``ex``, the clip's mean excitation (float32, one value a channel);
``depth``, 0 for the first block to 8 for the last; one 0/1 column a tag; ``clip_id``; ``mp3_path``.
The name's ending says the form: ``.parquet`` for Parquet, which is data alone, any other for a
pickle, which runs code that someone may have put in it when it is read.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from input_data import open_dataset, read_clips
from toolkit import backend, cli, messages
from toolkit.errors import UsageError
from toolkit.evaluation import DEFAULT_BATCH_SIZE, check_fits, clip_mean, predict_clips
from toolkit.files import replaced_whole

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

PARQUET_SUFFIX = ".parquet"


def extract(
    model_path: str | Path, data_dir: str | Path, batch_size: int = DEFAULT_BATCH_SIZE
) -> "pd.DataFrame":
    """Compute the mean excitation of every test clip at every depth.

    Parameters
    ----------
    model_path : str or Path
        A model of se or rese blocks (see `checkpoints.load`).
    data_dir : str or Path
        The dataset's folder.
    batch_size : int
        Segments a batch.

    Returns
    -------
    pd.DataFrame
        One row a clip and depth, as the module's docstring says.

    Raises
    ------
    UsageError
        The model has no excitations, or is not for this dataset.
    """
    from model import build_excitations
    from toolkit.backend import choose_jit
    from toolkit.models import checkpoints

    import pandas as pd

    dataset = open_dataset(data_dir)
    test = dataset.splits["test"]
    if not test.num_clips:
        raise UsageError(f"{data_dir}: no test clips to take excitations of")
    checkpoint = checkpoints.load(model_path)
    excitations = build_excitations(checkpoint.network)
    check_fits(dataset, checkpoint)
    excitations.compile(jit_compile=choose_jit("auto", checkpoint.config.block))

    means, labels, identities = [], [], []
    read = read_clips(test.shards, dataset.num_samples, len(dataset.tags))
    shown = messages.progress(
        predict_clips(excitations, read, batch_size),
        total=test.num_clips, unit="clip", desc="extracting",
    )  # fmt: skip
    for clip, outputs in shown:
        for depth, output in enumerate(outputs):
            means.append((clip_mean(output).astype(np.float32), depth))
            labels.append(clip.labels)
            identities.append((clip.clip_id, clip.mp3_path))
    return pd.concat(
        [
            pd.DataFrame(means, columns=["ex", "depth"]),
            pd.DataFrame(np.array(labels), columns=list(dataset.tags)),
            pd.DataFrame(identities, columns=["clip_id", "mp3_path"]),
        ],
        axis=1,
    )


def write(path: str | Path, table: "pd.DataFrame") -> None:
    """Write a table of excitations, whole or not at all, as its name's ending says.

    Parameters
    ----------
    path : str or Path
        A ``.parquet`` file, or any other for a pickle.
    table : pd.DataFrame
        What `extract` returns.

    Raises
    ------
    UsageError
        Two columns of the table have one name, which Parquet does not allow.
    """
    path = Path(path)
    with replaced_whole(path, path.suffix) as temporary:
        if path.suffix == PARQUET_SUFFIX:
            repeated = table.columns[table.columns.duplicated()]
            if len(repeated):
                raise UsageError(
                    f"{path}: Parquet has one column a name, and {repeated[0]!r} is a tag too: "
                    "write a .pkl, or rename the tag"
                )
            table.to_parquet(temporary, engine="pyarrow", index=False)
        else:
            # Strings as Python's own: pandas would else pickle them as pyarrow's, for pyarrow only.
            plain = table.astype({name: object for name in table.select_dtypes("str").columns})
            plain.columns = table.columns.astype(object)
            plain.to_pickle(temporary)


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Extract the mean excitations of the test clips into a pandas DataFrame.",
        "  python extract_excitations.py se-multi-auc_0.9111-tfrmodel.hdf5\n"
        "  python extract_excitations.py log/4 --out ./excitations.pkl",
    )
    data = parser.add_argument_group("model and data")
    cli.add_model(
        data,
        what="a .keras, .hdf5 or .h5 file of se or rese blocks, or a stage's folder for its best "
        "checkpoint",
    )
    cli.add_data_dir(data)
    machine = parser.add_argument_group("machine")
    cli.add_batch_size(machine, DEFAULT_BATCH_SIZE)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        metavar="PATH",
        default="./excitations.pkl",
        help="file to write: .parquet for Parquet, which is safe to read from anyone, or a pickle "
        "(default: ./excitations.pkl)",
    )
    return cli.add_general(parser)


def main(argv: list[str] | None = None) -> int:
    return cli.run(_extract, build_parser().parse_args(argv))


def _extract(arguments: argparse.Namespace) -> None:
    cli.check_model(arguments.model_path)
    output = Path(arguments.out)
    if not output.absolute().parent.is_dir():
        raise UsageError(f"{output}: no folder {output.absolute().parent} to write it in")
    open_dataset(arguments.data_dir)  # say what is wrong with it before the slow imports
    backend.import_keras()
    table = extract(arguments.model_path, arguments.data_dir, arguments.batch_size)
    write(output, table)
    num_depths = table.iloc[:, 1].nunique()  # by place: a tag may be named depth
    messages.say(
        f"{output}: {messages.count(len(table), 'row')}, "
        f"{messages.count(len(table) // num_depths, 'clip')} at {num_depths} depths, "
        f"{messages.size_on_disk(output)}"
    )


if __name__ == "__main__":
    sys.exit(main())
