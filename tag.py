"""Tag audio: the probability of each tag, for whole files and over time.

    python tag.py se-multi-auc_0.9111-tfrmodel.hdf5 song.mp3
    python tag.py model.onnx ~/Music --json > tags.jsonl
    python tag.py log/4 song.flac --taggram song.png --hop 22050
    python tag.py log/4 ~/Music --save-embeddings music.npz

A file's probability of a tag is the mean over its segments, as in evaluation. With an ``.onnx``
file, Keras is not needed.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from toolkit import cli, figures, messages
from toolkit.data.audio import check_file
from toolkit.errors import AudioError, UsageError
from toolkit.files import exists, write_atomically, written_whole
from toolkit.models.tags import choose_tags
from toolkit.prediction import DEFAULT_BATCH_SIZE, clip_mean, load
from toolkit.provenance import as_text, describe
from toolkit.tagging import find_files, tag_files

import numpy as np
from tqdm import tqdm

# --- Output --------------------------------------------------------------------------------------


def write_taggram(
    path: str | Path, tags: tuple[str, ...], probabilities: np.ndarray, starts: np.ndarray
) -> None:
    """Write tags over time as CSV: one row per segment, with its start and one column per tag.

    Parameters
    ----------
    path : str or Path
        File to write.
    tags : tuple of str
        Names of the tags.
    probabilities : np.ndarray [shape=(n_segments, n_tags)]
        Probabilities of the tags in each segment.
    starts : np.ndarray [shape=(n_segments,)]
        Start of each segment, in seconds.
    """
    lines = [_csv_row(["time", *tags])]
    for start, row in zip(starts, probabilities, strict=True):
        lines.append(_csv_row(f"{value:.6f}" for value in (start, *row)))
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


def _table(path: Path, tags: tuple[str, ...], means: np.ndarray, top: int) -> str:
    order = np.argsort(-means, kind="stable")[:top]
    width = max(len(tags[tag]) for tag in order)
    lines = [f"  {tags[tag]:<{width}}  {means[tag]:.4f}" for tag in order]
    return "\n".join([as_text(path), *lines])


def _csv_row(values: Iterable) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()


def _json_line(path: Path, tags: tuple[str, ...], means: np.ndarray, num_segments: int) -> str:
    values = {tag: round(float(mean), 6) for tag, mean in zip(tags, means, strict=True)}
    line = {"path": as_text(path), "segments": num_segments, "tags": values}
    return json.dumps(line, ensure_ascii=False)


# --- Command line --------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Tag audio files of any format and length.",
        "  python tag.py se-multi-auc_0.9111-tfrmodel.hdf5 song.mp3 --top 5\n"
        "  python tag.py model.onnx ~/Music --csv > tags.csv\n"
        "  python tag.py log/4 song.flac --taggram song.png --hop 22050",
    )
    read = parser.add_argument_group("model and audio")
    cli.add_model(
        read,
        what="a .keras, .hdf5, .h5 or .onnx file, or a stage's folder (its best checkpoint is "
        "used)",
    )
    cli.add_tags(read)
    read.add_argument(
        "audio",
        metavar="AUDIO",
        nargs="+",
        help="an audio file, or a folder for all audio in it and its subfolders, also those that "
        "links name; audio shorter than a segment is padded with silence, and samples after the "
        "last whole segment are dropped",
    )
    read.add_argument(
        "--hop",
        metavar="SAMPLES",
        type=cli.positive_int,
        help="hop length in samples (default: the length of a segment, without overlap)",
    )
    machine = parser.add_argument_group("machine")
    cli.add_batch_size(machine, DEFAULT_BATCH_SIZE)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--top",
        metavar="N",
        type=cli.positive_int,
        default=10,
        help="number of most probable tags to print and draw (default: 10)",
    )
    form = output.add_mutually_exclusive_group()
    form.add_argument(
        "--csv",
        action="store_true",
        help="print all tags as CSV, one row per file (default: off)",
    )
    form.add_argument(
        "--json",
        action="store_true",
        help="print all tags as JSON, one line per file (default: off)",
    )
    output.add_argument(
        "--save-embeddings",
        metavar="FILE.npz",
        help="write the activations before the output layer, averaged over each file's segments: "
        "arrays paths and embeddings (default: none)",
    )
    output.add_argument(
        "--taggram",
        metavar="FILE.png",
        help="draw the top tags of one file over time as .png, .svg or .pdf (default: none)",
    )
    output.add_argument(
        "--save-taggram",
        metavar="FILE.csv",
        help="write all tags of one file over time: one row per segment, with its start in "
        "seconds (default: none)",
    )
    return cli.add_general(parser)


def main(argv: list[str] | None = None) -> int:
    return cli.run(_tag, build_parser().parse_args(argv))


def _tag(arguments: argparse.Namespace) -> None:
    if arguments.csv or arguments.json:
        sys.stdout.reconfigure(encoding="utf-8")  # data, whatever the terminal shows
    cli.check_model(arguments.model_path)
    files, failed = find_files(arguments.audio)
    if not files and not failed:
        raise UsageError(f"{', '.join(arguments.audio)}: no files found")
    for path, is_named in files:
        # Before the model is loaded, which takes seconds.
        if is_named and not exists(path):
            raise UsageError(f"{path}: no such file")
        if is_named and len(files) == 1:
            check_file(path)
    _check_outputs(arguments, len(files))

    checkpoint = load(arguments.model_path, embeddings=bool(arguments.save_embeddings))
    tags = choose_tags(arguments.model_path, checkpoint, arguments.tags)
    segment, rate = checkpoint.config.num_samples, checkpoint.sample_rate
    hop = arguments.hop or segment
    was_named = dict(files)
    num_skipped = num_tagged = 0
    paths, embeddings = [], []  # of --save-embeddings: one mean per file

    def refused(path: Path, error: AudioError) -> None:
        nonlocal num_skipped
        if was_named[path]:
            failed.append(error)
        else:
            num_skipped += 1
            messages.say(f"{error}: skipped")

    for path, probabilities, *others in tag_files(
        checkpoint, [path for path, _ in files], hop, arguments.batch_size, refused
    ):
        means = clip_mean(probabilities)
        if arguments.csv:
            if not num_tagged:
                _print(_csv_row(["path", *tags]))
            _print(_csv_row([as_text(path), *(f"{mean:.6f}" for mean in means)]))
        elif arguments.json:
            _print(_json_line(path, tags, means, len(probabilities)))
        else:
            _print(("\n" if num_tagged else "") + _table(path, tags, means, arguments.top))
        num_tagged += 1
        for of_segments in others:
            paths.append(as_text(path))
            embeddings.append(clip_mean(of_segments).astype(np.float32))
        starts = np.arange(len(probabilities)) * hop / rate
        if arguments.save_taggram:
            write_taggram(arguments.save_taggram, tags, probabilities, starts)
        if arguments.taggram:
            provenance, seconds = describe(arguments.model_path, path, tags), segment / rate
            figures.plot_taggram(
                arguments.taggram, provenance, tags, probabilities, starts, seconds, arguments.top
            )

    if embeddings:
        with written_whole(arguments.save_embeddings) as file:
            np.savez(file, paths=np.array(paths), embeddings=np.array(embeddings))
    if num_skipped:
        messages.say(
            f"{num_skipped:,} of {len(files):,} files could not be decoded and were skipped"
        )
    if len(failed) == 1:
        raise failed[0]
    if failed:
        for error in failed:
            messages.say(str(error))
        raise AudioError(f"{len(failed):,} of the given files and folders cannot be read")
    if not num_tagged:
        raise AudioError(f"{', '.join(arguments.audio)}: no audio found")


def _check_outputs(arguments: argparse.Namespace, num_files: int) -> None:
    """Check the options of output files before the files are tagged."""
    for option, path, suffixes in (
        ("--taggram", arguments.taggram, figures.PICTURE_FORMATS),
        ("--save-taggram", arguments.save_taggram, (".csv",)),
        ("--save-embeddings", arguments.save_embeddings, (".npz",)),
    ):
        if path is None:
            continue
        if num_files != 1 and "taggram" in option:
            raise UsageError(f"{option} needs exactly one audio file, but there are {num_files:,}")
        if Path(path).suffix.lower() not in suffixes:
            raise UsageError(f"{option} {path}: expected a name that ends in {', '.join(suffixes)}")
        cli.check_output(path, option)


def _print(text: str) -> None:
    # tqdm.write does not break the progress bar if both are on one terminal.
    tqdm.write(text)


if __name__ == "__main__":
    sys.exit(main())
