"""report.html and errors.csv: escaped text, links to audio files, and missing parts."""

import re
from html.parser import HTMLParser
from urllib.parse import unquote

from input_data import Clip, Dataset, Split
from toolkit.data.manifest import write_manifest
from toolkit.evaluation import bootstrap, score
from toolkit.page import Result, write_errors, write_page
from toolkit.provenance import describe

import numpy as np
import pandas as pd
import pytest

TAGS = ("<script>alert(1)</script>", "슬픈 음악", "\"静か\" & 'é'", "🎷", "rock")
PATHS = [f"a/100% #{number}? x:<b>é'&amp;.mp3" for number in range(40)]


class Page(HTMLParser):
    """The visible text of a page, its links, and those that become players."""

    def __init__(self, path):
        super().__init__()
        self.text, self.links, self.sources, self.ids, self.tags = [], [], [], [], []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag == "a":
            is_audio = attributes.get("class") == "audio"
            (self.sources if is_audio else self.links).append(attributes["href"])
        self.ids += [attributes["id"]] if "id" in attributes else []

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def report(tmp_path):
    """Return a function that writes a report of simulated models."""

    def write(num_models=1, has_audio=True, has_identity=True):
        random, tags = np.random.default_rng(0), TAGS
        labels = (random.uniform(size=(len(PATHS), len(tags))) < 0.4).astype(np.uint8)
        labels[:, -1] = 0
        folder, data_dir = tmp_path / "report #1", tmp_path / "data?"
        folder.mkdir()
        # A link to a dataset whose audio is beside it.
        audio_dir, linked = tmp_path / "disk" / "audio", tmp_path / "disk" / "data"
        (linked / "tfrecord").mkdir(parents=True)
        data_dir.symlink_to(linked)
        built = {"tags": list(tags), "sample_rate": 22050, "num_samples": 59049, "splits": {}}
        write_manifest(data_dir / "tfrecord", built | {"options": {"audio_dir": "../audio"}})
        for path in PATHS[: len(PATHS) * has_audio]:
            (audio_dir / path).parent.mkdir(parents=True, exist_ok=True)
            (audio_dir / path).touch()
        clips = [
            Clip(np.zeros((0, 1), np.float32), row, *([str(number), path] if has_identity else []))
            for number, (row, path) in enumerate(zip(labels, PATHS, strict=True))
        ]
        splits = {split: Split() for split in ("train", "val", "test")}
        results = []
        for number in range(num_models):
            predictions = np.clip(random.normal(0.4 * labels + 0.3, 0.2), 0, 1)
            origin = describe(f"m-{number}.onnx", data_dir, tags, len(clips))
            scores = score(labels, predictions), bootstrap(labels, predictions, 50)
            validation = (labels[:9], predictions[:9])
            results.append(Result(origin, labels, predictions, *scores, validation))
        write_page(folder, Dataset(data_dir, tags, 22050, 59049, splits), tags, clips, results)
        write_errors(folder, tags, clips, results[0])
        return folder

    return write


def test_tags_and_paths_are_text(report):
    page = Page(report() / "report.html")
    assert page.tags.count("script") == 1
    for tag in TAGS:
        assert tag in page.text
    assert any(path in text for path in PATHS for text in page.text)


def test_players_read_the_audio_files_by_relative_links(report):
    folder = report()
    page = Page(folder / "report.html")
    assert len(page.sources) > 20
    for source in page.sources:
        assert not re.search("[?#:]", source)
        assert (folder / unquote(source)).is_file()
    assert set(page.links) <= {f"#{name}" for name in page.ids}  # nothing leaves the page


def test_clips_without_identity_are_numbered(report):
    folder = report(has_identity=False)
    table = pd.read_csv(folder / "errors.csv")
    text = " ".join(Page(folder / "report.html").text)
    assert table["clip_id"].str.fullmatch(r"test clip \d+").all()
    assert all(f"{name} " in text for name in table["clip_id"])


def test_missing_audio_is_said_instead_of_players(report):
    page = Page(report(has_audio=False) / "report.html")
    assert not page.sources and "so there are no players" in " ".join(page.text)


def test_errors_are_those_of_the_page(report):
    folder = report()
    table = pd.read_csv(folder / "errors.csv", dtype={"clip_id": str})
    assert list(table.columns) == ["tag", "clip_id", "mp3_path", "label", "prediction", "rank"]
    assert set(table["tag"]) == set(TAGS[:-1])  # no clip has the last tag
    page = (folder / "report.html").read_text(encoding="utf-8")
    shown = re.findall(r'<b class="number">([\d.]+)</b>', page)
    assert sorted(shown) == sorted(table["prediction"].map("{:.3f}".format))


def test_models_stand_side_by_side_with_their_differences(report):
    page = Page(report(num_models=3) / "report.html")
    text = " ".join(" ".join(page.text).split())
    for name in ("m-1.onnx", "m-2.onnx"):
        assert f"ROC AUC {name} − m-0.onnx" in text
    assert "difference from m-0.onnx" in text
    assert text.count("Clips on which the models differ most") == len(TAGS) + 1
    assert text.count("Predicted, but not labelled") == 3 * len(TAGS)
