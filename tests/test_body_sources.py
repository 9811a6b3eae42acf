"""Sources of bodies: a tiny instance of every layout, prepared, verified, read back and scored by a known answer."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_prep import InputError
from data_prep.format import Split
from data_prep.verify import verify_split
from protocols.search import score_gallery
from tests.conftest import ROOT, TINY, prepare_mutated, script
from tests.test_data_prep import encode, picture, run_here

# ---------------------------------------------------------------- fixtures


def write_files(folder: Path, files: dict[str, str | bytes | None]) -> Path:
    """Write files below folder; None: a drawn picture in the format that the name asks for."""
    for i, (name, content) in enumerate(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            content = encode(picture(i, 12, 24), "PNG" if name.endswith(".png") else "JPEG")
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def prepared(source: str, src: Path, out: Path, *options) -> Split:
    """Prepare a split through the command line and verify it."""
    run_here(source, "--src", src, "--out", out, "--size", 16, "--workers", 1, *options)
    assert verify_split(out) == []
    return Split(out)


def columns(split: Split, *names: str) -> list[list[int]]:
    return [split.column(name).tolist() for name in names]


def at_degrees(*angles: float) -> np.ndarray:
    """Unit embeddings on a circle: who is nearest can be read off the angles."""
    radians = np.radians(angles)
    return np.stack([np.cos(radians), np.sin(radians)], 1).astype(np.float32)


def scored(split: Split, *angles: float) -> dict[str, float]:
    figures, _ = score_gallery(at_degrees(*angles), split, draws=2, seed=0)
    return {name: figure.value for name, figure in figures.items()}


MSMT17 = {
    "list_train.txt": "0000/0000_000_01_0303morning_0015_0.jpg 0\n0001/0001_000_02_0303noon_0001_0.jpg 1\n",
    "list_val.txt": "0000/0000_001_03_0303morning_0020_1.jpg 0\n",
    "list_query.txt": "0000/0000_000_05_0113morning_0001_0.jpg 0\n0001/0001_000_15_0113noon_0002_0.jpg 1\n",
    "list_gallery.txt": "0000/0000_001_06_0113morning_0003_0.jpg 0\n0000/0000_002_05_0113noon_0004_0.jpg 0\n"
                        "0001/0001_001_07_0113noon_0005_0.jpg 1\n",
}  # fmt: skip


def msmt17_files(version: int) -> dict:
    train, test = ("train", "test") if version == 1 else ("mask_train_v2", "mask_test_v2")
    files = dict(MSMT17)
    for name, text in MSMT17.items():
        folder = train if name in ("list_train.txt", "list_val.txt") else test
        files |= {f"{folder}/{line.split()[0]}": None for line in text.splitlines()}
    return {f"MSMT17_V{version}/{name}": content for name, content in files.items()}


PRCC = {f"prcc/rgb/{name}": None for name in [
    "train/001/A_cropped_rgb001.jpg", "train/001/B_cropped_rgb002.jpg", "train/001/C_cropped_rgb003.jpg",
    "train/002/A_cropped_rgb004.jpg", "val/001/A_cropped_rgb009.jpg",
    "val/001/C_cropped_rgb010.jpg", "val/001/B_cropped_rgb011.jpg", "val/002/A_cropped_rgb012.jpg",
    "test/A/003/cropped_rgb001.jpg", "test/A/003/cropped_rgb002.jpg", "test/A/004/cropped_rgb003.jpg",
    "test/A/004/cropped_rgb004.jpg", "test/B/003/cropped_rgb001.jpg", "test/C/003/cropped_rgb001.jpg",
    "test/C/004/cropped_rgb001.jpg"]} | {"prcc/sketch/train/001/A_cropped_rgb001.jpg": None}  # fmt: skip
LTCC = {f"LTCC_ReID/{name}": None for name in [
    "train/000_1_c9_015833.png", "train/000_2_c7_015001.png", "train/001_1_c9_000001.png",
    "query/010_1_c1_000001.png", "query/011_1_c2_000002.png",
    "test/010_1_c2_000003.png", "test/010_2_c1_000004.png", "test/010_2_c3_000005.png", "test/011_2_c2_000006.png",
    "test/011_1_c5_000007.png"]} | {"LTCC_ReID/info/cloth-change_id_test.txt": "10\n11\n"}  # fmt: skip
DEEPCHANGE = {
    "train-set": ["P1_C16_1_20190101.jpg,1,0,0", "P1_C16_2_20190102.jpg,2", "P2_C1_1_20190103.jpg,3"],
    "val-set-query": ["P3_C1_1_20190104.jpg,20"],
    "val-set-gallery": ["P3_C1_1_20190105.jpg,20", "P3_C1_2_20190106.jpg,21", "P4_C1_2_20190106.jpg,22"],
    "test-set-query": ["P7_C4_1_20190104.jpg,10,5", "P8_C4_1_20190105.jpg,11"],
    "test-set-gallery": ["P7_C4_1_20190106.jpg,10", "P7_C4_2_20190107.jpg,12", "P8_C5_1_20190108.jpg,13"],
}  # fmt: skip


def deepchange_files() -> dict:
    files = {f"DeepChangeDataset/{folder}-bbox.txt": "\n".join(lines) + "\n" for folder, lines in DEEPCHANGE.items()}
    return files | {f"DeepChangeDataset/{folder}/{line.split(',')[0]}": None
                    for folder, lines in DEEPCHANGE.items() for line in lines}


PERSONS = """path,person,camera,clothes,role
img/a.jpg,ann,front,red,train
img/b.jpg,ann,back,blue,train
img/c.jpg,bob,front,red,
img/q.jpg,cy,front,red,probe
img/r.jpg,dee,side,,probe
img/s.jpg,cy,front,red,gallery
img/t.jpg,cy,back,blue,gallery
img/u.jpg,dee,back,red,gallery
img/v.jpg,,back,,distractor
"""


def persons_files() -> dict:
    return {"persons.csv": PERSONS} | {line.split(",")[0]: None for line in PERSONS.splitlines()[1:]}


# ---------------------------------------------------------------- every layout


def test_market_rules(tmp_path):
    names = {"bounding_box_train": ["0002_c1s1_000451_03.jpg", "0007_c3s1_000001_01.jpg"],
             "query": ["0003_c1s1_000001_00.jpg", "0005_c2s1_000001_00.jpg"],
             "bounding_box_test": ["0003_c6s1_000009_00.jpg", "0005_c2s2_000001_01.jpg", "-1_c4s1_000001_00.jpg",
                                   "0000_c5s1_000001_00.jpg", "Thumbs.db", "readme.jpg"]}
    for folder, files in names.items():
        (tmp_path / "src" / folder).mkdir(parents=True)
        for i, name in enumerate(files):
            (tmp_path / "src" / folder / name).write_bytes(encode(picture(i, 16, 32)))
    (tmp_path / "src/bounding_box_train").rename(tmp_path / "elsewhere")
    (tmp_path / "src/bounding_box_train").symlink_to(tmp_path / "elsewhere")
    for part in ("train", "test"):
        run_here("market", "--src", tmp_path / "src", "--out", tmp_path / "d/body" / part, "--size", 32)
    assert len(Split(tmp_path / "d/body/train")) == 2
    split = Split(tmp_path / "d/body/test")
    assert split.classes == ["0003", "0005"] and split.protocol == {"name": "reid"}
    # query first, then the gallery by name: the distractor 0000 has no label, junk -1 is gone
    assert split.labels.tolist() == [0, 1, -1, 0, 1] and split.column("role").tolist() == [0, 0, 2, 1, 1]
    assert split.column("camera").tolist() == [0, 1, 4, 5, 1]
    assert split.index["skipped"] == {"not an image by its name": 1, "name is not Market-1501's": 1,
                                      "junk (person -1)": 1}
    assert Split(tmp_path / "d/body/train").classes == ["0002", "0007"] and verify_split(split.folder) == []


def test_market_reads_the_names_of_dukemtmc(tmp_path):
    names = ["query/0005_c2_f0046985.jpg", "bounding_box_test/0005_c1_f0044158.jpg",
             "bounding_box_test/0006_c8_f0044159.jpg", "bounding_box_train/0002_c1_f0044158.jpg"]
    src = write_files(tmp_path / "src", dict.fromkeys(names))
    split = prepared("market", src, tmp_path / "d/body/duke")
    assert split.classes == ["0005", "0006"] and columns(split, "camera", "role") == [[1, 0, 7], [0, 1, 1]]
    assert scored(split, 0, 50, 10) == {"rank-1": 0, "rank-5": 1, "rank-10": 1, "mAP": 0.5, "mAP trapezoid": 0.25,
                                        "mINP": 0.5}
    assert prepared("market", src, tmp_path / "d/body/train").classes == ["0002"]


@pytest.mark.parametrize("version", [1, 2])
def test_msmt17(version, tmp_path, capsys):
    src = write_files(tmp_path / "src", msmt17_files(version))
    train = prepared("msmt17", src, tmp_path / "d/body/train")
    assert train.classes == ["train-0000", "train-0001"] and len(train) == 2 and train.protocol is None
    more = prepared("msmt17", src / f"MSMT17_V{version}", tmp_path / "e/body/train", "--with-val")
    assert sorted(more.column("camera").tolist()) == [0, 1, 2]
    split = prepared("msmt17", src, tmp_path / "d/body/msmt17")
    assert split.classes == ["test-0000", "test-0001"] and split.protocol == {"name": "reid"}
    assert columns(split, "label", "camera", "role") == [[0, 1, 0, 0, 1], [4, 14, 5, 4, 6], [0, 0, 1, 1, 1]]
    assert "WARNING" not in capsys.readouterr().out  # person 0 of train and person 0 of test are two people
    # the probe's own camera (row 3, nearest) is ignored; then 1 for row 2 (0) and 1 for the other person
    assert scored(split, 0, 90, 20, 0, 80)["mAP"] == 1


def test_prcc(tmp_path):
    src = write_files(tmp_path / "src", PRCC)
    train = prepared("prcc", src, tmp_path / "d/body/train")
    assert train.classes == ["001", "002"] and len(train) == 4
    rows = sorted(zip(*columns(train, "label", "camera", "clothes"), strict=True))
    assert rows == [(0, 0, 0), (0, 1, 0), (0, 2, 1), (1, 0, 2)]  # A and B share an outfit, C has another
    cross = prepared("prcc", src, tmp_path / "d/body/prcc-cc")
    assert cross.protocol == {"name": "reid", "variants": ["cross-clothes", "cross-clothes single-shot"], "draws": 10}
    assert columns(cross, "label", "role", "camera") == [[0, 0, 1, 1, 0, 1], [1] * 4 + [0] * 2, [0] * 4 + [2] * 2]
    assert columns(cross, "clothes") == [[0, 0, 2, 2, 1, 3]]
    # probe of 003 at 0: order 003 (0), 004 (20), 003 (40), 004 (90): AP (1 + 2/3)/2, INP 2/3
    # probe of 004 at 5: order 003 (0), 004 (20), 003 (40), 004 (90): AP (1/2 + 2/4)/2, INP 2/4
    figures = scored(cross, 0, 40, 20, 90, 0, 5)
    assert figures["rank-1"] == 0.5 and figures["mAP"] == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert figures["mINP"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    same = prepared("prcc", src / "prcc", tmp_path / "d/body/prcc-sc", "--variant", "same-clothes")
    assert same.protocol["variants"][0] == "same-clothes"
    assert columns(same, "label", "clothes", "role") == [[0, 0, 1, 1, 0], [0, 0, 2, 2, 0], [1] * 4 + [0]]


def test_validation_images_are_test_splits_of_their_own(tmp_path, capsys):
    options = ["--val", "--part", "test"]
    train = prepared("prcc", write_files(tmp_path / "prcc", PRCC), tmp_path / "d/body/train")
    prcc = prepared("prcc", tmp_path / "prcc", tmp_path / "d/body/val", *options)
    assert prcc.classes == train.classes == ["001", "002"]  # in PRCC the same people, which is said
    assert "WARNING: train and test overlap, 2 identities are in train too" in capsys.readouterr().out
    assert columns(prcc, "label", "camera", "role") == [[0, 0, 1], [0, 2, 0], [1, 0, 1]]
    assert prcc.protocol["variants"][0] == "cross-clothes"
    # the probe (C of 001, at 10 degrees) is nearer to its mate (0), or to the other person's A
    assert scored(prcc, 0, 10, 40)["mAP"] == 1 and scored(prcc, 0, 10, 15)["mAP"] == 0.5
    same = prepared("prcc", tmp_path / "prcc", tmp_path / "d/body/val-same", *options, "--variant", "same-clothes")
    assert columns(same, "camera") == [[0, 1, 0]]
    deep = prepared("deepchange", write_files(tmp_path / "deep", deepchange_files()), tmp_path / "d/body/deep", "--val")
    assert deep.classes == ["0003", "0004"] and columns(deep, "camera", "role") == [[20, 20, 21, 22], [0, 1, 1, 1]]
    # of the probe's mates one is of its own tracklet, and the other person comes before the other mate: 1/2
    assert scored(deep, 0, 0, 20, 10)["mAP"] == 0.5


def test_ltcc(tmp_path):
    src = write_files(tmp_path / "src", LTCC)
    train = prepared("ltcc", src, tmp_path / "d/body/train")
    assert train.classes == ["000", "001"] and sorted(train.column("clothes").tolist()) == [0, 1, 2]
    split = prepared("ltcc", src, tmp_path / "d/body/ltcc")
    assert split.protocol == {"name": "reid", "variants": ["general", "cross-clothes", "same-clothes"]}
    assert columns(split, "label", "role") == [[0, 1, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 1]]
    assert columns(split, "camera", "clothes") == [[0, 1, 1, 0, 2, 4, 1], [0, 2, 0, 1, 1, 2, 3]]
    # general: of probe 010 in camera 1, row 3 (same camera) is ignored; rows 2 and 4 count whatever is worn
    figures = scored(split, 0, 90, 10, 0, 60, 100, 30)
    assert figures["mAP"] == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2) and figures["rank-1"] == 1


def test_deepchange_ignores_a_tracklet_and_not_a_camera(tmp_path):
    src = write_files(tmp_path / "src", deepchange_files())
    train = prepared("deepchange", src, tmp_path / "d/body/train")
    assert train.classes == ["0001", "0002"] and sorted(train.column("clothes").tolist()) == [0, 1, 2]
    split = prepared("deepchange", src, tmp_path / "d/body/deepchange")
    assert columns(split, "label", "role", "camera") == [[0, 1, 0, 0, 1], [0, 0, 1, 1, 1], [10, 11, 10, 12, 13]]
    # probe P7 at 0: row 2 is of its own tracklet; row 4 (other person, 10) comes before row 3 (same camera, 20): AP 1/2
    figures = scored(split, 0, 90, 0, 20, 10)
    assert figures["mAP"] == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_persons(tmp_path):
    src = write_files(tmp_path / "src", persons_files())
    train = prepared("persons", src, tmp_path / "d/body/train")
    assert train.classes == ["ann", "bob"] and len(train) == 3 and sorted(train.column("camera").tolist()) == [0, 1, 1]
    split = prepared("persons", src, tmp_path / "d/body/mine")
    assert split.classes == ["cy", "dee"] and split.protocol == {"name": "reid"}
    assert columns(split, "label", "role", "camera") == [[0, 1, 0, 0, 1, -1], [0, 0, 1, 1, 1, 2], [1, 2, 1, 0, 0, 0]]
    worn = split.column("clothes")
    assert worn[0] == worn[2] != worn[3] and worn[1] == worn[5] == -1
    # cy: row 2 is of its camera; the distractor (10) comes before row 3 (20): 1/2. dee: 1
    assert scored(split, 0, 90, 0, 20, 90, 10)["mAP"] == pytest.approx(0.75)


def test_the_source_that_the_docs_show(tmp_path):
    """The code of docs/extending.md as it is: prepared by its own command from a zip, verified, read back, scored."""
    text = (ROOT / "docs/extending.md").read_text()
    code = text.partition("## Your own data source")[2].partition("```python\n")[2].partition("```")[0]
    names = ["query/0007_cam1_1.jpg", "gallery/0007_cam1_2.jpg", "gallery/0007_cam2_3.jpg", "gallery/0008_cam2_4.jpg",
             "gallery/notes.jpg", "train/0001_cam3_5.jpg", "train/0002_cam4_6.jpg", "train/readme.txt"]
    with zipfile.ZipFile(tmp_path / "Plaza.zip", "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(f"Plaza-1.0/{name}", encode(picture(i, 16, 16), quality=90))
    command = ["-c", code, "plaza", "--src", tmp_path / "Plaza.zip", "--size", "16", "--workers", "2", "--out"]
    for part in ("plaza", "train"):
        script(*command, tmp_path / "d/body" / part)
        assert verify_split(tmp_path / "d/body" / part) == []
    split, train = Split(tmp_path / "d/body/plaza"), Split(tmp_path / "d/body/train")
    assert columns(split, "label", "camera", "role") == [[0, 0, 1, 0], [1, 2, 2, 1], [1, 1, 1, 0]]  # by name
    assert [split.jpeg(row)[1] for row in range(4)] == [encode(picture(i, 16, 16), quality=90) for i in (1, 2, 3, 0)]
    assert split.index["skipped"] == {"name is not Plaza's": 1}
    assert split.protocol == {"name": "reid"} and train.protocol is None and train.classes == ["0001", "0002"]
    # row 0 is of the probe's camera; the other person (20 degrees) comes before its mate (40)
    assert scored(split, 0, 40, 20, 0)["mAP"] == 0.5
    refused = script("-c", code, "plaza", "--src", tmp_path / "d", "--out", tmp_path / "d/body/x", check=2).stderr
    assert refused.startswith(f"error: --src {tmp_path / 'd'}: no query in it; Plaza has the folders")


def test_evaluation_scores_every_variant(tmp_path):
    src = write_files(tmp_path / "src", PRCC)
    prepared("prcc", src, tmp_path / "d/body/prcc")
    model = TINY[TINY.index("--backbone"):TINY.index("--workers")]
    result = script("evaluate.py", *model, "--data", tmp_path / "d", "--out", tmp_path / "r", "--bootstrap", "2",
                    "--workers", "0", "--device", "cpu")
    rows = json.loads((tmp_path / "r/eval/results.json").read_text())
    variants: dict = {}
    for row in rows:
        variants.setdefault(row["protocol"].split(", ")[1], []).append(row["metric"])
    assert list(variants) == ["cross-clothes", "cross-clothes single-shot in 10 drawn galleries", "random pairs"]
    whole, single, _ = variants.values()
    assert single == ["rank-1", "rank-5", "rank-10"] and {"mAP", "mAP trapezoid", "mINP", *single} == set(whole)
    assert "rank-1" in result.stdout


# ---------------------------------------------------------------- bad input


def edited(files: dict, name: str, *change: str) -> dict:
    """The files with text replaced in those whose name ends so; without a replacement: without those files."""
    if not change:
        return {key: value for key, value in files.items() if not key.endswith(name)}
    return {key: value.replace(*change) if key.endswith(name) and value else value for key, value in files.items()}


@pytest.mark.parametrize("source, files, words", [
    ("msmt17", {"a.jpg": None}, "no list_query.txt in it; MSMT17 has train, test"),
    ("msmt17", edited(msmt17_files(1), "list_gallery.txt"), "no list_gallery.txt"),
    ("msmt17", edited(msmt17_files(1), "list_query.txt", "jpg 1", "jpg"), "list_query.txt, line 2: want `0000/"),
    ("msmt17", edited(msmt17_files(1), "list_query.txt", "0000/", "../../0000/"), "line 1: names '"),
    ("prcc", LTCC, "no rgb/test in it; PRCC has"),
    ("prcc", edited(edited(PRCC, "C/003/cropped_rgb001.jpg"), "C/004/cropped_rgb001.jpg"), "no probe images"),
    ("ltcc", PRCC, "no query in it; LTCC has"),
    ("market", {f"{name}/query/0001_c1s1_000001_00.jpg": None for name in ("Duke", "Market")},
     "Duke/query and Market/query are both in it: give the folder of one"),
    ("ltcc", {name: c for name, c in LTCC.items() if "/test/" not in name}, "no gallery images"),
    ("deepchange", PRCC, "no test-set-query-bbox.txt in it"),
    ("deepchange", edited(deepchange_files(), "query-bbox.txt", ",11", ""), "line 2: want `P1_C1_1_000001.jpg,1`"),
    ("deepchange", edited(deepchange_files(), "query-bbox.txt", ",11", "," + "9" * 30), "line 2: want `P1_C1_1"),
    ("persons", PRCC, "no persons.csv in it"),
    ("persons", edited(persons_files(), "persons.csv", "camera", "cam"), "line 1: no column 'camera'"),
    ("persons", edited(persons_files(), "persons.csv", "cy,front,red,probe", "cy,front"), "line 5: want 5 values"),
    ("persons", edited(persons_files(), "persons.csv", "img/r", "img/q"), "line 6: 'img/q.jpg' is listed twice"),
    ("persons", edited(persons_files(), "persons.csv", "img/r", "/etc/r"), "line 6: names '/etc/r.jpg'"),
    ("persons", edited(persons_files(), "persons.csv", "probe", "query"), "line 5: role 'query', want train, probe"),
    ("persons", edited(persons_files(), "persons.csv", "dee,side", ",side"), "line 6: no person"),
    ("persons", edited(persons_files(), "persons.csv", "dee,side", "dee,"), "line 6: no camera"),
    ("persons", edited(persons_files(), "persons.csv", "gallery", "train"), "no gallery images"),
    ("persons", edited(persons_files(), "persons.csv", "img/q.jpg", '"img/q.jpg'), "not CSV"),
    ("persons", persons_files() | {"persons.csv": b"path,person,camera\n\xff\xfe"}, "cannot be read as text"),
])  # fmt: skip
def test_bad_input(source, files, words, tmp_path):
    src = write_files(tmp_path / "src", files)
    with pytest.raises(InputError) as error:
        run_here(source, "--src", src, "--out", tmp_path / "d/body/test", "--size", 16, "--workers", 1)
    assert words in error.value.message and not (tmp_path / "d").exists()


def test_a_listed_image_that_is_not_there_is_counted_and_paths_may_be_of_windows(tmp_path, capsys):
    src = write_files(tmp_path / "src", edited(edited(persons_files(), "persons.csv", "img/", "img\\"), "img/r.jpg"))
    run_here("persons", "--src", src, "--out", tmp_path / "d/body/test", "--size", 16)
    assert "1: listed, but not in the source" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"6 of 6 entries name images that the source lacks, such as 'img/"):
        run_here("persons", "--src", write_files(tmp_path / "none", {"persons.csv": PERSONS}), "--out",
                 tmp_path / "d/body/none")


def test_validation_images_are_not_test_images(tmp_path):
    src = write_files(tmp_path / "src", msmt17_files(1))
    with pytest.raises(InputError, match="--with-val is for training splits"):
        run_here("msmt17", "--src", src, "--out", tmp_path / "d/body/test", "--with-val")
    for source in ("prcc", "deepchange"):
        with pytest.raises(InputError, match="--val is for test splits"):
            run_here(source, "--src", src, "--out", tmp_path / "d/body/train", "--val")


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    src = write_files(tmp_path / "src", edited(persons_files(), "persons.csv", "camera", "cam"))
    result = script("-m", "data_prep", "persons", "--src", src, "--out", tmp_path / "d/body/test", check=2)
    assert result.stderr.strip().splitlines() == [f"error: {src}/persons.csv, line 1: no column 'camera'; want "
                                                  "path,person,camera, found 'path,person,cam,clothes,role'"]


# ---------------------------------------------------------------- mutated lists


@pytest.mark.parametrize("source, name, files", [
    ("msmt17", "MSMT17_V2/list_gallery.txt", msmt17_files(2)), ("persons", "persons.csv", persons_files()),
    ("deepchange", "DeepChangeDataset/test-set-query-bbox.txt", deepchange_files()),
])  # fmt: skip
def test_mutated_lists_end_in_one_line_and_touch_nothing_else(source, name, files, tmp_path, monkeypatch):
    src = write_files(tmp_path / "b" / "src", files)
    monkeypatch.chdir(src)
    assert 20 < prepare_mutated(source, src, name, 120, "body/test") < 120  # the loop meets both good and bad lists
