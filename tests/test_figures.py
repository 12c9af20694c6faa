"""Figures: fonts that have the characters, or one line that names a font; texts that fit."""

from itertools import combinations

from toolkit import figures
from toolkit.evaluation import bootstrap, score
from toolkit.provenance import describe

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")


def draw(folder, tag):
    figures._say_once.cache_clear()
    probabilities = np.full((2, 1), 0.5)
    path = folder / "taggram.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        provenance = describe("m.keras", "song.mp3", (tag,))
        figures.plot_taggram(path, provenance, (tag,), probabilities, np.arange(2.0), 1.0)
    return path.read_text(encoding="utf-8")


@pytest.mark.filterwarnings("error")
def test_a_character_is_drawn_in_an_installed_font_that_has_it(tmp_path, capsys):
    assert "STIX" in draw(tmp_path, "ᶍ")  # not in DejaVu Sans, the default
    assert "STIX" not in draw(tmp_path, "x" * 300)
    assert capsys.readouterr() == ("", "")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("tag", "font"), [("음악", "Noto Sans CJK"), ("🎷", "Symbola"), ("𓀀", "Noto Sans")]
)
def test_without_such_a_font_one_line_names_one_to_install(
    tmp_path, capsys, monkeypatch, tag, font
):
    monkeypatch.setattr(figures, "_installed_fonts", lambda: {"DejaVu Sans": None})
    monkeypatch.setattr(figures, "_characters", lambda path: frozenset(map(chr, range(256))))
    draw(tmp_path, tag)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("no installed font has ") and font in err


def test_texts_of_a_comparison_fit_and_do_not_overlap(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    names = ["se-multi-auc_0.9111-tfrmodel", "rese-multi-auc_0.9113-tfrmodel", "log-$x^{$"]
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (saved.append(f), save(f, *a, **k)))
    random = np.random.default_rng(0)
    labels = np.tile([[0, 1], [1, 0]], (30, 1)).astype(np.uint8)
    predictions = [labels + random.normal(size=labels.shape) for _ in names]
    scores = [score(labels, values) for values in predictions]
    resamples = [bootstrap(labels, values, num_resamples=50) for values in predictions]
    tags = ("a$^", "b")
    provenances = [describe("m.keras", "data", tags, 60, name=name) for name in names]
    figures.plot_comparison(tmp_path / "c.png", provenances, tags, scores, resamples)
    (figure,) = saved
    # Numbers also belong to ticks outside the axes, which are not drawn.
    texts = [text for text in figure.findobj(Text) if text.get_visible()]
    texts = [text for text in texts if any(map(str.isalpha, text.get_text()))]
    boxes = [text.get_window_extent() for text in texts]
    assert {"data, 60 test clips", "ROC AUC"} < {text.get_text() for text in texts}
    assert all(box.x0 >= 0 and box.x1 <= 830 for box in boxes)
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
