"""data_prep as its users run it: names, lists of sources, overlaps, bad input; what the tests of sources share."""

import io
import os
import unicodedata
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from data_prep import InputError, progress
from data_prep.__main__ import cli, data_set_name
from data_prep.format import Split
from data_prep.verify import verify_split
from tests.conftest import script


def run_here(*arguments) -> None:
    cli.main([str(a) for a in arguments], standalone_mode=False)


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def class_folders(folder: Path, classes: int = 3, images: int = 5, **options) -> Path:
    for c in range(classes):
        (folder / f"c{c}").mkdir(parents=True)
        for i in range(images):
            (folder / f"c{c}" / f"{i}.jpg").write_bytes(encode(picture(10 * c + i, **options)))
    return folder


def people(folder: Path, counts: dict[str, int]) -> Path:
    """Person folders with so many images each, all different."""
    for p, (name, images) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(images):
            (folder / name / f"{i}.jpg").write_bytes(encode(picture(1000 * p + i, 24, 24)))
    return folder


def lfw_folder(folder: Path, people: int = 4, images: int = 3) -> Path:
    for p in range(people):
        (folder / f"P_{p}").mkdir(parents=True)
        for i in range(1, images + 1):
            (folder / f"P_{p}" / f"P_{p}_{i:04d}.jpg").write_bytes(encode(picture(10 * p + i, 36, 36)))
    return folder


PAIRS = "2\t1\nP_0\t1\t3\nP_0\t1\tP_1\t2\nP_2\t2\t1\nP_3\t1\tP_2\t3\n"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def prepared(src: Path, out: Path, *options, source: str = "folder") -> Split:
    run_here(source, "--src", src, "--out", out, "--size", 24, "--workers", 1, *options)
    assert verify_split(out) == []
    return Split(out)


def counts(split: Split) -> dict[str, int]:
    return dict(zip(split.classes, split.counts.tolist(), strict=True))


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("src, name", [
    ("/sets/LFW/train", "LFW"), ("/sets/casia_train", "casia"), ("/sets/lfw.zip/images", "lfw"),
    ("/sets/c4m/train-{000..146}.tar", "c4m"), ("/sets/inet/data/train-00000-of-00294.parquet", "inet"),
    ("https://host/cc12m/{0..9}.tar", "cc12m"), ("/data/test", "unnamed"), ("/sets/ms1m/train.rec", "ms1m"),
])
def test_a_data_set_is_called_after_its_folder(src, name):
    assert data_set_name(src) == name


def test_a_split_records_its_data_set_through_merging_and_degrading(tmp_path):
    """Two data sets by one command are two; a copy of them and a merged split are of both, image by image."""
    root = tmp_path / "d/face_hq"
    src = people(tmp_path / "casia/train", {"a": 2, "b": 2}), people(tmp_path / "other", {"c": 2, "d": 2})
    a = prepared(src[0], root / "a", "--part", "train")
    b = prepared(src[1], root / "b", "--part", "train", "--source-name", "VGG")
    assert [split.index["provenance"]["data_set"] for split in (a, b)] == [["casia"], ["VGG"]]
    assert {split.index["provenance"]["source"] for split in (a, b)} == {"folder"}
    run_here("merge", root / "a", root / "b", "--out", root / "train")
    run_here("degrade", "--src", root / "train", "--out", tmp_path / "d/face_lq/train", "--workers", 1)
    for path in (root / "train", tmp_path / "d/face_lq/train"):
        split = Split(path)
        assert split.index["provenance"]["data_set"] == ["casia", "VGG"] and verify_split(path) == []
        found = {(split.fields(row)["identity"], split.fields(row)["source"]) for row in range(len(split))}
        assert found == {("a", "casia"), ("b", "casia"), ("c", "VGG"), ("d", "VGG")}
    with pytest.raises(InputError, match="already holds another split"):
        prepared(src[1], root / "b", "--part", "train", "--source-name", "another")


@pytest.mark.parametrize("stored, typed", [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_are_one_however_they_are_spelled(stored, typed, tmp_path, capsys):
    """macOS stores decomposed names; people type composed ones."""
    def spell(form: str, text: str) -> str:
        return unicodedata.normalize(form, text)

    for p, person in enumerate(("José_Müller", "Zoë_Ångström")):
        folder = tmp_path / "src" / spell(stored, person)
        folder.mkdir(parents=True)
        for i in (1, 2):
            (folder / spell(stored, f"{person}_{i:04d}.jpg")).write_bytes(encode(picture(10 * p + i, 24, 24)))
    lists = {"pairs.txt": "1\t1\nJosé_Müller\t1\t2\nJosé_Müller\t1\tZoë_Ångström\t2\n", "list.txt": "José_Müller\n",
             "pairs.csv": "José_Müller/José_Müller_0001.jpg,José_Müller/José_Müller_0002.jpg,1\n"
                          "José_Müller/José_Müller_0001.jpg,Zoë_Ångström/Zoë_Ångström_0002.jpg,0\n",
             "names.tsv": "José_Müller\tJ. Müller\nNobody\tN. N.\n",
             "classes.csv": "José_Müller,Übung\nZoë_Ångström,two\n"}
    for name, text in lists.items():
        (tmp_path / name).write_text(spell(typed, text))
    for source, split, options in [
        ("lfw", "lfw", ["--pairs", "pairs.txt"]), ("pairs", "pairs", ["--pairs", "pairs.csv"]),
        ("folder", "train", ["--list", "list.txt", "--names", "names.tsv"]),
        ("folder", "../object/train", ["--classes", "classes.csv"])]:
        options = [tmp_path / option if "." in option else option for option in options]
        run_here(source, "--src", tmp_path / "src", "--out", tmp_path / "d/face_hq" / split, *options)
    assert all(Split(tmp_path / "d/face_hq" / name).column("pairs").tolist() == pairs for name, pairs in [
        ("lfw", [[0, 1, 1, 0], [0, 3, 0, 0]]), ("pairs", [[0, 1, 1, 0], [0, 2, 0, 1]])])
    train = Split(tmp_path / "d/face_hq/train")
    assert train.classes == ["José_Müller"] and len(train) == 2 and train.names == ["J. Müller"]
    assert Split(tmp_path / "d/object/train").classes == ["two", "Übung"]
    assert "names.tsv: 1 of its folders are not in the source: Nobody" in capsys.readouterr().out


def test_names_that_are_no_text_are_classes_as_others(tmp_path):
    """A folder called b"a\\xff" becomes a class that can be printed and written."""
    for part in ("train", "test"):
        (tmp_path / "src" / os.fsdecode(b"a\xff")).mkdir(parents=True, exist_ok=True)
        for i in range(2):
            (tmp_path / "src" / os.fsdecode(b"a\xff") / f"{i}.jpg").write_bytes(encode(picture(i, 24, 24)))
        strict = "import sys; sys.argv[0] = 'data_prep'; sys.stdout.reconfigure(encoding='utf-8', errors='strict'); " \
                 "from data_prep.__main__ import cli, run_command; run_command(cli)"
        result = script("-c", strict, "folder", "--src", tmp_path / "src", "--out", tmp_path / "d/face_hq" / part,
                        "--workers", "1")
    assert "1 identities are in train too: a\\udcff" in result.stdout
    names = Split(tmp_path / "d/face_hq/train").classes
    assert names == ["a\\udcff"] and names[0].encode()  # a figure or a CSV can hold it
    with pytest.raises(InputError, match="want a name in UTF-8"):
        run_here("folder", "--src", tmp_path / "src", "--out", tmp_path / "d/face_hq" / os.fsdecode(b"a\xff"))


# ---------------------------------------------------------------- what is told


def test_an_overlap_of_train_and_test_people_is_reported(tmp_path, capsys):
    src = lfw_folder(tmp_path / "src")
    for name in ("train", "test"):
        run_here("folder", "--src", src, "--out", tmp_path / "d/face_hq" / name)
    assert "train and test overlap, 4 identities are in train too: P_0" in capsys.readouterr().out


def test_progress_is_told_in_lines_where_there_is_no_terminal(capsys, monkeypatch):
    clock = iter(range(0, 1000, 12))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))  # 12 s pass with every image
    assert list(progress(range(7), desc="list", unit="img")) == list(range(7))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("[")[0] for line in lines] == ["list:  43% 3/7 ", "list:  86% 6/7 "]
    assert lines[0].endswith("[00:36<00:48, 12.00s/img]")


def test_every_source_is_listed_with_its_layout_and_its_own_options(capsys):
    run_here("sources")
    lines = capsys.readouterr().out.splitlines()
    listed = [line for line in lines if not line.startswith(" ")]
    expected = [name for name, command in cli.commands.items() if "part" in {option.name for option in command.params}]
    assert listed == sorted(expected) and {"folder", "lfw", "market", "parquet"} < set(listed)
    assert not {"bench", "demo", "merge", "verify"} & set(listed)
    text = " ".join(" ".join(lines).split())
    for numbers in ("5,822,653 of 85,742", "501,195 images of 10,572", "4,235,242 of 205,990", "12,720,066 of 617,970",
                    "42,474,557 of 2,059,906", "6,000 pairs, cfp_fp and cfp_ff 7,000", "6,000 pairs in 10 folds",
                    "3,728 probes, 4,443 matches, 153,428 distractors", "227,630 images, 12,115 templates, 8,010,270",
                    "469,375 images, 23,124 templates, 15,658,489", "1,772 and 1,759 templates, 19,593 probes",
                    "12,936 training images; 3,368 queries, 15,913", "16,522, 2,228 and 17,661", "32,621", "17,896",
                    "A 3,384, B 3,543, C 3,873", "9,576", "75,083", "17,527 queries", "1,281,167 training and 50,000",
                    "10,000 images, 10 per", "7,500 images of 200", "30,000 images of 200", "50,889", "113 of 313"):
        assert numbers in text, numbers
    assert "list_{train,val,query,gallery}.txt" in text and "11,659 queries, 82,161 gallery images" in text
    assert "options: --pairs" in text and "--holdout" not in text and max(map(len, lines)) <= 120


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("arguments, words", [
    (["folder", "--src", "{src}", "--out", "{out}/faces/train"], "want DATA/<domain>/<split>"),
    (["folder", "--src", "{src}/none", "--out", "{out}/object/train"], "no such folder"),
    (["folder", "--src", "{empty}", "--out", "{out}/object/train"], "holds no images"),
    (["folder", "--src", "{src}", "--out", "{out}/object/train", "--names", "{src}/no.txt"], "--names"),
    (["lfw", "--src", "{src}", "--out", "{out}/face_hq/test"], "needs --pairs"),
    (["lfw", "--src", "{src}", "--out", "{out}/face_hq/train", "--pairs", "x"], "is for test splits"),
    (["market", "--src", "{src}", "--out", "{out}/body/train"], "no bounding_box_train in it; Market-1501 has"),
    (["folder", "--src", "{src}", "--out", "{out}/object/train", "--ood"], "is for test splits of objects"),
    (["folder", "--src", "{src}", "--out", "{out}/body/test", "--reference", "x"], "is for test splits of objects"),
    (["verify", "{empty}"], "no index.json"), (["show", "{empty}"], "no index.json"),
    (["folder", "--src", "{src}"], "--out"), (["tiff"], "No such command"),
])  # fmt: skip
def test_bad_input(arguments, words, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"src": class_folders(tmp_path / "src"), "out": tmp_path / "out", "empty": tmp_path / "empty"}
    with pytest.raises(click.ClickException) as error:
        run_here(*[a.format(**places) for a in arguments])
    assert words in error.value.format_message()


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    command = ["-m", "data_prep", "folder", "--src", tmp_path / "none", "--out", tmp_path / "object/train"]
    result = script(*command, check=2)
    assert result.stderr.strip().splitlines() == [f"error: --src {tmp_path}/none: no such folder or archive"]
    assert not result.stdout
    result = script("-m", "data_prep", "verify", tmp_path, "--debug", check=1)
    assert "Traceback" in result.stderr
