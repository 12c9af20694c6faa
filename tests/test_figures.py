"""Fonts of figures: installed ones that have the characters, or one line that names a font."""

from toolkit import figures
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
    assert "STIX" not in draw(tmp_path, "x")
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
