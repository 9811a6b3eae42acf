"""The demo corpus: a function of its seed, and whom its splits show."""

import json
import tarfile

from data_prep.demo import demo_splits, draw_body, draw_face, draw_object
from data_prep.format import open_root
from data_prep.verify import verify_split


def test_the_demo_is_a_function_of_its_seed():
    for draw in (lambda s: draw_face(s, 3, 1), lambda s: draw_face(s, 3, 1, 0.7), lambda s: draw_body(s, 3, 1, 2),
                 lambda s: draw_object(s, 3, 1), lambda s: draw_object(s, 3, 1, True)):
        assert draw(0) == draw(0) != draw(1)


def test_every_split_of_the_demo_verifies(demo_root):
    for splits in open_root(demo_root).values():
        for split in splits.values():
            assert verify_split(split.folder) == []


def test_demo_people_are_the_same_in_both_qualities_and_never_in_train_and_test(demo_root):
    root = open_root(demo_root)
    for domain in ("face_hq", "face_lq", "body"):
        assert not set(root[domain]["train"].classes) & set(root[domain]["test"].classes)
    assert root["face_hq"]["test"].classes == root["face_lq"]["test"].classes
    drawn = {name: {record.name for record in source.records} for name, (source, _) in demo_splits(0, 0.1).items()}
    for split in ("train", "test"):  # and no picture is in both, sharp and degraded
        assert len(drawn[f"face_hq/{split}"]) == len(drawn[f"face_lq/{split}"]) == len(root["face_lq"][split])
        assert not drawn[f"face_hq/{split}"] & drawn[f"face_lq/{split}"]
    with tarfile.open(root["face_lq"]["test"].folder / "shard-000000.tar") as tar:
        meta = json.loads(tar.extractfile(tar.getmembers()[1]).read())
    assert meta["person"] == f"demo-{meta['identity']}"
