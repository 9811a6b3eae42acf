"""Sources of objects: a tiny instance of every layout, prepared, verified, read back and scored by a known answer."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data_prep.sources.archives
import data_prep.sources.parquet
import data_prep.sources.webdataset
from data_prep import InputError
from data_prep.format import Split
from data_prep.sources.imagenet import imagenet_classes
from data_prep.verify import verify_split
from data_prep.write import random_order
from protocols.bootstrap import normalise
from protocols.classify import score_classification
from tests.conftest import TINY, prepare_mutated, script
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


# ---------------------------------------------------------------- parquet


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquet_file(path: Path, labels: list, first: int = 0, names: list[str] | None = None, group: int = 2,
                 kind: pa.DataType | None = None, columns: tuple[str, str] = ("image", "label")) -> Path:
    """A parquet file as the `datasets` library writes it; the image of row i has the drawing's seed first + i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = [encode(picture(first + i, 12, 12), "PNG") for i in range(len(labels))]
    images = pa.array([{"bytes": d, "path": f"../../{i}.png"} for i, d in enumerate(data)], IMAGE)
    table = pa.table(dict(zip(columns, (images if kind is None else pa.array(data, kind), pa.array(labels)),
                              strict=True)))
    if names:
        features = {"image": {"_type": "Image"}, columns[1]: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=group)
    return path


def test_parquet(tmp_path):
    src = tmp_path / "src"
    names = ["tench, Tinca", "goldfish", "crane", "crane"]  # names need not be unique: the number is the identity
    parquet_file(src / "data/train-00000-of-00002.parquet", [3, 0, 1, 0, 2], 0, names)
    parquet_file(src / "data/train-00001-of-00002.parquet", [1, 1, -1], 10, names)
    parquet_file(src / "data/validation-00000-of-00001.parquet", [0, 3, 1], 20, names)
    parquet_file(src / "data/test-00000-of-00001.parquet", [-1, -1], 30, names)
    (src / "data/._train-00000-of-00002.parquet").write_bytes(b"left by macOS")
    train = prepared("parquet", src, tmp_path / "d/object/train", "--seed", 1)
    assert train.classes == ["0000000", "0000001", "0000002", "0000003"] and train.names == names
    assert train.counts.tolist() == [2, 3, 1, 1] and train.index["skipped"] == {
        "no label": 1, "hidden, or left by the system": 1}
    val = prepared("parquet", src, tmp_path / "d/object/val")
    assert identities(val) == ["0000000", "0000003", "0000001"] and val.protocol["ood"] is False
    for row, seed in enumerate((20, 21, 22)):  # the right picture in every row
        expected = np.asarray(picture(seed, 12, 12).resize((16, 16), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(val.image(row).permute(1, 2, 0).numpy() - expected).mean() < 12
    wnids = prepared("parquet", src, tmp_path / "d/object/wnids", "--wnids", "--ood")
    assert identities(wnids) == [TENCH, "n01491361", GOLDFISH] and wnids.names[0] == "tench" and wnids.protocol["ood"]
    with pytest.raises(InputError, match="2 left out: no label"):
        prepared("parquet", src, tmp_path / "d/object/test", "--files", "test-*")


def test_one_parquet_file_is_a_source(tmp_path):
    """Whatever it is called; its neighbours are not read."""
    path = parquet_file(tmp_path / "src/part.parquet", [0, 1, 1], names=["a", "b"])
    parquet_file(tmp_path / "src/train.parquet", [0] * 9)
    split = prepared("parquet", path, tmp_path / "d/object/train")
    assert len(split) == 3 and split.counts.tolist() == [1, 2] and split.names == ["a", "b"]
    # read one row group after the other, and known to the source when the last is read
    source = data_prep.sources.parquet.parquet(path, "object", True, None, "image", "label", False, None, False)
    records = iter(source.records)
    assert next(records).identity == "0000000" and source.blocks == []
    assert len(list(records)) == 2 and source.blocks == [0, 2]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_parquet_of_plain_bytes_and_words_and_people(kind, tmp_path):
    parquet_file(tmp_path / "src/people-val.parquet", ["ann", "bob", "ann", "cy", None], kind=kind,
                 columns=("img", "who"))
    split = prepared("parquet", tmp_path / "src", tmp_path / "d/face_hq/people", "--image-column", "img",
                     "--label-column", "who")
    assert identities(split) == ["ann", "bob", "ann", "cy"] and split.protocol == {"name": "identification"}
    assert split.column("role").tolist() == [1, 2, 0, 2]


@pytest.mark.parametrize("part", ["train", "val"])
def test_parquet_reads_each_row_group_once(part, tmp_path, monkeypatch):
    for k in range(3):
        parquet_file(tmp_path / "src" / f"{part}-{k}.parquet", [10 * k, -1, *range(10 * k, 10 * k + 7)], 9 * k, group=3)
    opened = []
    data_prep.sources.parquet.row_group.cache_clear()
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, group, columns, **options: (
        opened.append(columns[0]), read(self, group, columns=columns, **options))[1])
    split = prepared("parquet", tmp_path / "src", tmp_path / "d/object" / part)
    assert opened == ["label"] * 9 + ["image"] * 9
    labels = [int(name) for name in identities(split)]
    whole = [label for k in range(3) for label in (10 * k, *range(10 * k, 10 * k + 7))]
    assert sorted(labels) == sorted(whole) and (labels == whole) == (part == "val")
    assert verify_split(split.folder) == []


def test_blocks_move_as_a_whole():
    order = random_order(10, [0, 4, 7], 1).tolist()
    runs = [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    runs.sort(key=lambda run: order.index(run[0]))
    assert order == [place for run in runs for place in run]
    assert len({tuple(random_order(10, [0, 4, 7], seed)) for seed in range(30)}) == 6  # every order of three runs
    assert random_order(10, [], 3).tolist() == np.random.default_rng(3).permutation(10).tolist()


def test_parquet_rows_without_an_image_are_counted(tmp_path):
    path = parquet_file(tmp_path / "src/val.parquet", [0, 1, 1, 1])
    (tmp_path / "secret.png").write_bytes(encode(picture(0)))
    images = pa.array([{"bytes": encode(picture(0)), "path": None}, {"bytes": None, "path": "a.png"}, None,
                       {"bytes": None, "path": "../secret.png"}], IMAGE)
    pq.write_table(pq.read_table(path).set_column(0, "image", images), path)
    split = prepared("parquet", tmp_path / "src", tmp_path / "d/object/val")
    assert len(split) == 1 and split.index["skipped"] == {
        "no image in its row": 1, "its row names a missing file": 1,
        "its row names a file outside the source": 1}


@pytest.mark.parametrize("labels, classes", [
    ([0.0, 2.0, float("nan"), -1.0], ["0000000", "0000002"]),
    ([True, False, True, None], ["0000001", "0000000", "0000001"]),
    ([1.5, 2.0, None, 3.0], ["0000002", "0000003"])])
@pytest.mark.parametrize("kind", ["struct", "string"])
def test_parquet_of_paths_and_of_labels_that_are_no_integers(kind, labels, classes, tmp_path):
    """pandas makes floats of numbers with gaps; a row may name its image, beside the file or below the source."""
    for i, folder in enumerate(["data", "data", "", ""]):
        (tmp_path / "src" / folder / "images").mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / folder / f"images/{i}.jpg").write_bytes(encode(picture(i, 16, 16)))
    names = [f"images/{i}.jpg" for i in range(4)]
    images = pa.array([{"bytes": None, "path": name} for name in names] if kind == "struct" else names)
    pq.write_table(pa.table({"image": images, "label": pa.array(labels)}), tmp_path / "src/data/val.parquet")
    split = prepared("parquet", tmp_path / "src", tmp_path / "d/object/val")
    assert identities(split) == classes and split.index["skipped"] == {"no label": 4 - len(classes)}
    kept = [i for i, label in enumerate(labels) if label is not None and label >= 0 and label == int(label)]
    assert [split.jpeg(row)[1] for row in range(len(split))] == [encode(picture(i, 16, 16)) for i in kept]


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


# ---------------------------------------------------------------- WebDataset


def tar_of(path: Path, files: dict[str, bytes | str | None], kind: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of these members in this order; None: a drawn picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for i, (name, content) in enumerate(files.items()):
            drawn = encode(picture(i, 12, 12), "PNG" if name.endswith(".png") else "JPEG")
            data = drawn if content is None else content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(first: int, n: int) -> dict:
    """n samples: a .jpg with a .cls, or a .png with a .json, in turn."""
    files = {}
    for i in range(first, first + n):
        files[f"dir/{i:06d}.{'png' if i % 2 else 'jpg'}"] = None
        files |= {f"dir/{i:06d}.json": json.dumps({"label": i % 3})} if i % 2 else {f"dir/{i:06d}.cls": f"{i % 3}\n"}
    return files


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_webdataset(kind, tmp_path):
    for k in range(3):
        tar_of(tmp_path / "src" / f"train-{k:06d}.tar", samples(4 * k, 4), kind)
    whole = prepared("webdataset", tmp_path / "src", tmp_path / "a/object/val")
    assert identities(whole) == [f"{i % 3:07d}" for i in range(12)]
    places = {"folder": tmp_path / "src", "braces": tmp_path / "src/train-{000000..000002}.tar",
              "list": tmp_path / "src/train-00000{0,1,2}.tar", "star": tmp_path / "src/train-*.tar",
              "url": f"file://{tmp_path}/src/train-{{000000..000002}}.tar"}
    for name, src in places.items():
        split = prepared("webdataset", src, tmp_path / name / "object/val")
        assert split.classes == whole.classes and identities(split) == identities(whole)
        assert [split.jpeg(row)[1] for row in range(12)] == [whole.jpeg(row)[1] for row in range(12)]
    one = prepared("webdataset", tmp_path / "src/train-000001.tar", tmp_path / "d/object/train", "--wnids")
    assert one.classes == [TENCH, GOLDFISH, SHARK] and len(one) == 4


def test_webdataset_reads_our_own_shards_and_what_the_library_writes(tmp_path):
    import webdataset

    src = write_files(tmp_path / "src", FOLDERS)
    ours = prepared("imagenet", src, tmp_path / "a/object/val")
    again = prepared("webdataset", ours.folder, tmp_path / "b/object/val", "--label-key", "identity")
    assert identities(again) == identities(ours)
    assert [again.jpeg(row)[1] for row in range(6)] == [ours.jpeg(row)[1] for row in range(6)]  # copied byte for byte
    (tmp_path / "w").mkdir()
    with webdataset.TarWriter(str(tmp_path / "w/a.tar")) as writer:
        for i in range(3):
            writer.write({"__key__": f"{'a long name ' * 12}é {i}", "jpg": encode(picture(i, 16, 16)), "cls": i})
    split = prepared("webdataset", tmp_path / "w", tmp_path / "c/object/val")
    assert identities(split) == ["0000000", "0000001", "0000002"]


def test_webdataset_skips_and_counts_what_machines_leave(tmp_path):
    tar_of(tmp_path / "src/a.tar", {"./._0.jpg": b"x", "./0.jpg": None, "0.cls": "1", "__MACOSX/._0.jpg": None,
                                    "__MACOSX/0.cls": "5", ".DS_Store": "x", "d/.DS_Store": "x", "1.jpg": None,
                                    "1.cls": "2"})
    (tmp_path / "src/._a.tar").write_bytes(b"no tar")
    split = prepared("webdataset", tmp_path / "src", tmp_path / "d/object/val")
    assert identities(split) == ["0000001", "0000002"]
    assert split.index["skipped"] == {"hidden, or left by the system": 6}


def test_two_tars_in_one_file_are_refused(tmp_path):
    """Readers end at the first end mark: what was appended with `cat` would be lost without a word."""
    one = tar_of(tmp_path / "a.tar", samples(0, 1)).read_bytes()
    (tmp_path / "a.tar").write_bytes(one + one)
    for source, src in (("webdataset", tmp_path / "a.tar"), ("folder", tmp_path / "a.tar")):
        with pytest.raises(InputError, match="or a second tar after it"):
            run_here(source, "--src", src, "--out", tmp_path / "d/object/val")


def test_webdataset_samples_without_image_or_label_are_counted(tmp_path):
    tar_of(tmp_path / "a.tar", {
        "1.jpg": None, "1.cls": "5", "2.cls": "1", "3.jpg": None, "4.jpg": None, "4.json": "{", "5.jpg": None,
        "5.json": '{"other": 1}', "6.seg.png": None, "6.jpg": None, "6.cls": "cat", "7.jpg": None, "7.cls": "-1",
        "8.jpg": b"damaged", "8.cls": "5"})  # fmt: skip
    split = prepared("webdataset", tmp_path / "a.tar", tmp_path / "d/object/val")
    assert identities(split) == ["0000005", "cat"]
    assert split.index["skipped"] == {"sample without an image": 1, "no label": 4, "unreadable image": 1}


@pytest.mark.parametrize("names, classes", [
    (["img.v1.0", "img.v1.1", "img.v1.2"], 3), (["v1.2/0", "v1.2/1"], 2), (["0", "1", "0", "1"], 4),
    (["0", "0", "0"], 3), (["a", "a.b", "a.b.c"], 3)])
@pytest.mark.parametrize("label", ["cls", "json"])
def test_webdataset_names_with_dots_and_keys_that_come_again_lose_nothing(names, classes, label, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, name in enumerate(names):
            for ending, data in (("seg.png", b"a mask"), ("jpg", encode(picture(i, 12, 12))),
                                 (label, b"%d" % i if label == "cls" else b'{"label": %d}' % i)):
                for hidden in ("", "._"):
                    path = name.rpartition("/")
                    info = tarfile.TarInfo(f"{path[0]}{path[1]}{hidden}{path[2]}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    split = prepared("webdataset", tmp_path / "a.tar", tmp_path / "d/object/val", "--size", 12)
    assert identities(split) == [f"{i:07d}" for i in range(classes)]
    assert [split.jpeg(row)[1] for row in range(classes)] == [encode(picture(i, 12, 12)) for i in range(classes)]
    assert split.index["skipped"] == {"hidden, or left by the system": 3 * len(names)}


@pytest.mark.parametrize("folder, pattern", [("faces [aligned]", "train-*.tar"), ("a{1,2}", "train-{0..1}.tar"),
                                             ("what?", "train-[01].tar"), ("100% real", "train-{0,1}.tar"),
                                             ("x*y", "")])
def test_webdataset_paths_with_signs_of_patterns(folder, pattern, tmp_path):
    for k in range(2):
        tar_of(tmp_path / folder / f"train-{k}.tar", samples(4 * k, 4))
    tar_of(tmp_path / folder / "one[0].tar", samples(8, 2))
    some = prepared("webdataset", tmp_path / folder / pattern, tmp_path / "a/object/val")
    assert identities(some) == [f"{i % 3:07d}" for i in ([*range(8)] if pattern else [8, 9, *range(8)])]
    assert identities(prepared("webdataset", tmp_path / folder / "one[0].tar", tmp_path / "b/object/val")) == [
        "0000002", "0000000"]


READ_PART = data_prep.sources.archives.read_part


def cut_and_read(url: str, offset: int, size: int) -> bytes:
    """A tar that is there while it is listed, and then half of it is gone."""
    os.truncate(url, os.path.getsize(url) // 2)
    return READ_PART(url, offset, size)


def test_a_source_that_goes_away_ends_in_one_line_and_the_same_command_goes_on(tmp_path):
    tar = tar_of(tmp_path / "a.tar", samples(0, 6))
    command = ["webdataset", "--src", tar, "--out", tmp_path / "d/object/val", "--size", 16, "--shard-size", 2]
    whole = tar.read_bytes()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="the same command later continues"):
        patch.setattr(data_prep.sources.webdataset, "read_part", cut_and_read)
        run_here(*command, "--workers", 1)
    assert not (tmp_path / "d/object/val/index.json").exists()
    tar.write_bytes(whole)
    run_here(*command, "--workers", 2)
    assert verify_split(tmp_path / "d/object/val") == [] and len(Split(tmp_path / "d/object/val")) == 6


def test_a_server_without_ranges_ends_in_one_line(tmp_path, monkeypatch):
    class Broken(io.BytesIO):
        def read(self, *_):
            raise ValueError("no range requests")  # as fsspec's HTTP files do

    monkeypatch.setattr(data_prep.sources.webdataset, "open_tar", lambda url: Broken(b"0" * 1024))
    with pytest.raises(InputError, match=r"http://host/a.tar: not a readable zip or plain tar \(no range requests\)"):
        run_here("webdataset", "--src", "http://host/a.tar", "--out", tmp_path / "d/object/val")


# ---------------------------------------------------------------- bad input


def special(path: Path, name: str, kind: bytes, target: str = "") -> Path:
    """A tar with one good sample and one member of another kind or with another name."""
    tar_of(path, samples(0, 1))
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        tar.addfile(info)
    return path


def negative_size(path: Path) -> Path:
    """A header whose size is -512, in the base-256 form that makes careless readers go round in circles."""
    data = bytearray(tar_of(path, samples(0, 2)).read_bytes())
    data[124:136] = b"\xff" * 10 + b"\xfe\x00"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    return path


def replaced(files: dict, name: str, content: str | bytes | None) -> dict:
    return {key: value for key, value in files.items() if key != name} | ({} if content is None else {name: content})


MAP = "objectnet-1.0/mappings/"
LABELS = f"{MAP}folder_to_objectnet_label.json"
BAD = [
    ("imagenet", "val", {"a.jpg": None}, "no ILSVRC/Data/CLS-LOC/val in it; ImageNet has"),
    ("imagenet", "val", {"val/1.JPEG": None}, "are not in wnid folders; put LOC_val_solution.csv beside val"),
    ("imagenet", "val", replaced(KAGGLE, "LOC_val_solution.csv", None), "put LOC_val_solution.csv beside ILSVRC"),
    ("imagenet", "val", replaced(KAGGLE, "LOC_val_solution.csv", "ImageId,PredictionString\nx,../../evil 1\n"),
     "LOC_val_solution.csv, line 2: want a wnid"),
    ("imagenet", "val", replaced(KAGGLE, "LOC_val_solution.csv", f"ImageId,PredictionString\nx,{TENCH} 1\n"),
     "ILSVRC2012_val_00000001.JPEG: neither in a wnid folder nor"),
    ("imagenet", "val", replaced(KAGGLE, "LOC_val_solution.csv", "Id,Class\n"), "line 1: no column 'ImageId'"),
    ("imagenet-a", "a", {"n00000001/1.jpg": None}, "n00000001 is not one of the 1,000 classes"),
    ("imagenet-a", "train", {f"{TENCH}/1.jpg": None}, "this set is for testing only"),
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


@pytest.mark.parametrize("arguments, words", [
    (["--out", "{out}/object/val", "--image-column", "img"], "no column 'img'; it has image, label; --image-column"),
    (["--out", "{out}/object/val", "--label-column", "y"], "no column 'y'; it has image, label; --label-column"),
    (["--out", "{out}/object/val", "--image-column", "label"], "column 'label' is int64; want bytes"),
    (["--out", "{out}/object/val", "--wnids"], "row group 0, row 1: label 1000: want an ImageNet class number 0..999"),
    (["--out", "{out}/face_hq/val", "--ood"], "are for test splits of objects"),
    (["--out", "{out}/object/train", "--reference", "a", "--files", "val*"], "are for test splits of objects"),
])  # fmt: skip
def test_bad_options(arguments, words, tmp_path):
    parquet_file(tmp_path / "src/val.parquet", [0, 1000])
    with pytest.raises(InputError) as error:
        run_here("parquet", "--src", tmp_path / "src", *[a.format(out=tmp_path / "d") for a in arguments])
    assert words in error.value.message and not (tmp_path / "d").exists()


@pytest.mark.parametrize("make, words", [
    (lambda p: special(p, "2.jpg", tarfile.SYMTYPE, "/etc/passwd"), "member '2.jpg' is a link"),
    (lambda p: special(p, "2.jpg", tarfile.LNKTYPE, "dir/000000.jpg"), "member '2.jpg' is a link"),
    (lambda p: special(p, "2.jpg", tarfile.CHRTYPE), "member '2.jpg' is a device"),
    (lambda p: special(p, "2.jpg", tarfile.FIFOTYPE), "member '2.jpg' is a device"),
    (lambda p: special(p, "../../evil.jpg", tarfile.REGTYPE), "member '../../evil.jpg' points out of the archive"),
    (lambda p: special(p, "/tmp/evil.jpg", tarfile.REGTYPE), "member '/tmp/evil.jpg' points out of the archive"),
    (lambda p: special(p, "a/" * 80 + "../evil.jpg", tarfile.REGTYPE), "points out of the archive"),
    (negative_size, "is cut off"),
    (lambda p: p.write_bytes(tar_of(p, samples(0, 2)).read_bytes()[:2000]), "is cut off"),
    (lambda p: p.write_bytes(bytes(p.stat().st_size) if p.exists() else b"\0" * 1024), "holds no images"),
])  # fmt: skip
def test_bad_tars(make, words, tmp_path):
    (tmp_path / "src").mkdir()
    make(tmp_path / "src" / "a.tar")
    with pytest.raises(InputError) as error:
        run_here("webdataset", "--src", tmp_path / "src", "--out", tmp_path / "d/object/val", "--workers", 1)
    assert words in error.value.message and not (tmp_path / "d").exists() and not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("src, words", [
    ("{tmp}/none.tar", "none.tar: cannot be opened"), ("{tmp}/none-{{3..1}}.tar", "counts backwards"),
    ("{tmp}/none-{{0..999999999}}.tar", "more than 100,000 files"), ("{tmp}/*.tar", "no tar found"),
    ("nosuch://host/a.tar", "nosuch://host/a.tar: cannot be opened"), ("memory://none.tar", "cannot be opened"),
])  # fmt: skip
def test_bad_places_of_tars(src, words, tmp_path):
    with pytest.raises(InputError) as error:
        run_here("webdataset", "--src", src.format(tmp=tmp_path), "--out", tmp_path / "d/object/val")
    assert words in error.value.message


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    write_files(tmp_path / "src", {"val.parquet": b"PAR1 no PAR1"})
    out = tmp_path / "d/object/val"
    result = script("-m", "data_prep", "parquet", "--src", tmp_path / "src", "--out", out, check=2)
    assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.stderr


# ---------------------------------------------------------------- mutated files


@pytest.mark.parametrize("source, name, cases", [("webdataset", "a.tar", 200), ("parquet", "val.parquet", 200),
                                                 ("imagenet", "LOC_val_solution.csv", 60),
                                                 ("objectnet", f"{MAP}objectnet_to_imagenet_1k.json", 60)])  # fmt: skip
def test_mutated_files_end_in_one_line_and_touch_nothing_else(source, name, cases, tmp_path, monkeypatch):
    src = tmp_path / "b" / "src"
    write_files(src, {"imagenet": KAGGLE, "objectnet": objectnet_files()}.get(source, {"keep.txt": "x"}))
    if source == "webdataset":
        tar_of(src / name, samples(0, 5))
    elif source == "parquet":
        parquet_file(src / name, [0, 1, 2, 1, 0], names=["a", "b", "c"])
    monkeypatch.chdir(src)
    assert 5 < prepare_mutated(source, src, name, cases, "object/val") < cases  # the loop meets both good and bad files
