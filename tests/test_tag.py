"""tag.py: the tags of whole audio files in every output format, and errors."""

import csv
import errno
import io
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import tag
from model import NetworkConfig, build_network
from toolkit import figures, tagging
from toolkit.data.annotations import MTT_TOP_TAGS
from toolkit.data.audio import decode, decode_pieces
from toolkit.errors import AudioError
from toolkit.models.checkpoints import Checkpoint, load, save
from toolkit.models.export import export
from toolkit.provenance import describe

import matplotlib.image
import numpy as np
import pytest
from conftest import encode_audio, run_python, synthesise
from model_files import matched_checkpoint
from test_eval import published_stage

SEGMENT = 59049
RATE = 22050
TAGS = ("guitar", "slow", "naïve ♪", 'a,b"c', "$x$ $", "drums")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """Save a small network with random weights whose outputs depend on the audio."""
    path = tmp_path_factory.mktemp("model") / "small.keras"
    save(path, matched_checkpoint("res", TAGS, RATE))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write audio files of several formats and lengths, and files that are not audio."""
    root = tmp_path_factory.mktemp("music")
    (root / "b" / "deep").mkdir(parents=True)
    encode_audio(root / "b" / "deep" / "one.mp3", synthesise(6, tags=(1,)))
    encode_audio(root / "a.wav", synthesise(9, 44100, 2, tags=(3,)), 44100, "pcm_s16le", None)
    encode_audio(root / "c.flac", synthesise(4, tags=(5,)), codec="flac", bit_rate=None)
    (root / "b" / "cover.txt").write_text("not audio\n" * 50)
    (root / "z.empty").touch()
    return root


AUDIO_NAMES = ["a.wav", "b/deep/one.mp3", "c.flac"]  # in the order in which a folder is read


@pytest.fixture(autouse=True)
def program(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tag.py"])


def run(capsys, *arguments, status=0):
    """Run tag.py in this process; return stdout and the lines of stderr."""
    assert tag.main(list(map(str, arguments))) == status
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.out, printed.err.splitlines()


def json_lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_published_log_folders_give_the_published_predictions(golden, tmp_path, capsys):
    expected = np.load(golden / "expected.npz")
    clips = [golden / "clips" / f"gm-{name}-01-take-0-29.mp3" for name in ("pop", "choir")]
    for name in ("se-multi", "res-nomulti"):
        model = published_stage(golden, tmp_path / name, name)
        out, said = run(capsys, model, *clips, "--json")
        (line,) = said
        assert line.startswith(f"{model}: the file contains no tag names: assuming")
        found = json_lines(out)
        assert [line["path"] for line in found] == list(map(str, clips))
        assert [line["segments"] for line in found] == [10, 10]
        means = expected[f"{name}/predictions"].reshape(2, 10, 50).mean(axis=1)
        values = [list(line["tags"].values()) for line in found]
        np.testing.assert_allclose(values, means, rtol=0, atol=1e-5)
        assert tuple(found[0]["tags"]) == MTT_TOP_TAGS


def test_tags_option_names_the_outputs_of_a_file_without_tags(golden, tmp_path, capsys):
    model = golden / "checkpoints" / "se-multi.hdf5"
    clip = golden / "clips" / "gm-pop-01-take-0-29.mp3"
    moods = [f"mood {number}" for number in range(50)]
    (tmp_path / "tags.txt").write_text("\n".join(moods) + "\n")
    out, said = run(capsys, model, clip, "--json", "--tags", tmp_path / "tags.txt")
    assert said == []
    assert list(json_lines(out)[0]["tags"]) == moods
    _, said = run(capsys, model, clip, "--tags", tmp_path / "none.txt", status=2)
    assert "No such file or directory" in said[-1]


def test_an_onnx_file_gives_the_tags_of_its_network(folder, model_path, tmp_path, capsys):
    pytest.importorskip("onnx", reason="needs requirements/export.txt")
    checkpoint = load(model_path)
    export(tmp_path / "small.onnx", checkpoint)
    options = ("--json", "--hop", 20_000, "--batch-size", 4)
    out, said = run(capsys, tmp_path / "small.onnx", folder, *options)
    assert said[-1] == "2 of 5 files could not be decoded and were skipped"
    expected = tagging.tag_files(checkpoint, [folder / name for name in AUDIO_NAMES], 20_000)
    for line, (path, probabilities) in zip(json_lines(out), expected, strict=True):
        assert line["path"] == str(path) and line["segments"] == len(probabilities)
        assert tuple(line["tags"]) == TAGS
        means = probabilities.mean(axis=0)
        np.testing.assert_allclose(list(line["tags"].values()), means, rtol=0, atol=1e-5)


def test_a_folder_is_read_in_order_and_files_that_are_not_audio_are_skipped(
    folder, model_path, capsys
):
    out, said = run(capsys, model_path, folder, "--json")
    found = json_lines(out)
    assert [line["path"] for line in found] == [str(folder / name) for name in AUDIO_NAMES]
    assert [line["segments"] for line in found] == [3, 2, 1]
    assert len(said) == 3
    assert str(folder / "b" / "cover.txt") in said[0] and said[0].endswith(": skipped")
    assert said[1] == f"{folder / 'z.empty'}: the file is empty: skipped"
    assert said[2] == "2 of 5 files could not be decoded and were skipped"

    # Tagged one by one, the files have the same tags.
    for line in found:
        alone, said = run(capsys, model_path, line["path"], "--json", "--batch-size", "3")
        assert said == []
        (alone,) = json_lines(alone)
        assert alone["tags"].keys() == line["tags"].keys()
        assert list(alone["tags"].values()) == pytest.approx(list(line["tags"].values()), abs=2e-6)
    assert found[0]["tags"] != found[1]["tags"] != found[2]["tags"]


@pytest.mark.slow
def test_less_than_a_batch_is_tagged_with_pytorch(folder, model_path, capsys):
    pytest.importorskip("torch", reason="needs requirements/backends.txt")
    done = run_python("tag.py", model_path, folder / "a.wav", "--json", KERAS_BACKEND="torch")
    assert (done.returncode, done.stderr) == (0, "")
    (expected,) = json_lines(run(capsys, model_path, folder / "a.wav", "--json")[0])
    (found,) = json_lines(done.stdout)
    assert list(found["tags"].values()) == pytest.approx(list(expected["tags"].values()), abs=1e-5)


def test_the_table_has_the_top_tags_aligned(folder, model_path, capsys):
    out, _ = run(capsys, model_path, folder / "a.wav", folder / "c.flac", "--json")
    expected = json_lines(out)
    out, _ = run(capsys, model_path, folder / "a.wav", folder / "c.flac", "--top", "3")
    tables = [table.splitlines() for table in out.split("\n\n")]
    assert len(tables) == 2
    for (path, *rows), line in zip(tables, expected, strict=True):
        assert path == line["path"]
        best = sorted(line["tags"].items(), key=lambda entry: -entry[1])[:3]
        width = max(len(name) for name, _ in best)
        assert len({len(row) for row in rows}) == 1
        for row, (name, value) in zip(rows, best, strict=True):
            assert row[:2] == "  " and row[2 : 2 + width].rstrip() == name
            assert float(row[2 + width :]) == pytest.approx(value, abs=1e-4)
    out, _ = run(capsys, model_path, folder / "c.flac")
    assert len(out.splitlines()) == 1 + len(TAGS)  # --top 10, but the model has only six tags


def test_csv_has_one_row_per_file(folder, model_path, capsys):
    out, _ = run(capsys, model_path, folder, "--csv")
    header, *rows = csv.reader(io.StringIO(out))
    assert header == ["path", *TAGS]
    assert [row[0] for row in rows] == [str(folder / name) for name in AUDIO_NAMES]
    expected = json_lines(run(capsys, model_path, folder, "--json")[0])
    for row, line in zip(rows, expected, strict=True):
        assert list(map(float, row[1:])) == pytest.approx(list(line["tags"].values()), abs=2e-6)


def test_a_short_file_is_padded_with_silence(tmp_path, model_path, capsys):
    path = encode_audio(tmp_path / "short.wav", synthesise(1, RATE), RATE, "pcm_s16le", None)
    (line,) = json_lines(run(capsys, model_path, path, "--json", "--hop", "100")[0])
    assert line["segments"] == 1
    segment = np.zeros((1, SEGMENT), "f")
    samples = decode(path, RATE)
    segment[0, : len(samples)] = samples
    assert 0 < len(samples) < SEGMENT
    expected = load(model_path).network.predict_on_batch(segment)[0]
    assert list(line["tags"].values()) == pytest.approx(expected.tolist(), abs=1e-5)


def test_taggrams_are_drawn_and_saved(folder, model_path, tmp_path, capsys):
    picture, table = tmp_path / "a.png", tmp_path / "a.csv"
    options = ["--hop", "11025", "--taggram", picture, "--save-taggram", table, "--top", "4"]
    out, said = run(capsys, model_path, folder / "a.wav", "--json", *options)
    assert said == []
    (line,) = json_lines(out)
    height, width, _ = matplotlib.image.imread(picture).shape
    assert width == 830 and 150 < height < 400
    with open(table, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["time", *TAGS]
    values = np.array(rows, float)
    assert len(values) == line["segments"] == (9 * RATE - SEGMENT) // 11025 + 1
    np.testing.assert_allclose(values[:, 0], 0.5 * np.arange(len(values)), atol=1e-5)
    means = values[:, 1:].mean(axis=0)
    np.testing.assert_allclose(means, list(line["tags"].values()), rtol=0, atol=2e-6)

    # One segment is enough for a picture.
    for name in ("c.SVG", "c.pdf"):
        run(capsys, model_path, folder / "c.flac", "--taggram", tmp_path / name)
        assert b"tags_sha256" in (tmp_path / name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


def test_the_taggram_shows_the_tags_with_the_largest_means(tmp_path):
    random = np.random.default_rng(0)
    probabilities = random.uniform(0, 0.3, (7, len(TAGS)))
    probabilities[:, 3] = 1
    starts = np.arange(7.0)
    pictures = []
    provenance = describe("m.keras", "x" * 500, TAGS)
    for name, top in (("one.png", 1), ("all.png", 99)):
        figures.plot_taggram(tmp_path / name, provenance, TAGS, probabilities, starts, 1, top)
        pictures.append(matplotlib.image.imread(tmp_path / name)[..., :3])
    yellow = np.array([253, 231, 37]) / 255  # a probability of 1 in the colormap viridis
    shares = [
        (np.abs(picture[:, 150:650] - yellow).max(axis=-1) < 0.02).mean() for picture in pictures
    ]
    assert shares[0] > 0.12 and 0.03 < shares[1] < shares[0]


def test_a_folder_that_cannot_be_read_is_an_error_after_the_files(
    folder, model_path, capsys, monkeypatch
):
    scan = os.scandir

    def refuse(path):
        if str(path) == str(folder / "b"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    out, said = run(capsys, model_path, folder, "--json", status=1)
    assert [Path(line["path"]).name for line in json_lines(out)] == ["a.wav", "c.flac"]
    assert said[-1] == f"tag.py: error: {folder / 'b'}: cannot be read: Permission denied"


def test_linked_folders_are_read_once(folder, tmp_path):
    music = tmp_path / "music"
    (music / "own").mkdir(parents=True)
    shutil.copy(folder / "c.flac", music / "own")
    (music / "again").symlink_to(music / "own")
    (music / "own" / "loop").symlink_to(music)
    (music / "linked").symlink_to(folder)
    found, errors = tagging.find_files(str(music))
    names = ["a.wav", "b/cover.txt", "b/deep/one.mp3", "c.flac", "z.empty"]
    expected = [*(music / "linked" / name for name in names), music / "own" / "c.flac"]
    assert [path for path, _ in found] == expected and errors == []


def test_a_given_file_that_cannot_be_decoded_is_an_error_after_the_other_files(
    folder, model_path, tmp_path, capsys
):
    text = shutil.copy(folder / "b" / "cover.txt", tmp_path / "cover.txt")
    out, said = run(capsys, model_path, text, folder / "c.flac", "--json", status=1)
    assert [line["path"] for line in json_lines(out)] == [str(folder / "c.flac")]
    assert len(said) == 1 and said[0].startswith(f"tag.py: error: {text}: ")

    other = shutil.copy(text, tmp_path / "other.txt")
    out, said = run(capsys, model_path, text, other, folder / "c.flac", "--csv", status=1)
    assert len(out.splitlines()) == 2
    assert said[0].startswith(f"{text}: ") and said[1].startswith(f"{other}: ")
    assert said[2:] == ["tag.py: error: 2 of the given files and folders cannot be read"]


def test_a_missing_file_is_named_before_others_are_tagged(folder, model_path, tmp_path, capsys):
    missing, long = tmp_path / "none.mp3", tmp_path / f"{'n' * 300}.mp3"
    for path, reason, status in ((missing, "no such file", 2), (long, "File name too long", 1)):
        out, said = run(capsys, model_path, folder / "c.flac", path, status=status)
        assert (out, said) == ("", [f"tag.py: error: {path}: {reason}"])


def test_at_most_two_files_are_decoded_ahead_of_the_network(folder, model_path, monkeypatch):
    started, threads = [], set()

    def noted(path, *options, **more):
        started.append(path)
        threads.add(threading.current_thread().name)
        yield from decode_pieces(path, *options, **more)

    monkeypatch.setattr(tagging, "decode_pieces", noted)
    found = tagging.tag_files(load(model_path), [folder / "c.flac"] * 40, batch_size=1)
    ahead = []
    for number, _ in enumerate(found, start=1):
        # The network has the next file; those after it are decoded before they are requested.
        deadline = time.monotonic() + 20
        while len(started) < min(number + 3, 40) and time.monotonic() < deadline:
            time.sleep(0.001)
        ahead.append(len(started) - number - 1)
    assert ahead == [2] * 37 + [1, 0, -1]
    assert len(threads) == 1  # one decoding thread is faster than several


def test_an_abandoned_iterator_stops_its_thread(folder, model_path):
    found = tagging.tag_files(load(model_path), [folder / "c.flac"] * 40, batch_size=1)
    next(found)
    assert any(thread.name == "decode" for thread in threading.enumerate())
    found.close()
    assert not any(thread.name == "decode" for thread in threading.enumerate())


def test_python_exits_while_an_iterator_is_in_use(folder, tmp_path):
    """Also in the middle of a file in parts, whose next parts are decoded."""
    code = (
        "import sys; from pathlib import Path; from toolkit import tagging\n"
        "parts = tagging._decode_ahead([Path(sys.argv[1])] * 9, 22050, 59049, 1)\n"
        "print(len(next(parts)[1].segments))"
    )
    done = run_python("-c", code, folder / "a.wav", timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{9 * RATE - SEGMENT + 1}\n"


def test_tag_files_raises_the_error_of_a_file_after_the_files_before_it(
    folder, model_path, tmp_path
):
    files = [folder / "a.wav", folder / "c.flac", tmp_path / "none.mp3", folder / "c.flac"]
    found = tagging.tag_files(load(model_path), files, batch_size=1)
    assert next(found)[0] == files[0]
    with pytest.raises(AudioError, match="no such file"):
        list(found)
    assert not any(thread.name == "decode" for thread in threading.enumerate())


def test_folders_without_audio_are_an_error(model_path, tmp_path, capsys):
    out, said = run(capsys, model_path, tmp_path, status=2)
    assert (out, said) == ("", [f"tag.py: error: {tmp_path}: no files found"])
    (tmp_path / "a.txt").write_text("words\n")
    out, said = run(capsys, model_path, tmp_path, status=1)
    assert out == "" and said[-1] == f"tag.py: error: {tmp_path}: no audio found"


@pytest.mark.parametrize(
    ("audio", "option", "path", "message"),
    [
        (".", "--taggram", "x.png", " needs exactly one audio file, but there are 5"),
        (".", "--save-taggram", "x.csv", " needs exactly one audio file, but there are 5"),
        ("c.flac", "--taggram", "x.jpeg", " x.jpeg: expected a name that ends in .png"),
        ("c.flac", "--save-taggram", "x.png", " x.png: expected a name that ends in .csv"),
        ("c.flac", "--taggram", "/none/x.png", " /none/x.png: the folder /none does not exist"),
        ("c.flac", "--save-embeddings", "x.npz", " x.npz: is a folder: choose another name"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused(
    folder, model_path, tmp_path, capsys, monkeypatch, audio, option, path, message
):
    monkeypatch.chdir(tmp_path)
    Path("x.npz").mkdir()
    out, (said,) = run(capsys, model_path, folder / audio, option, path, status=2)
    assert out == "" and said.startswith(f"tag.py: error: {option}{message}")


@pytest.mark.parametrize(
    "options", [[], ["m.keras"], ["m", "a", "--hop", "0"], ["m", "a", "--csv", "--json"]]
)
def test_invalid_commands_print_the_usage(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        tag.main(options)
    assert "usage: " in capsys.readouterr().err


def test_tags_are_printed_in_any_encoding_and_data_is_utf_8(folder, tmp_path, monkeypatch):
    config = NetworkConfig("se", init_features=2, num_tags=2)
    path = tmp_path / "model.keras"
    save(path, Checkpoint(build_network(config), config, ("음악", "doux é")))
    for options, expected in (((), "?? "), (("--json",), "음악"), (("--csv",), "음악")):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
        monkeypatch.setattr(sys, "stdout", stdout)
        assert tag.main([str(path), str(folder / "c.flac"), *options]) == 0
        stdout.flush()
        assert expected in stdout.buffer.getvalue().decode("utf-8" if options else "latin-1")


def test_a_file_name_that_is_not_utf_8_is_printed(folder, model_path, tmp_path, capsys):
    name = b"caf\xe9.flac".decode(errors="surrogateescape")
    try:
        path = Path(shutil.copy(folder / "c.flac", tmp_path / name))
    except OSError:
        pytest.skip("this file system accepts only UTF-8 names")
    for form in ("--json", "--top=2"):
        assert "caf�.flac" in run(capsys, model_path, path, form)[0]
