"""Parquet: row groups read once, labels and images of many kinds, bad options."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data_prep.sources.parquet
from data_prep import InputError
from data_prep.verify import verify_split
from data_prep.write import random_order
from tests.test_data_prep import encode, picture, run_here
from tests.test_object_sources import GOLDFISH, TENCH, identities, prepared

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


@pytest.mark.parametrize("arguments, words", [
    (["--out", "{out}/object/val", "--image-column", "img"], "no column 'img'; it has image, label; --image-column"),
    (["--out", "{out}/object/val", "--label-column", "y"], "no column 'y'; it has image, label; --label-column"),
    (["--out", "{out}/object/val", "--image-column", "label"], "column 'label' is int64; want bytes"),
    (["--out", "{out}/object/val", "--wnids"], "row group 0, row 1: label 1000: want an ImageNet class number 0..999"),
    (["--out", "{out}/face_hq/val", "--ood"], "is for test splits of objects"),
    (["--out", "{out}/object/train", "--reference", "a", "--files", "val*"], "is for test splits of objects"),
])  # fmt: skip
def test_bad_options(arguments, words, tmp_path):
    parquet_file(tmp_path / "src/val.parquet", [0, 1000])
    with pytest.raises(InputError) as error:
        run_here("parquet", "--src", tmp_path / "src", *[a.format(out=tmp_path / "d") for a in arguments])
    assert words in error.value.message and not (tmp_path / "d").exists()
