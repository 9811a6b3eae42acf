"""Damaged images inside every kind of source, and damaged splits: a line of bad input or a counted image, never more.

Sources' own lists and containers are damaged in the tests of those sources; those of objects, in several files, here.
"""

import io
import json
import os
import pickle
import resource
import signal
import struct
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data_prep.verify
from data_prep import InputError
from data_prep.format import BadImage, Record, Source, Split, jpeg_sides, open_root
from data_prep.sources.parquet import row_group
from data_prep.stats import split_stats
from data_prep.stream import Batches, Stream
from data_prep.write import fit_image, write_split
from protocols.classify import score_classification
from protocols.pairs import score_verification
from protocols.search import score_gallery, variants_of
from tests.conftest import TINY, mutated, prepare_mutated, script
from tests.test_body_sources import LTCC, PRCC, deepchange_files, msmt17_files, persons_files, write_files
from tests.test_data_prep import PAIRS, encode, picture, run_here
from tests.test_face_sources import write_ijb
from tests.test_insightface import classic, write_rec
from tests.test_object_sources import FOLDERS, GOLDFISH, HEN, KAGGLE, MAP, objectnet_files
from tests.test_parquet import IMAGE, parquet_file
from tests.test_webdataset import samples, tar_of

SECONDS, GIGABYTE = 20, 1 << 20  # the latter as getrusage counts, in KiB


@contextmanager
def watched():
    """At most so many seconds and a gigabyte more of memory than before."""
    def too_long(*_):
        raise TimeoutError("damaged input is read without end")

    before, memory = signal.signal(signal.SIGALRM, too_long), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < memory + GIGABYTE


def one_line(error: click.ClickException) -> bool:
    return isinstance(error, InputError) and 0 < len(error.message) < 1000 and "\n" not in error.message


# ---------------------------------------------------------------- damaged images


def with_sides(jpeg: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header announces another size."""
    at = max(jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc2"))
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


def png_of(side: int) -> bytes:
    """A PNG of a few bytes that announces side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + b"\0" * 4


def damaged(i: int, rng: np.random.Generator) -> bytes:
    """Picture i after an accident, or what is no picture at all."""
    good = encode(picture(i, 24, 24), quality=80)
    progressive = encode(picture(i, 24, 24), progressive=True)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = int(rng.integers(1, 9)), "x" * 40
    turned = encode(picture(i, 24, 16), exif=exif)
    kinds = [
        lambda: mutated(good, rng), lambda: mutated(progressive, rng), lambda: mutated(turned, rng),
        lambda: mutated(encode(picture(i, 24, 24), "PNG"), rng), lambda: mutated(encode(picture(i, 9, 9), "TIFF"), rng),
        lambda: mutated(encode(picture(i, 9, 9), "GIF"), rng), lambda: mutated(encode(picture(i, 9, 9), "WEBP"), rng),
        lambda: good[: rng.integers(len(good))], lambda: good + rng.bytes(50), lambda: b"", lambda: rng.bytes(300),
        lambda: with_sides(good, *[(0, 0), (65500, 65500), (1, 65500), (24, 23), (0, 24)][rng.integers(5)]),
        lambda: with_sides(progressive, 65500, 65500), lambda: png_of(1 << 20), lambda: png_of(1 << 31),
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(pwned) (w) file\n", lambda: b"<svg/>" * 9,
        lambda: good[:2] + b"\xff\x01" * 3 + good[2:], lambda: good[:2] + b"\xff\xe1\0\1" + good[2:],
    ]  # fmt: skip
    return kinds[rng.integers(len(kinds))]()


def images_in(folder: Path, files: dict[str, str | bytes | None], draw) -> Path:
    """Write these files below folder; None: what `draw` makes of the file's number."""
    for i, (name, content) in enumerate(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = draw(i) if content is None else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def parquet_of(folder: Path, draw) -> Path:
    rows = [{"bytes": draw(i), "path": ""} for i in range(8)]
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"image": pa.array(rows, IMAGE), "label": [0, 1] * 4}), folder / "val.parquet",
                   row_group_size=3)
    return folder


def recordio_of(folder: Path, draw) -> Path:
    return write_rec(folder, classic([draw(i) for i in range(6)]))


def bin_of(folder: Path, draw) -> Path:
    folder.mkdir(parents=True)
    (folder / "a.bin").write_bytes(pickle.dumps(([draw(i) for i in range(8)], [True, False] * 2), 2))
    return folder / "a.bin"


def ijb_of(folder: Path, draw) -> Path:
    for i, path in enumerate(sorted(write_ijb(folder).glob("loose_crop/*"))):
        path.write_bytes(draw(i))
    return folder


def webdataset_of(folder: Path, draw) -> Path:
    files = {name: draw(i) if content is None else content for i, (name, content) in enumerate(samples(0, 8).items())}
    return tar_of(folder / "a.tar", files)


def lfw_of(folder: Path, draw) -> Path:
    return images_in(folder, {f"P_{p}/P_{p}_{i:04d}.jpg": None for p in range(4) for i in (1, 2, 3)}, draw)


WNIDS = {f"{wnid}/{i}.jpg": None for wnid in (GOLDFISH, HEN) for i in range(4)}
MARKET = {f"{folder}/000{p}_c{c}s1_{i:06d}_00.jpg": None for i, (folder, c) in enumerate(
    [("query", 1), ("bounding_box_test", 2), ("bounding_box_test", 3)]) for p in (1, 2, 3)}  # fmt: skip
TINYFACE = {f"Testing_Set/{name}": None for name in [
    "Probe/1_1.jpg", "Probe/2_1.jpg", "Gallery_Match/1_2.jpg", "Gallery_Match/1_3.jpg", "Gallery_Match/2_2.jpg",
    "Gallery_Distractor/9_1.jpg", "Gallery_Distractor/9_2.jpg", "Gallery_Distractor/9_3.jpg"]}  # fmt: skip
# source: (its files, or the function that writes them; domain; further options)
SOURCES = {
    "folder": (lfw_of, "object", []), "lfw": (lfw_of, "face_hq", ["--pairs", "{tmp}/pairs.txt"]),
    "pairs": (lfw_of, "face_hq", ["--pairs", "{tmp}/pairs.csv"]), "ijb": (ijb_of, "face_lq", []),
    "tinyface": (TINYFACE, "face_lq", []), "recordio": (recordio_of, "face_hq", []), "bin": (bin_of, "face_hq", []),
    "market": (MARKET, "body", []), "msmt17": (msmt17_files(2), "body", []), "prcc": (PRCC, "body", []),
    "ltcc": (LTCC, "body", []), "deepchange": (deepchange_files(), "body", []),
    "persons": (persons_files(), "body", []), "imagenet": (FOLDERS | KAGGLE, "object", []),
    "imagenet-v2": ({f"v2/{c}/{i}.jpeg": None for c in (2, 100) for i in range(10)}, "object", []),
    "imagenet-a": (WNIDS, "object", []), "imagenet-r": (WNIDS, "object", []), "imagenet-sketch": (WNIDS, "object", []),
    "objectnet": ({k: None if k.endswith("png") else v for k, v in objectnet_files().items()}, "object", []),
    "parquet": (parquet_of, "object", []), "webdataset": (webdataset_of, "object", []),
    "stimuli": ({f"{c}/{c}{i}.png": None for c in ("cat", "dog") for i in range(10)}, "object", []),
}  # fmt: skip
ROUNDS = 3


def test_the_table_of_sources_is_complete():
    from data_prep.__main__ import cli

    named = {name for name, command in cli.commands.items() if "part" in {option.name for option in command.params}}
    assert set(SOURCES) == named


def test_damaged_images_of_every_source_are_counted(tmp_path):
    """Three quarters of the images are damaged: a verified split of the others, or one line; nothing else is written.

    More than 400 damaged images.
    """
    (tmp_path / "pairs.txt").write_text(PAIRS)
    (tmp_path / "pairs.csv").write_text("".join(f"P_0/P_0_0001.jpg,P_{p}/P_{p}_000{i}.jpg,{int(p == 0)}\n"
                                                for p in range(4) for i in (2, 3)))
    drawn = refused = left_out = 0
    for source, (files, domain, options) in SOURCES.items():
        for number in range(ROUNDS):
            rng = np.random.default_rng([number, *source.encode()])

            def draw(i: int, rng: np.random.Generator = rng) -> bytes:
                nonlocal drawn
                if rng.random() < 0.25:
                    return encode(picture(i, 24, 24))
                drawn += 1
                return damaged(i, rng)

            place, out = tmp_path / "src" / source / str(number), tmp_path / "out" / str(number) / domain / source
            src = files(place, draw) if callable(files) else images_in(place, files, draw)
            before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
            row_group.cache_clear()
            with watched():
                try:
                    run_here(source, "--src", src, "--out", out, "--size", 24, "--workers", 1,
                             *(option.format(tmp=tmp_path) for option in options))
                    problems = data_prep.verify.verify_split(out)  # pairs, probes or templates may have lost all images
                    assert all("needs" in problem or "names no" in problem for problem in problems), (source, problems)
                    left_out += sum(Split(out).index["skipped"].values())
                except click.ClickException as error:
                    assert one_line(error), (source, number, error.message)
                    refused += 1
            assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"src", "out", "pairs.txt", "pairs.csv"}
    assert drawn > 400 and left_out > 150 and refused < len(SOURCES)


def test_no_size_is_believed_that_a_header_only_announces():
    """Decoded as announced, 700 bytes would take 13 GB; what would make our reader and libjpeg differ is not copied."""
    good = encode(picture(0, 24, 24))
    assert jpeg_sides(good) == (24, 24) and fit_image(good, 24, "squash", 90) == good
    assert jpeg_sides(with_sides(good, 65500, 3)) == (65500, 3) and jpeg_sides(good[:20]) is None
    assert jpeg_sides(with_sides(good, 4000, 4000)) is None  # 31 kB would be the least
    at = good.find(b"\xff\xc0")  # libjpeg skips a fill byte; read as a marker, it begins a segment of 48 KiB
    gap = 0xC000 + 2 - 20 - 4  # up to the false header, which a comment holds
    comment = b"\xff\xfe" + struct.pack(">H", gap + 21) + bytes(gap) + good[at : at + 19]
    assert jpeg_sides(good[:at] + b"\xff" + with_sides(good, 90, 90)[at : at + 19] + comment + good[at + 19 :]) is None
    for stray in (b"\xff\x01", b"\xff\xd0", b"\0", b"\xff\xff"):  # two markers without length, a byte, a fill byte
        strange = good[:2] + stray + good[2:]
        assert jpeg_sides(strange) is None
        try:
            fitted = fit_image(strange, 24, "squash", 90)
        except BadImage:
            continue
        assert jpeg_sides(fitted) == (24, 24) and fitted != strange


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


# ---------------------------------------------------------------- damaged splits


class Bomb:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def splits_in(root: Path) -> list[Path]:
    """A training split, another to merge it with, and test splits of each kind of protocol, six images each."""
    def split(name: str, protocol: dict | None, pairs=(), **columns) -> Path:
        records = [Record(partial(bytes, encode(picture(i, 16, 16))), f"{i}", f"c{i // 2}", person=f"p{i // 2}",
                          **{key: values[i] for key, values in columns.items()}) for i in range(6)]
        write_split(root / name, Source(records, protocol, list(pairs)), source_name="drawn", size=16, fit="pad",
                    quality=90, train=protocol is None, shard_size=4)
        return root / name

    reid = {"name": "reid", "variants": ["cross-clothes", "cross-clothes single-shot"], "draws": 2}
    pairs = [(0, 1, 1, 0), (2, 4, 0, 0), (2, 3, 1, 1), (1, 5, 0, 1)]
    return [
        split("face_hq/train", None, quality=[0.5] * 6), split("face_hq/more", None),
        split("face_hq/pairs", {"name": "verification", "folds": 2}, pairs),
        split("body/reid", reid, role=[0, 1] * 3, camera=[0, 1] * 3, clothes=list(range(6))),
        split("object/val", {"name": "classification", "reference": "val", "groups": {"c0": ["c0", "c1"]}}),
    ]  # fmt: skip


def mutated_json(text: bytes, rng: np.random.Generator) -> bytes:
    """The bytes after an accident, or the object with one value somewhere inside replaced or removed."""
    if rng.random() < 0.3:
        return mutated(text, rng)
    index = json.loads(text)
    there, places = index, []

    def visit(value) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], (dict, list)):
                visit(value[key])

    visit(index)
    there, key = places[rng.integers(len(places))]
    odd = [None, True, -1, 0, 3, 10**30, 1 << 61, 1e300, float("nan"), "", "../../../etc/passwd", "a\nb", "\ud800", [],
           {}, [[]], [{}], [None], {"name": []}, "body", "shard-000000.tar", "../more/shard-000000.tar", "x" * 5000]
    if rng.random() < 0.15:
        del there[key]
    else:
        there[key] = odd[rng.integers(len(odd))]
    return json.dumps(index).encode()


def mutated_npy(data: bytes, rng: np.random.Generator, bomb: Path) -> bytes:
    """A column after an accident to its bytes, of another type or shape, with impossible numbers, or with a pickle."""
    array, out = np.load(io.BytesIO(data)), io.BytesIO()
    kind = rng.integers(9)
    if kind < 2:
        return mutated(data, rng)
    if kind == 2:
        return data[: rng.integers(len(data))]
    if kind == 3:
        return pickle.dumps(Bomb(bomb))
    if kind == 4:
        np.savez(out, label=np.array([Bomb(bomb)], dtype=object))
    elif kind == 5:
        np.save(out, np.array([Bomb(bomb)] * len(array), dtype=object), allow_pickle=True)
    elif kind == 6:
        types = ["f8", "i4", ">i8", "U3", "M8[s]", "c16", "?", "V8", [("a", "i8")], "u8"]
        np.save(out, array.astype(types[rng.integers(len(types))], casting="unsafe"))
    elif kind == 7:
        shapes = [array[:-1], array[None], np.concatenate([array, array]), array[:0], np.array(7), array[..., None],
                  np.asfortranarray(array)]
        np.save(out, shapes[rng.integers(len(shapes))])
    else:
        odd = [-1, -2, 1 << 62, -(1 << 63), (1 << 63) - 1, 0, 511, 7, 1 << 20, 1 << 31]
        array = array.copy()
        number = odd[rng.integers(len(odd))]
        array.flat[rng.integers(array.size)] = np.array(number % 2**64, np.uint64).view(np.int64).astype(array.dtype)
        if array.dtype.kind == "f" and rng.random() < 0.5:
            array[0] = [np.nan, np.inf, -np.inf][rng.integers(3)]
        np.save(out, array)
    return out.getvalue()


def mutated_tar(data: bytes, split: Split, rng: np.random.Generator) -> bytes:
    """A shard whose images, JSON or headers had an accident, as long as before."""
    data, size = bytearray(data), len(data)
    rows = np.flatnonzero(split.shard == 0)
    row = int(rng.choice(rows))
    start, length = int(split.offset[row]), int(split.length[row])
    kind = rng.integers(5)
    if kind < 2:  # an image
        data[start : start + length] = (damaged(row, rng) + bytes(length))[:length]
    elif kind == 2:  # its JSON
        at = start + -(-length // 512) * 512 + 512
        texts = [b"[" * 4000, b'"ab"', b"[[1, 2]]", b'{"person": [1], "key": {}}', b'{"key": NaN}', b"\xff", b"[]"]
        text = texts[rng.integers(len(texts))]
        data[at : at + len(text)] = text
    elif kind == 3:  # a header: another kind or size of member
        at = start - 512 + [156, 124, 124, 0, 345][rng.integers(5)]
        values = [b"1", b"2", b"5", b"x", b"S", b"\xff" * 12, b"-0000000512\0", b"77777777777\0", b"../evil\0"]
        value = values[rng.integers(len(values))]
        data[at : at + len(value)] = value
        header = data[start - 512 : start]
        header[148:156] = b" " * 8
        data[start - 512 + 148 : start - 512 + 156] = b"%06o\0 " % sum(header)  # a sum that fits
    else:
        at = int(rng.integers(size))
        data[at : at + 40] = rng.bytes(40)
    return bytes(data[:size])


def read_everything(split: Split) -> None:
    """What training and evaluation read of a split."""
    for _, images in (Batches(split, np.arange(len(split)), 4)[b] for b in range(-(-len(split) // 4))):
        assert images.shape[1:] == (3, split.size, split.size)
    for name in split.index["columns"]:
        split.column(name)
    x = np.random.default_rng(0).normal(size=(len(split), 4)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    name = (split.protocol or {}).get("name")
    if split.protocol is None and len(split):
        stream = Stream([split], np.full((2, 1), 3), seed=0, crop=[1.0])
        assert all(len(stream[c].label) == 3 for c in range(len(stream)))
    elif name == "verification":
        score_verification(x, split, 1, 0)
    elif name in ("reid", "identification"):
        for variant in variants_of(split):
            score_gallery(x, split, 1, 0, variant)
    elif name == "classification":
        score_classification(x, split, (x, split), None, [], 1, 0, split.protocol.get("groups"))


def use(folder: Path, turn: int) -> int:
    """Verify a split, read it as training and evaluation do, and show, count or merge it; how many refuse it."""
    refused = 0
    steps = [lambda: run_here("verify", folder, "--workers", 1),
             lambda: read_everything(open_root(folder.parent.parent, [folder.parent.name], folder.name)
                                     [folder.parent.name][folder.name]),
             [lambda: run_here("show", folder, "--out", folder.parent.parent / "sheet.png"),
              lambda: split_stats(Split(folder), 6, 0),
              lambda: run_here("merge", folder, folder.parent / "more", "--out", folder.parent / "both")][turn % 3]]
    for step in steps:
        with watched():
            try:
                step()
            except click.ClickException as error:
                assert one_line(error), error.message
                refused += 1
    return refused


def test_damaged_splits_end_in_one_line(tmp_path, capsys):
    """600 accidents to index.json, to a column or to a shard; no pickle is loaded, whatever it hides in."""
    root, bomb, refused, cases = tmp_path / "d", tmp_path / "bomb", 0, 0
    splits = splits_in(root)
    for folder in splits[:1] + splits[2:]:
        assert use(folder, 1) == 0
        files = {path: path.read_bytes() for path in [folder / "index.json", *sorted(folder.glob("index/*.npy"))]}
        split, shard = Split(folder), folder / "shard-000000.tar"
        files[shard] = shard.read_bytes()
        rng, paths = np.random.default_rng(list(folder.name.encode())), [*files]
        for case in range(150):
            path = [folder / "index.json", shard, paths[rng.integers(len(paths))]][case % 3]
            if path.suffix == ".json":
                path.write_bytes(mutated_json(files[path], rng))
            elif path == shard:
                path.write_bytes(mutated_tar(files[path], split, rng))
            else:
                path.write_bytes(mutated_npy(files[path], rng, bomb))
            refused += use(folder, case) > 0
            path.write_bytes(files[path])
            cases += 1
        assert use(folder, 1) == 0
    assert cases == 600 and 300 < refused < cases and not bomb.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"d"}
    assert {path.name for path in root.iterdir()} <= {"face_hq", "body", "object", "sheet.png"}
    capsys.readouterr()


def test_a_merged_split_that_names_itself_is_not_verified_without_end(tmp_path):
    train, more, *_ = splits_in(tmp_path / "d")
    both = train.parent / "both"
    run_here("merge", train, more, "--out", both)
    whole = (both / "index.json").read_text()
    rng = np.random.default_rng(0)
    for case in range(40):
        index = json.loads(whole)
        if case == 0:
            index["merged"] = [{"split": "both"}, {"split": "more"}]
        text = json.dumps(index).encode()
        (both / "index.json").write_bytes(mutated_json(text, rng) if case else text)
        with watched():
            try:
                assert data_prep.verify.verify_split(both) or case
            except click.ClickException as error:
                assert one_line(error)


@pytest.mark.parametrize("name, array, words", [
    ("label", np.array([{}] * 6, dtype=object), "column 'label' cannot be read"),
    ("offset", np.array([512, -1, 512, 512, 512, 512]), "has rows outside the shards"),
    ("length", np.full(6, (1 << 63) - 1), "has rows outside the shards"),
    ("length", np.full(6, -5), "has rows outside the shards"), ("label", np.zeros(6), "holds float64 [6]"),
    ("shard", np.zeros((6, 1), int), "holds int64 [6, 1]"), ("quality", np.full(6, np.nan), "not all numbers are"),
])  # fmt: skip
def test_a_column_that_cannot_be_is_named(name, array, words, tmp_path):
    train = splits_in(tmp_path / "d")[0]
    np.save(train / f"index/{name}.npy", array, allow_pickle=True)
    with pytest.raises(InputError) as error:
        Split(train).column(name)
    assert words in error.value.message and str(train / "index") in error.value.message


@pytest.mark.parametrize("command", ["verify", "train.py", "evaluate.py"])
def test_a_damaged_split_is_one_line_and_exit_code_2_for_every_script(command, tmp_path):
    train, _, pairs, *_ = splits_in(tmp_path / "d")
    for folder in (train, pairs):
        (folder / "index/offset.npy").write_bytes(pickle.dumps(Bomb(tmp_path / "bomb")))
    root, model = ["--data", tmp_path / "d", "--out", tmp_path / "r"], TINY[: TINY.index("--workers")]
    result = script(*{"verify": ["-m", "data_prep", "verify", train], "train.py": ["train.py", *TINY, *root],
                      "evaluate.py": ["evaluate.py", *model, "--device", "cpu", *root]}[command], check=2)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "column 'offset' cannot be read" in lines[0]
    assert not (tmp_path / "bomb").exists()
