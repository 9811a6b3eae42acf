"""ImageNet and its test sets: a tiny instance of each, prepared, verified, read back and scored by a known answer."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data_prep import InputError
from data_prep.format import Split
from data_prep.sources.imagenet import imagenet_classes
from data_prep.verify import verify_split
from protocols.bootstrap import normalise
from protocols.classify import score_classification
from tests.conftest import TINY, script
from tests.test_body_sources import at_degrees, write_files
from tests.test_data_prep import encode, picture, run_here

TENCH, GOLDFISH, SHARK, HEN = "n01440764", "n01443537", "n01484850", "n01514859"  # classes 0, 1, 2 and 8 of ImageNet


def prepared(source: str, src: Path | str, out: Path, *options) -> Split:
    """Prepare a split through the command line and verify it."""
    run_here(source, "--src", src, "--out", out, "--size", 16, "--workers", 1, *options)
    assert verify_split(out) == []
    return Split(out)


def identities(split: Split) -> list[str]:
    return [split.classes[label] for label in split.labels]


def scored(split: Split, x: np.ndarray, reference: Split, y: np.ndarray, head=None, head_classes=()) -> dict:
    figures = score_classification(x, split, (y, reference), head, list(head_classes), 2, 0,
                                   split.protocol.get("groups"))
    return {name: figure.value for name, figure in figures.items()}


# ---------------------------------------------------------------- ImageNet


FOLDERS = {f"imagenet/{part}/{wnid}/{name}_{i}.JPEG": None for part, n in (("train", 3), ("val", 2))
           for wnid in (TENCH, GOLDFISH, HEN) for i in range(n) for name in [f"{part}_{wnid}"]}  # fmt: skip
KAGGLE = {f"ILSVRC/Data/CLS-LOC/train/{TENCH}/{TENCH}_{i}.JPEG": None for i in range(2)} | {
    "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG": None,
    "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000002.JPEG": None,
    "ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml": "<annotation/>",
    "ILSVRC/ImageSets/CLS-LOC/val.txt": "ILSVRC2012_val_00000001 1\n",
    "LOC_synset_mapping.txt": f"{TENCH} tench, Tinca tinca\n{GOLDFISH} goldfish, Carassius auratus\nn90000000 other\n",
    "LOC_val_solution.csv": f"ImageId,PredictionString\nILSVRC2012_val_00000002,{TENCH} 1 2 3 4 {TENCH} 5 6 7 8 \n"
                            f"ILSVRC2012_val_00000001,{GOLDFISH} 1 2 3 4\n",
}  # fmt: skip


def test_the_thousand_classes():
    classes = imagenet_classes()
    assert len(classes) == 1000 and list(classes) == sorted(classes)
    assert classes[TENCH] == "tench" and list(classes)[999] == "n15075141" and classes["n15075141"] == "toilet paper"


def test_imagenet_class_folders(tmp_path):
    src = write_files(tmp_path / "src", FOLDERS)
    train = prepared("imagenet", src, tmp_path / "d/object/train")
    val = prepared("imagenet", src / "imagenet", tmp_path / "d/object/val")
    assert train.classes == val.classes == [TENCH, GOLDFISH, HEN] and train.names == ["tench", "goldfish", "hen"]
    assert len(train) == 9 and identities(val) == [TENCH] * 2 + [GOLDFISH] * 2 + [HEN] * 2
    assert val.protocol == {"name": "classification", "reference": "train", "ood": False}
    # means at 0, 90 and 180 degrees; the fifth image (of the hen) lies with the tench
    place = dict(zip(train.classes, (0, 90, 180), strict=True))
    y = at_degrees(*(place[name] for name in identities(train)))
    assert scored(val, at_degrees(5, 10, 80, 100, 20, 170), train, y)["nearest-mean top-1"] == pytest.approx(5 / 6)


def test_kaggle_layout(tmp_path):
    src = write_files(tmp_path / "src", KAGGLE)
    assert prepared("imagenet", src, tmp_path / "d/object/train").classes == [TENCH]
    val = prepared("imagenet", src, tmp_path / "d/object/val", "--reference", "other")
    assert identities(val) == [GOLDFISH, TENCH] and val.index["skipped"] == {}
    assert val.names == ["tench", "goldfish"] and val.protocol["reference"] == "other"


# ---------------------------------------------------------------- its test sets


def test_imagenet_v2_counts_its_folders_and_does_not_sort_them_as_words(tmp_path):
    files = {f"imagenetv2-matched-frequency-format-val/{k}/{i}.jpeg": None for k in (0, 1, 2, 10, 100)
             for i in range(10)}
    split = prepared("imagenet-v2", write_files(tmp_path / "src", files), tmp_path / "d/object/imagenet-v2")
    wnids = list(imagenet_classes())
    assert split.classes == [wnids[k] for k in (0, 1, 2, 10, 100)]  # sorted as words, 10 would have been class 2
    assert split.names[3] == "brambling" and split.counts.tolist() == [10] * 5
    assert split.protocol == {"name": "classification", "reference": "train", "ood": True}
    assert split.index["provenance"]["source"] == "imagenet-v2"
    assert identities(split)[:20] == [wnids[0]] * 10 + [wnids[1]] * 10


@pytest.mark.parametrize("source", ["imagenet-a", "imagenet-r", "imagenet-sketch"])
def test_a_set_of_some_classes_is_scored_among_those(source, tmp_path):
    src = write_files(tmp_path / "src", {f"{source}/{GOLDFISH}/1.jpg": None, f"{source}/{HEN}/2.png": None,
                                         f"{source}/{HEN}/3.jpg": None, f"{source}/README.txt": "about"})
    split = prepared(source, src, tmp_path / "d/object" / source)
    assert identities(split) == [GOLDFISH, HEN, HEN] and split.protocol["ood"] is True
    assert split.index["skipped"] == {"not an image by its name": 1}
    train = SimpleNamespace(classes=[TENCH, GOLDFISH, HEN], labels=np.array([0, 1, 2]), folder=Path("train"))
    x, y = at_degrees(1, 80, 170), at_degrees(0, 50, 180)
    # the first image is nearest to the tench, which the set does not have; among its own it is a goldfish: right.
    # The second is a goldfish to all readouts: wrong
    figures = scored(split, x, train, y, y, [TENCH, GOLDFISH, HEN])
    for metric in ("nearest-mean top-1", "head top-1"):
        assert figures[metric] == pytest.approx(2 / 3)


OBJECTNET = {  # three of its classes that ImageNet has, one of them as two classes, and one that it has not
    "mappings/folder_to_objectnet_label.json": json.dumps(
        {"alarm_clock": "Alarm clock", "banana": "Banana", "bench": "Bench", "squeegee": "Squeegee"}),
    "mappings/objectnet_to_imagenet_1k.json": json.dumps(
        {"Alarm clock": "analog clock; digital clock", "Banana": "banana", "Bench": "park bench"}),
    "mappings/pytorch_to_imagenet_2012_id.json": json.dumps({"409": 2, "530": 0, "954": 1, "703": 3}),
    "mappings/imagenet_to_label_2012_v2": "digital clock\nbanana\nanalog clock\npark bench\n",
} | {f"images/{name}": None for name in ["alarm_clock/a.png", "alarm_clock/b.png", "alarm_clock/c.png", "banana/d.png",
                                         "bench/e.png", "squeegee/f.png"]}  # fmt: skip
ANALOG, DIGITAL, BANANA, BENCH = "n02708093", "n03196217", "n07753592", "n03891251"


def objectnet_files() -> dict:
    """With one image that has the data set's red border of two pixels around green."""
    image = Image.new("RGB", (24, 24), (255, 0, 0))
    image.paste((0, 255, 0), (2, 2, 22, 22))
    return {f"objectnet-1.0/{k}": v for k, v in (OBJECTNET | {"images/bench/e.png": encode(image, "PNG")}).items()}


def test_objectnet(tmp_path):
    src = write_files(tmp_path / "src", objectnet_files())
    split = prepared("objectnet", src, tmp_path / "d/object/objectnet")
    assert split.classes == [ANALOG, BENCH, BANANA] and split.names == ["Alarm clock", "Bench", "Banana"]
    assert split.protocol == {"name": "classification", "reference": "train", "ood": True,
                              "groups": {ANALOG: [ANALOG, DIGITAL]}}
    assert identities(split) == [ANALOG] * 3 + [BANANA, BENCH]
    assert split.index["skipped"] == {"class that ImageNet lacks": 1}
    red, green, _ = split.image(4).float().mean((1, 2)).tolist()
    assert red < 5 and green > 250
    # the reference: analog clock 0, digital clock 90, banana 180, bench 270, a class outside the set 45 degrees
    train = SimpleNamespace(classes=[ANALOG, DIGITAL, BENCH, BANANA, "n9"], labels=np.arange(5), folder=Path("train"))
    y = at_degrees(0, 90, 270, 180, 45)
    # alarm clocks near the analog one, near the digital one, and near the banana; a banana, a bench
    figures = scored(split, at_degrees(10, 50, 170, 185, 265), train, y, y, train.classes)
    assert figures["nearest-mean top-1"] == figures["head top-1"] == pytest.approx(4 / 5)
    assert figures["head top-5"] == 1


def test_groups_equal_a_literal_projection():
    """Logits of a class of several: their maximum, then the argmax (ObjectNet's rule), on random cases."""
    rng = np.random.default_rng(0)
    names = [f"c{i}" for i in range(12)]
    groups = {"c0": ["c0", "c3", "c7"], "c2": ["c2", "c5"]}
    classes = ["c0", "c2", "c4", "c9"]
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in rng.standard_normal((2, 300, 8)))
    split = SimpleNamespace(classes=classes, labels=rng.integers(0, 4, 300), folder=Path("a"),
                            protocol={"groups": groups})
    train = SimpleNamespace(classes=names, labels=rng.integers(0, 12, 300), folder=Path("b"))
    head = rng.standard_normal((12, 8))
    means = np.stack([y[train.labels == c].sum(0) for c in range(12)])
    for w, metric in ((means, "nearest-mean top-1"), (head, "head top-1")):
        logits = x @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T
        projected = np.stack([logits[:, [int(n[1:]) for n in groups.get(c, [c])]].max(1) for c in classes], 1)
        literal = (projected.argmax(1) == split.labels).mean()
        assert scored(split, x, train, y, head, names)[metric] == pytest.approx(literal)
    # images of the reference's own classes among the same four, as the gap to clean images needs them
    clean = SimpleNamespace(classes=names, labels=rng.integers(0, 12, 300), folder=Path("c"), protocol={})
    found = score_classification(x, clean, (y, train), head, names, 2, 0, groups, only=classes)
    stands = {int(n[1:]): i for i, c in enumerate(classes) for n in groups.get(c, [c])}
    rows = np.flatnonzero(np.isin(clean.labels, list(stands)))
    truth = np.array([stands[label] for label in clean.labels[rows]])
    assert len(stands) == 7 and found["head top-1"].count == len(rows)
    assert found["head top-1"].value == pytest.approx((projected[rows].argmax(1) == truth).mean())


def test_evaluation_of_the_whole_family(tmp_path):
    """Through evaluate.py: every set is scored against the training split, ObjectNet's groups too."""
    classes = (TENCH, GOLDFISH, HEN, ANALOG, DIGITAL, BANANA, BENCH)
    imagenet = {f"{part}/{wnid}/{i}.JPEG": None for part in ("train", "val") for wnid in classes for i in range(2)}
    root = tmp_path / "data" / "object"
    for source, name, files in (("imagenet", "train", imagenet), ("imagenet", "val", imagenet),
                                ("imagenet-a", "a", {f"{HEN}/1.jpg": None, f"{TENCH}/2.jpg": None}),
                                ("objectnet", "objectnet", objectnet_files())):
        prepared(source, write_files(tmp_path / f"src-{name}", files), root / name)
    model = TINY[TINY.index("--backbone"):TINY.index("--workers")]
    script("evaluate.py", *model, "--data", tmp_path / "data", "--out", tmp_path / "run", "--bootstrap", "2",
           "--workers", "0", "--device", "cpu")
    rows = json.loads((tmp_path / "run/eval/results.json").read_text())
    counts = {row["split"]: ("out of distribution" in row["protocol"], row["count"])
              for row in rows if row["metric"] == "nearest-mean top-1"}
    assert counts == {"val": (False, 14), "a": (True, 2), "objectnet": (True, 5)}
    assert all(row["protocol"].startswith("classification, ") for row in rows)
    # val among the two classes that imagenet-a has here, by hand
    val, base, other = (Split(root / name) for name in ("val", "train", "a"))
    x, y, z = (normalise(np.load(next((tmp_path / ".foundation").glob(f"foundation-object-{name}-*.npy"))))
               for name in ("val", "train", "a"))
    means = np.stack([y[base.labels == base.classes.index(name)].sum(0) for name in other.classes])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    mine = np.isin(val.labels, [val.classes.index(name) for name in other.classes])
    clean = np.mean([other.classes[(means @ v).argmax()] == val.classes[label]
                     for v, label in zip(x[mine], val.labels[mine], strict=True)])
    shifted = np.mean([(means @ v).argmax() == label for v, label in zip(z, other.labels, strict=True)])
    gaps = {(row["split"], row["metric"]): row for row in rows if row["metric"].startswith("gap of ")}
    row = gaps["a", "gap of nearest-mean top-1"]
    assert row["value"] == pytest.approx(clean - shifted) and "clean is val imagenet" in row["protocol"]
    assert {split for split, _ in gaps} == {"a", "objectnet"} and ("a", "gap of probe top-1") in gaps


def test_a_wrong_reference_is_told(tmp_path, capsys):
    for i, name in enumerate(["train", "other"]):
        for k in range(2):
            (tmp_path / f"src/{name}/c{2 * i + k}").mkdir(parents=True)
            (tmp_path / f"src/{name}/c{2 * i + k}/0.jpg").write_bytes(encode(picture(k, 16, 16)))

    def told(*options) -> str:
        run_here("folder", "--src", tmp_path / "src/train", "--out", tmp_path / f"d/object/val{len(options)}",
                 *options)
        return capsys.readouterr().out

    assert "WARNING: --reference train: object/train, whose images classify this split, does not" in told()
    for name in ("train", "other"):
        run_here("folder", "--src", tmp_path / "src" / name, "--out", tmp_path / "d/object" / name, "--part", "train")
    shutil.rmtree(tmp_path / "d/object/val0")
    assert "--reference" not in told()
    assert "object/other has none of the classes, such as c0" in told("--reference", "other")


# ---------------------------------------------------------------- bad input


def replaced(files: dict, name: str, content: str | bytes | None) -> dict:
    return {key: value for key, value in files.items() if key != name} | ({} if content is None else {name: content})


MAP = "objectnet-1.0/mappings/"
LABELS = f"{MAP}folder_to_objectnet_label.json"
BAD = [
    ("imagenet", "val", {"a.jpg": None}, "no ILSVRC/Data/CLS-LOC/val in it; ImageNet has"),
    ("imagenet", "val", {"val/1.JPEG": None}, "val/1.JPEG: neither in a wnid folder nor in LOC_val_"),
    ("imagenet", "val", replaced(KAGGLE, "LOC_val_solution.csv", None), "nor in LOC_val_solution.csv"),
    ("imagenet", "val", replaced(KAGGLE, "LOC_val_solution.csv", "ImageId,PredictionString\nx,../../evil 1\n"),
     "LOC_val_solution.csv, line 2: want a wnid"),
    ("imagenet", "val", replaced(KAGGLE, "LOC_val_solution.csv", f"ImageId,PredictionString\nx,{TENCH} 1\n"),
     "ILSVRC2012_val_00000001.JPEG: neither in a wnid folder nor"),
    ("imagenet", "val", replaced(KAGGLE, "LOC_val_solution.csv", "Id,Class\n"), "line 1: no column 'ImageId'"),
    ("imagenet-a", "a", {"n00000001/1.jpg": None}, "n00000001 is not one of the 1,000 classes"),
    ("imagenet-a", "train", {f"{TENCH}/1.jpg": None}, "imagenet-a is for test splits of objects"),
    ("imagenet-v2", "v2", {f"v2/3/{i}.jpeg": None for i in range(20)}, "20 images in folder 3, ImageNet-V2 has 10"),
    ("imagenet-v2", "v2", {f"v2/{TENCH}/1.jpeg": None}, "name is not ImageNet-V2's"),
    ("objectnet", "on", {"images/banana/1.png": None}, "no mappings in it; ObjectNet has"),
    ("objectnet", "on", replaced(objectnet_files(), LABELS, "{"), "label.json: not JSON"),
    ("objectnet", "on", replaced(objectnet_files(), LABELS, "[1]"), "want a JSON object"),
    ("objectnet", "on", replaced(objectnet_files(), f"{MAP}imagenet_to_label_2012_v2", "a\n"), "do not match each"),
    ("objectnet", "on", replaced(objectnet_files(), f"{MAP}pytorch_to_imagenet_2012_id.json", None), "no mappings/pyt"),
    ("parquet", "val", {"a.txt": "x"}, "no parquet file like *val* or *test*; there are none at all"),
    ("parquet", "val", {"train.parquet": b"PAR1"}, "there are train.parquet; --files PATTERN selects"),
    ("parquet", "val", {"val.parquet": b"PAR1 no PAR1"}, "val.parquet: not a readable parquet file"),
    ("webdataset", "val", {"a.txt": "x"}, "no tar found; give a folder"),
    ("webdataset", "val", {"a.tar": b"no tar at all" * 100}, "a.tar: not a readable zip or plain tar"),
]  # fmt: skip


@pytest.mark.parametrize("source, name, files, words", BAD)
def test_bad_input(source, name, files, words, tmp_path):
    src = write_files(tmp_path / "src", files)
    with pytest.raises(InputError) as error:
        run_here(source, "--src", src, "--out", tmp_path / "d/object" / name, "--size", 16, "--workers", 1)
    assert words in error.value.message and not (tmp_path / "d").exists()


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    write_files(tmp_path / "src", {"val.parquet": b"PAR1 no PAR1"})
    out = tmp_path / "d/object/val"
    result = script("-m", "data_prep", "parquet", "--src", tmp_path / "src", "--out", out, check=2)
    assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.stderr
