"""Choosing identities and images: --min-images to --holdout, lists, copies of an image, and bad choices."""

import csv
import hashlib
from pathlib import Path

import click
import numpy as np
import pytest

import data_prep.write
from data_prep import InputError
from data_prep.records import draw, first_copies
from data_prep.verify import verify_split
from tests.conftest import script
from tests.test_data_prep import PAIRS, class_folders, counts, lfw_folder, people, prepared
from tests.test_roles import cut, listed_people

# ---------------------------------------------------------------- choosing identities and images


FIVE = {"a": 1, "b": 2, "c": 4, "d": 4, "e": 6}


@pytest.mark.parametrize("options, expected", [
    (["--min-images", 4], {"c": 4, "d": 4, "e": 6}),
    (["--max-images", 3], {"a": 1, "b": 2, "c": 3, "d": 3, "e": 3}),
    (["--min-images", 2, "--max-images", 2], {"b": 2, "c": 2, "d": 2, "e": 2}),
])  # fmt: skip
def test_identities_are_chosen_by_their_images(options, expected, tmp_path):
    split = prepared(people(tmp_path / "src", FIVE), tmp_path / "d/face_hq/train", *options)
    assert counts(split) == expected
    assert sum(split.index["skipped"].values()) == 17 - sum(expected.values())
    chosen = zip(options[::2], options[1::2], strict=True)
    assert split.index["provenance"]["options"] == {"ood": "False"} | {
        option.strip("-").replace("-", "_"): str(value) for option, value in chosen
    }


def test_fewer_classes_are_among_more_and_depend_on_the_seed(tmp_path):
    src = people(tmp_path / "src", {f"p{i:02d}": 1 for i in range(20)})
    chosen = {(n, seed): set(prepared(src, tmp_path / f"{n}-{seed}/face_hq/train", "--max-classes", n, "--seed",
                                      seed).classes) for n in (5, 9) for seed in (0, 1)}
    for seed in (0, 1):
        assert len(chosen[5, seed]) == 5 and len(chosen[9, seed]) == 9 and chosen[5, seed] < chosen[9, seed]
    assert chosen[5, 0] != chosen[5, 1]


def test_the_first_images_of_each_role_are_kept(tmp_path):
    split = prepared(people(tmp_path / "src", {"a": 5, "b": 2, "c": 1}), tmp_path / "d/face_hq/search",
                     "--max-images", 1)
    # by default the first image is the gallery, the others are probes, a lone one is a distractor
    assert split.labels.tolist() == [0, 0, 1, 1, 2] and split.column("role").tolist() == [1, 0, 1, 0, 2]


@pytest.mark.parametrize("workers", [1, 2])
def test_so_many_readable_images_are_taken(workers, tmp_path, monkeypatch):
    """Of five images of a, three are cut off: two readable ones are there. It is decided once, before a kill."""
    src, out = people(tmp_path / "src", {"a": 5, "b": 3}), tmp_path / "d/face_hq/train"
    for name in ("a/0.jpg", "a/2.jpg", "a/4.jpg", "b/2.jpg"):
        cut(src / name)
    options = ("--max-images", 2, "--shard-size", 2, "--workers", workers)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("data_prep.write.write_columns", lambda *_: 1 / 0)
        prepared(src, out, *options)
    cut(src / "a/1.jpg")  # its shard is written
    split = prepared(src, out, *options)
    assert counts(split) == {"a": 2, "b": 2}
    # b's third image is neither needed nor looked at; a's fifth comes after its second readable one
    assert split.index["skipped"] == {"unreadable image": 2, "image beyond --max-images": 2}
    files = {row[0] for row in csv.reader((out / "skipped.csv").open())}
    assert files == {"file", "a/0.jpg", "a/2.jpg"}
    (src / "b/1.jpg").write_bytes((src / "b/0.jpg").read_bytes())
    unlike = prepared(src, tmp_path / "e/face_hq/train", "--max-images", 2, "--drop-duplicates")
    assert counts(unlike) == {"a": 1, "b": 1}  # of different images
    listed = listed_people(tmp_path)
    cut(listed / "g/b.jpg")  # a listed miss stays, and the other mate of bob is taken
    test = prepared(listed, tmp_path / "d/body/mine", "--max-images", 1, source="persons")
    assert test.missing.tolist() == [False] * 4 + [True, False, False]


@pytest.mark.parametrize("train", [True, False])
def test_a_class_without_a_readable_image_is_none(train, tmp_path, capsys, monkeypatch):
    """Everything is as in the set without that folder, however often the preparation is killed."""
    split = "train" if train else "val"
    bad, good = (people(tmp_path / name, {"a": 3, "b": 2, "c": 3, "d": 2}) for name in ("bad", "good"))
    for name in ("b/0.jpg", "b/1.jpg", "c/1.jpg"):
        cut(bad / name)
        (good / name).unlink()
    out, options = tmp_path / f"bad_/object/{split}", ("--shard-size", 3, "--workers", 1)
    for stop in (1, 2):  # after the first and after the second time that all shards were written
        calls = iter(range(stop - 1))
        with monkeypatch.context() as patch, pytest.raises(StopIteration):
            patch.setattr("data_prep.write.write_columns", lambda *args, f=data_prep.write.write_columns, c=calls:
                          f(*args) if next(c) is not None else None)
            prepared(bad, out, *options)
    found, wanted = prepared(bad, out, *options), prepared(good, tmp_path / f"good_/object/{split}", *options)
    assert "1 classes have no readable image and are left out: b" in capsys.readouterr().out
    assert found.classes == wanted.classes == ["a", "c", "d"] and counts(found) == counts(wanted)
    assert verify_split(out) == [] and len(list(out.glob("*.tar"))) == len(found.index["shards"]) == 3
    assert found.index["unreadable_classes"] == ["b"] and "unreadable_classes" not in wanted.index
    assert found.index["skipped"] == {"unreadable image": 3}
    assert len((out / "skipped.csv").read_text().splitlines()) == 4
    if not train:
        assert [found.jpeg(row)[1] for row in range(7)] == [wanted.jpeg(row)[1] for row in range(7)]
        assert found.protocol == wanted.protocol | {"unreadable": 3}


def test_holdout_keeps_people_apart_whatever_the_other_options(tmp_path):
    src = people(tmp_path / "src", {f"p{i:02d}": 1 + i % 4 for i in range(60)})
    train = prepared(src, tmp_path / "d/face_hq/train", "--holdout", 0.3)
    test = prepared(src, tmp_path / "d/face_hq/test", "--holdout", 0.3)
    everyone = {f"p{i:02d}" for i in range(60)}
    expected = {name for name in everyone if draw(0, name) < 0.3}
    assert set(test.classes) == expected and set(train.classes) == everyone - expected
    assert 8 <= len(expected) <= 28  # 18 on average
    assert len(train) + len(test) == sum(1 + i % 4 for i in range(60))
    fewer = prepared(src, tmp_path / "d/face_hq/few", "--holdout", 0.3, "--min-images", 3, "--max-classes", 4)
    assert len(fewer.classes) == 4 and set(fewer.classes) < expected
    other = prepared(src, tmp_path / "e/face_hq/test", "--holdout", 0.3, "--seed", 1)
    assert set(other.classes) != expected
    # the definition, so that splits of an older version never mix with those of a newer one
    assert draw(3, "p") == int.from_bytes(hashlib.sha256(b"3\0p").digest()[:8]) / 2**64


def test_a_list_names_identities_or_images(tmp_path):
    src = people(tmp_path / "src", FIVE)
    (tmp_path / "list").write_text("\ufeffe\n\nc/2.jpg\nd/0.jpg\nd/0.jpg\n")
    split = prepared(src, tmp_path / "d/face_hq/train", "--list", tmp_path / "list")
    assert counts(split) == {"c": 1, "d": 1, "e": 6} and split.index["skipped"] == {"not in --list": 9}


def test_pairs_follow_what_was_left_out(tmp_path, capsys):
    """Known answer: without P_0 only the second fold is left, and its rows move up by three."""
    (tmp_path / "pairs.txt").write_text(PAIRS)
    (tmp_path / "list").write_text("P_1\nP_2\nP_3\n")
    split = prepared(lfw_folder(tmp_path / "src"), tmp_path / "d/face_hq/lfw", "--pairs", tmp_path / "pairs.txt",
                     "--list", tmp_path / "list", source="lfw")
    assert split.column("pairs").tolist() == [[4, 3, 1, 1], [6, 5, 0, 1]]
    assert split.protocol == {"name": "verification", "folds": 2, "pairs": 2, "pairs_lost": 2}
    assert "12 images in, 9 of 3 classes written, 3 skipped" in capsys.readouterr().out


# ---------------------------------------------------------------- copies


def test_first_copies():
    hashes = np.array([5, 0, 7, 5, 0, 8, 7], dtype=np.uint64)
    assert first_copies(hashes).tolist() == [True, True, True, False, True, True, False]
    assert first_copies(hashes, np.array([8, 5], dtype=np.uint64)).tolist() == [False, True, True, False, True, False,
                                                                                False]


def with_copies(tmp_path: Path) -> tuple[Path, Path]:
    """Training people b and c and test people x and y; b holds an image twice, c one of b, b one of x."""
    train = people(tmp_path / "train", {"b": 3, "c": 3})
    test = people(tmp_path / "test", {"_": 0, "__": 0, "x": 2, "y": 2})  # places 2 and 3: other pictures than b and c
    (train / "b/3.jpg").write_bytes((train / "b/0.jpg").read_bytes())
    (train / "c/3.jpg").write_bytes((train / "b/1.jpg").read_bytes())
    (train / "b/4.jpg").write_bytes((test / "x/1.jpg").read_bytes())
    return train, test


def test_copies_are_reported(tmp_path, capsys):
    train, test = with_copies(tmp_path)
    prepared(test, tmp_path / "d/face_hq/test")
    assert "are copies" not in capsys.readouterr().out
    split = prepared(train, tmp_path / "d/face_hq/train")
    out = capsys.readouterr().out
    assert len(split) == 9 and "2 images are copies of others in the split" in out
    assert "1 of the copied images have several labels" in out
    assert "train and test overlap, 1 images are in test too: prepare train again, after test" in out


def test_copies_are_dropped(tmp_path, capsys):
    train, test = with_copies(tmp_path)
    prepared(test, tmp_path / "d/face_hq/test")
    split = prepared(train, tmp_path / "d/face_hq/train", "--drop-duplicates")
    assert counts(split) == {"b": 3, "c": 3} and split.index["skipped"] == {"copy of another image": 3}
    assert "copies of others" not in (out := capsys.readouterr().out) and "overlap" not in out
    again = prepared(train, tmp_path / "d/face_hq/train", "--drop-duplicates")
    assert "complete" in capsys.readouterr().out and len(again) == 6


def test_a_damaged_image_is_no_copy(tmp_path):
    src = people(tmp_path / "src", {"a": 2})
    for name in ("2.jpg", "3.jpg"):
        (src / "a" / name).write_bytes(b"damaged")
    split = prepared(src, tmp_path / "d/face_hq/train", "--drop-duplicates")
    assert len(split) == 2 and split.index["skipped"] == {"copy of another image": 1, "unreadable image": 1}


def test_what_a_test_split_holds_is_seen_once(tmp_path, monkeypatch):
    """A preparation that is continued after a test split came decides as it did when it began."""
    train, test = with_copies(tmp_path)
    out = tmp_path / "d/face_hq/train"
    monkeypatch.setattr("data_prep.write.write_columns", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepared(train, out, "--drop-duplicates")
    monkeypatch.undo()
    prepared(test, tmp_path / "d/face_hq/test")
    assert prepared(train, out, "--drop-duplicates").index["skipped"] == {"copy of another image": 2}


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("arguments, words", [
    (["--list", "{tmp}/none"], "--list {tmp}/none: cannot be read as text"),
    (["--list", "{tmp}/empty"], "--list {tmp}/empty: is empty"),
    (["--list", "{tmp}/unknown"], "line 2: 'c0/9.jpg' is neither an identity nor an image of the source"),
    (["--list", "{tmp}/binary"], "--list {tmp}/binary: cannot be read as text"),
    (["--min-images", "6"], "--min-images 6: none of the 15 images is left"),
    (["--holdout", "0.0001", "--part", "test"], "--holdout 0.0001 with --seed 0, test part: none of the 15 images"),
    (["--holdout", "1.5"], "--holdout"), (["--max-images", "0"], "--max-images"), (["--max-classes", "x"], "x"),
])  # fmt: skip
def test_bad_selections(arguments, words, tmp_path):
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "unknown").write_text("c0\nc0/9.jpg\nzz\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00c0")
    with pytest.raises(click.ClickException) as error:
        prepared(class_folders(tmp_path / "src"), tmp_path / "d/body/train",
                 *[a.format(tmp=tmp_path) for a in arguments])
    assert words.format(tmp=tmp_path) in error.value.format_message() and "\n" not in error.value.format_message()


def test_holdout_is_for_people(tmp_path):
    with pytest.raises(InputError, match="--holdout is for splits of people, not for training splits of objects"):
        prepared(class_folders(tmp_path / "src"), tmp_path / "d/object/train", "--holdout", 0.5)


def test_a_bad_option_is_one_line_and_exit_code_2(tmp_path):
    result = script("-m", "data_prep", "folder", "--src", class_folders(tmp_path / "src"), "--out",
                    tmp_path / "d/body/train", "--list", tmp_path / "none", check=2)
    assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith("error: --list")
