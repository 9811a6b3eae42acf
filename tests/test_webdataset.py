"""WebDataset: tars by folder, braces or address, names of many kinds, tars that are bad or go away."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

import data_prep.sources.archives
import data_prep.sources.webdataset
from data_prep import InputError
from data_prep.format import Split
from data_prep.verify import verify_split
from tests.test_body_sources import write_files
from tests.test_data_prep import encode, picture, run_here
from tests.test_object_sources import FOLDERS, GOLDFISH, SHARK, TENCH, identities, prepared


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
    ("{tmp}/none.tar", "none.tar: cannot be opened"), ("{tmp}/none-{{3..1}}.tar", "none-{3..1}.tar: no tar found"),
    ("{tmp}/none-{{0..999999999}}.tar", "more than 100,000 files"), ("{tmp}/*.tar", "no tar found"),
    ("nosuch://host/a.tar", "nosuch://host/a.tar: cannot be opened"), ("memory://none.tar", "cannot be opened"),
])  # fmt: skip
def test_bad_places_of_tars(src, words, tmp_path):
    with pytest.raises(InputError) as error:
        run_here("webdataset", "--src", src.format(tmp=tmp_path), "--out", tmp_path / "d/object/val")
    assert words in error.value.message
