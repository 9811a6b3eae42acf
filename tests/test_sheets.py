"""The sheets of pictures that --sheet draws: the neighbours that are scored, framed by what is right, and leaks."""

import shutil
from functools import partial

import numpy as np
import pytest
from PIL import Image

import reports.plots
from data_prep import InputError
from data_prep.format import Record, Source, Split, open_root
from data_prep.write import write_split
from tests.test_evaluate import run_here, unit
from tests.test_evaluate_inputs import known, one_camera
from tests.test_scale import OPTIONS

WIDE, HIGH, TEXT, GAP = 96 + 6 + 4, 96 + 6 + 26 + 8, 26, 12  # pixels of a tile on a sheet, of its caption, of a gap


def frames_of(path):
    """The colours of the frames of an identification sheet, line by line: the probe's, then those of its ten."""
    image = np.array(Image.open(path).convert("RGB"))
    lines = range(image.shape[0] % HIGH, image.shape[0], HIGH)  # below the legend
    colours = [["#" + bytes(image[top + TEXT, left]).hex().upper() for left in
                [0, *range(WIDE + GAP, min(image.shape[1], 11 * WIDE + GAP), WIDE)]] for top in lines]
    return [[colour for colour in line if colour != "#FFFFFF"] for line in colours]


def test_the_identification_sheet_frames_what_is_right(run, demo_root, capsys):
    run_here("--run", run, *OPTIONS, "--splits", "body/test", "--no-foundation", "--sheet")
    path = run / "eval/sheet-body-test.png"
    said = capsys.readouterr().out
    assert f"{path}: shows people" in said
    split, x = Split(demo_root / "body/test"), unit(np.load(run / "eval/embeddings/tuned-body-test.npy"))
    roles, cameras = split.column("role"), split.column("camera")
    gallery = np.flatnonzero(roles > 0)
    probes = [probe for probe in np.random.default_rng(0).permutation(np.flatnonzero(roles == 0))
              if ((split.labels[gallery] == split.labels[probe]) & (cameras[gallery] != cameras[probe])).any()][:12]
    for probe, (first, *colours) in zip(probes, frames_of(path), strict=True):
        mine = split.labels[gallery] == split.labels[probe]
        kept = gallery[~(mine & (cameras[gallery] == cameras[probe]))]
        order = kept[np.argsort(-(x[kept] @ x[probe]), kind="stable")][:10]
        assert first == "#000000"
        assert colours == ["#009E73" if split.labels[row] == split.labels[probe] else "#D55E00" for row in order]
    run_here("--run", run, *OPTIONS, "--splits", "body/test", "--no-foundation")
    assert "shows people" not in capsys.readouterr().out  # only on request


def test_the_sheet_of_leaks_shows_both_images(run, demo_root, tmp_path, capsys):
    """Every image of the test split is in training too; each pair on the sheet is twice the same picture."""
    root, base = tmp_path / "data", Split(demo_root / "face_hq/train")
    shutil.copytree(base.folder, root / "face_hq/train")
    records = [Record(partial(bytes, base.jpeg(row)[1]), f"{row} {role}", base.classes[base.labels[row]], role=role)
               for role in (0, 1) for row in range(3)]
    write_split(root / "face_hq/copy", Source(records, {"name": "identification"}), source_name="folder",
                size=base.size, fit="crop", quality=95, train=False)
    arguments = ["leaks", "--run", run, "--data", root, "--bootstrap", 2, "--workers", 0, "--sheet"]
    with pytest.raises(InputError, match="no image left to score"):  # without the leaks
        run_here(*arguments, "--threshold", 0.999)
    assert "leaks-sheet.png: shows people" in capsys.readouterr().out
    sheet = np.array(Image.open(run / "eval/leaks-sheet.png").convert("RGB")).astype(int)
    for line, pairs in ((0, 4), (1, 2)):
        top = len(sheet) % HIGH + line * HIGH + TEXT + 3
        for left in range(0, pairs * (2 * WIDE + GAP), 2 * WIDE + GAP):
            a, b = (sheet[top : top + 96, start + 3 : start + 99] for start in (left, left + WIDE))
            assert a.std() > 10 and (a == b).all()


def test_a_sheet_shows_the_neighbours_that_are_scored(demo_root, tmp_path, monkeypatch):
    """Of classes those in the reference; of a gallery what the camera rule leaves; of pairs the hardest, each once."""
    drawn = {}
    monkeypatch.setattr(reports.plots, "draw_sheet", lambda path, lines, legend: drawn.update({path.stem: lines}))
    root, rng = open_root(demo_root), np.random.default_rng(0)
    body = one_camera(Split(demo_root / "body/train"), tmp_path / "body/one", [0, 0, 0, 1, 0, 1])
    splits = [root["object"]["val"], body, root["face_hq"]["test"]]
    x = {f"{split.domain}/{split.name}": rng.normal(size=(len(split), 8)).astype(np.float32)
         for split in [*splits, root["object"]["train"]]}
    for split in splits:
        reports.plots.draw_split(tmp_path, split, known(x), root, 0)
    reference = root["object"]["train"]
    y, probes = unit(x["object/train"]), unit(x["object/val"])
    for probe, _, *tiles in drawn["sheet-object-val"]:
        best = np.argsort(-(y @ probes[probe[1]]))[:10]
        assert [tile[1] for tile in tiles] == best.tolist() and all(tile[0] is reference for tile in tiles)
        assert [tile[2] == reports.plots.HIT for tile in tiles] == [
            reference.labels[row] == splits[0].labels[probe[1]] for row in best]
        assert all(tile[3].endswith(f"\n{reference.names[reference.labels[tile[1]]]}") for tile in tiles)
    rows = {line[0][1]: {tile[1] for tile in line[2:]} for line in drawn["sheet-body-one"]}
    assert rows == {2: {1, 3, 5}, 4: {1, 3, 5}}  # the first probe has no mate of another camera: it is not scored
    pairs = [tuple(tile[1] for tile in line[i : i + 2]) for line in drawn["sheet-face_hq-test"]
             for i in range(0, len(line), 3)]
    assert len(set(map(frozenset, pairs))) == len(pairs) == 40
    z = unit(x["face_hq/test"])
    scores = [float(z[a] @ z[b]) for a, b in pairs]
    listed = {tuple(sorted(map(int, row[:2]))): row[2] for row in splits[2].column("pairs")}
    assert scores[0] == pytest.approx(min(z[a] @ z[b] for (a, b), same in listed.items() if same))
    assert scores[20] == pytest.approx(max(z[a] @ z[b] for (a, b), same in listed.items() if not same))
