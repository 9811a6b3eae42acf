"""Folders of images: how deep, what lies beside them, links, and which of them are classes."""

import shutil
import tracemalloc
from pathlib import Path

import pytest

from data_prep import InputError
from data_prep.format import Split
from data_prep.sources.archives import members
from data_prep.sources.folders import folder
from tests.conftest import ROOT, TINY, script
from tests.test_data_prep import class_folders, counts, encode, people, picture, prepared, run_here

# ---------------------------------------------------------------- what lies beside images, and how deep


def test_skipped_files_are_counted_by_reason(tmp_path, capsys):
    src = class_folders(tmp_path / "src")
    (src / "c0" / "notes.txt").write_text("no image")
    (src / "c1" / "fake.png").write_text("no image either")
    (src / "c2" / "cut.jpg").write_bytes(encode(picture(0))[:150])
    (src / "stray.jpg").write_bytes(encode(picture(0)))
    run_here("folder", "--src", src, "--out", tmp_path / "data/object/train", "--size", 24)
    split = Split(tmp_path / "data/object/train")
    assert len(split) == 15
    assert split.index["skipped"] == {"not an image by its name": 1, "not in a class folder": 1, "unreadable image": 2}
    assert "19 images in, 15 of 3 classes written, 4 skipped" in capsys.readouterr().out


def test_linked_folders_are_followed_and_dead_links_and_circles_counted(tmp_path, capsys):
    src = people(tmp_path / "src", {"cat": 2, "owl": 1})
    people(tmp_path / "elsewhere", {"dog": 3})
    (src / "dog").symlink_to(tmp_path / "elsewhere/dog")
    (src / "owl/9.jpg").symlink_to("/nowhere/9.jpg")
    (src / "owl/all").symlink_to(src)  # a circle
    split = prepared(src, tmp_path / "d/object/val")
    assert counts(split) == {"cat": 2, "dog": 3, "owl": 1}
    assert split.index["skipped"] == {"dead link": 1, "circular link": 1}
    assert "owl/9.jpg,dead link" in (split.folder / "skipped.csv").read_text()
    (tmp_path / "linked").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "linked" / name).symlink_to(src / name)
    assert counts(prepared(tmp_path / "linked", tmp_path / "e/object/val")) == {"cat": 2, "dog": 3}


@pytest.mark.parametrize("archive", [False, True])
def test_what_machines_leave_beside_images_is_counted_and_no_class(archive, tmp_path):
    src = people(tmp_path / "src", {"a": 2, "b": 2, ".ipynb_checkpoints": 1, "@eaDir": 1, "__MACOSX": 1})
    (src / "a/._0.jpg").write_bytes(b"\0\5\x16\7")
    (src / ".DS_Store").write_bytes(b"x")
    if archive:
        src = Path(shutil.make_archive(str(tmp_path / "set"), "zip", src))
    split = prepared(src, tmp_path / "d/face_hq/search")
    assert counts(split) == {"a": 2, "b": 2} and split.column("role").tolist() == [1, 0, 1, 0]
    assert split.index["skipped"] == {"hidden, or left by the system": 5}
    assert "a/._0.jpg" in (split.folder / "skipped.csv").read_text()


@pytest.mark.parametrize("archive", [False, True])
def test_class_folders_one_level_too_deep(archive, tmp_path, capsys):
    src = tmp_path / "src"
    people(src / "set/set", {"a": 2, "b": 2})
    (src / "pairs.csv").write_text("x")
    src = Path(shutil.make_archive(str(tmp_path / "set"), "zip", src)) if archive else src
    assert counts(prepared(src, tmp_path / "d/object/train")) == {"a": 2, "b": 2}


def test_the_parts_of_a_data_set_are_no_classes(tmp_path, capsys):
    src = tmp_path / "src"
    for part in ("train", "val"):
        people(src / part, {"a": 2, "b": 2})
    with pytest.raises(InputError, match="would be train, val, which are parts of a data set: prepare each"):
        prepared(src, tmp_path / "d/object/train")
    vehicles = people(tmp_path / "vehicles", {"train": 2, "bus": 1})  # a train is a train
    assert counts(prepared(vehicles, tmp_path / "d/object/val")) == {"bus": 1, "train": 2}
    prepared(people(tmp_path / "one", {"a": 2}), tmp_path / "d/object/train")
    assert "WARNING: only one class, a, which is too few for training" in capsys.readouterr().out
    message = script(ROOT / "train.py", *TINY, "--data", tmp_path / "d", "--domains", "object", "--out", tmp_path / "r",
                     check=2).stderr
    assert "d/object/train: only one class, 'a': prepare it again" in message and len(message.splitlines()) == 1


@pytest.mark.parametrize("sets, classes, archive", [(2, 2, False), (3, 4, False), (3, 2, True), (12, 13, False)])
def test_data_sets_side_by_side_are_no_classes(sets, classes, archive, tmp_path):
    src = tmp_path / "src"
    for k in range(sets):
        people(src / f"set{k:02d}", {f"c{c}": 2 for c in range(classes)})
    (src / "readme.txt").write_text("x")
    given = src
    if archive:  # in two folders around all, as people pack
        shutil.copytree(src, tmp_path / "pack/all/data")
        given = Path(shutil.make_archive(str(tmp_path / "all"), "zip", tmp_path / "pack"))
    with pytest.raises(InputError, match=f"{sets} folders, set00, set01.* hold {sets * classes} folders of images, "
                                         "like several data sets: prepare each .* first --src") as error:
        prepared(given, tmp_path / "d/object/train")
    one = error.value.message.partition("--src ")[2].partition(" --src ")[2].partition(" (`merge`")[0]
    assert one.endswith("/set00") and len(prepared(Path(one), tmp_path / "d/object/train")) == 2 * classes
    (tmp_path / "list").write_text("\n".join(f"set{k:02d}" for k in range(sets)))
    assert counts(prepared(given, tmp_path / "d/face_hq/train", "--list", tmp_path / "list")) == {
        f"set{k:02d}": 2 * classes for k in range(sets)}
    if classes > 2:
        shutil.copy(src / "set00/c0/0.jpg", src / "set00/preview.jpg")
        with pytest.raises(InputError, match="like several data sets"):
            prepared(src, tmp_path / "d/object/other")


def test_people_may_have_a_folder_a_video(tmp_path, capsys):
    for k in range(12):
        people(tmp_path / f"src/p{k:02d}", {"0": 2, "1": 1})
    assert len(prepared(tmp_path / "src", tmp_path / "d/face_hq/train").classes) == 12
    assert "hold 24 folders of images: they are taken as 12 classes" in capsys.readouterr().out
    (tmp_path / "few/a").mkdir(parents=True)
    for k in range(2):
        people(tmp_path / f"few/p{k}", {"0": 2, "1": 1})
        shutil.copy(tmp_path / "src/p00/0/0.jpg", tmp_path / f"few/p{k}/x.jpg")  # images in the class folder itself
    assert len(prepared(tmp_path / "few", tmp_path / "d/face_hq/few").classes) == 2


def test_a_folder_is_walked_in_the_order_of_names_and_one_folder_at_a_time(tmp_path):
    """2,000 images as a list of records would take over a megabyte."""
    names = ["a/x.jpg", "a-b/y.jpg", "a.jpg", "a/b/z.jpg", "a/b.jpg", "B/1.jpg", "ä/1.jpg", "a /1.jpg"]
    for name in names:
        (tmp_path / "small" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "small" / name).touch()
    (tmp_path / "small/a/loop").symlink_to(tmp_path / "small")
    (tmp_path / "small/a/gone.jpg").symlink_to(tmp_path / "nothing")
    assert [member.name for member in members(tmp_path / "small")] == sorted(names)
    for i in range(2000):
        path = tmp_path / "large" / f"class-{i // 50:02d}" / f"image-with-a-long-name-{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    next(iter(folder(tmp_path / "large", "object", True).records))  # what is imported and cached on first use
    tracemalloc.start()
    source = folder(tmp_path / "large", "object", True)
    assert sum(record.identity.startswith("class-") for record in source.records) == 2000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000


# ---------------------------------------------------------------- classes and people


def test_names_for_prompts(tmp_path):
    (tmp_path / "names.txt").write_text("c0\ttench, Tinca\nc2\tgoldfish\n")
    run_here("folder", "--src", class_folders(tmp_path / "src"), "--out", tmp_path / "d/object/train", "--size", 24,
             "--names", tmp_path / "names.txt")
    split = Split(tmp_path / "d/object/train")
    assert split.classes == ["c0", "c1", "c2"] and split.names == ["tench, Tinca", "c1", "goldfish"]


def test_people_folders_are_an_identification_test(tmp_path):
    src = class_folders(tmp_path / "src", classes=3, images=3)
    (src / "c9").mkdir()
    (src / "c9" / "only.jpg").write_bytes(encode(picture(99)))
    run_here("folder", "--src", src, "--out", tmp_path / "d/face_hq/search")
    split = Split(tmp_path / "d/face_hq/search")
    assert split.protocol == {"name": "identification"} and split.size == 112
    assert split.column("role").tolist() == [1, 0, 0] * 3 + [2]


@pytest.mark.parametrize("head, mark", [("", ","), ("wnid,category\n", ","), ("", "\t")])
def test_classes_gather_folders(head, mark, tmp_path, capsys):
    src = people(tmp_path / "src", {"n1": 2, "n2": 1, "n3": 3, "n4": 1})
    (tmp_path / "classes.csv").write_text(f"{head}n1,dog\nn2,cat\nn3,dog\nn9,cat\n".replace(",", mark))
    split = prepared(src, tmp_path / "d/object/val", "--classes", tmp_path / "classes.csv", "--max-images", 4)
    assert counts(split) == {"cat": 1, "dog": 4} and split.names == ["cat", "dog"]
    assert split.index["skipped"] == {"folder not in --classes": 1, "image beyond --max-images": 1}
    shown = capsys.readouterr().out
    assert f"{1 + bool(head)} of its folders are not in the source: n9" in shown  # the head counts as one
    assert split.fields(0)["identity"] == "dog"


@pytest.mark.parametrize("text, words", [
    ("x,dog\ny,cat", "names none of the 2 class folders of the source"),
    ("a,dog\na,cat", "line 2: 'a' is 'dog' above"), ("a,dog,3", "line 1: want folder,class"),
])
def test_bad_classes(text, words, tmp_path):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        prepared(people(tmp_path / "src", {"a": 2, "b": 2}), tmp_path / "d/object/val", "--classes", tmp_path / "c.csv")
    with pytest.raises(InputError, match=words):
        prepared(tmp_path / "src", tmp_path / "d/object/val", "--names", tmp_path / "c.csv")
