"""Convert a model file to .keras, or export it to a format that other programs run.

    python -m tools.convert_model se-multi-auc_0.9111-tfrmodel.hdf5 se-multi.keras
    python -m tools.convert_model log/4 se-multi.onnx

The extension of the output's name selects the format.
"""

import argparse
import sys
from pathlib import Path

from toolkit import backend, cli, messages
from toolkit.errors import UsageError
from toolkit.models import checkpoints
from toolkit.models.export import FORMATS, export
from toolkit.models.tags import choose_tags, read_tags


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(
        "Convert a model file to .keras, or export it to a format that other programs run.",
        "  python -m tools.convert_model se-multi-auc_0.9111-tfrmodel.hdf5 se-multi.keras\n"
        "  python -m tools.convert_model log/4 se-multi.onnx",
    )
    files = parser.add_argument_group("model files")
    cli.add_model(files)
    files.add_argument(
        "output",
        metavar="OUTPUT",
        help="file to write: .keras, .onnx, .savedmodel (a folder, needs TensorFlow) or .tflite "
        "(LiteRT, needs TensorFlow)",
    )
    cli.add_tags(files)
    return cli.add_general(parser)


def main(argv: list[str] | None = None) -> int:
    return cli.run(_convert, build_parser().parse_args(argv))


def _convert(arguments: argparse.Namespace) -> None:
    output = Path(arguments.output)
    if output.suffix not in (".keras", *FORMATS):
        raise UsageError(f"{output}: expected a name that ends in .keras, {', '.join(FORMATS)}")
    cli.check_output(output, replaces_folder=output.suffix == ".savedmodel")
    if cli.check_model(arguments.model_path) == "onnx":
        raise UsageError(
            f"{arguments.model_path}: an ONNX model cannot be converted: use the model that it was "
            "exported from"
        )
    if arguments.tags:
        read_tags(arguments.tags)
    # After the checks, because the import takes seconds.
    backend.import_keras()

    checkpoint = checkpoints.load(arguments.model_path)
    # Other programs cannot know the tags, so every converted file names them.
    checkpoint.tags = choose_tags(arguments.model_path, checkpoint, arguments.tags)
    config = checkpoint.config
    messages.say(
        f"{arguments.model_path}: {config.block} blocks{', multi-level' if config.multi else ''}, "
        f"{messages.count(config.init_features, 'feature')}, "
        f"{messages.count(config.num_tags, 'tag')}"
    )
    compared = ""
    if output.suffix == ".keras":
        checkpoints.save(output, checkpoint)
    else:
        difference = export(output, checkpoint)
        compared = f", differs from the network by at most {difference:.1e}"
    messages.say(f"{output}: {messages.size_on_disk(output)}{compared}")


if __name__ == "__main__":
    sys.exit(main())
