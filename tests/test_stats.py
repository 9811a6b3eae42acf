"""Statistics of a split, against known answers."""

import json

import numpy as np
import pytest
from PIL import Image

from data_prep import InputError
from data_prep.stats import draw_stats, jpeg_quality, sharpness
from data_prep.verify import verify_split
from tests.test_data_prep import encode, picture, prepared, run_here


def test_statistics_have_known_answers(tmp_path, capsys):
    src = tmp_path / "src"
    for name, quality, images in (("a", 40, 1), ("b", 75, 3), ("c", 95, 2)):
        (src / name).mkdir(parents=True)
        for i in range(images):
            (src / name / f"{i}.jpg").write_bytes(encode(picture(ord(name) + 9 * i, 24, 24), quality=quality))
    (src / "c/1.jpg").write_bytes((src / "c/0.jpg").read_bytes())
    split = prepared(src, tmp_path / "d/face_hq/search")
    run_here("stats", split.folder)
    found = json.loads((split.folder / "stats.json").read_text())
    assert (found["images"], found["classes"], found["classes with one image"], found["copies"]) == (6, 3, 1, 1)
    assert found["images per class"] == {"min": 1, "p25": 1.5, "median": 2, "p75": 2.5, "max": 3, "mean": 2}
    assert found["JPEG quality"] == {"min": 40, "p25": 75, "median": 75, "p75": 90, "max": 95, "mean": 75.833}
    assert found["bytes per image"]["mean"] == pytest.approx(np.mean([p.stat().st_size for p in src.rglob("*.jpg")]),
                                                             abs=1e-3)
    assert found["roles"] == {"probe": 3, "gallery": 2, "distractor": 1} and found["pixels"] == 24
    assert Image.open(split.folder / "stats.png").width > 1000 and "JPEG quality" in capsys.readouterr().out
    assert verify_split(split.folder) == []  # what it wrote beside the shards is no part of them


def test_one_value_is_told_and_fills_no_panel(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    draw_stats(tmp_path / "stats.png", "a set", {"images per class": np.array([3, 3]), "sharpness": np.array([1.0, 2])})
    one, several = figures[0].axes
    assert [text.get_text() for text in one.texts] == ["all 2 classes:\n3"] and not one.patches
    assert sum(bar.get_height() for bar in several.patches) == 2 and not several.texts


@pytest.mark.parametrize("quality", [1, 25, 49, 50, 51, 77, 90, 100])
def test_the_quality_of_a_jpeg_is_read_from_its_table(quality):
    assert jpeg_quality(encode(picture(0), quality=quality)) == quality
    assert jpeg_quality(b"damaged") is None


def test_sharpness_of_known_images():
    grey = np.full((3, 16, 16), 100, dtype=np.uint8)
    assert sharpness(grey) == 0
    board = ((np.indices((16, 16)).sum(0) % 2) * 200).astype(np.uint8)[None].repeat(3, 0)
    assert sharpness(board) == pytest.approx(800)  # +-800 at every other pixel, mean 0


def test_bad_statistics(tmp_path):
    with pytest.raises(InputError, match=r"no index\.json"):
        run_here("stats", tmp_path)
