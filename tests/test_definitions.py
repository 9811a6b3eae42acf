"""What the figures mean at the edges of their definitions: ties, lost mates, empty references, resamplings of one kind.

Each against a case computed by hand or a slow literal transcription.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from data_prep import InputError
from evaluate import Figure
from tests.test_evaluate import FakeSplit, unit
from tests.test_protocols import FakeTemplates


def classified(labels, classes, name, **more):
    """A split of objects without images."""
    labels = np.array(labels)
    return SimpleNamespace(labels=labels, classes=classes, folder=Path(name), name=name, domain="object",
                           counts=np.bincount(labels[labels >= 0], minlength=len(classes)),
                           protocol={"name": "classification", "reference": "train", **more})


# ---------------------------------------------------------------- ties between classes


def test_ties_between_classes_go_to_the_first():
    classes = list("abcdefgh")
    split, train = classified(range(8), classes, "val"), classified(range(8), classes, "train")
    x = np.eye(8)
    found = evaluate.score_classification(x, split, (x, train), np.zeros((8, 8)), classes, 0, 0)
    # a head of zeros answers a to everything; its five best are a to e
    assert found["head top-1"].value == 1 / 8 and found["head top-5"].value == 5 / 8
    # h has the words of b: what shows an h is taken for a b
    twins = np.eye(8)
    twins[7] = twins[1]
    shown = np.eye(8)[[0, 1, 2, 3, 4, 5, 6, 1]]
    found = evaluate.score_classification(shown, split, (x, train), None, [], 0, 0, linear={
        "zero-shot 1": (twins, np.zeros(8))})
    assert found["zero-shot 1 top-1"].value == 7 / 8 and found["zero-shot 1 top-5"].value == 1


def test_top_5_equals_a_stable_sort():
    rng = np.random.default_rng(0)
    classes, truth = [f"{i:02}" for i in range(12)], rng.integers(0, 12, 300)
    x, w = rng.integers(-1, 2, (300, 3)).astype(float), rng.integers(-1, 2, (12, 3)).astype(float)
    found = evaluate.score_classification(x, classified(truth, classes, "val"), (x, classified(truth, classes, "train")),
                                          None, [], 0, 0, linear={"probe": (w, np.zeros(12))})
    order = np.argsort(-(x @ w.T), axis=1, kind="stable")
    for k in (1, 5):
        assert found[f"probe top-{k}"].value == pytest.approx((order[:, :k] == truth[:, None]).any(1).mean())


# ---------------------------------------------------------------- references without votes


def test_where_nothing_votes_there_is_no_answer():
    x, none = np.eye(2, dtype=np.float32), np.zeros((0, 2), dtype=np.float32)
    assert evaluate.nearest_neighbours(x, none, np.zeros(0, int), 2, False).tolist() == [-1, -1]
    assert evaluate.nearest_neighbours(x[:1], x[:1], np.zeros(1, int), 2, True).tolist() == [-1]  # itself alone
    assert evaluate.nearest_neighbours(none, none, np.zeros(0, int), 2, True).tolist() == []
    assert evaluate.nearest_mean(x, np.zeros((2, 2))).tolist() == [-1, -1]
    assert evaluate.nearest_mean(x[:1], evaluate.class_means(x[:1], np.zeros(1, int), 2), np.zeros(1, int)) == [-1]


def test_an_image_that_is_its_own_reference_alone_is_a_miss():
    split = classified([0], ["a", "b"], "val")
    found = evaluate.score_classification(np.eye(2)[:1], split, (np.eye(2)[:1], split), None, [], 0, 0)
    assert {name: f.value for name, f in found.items()} == {"nearest-mean top-1": 0, "knn top-1": 0}


def test_a_reference_without_an_image_of_the_split_s_classes_votes_for_none():
    split, train = classified([0, 1], ["a", "b"], "val"), classified([2, 2], ["a", "b", "c"], "train")
    found = evaluate.score_classification(np.eye(2), split, (np.eye(2), train), None, [], 0, 0)
    assert {name: f.value for name, f in found.items()} == {"nearest-mean top-1": 0, "knn top-1": 0}


def test_an_unreadable_reference_is_named():
    split, train = classified([0, 1], ["a", "b"], "val"), classified([0, 1], ["a", "b"], "train")
    with pytest.raises(InputError, match=r"^train: no readable image") as error:
        evaluate.score_classification(np.eye(2), split, (np.full((2, 2), np.nan), train), None, [], 0, 0)
    assert "\n" not in error.value.message


def test_no_answer_is_not_right_by_real(monkeypatch):
    split, train = classified([0, 1], ["a", "b"], "val"), classified([2, 2], ["a", "b", "c"], "train")
    monkeypatch.setattr(evaluate, "true_in_real", lambda split: np.array([[True, False], [False, True]]))
    found = evaluate.score_classification(np.eye(2), split, (np.eye(2), train), None, [], 0, 0)
    assert found["knn ReaL"].value == found["nearest-mean ReaL"].value == 0 and found["knn ReaL"].count == 2


# ---------------------------------------------------------------- gaps between clean and shifted images


def test_clean_images_are_of_all_the_shifted_classes():
    train, shifted = classified([0], ["a"], "train"), classified([0, 1, 1], ["a", "b", "c"], "r", ood=True)
    other, some, empty, whole = (classified(labels, classes, name) for labels, classes, name in (
        ([0, 0], ["x"], "other"), ([0, 0], ["a"], "some"), ([0, 0], ["a", "b"], "empty"),
        ([0, 1], ["b", "a"], "whole")))
    assert evaluate.clean_of(shifted, [shifted, other]) is None  # none of them: once a division by zero
    assert evaluate.clean_of(shifted, [shifted, some, empty]) is None
    assert evaluate.clean_of(shifted, [shifted, other, some, empty, whole]) is whole  # c has no image to compare
    assert evaluate.clean_of(shifted, [train, whole]) is whole  # the reference lacks b
    assert evaluate.clean_of(whole, [shifted, some]) is None  # not shifted
    grouped = classified([0, 1], ["a", "b"], "objectnet", ood=True, groups={"a": ["d", "e"]})
    fine = classified([0, 1], ["e", "b"], "fine")
    assert evaluate.clean_of(grouped, [grouped, some, fine]) is fine and evaluate.clean_of(shifted, [fine]) is None


def test_gaps_name_their_readout():
    """Through score(), by an embedder that knows the answers: two classes, one of three shifted images lost."""
    train, val, r = (classified(labels, ["a", "b"], name, **more) for labels, name, more in (
        ([0, 1], "train", {}), ([0, 1], "val", {}), ([0, 1, 1], "r", {"ood": True})))
    for split in (train, val, r):
        split.index = {"provenance": {"source": split.name, "plan": "0123456789"}}
    vectors = {"train": np.eye(2), "val": np.eye(2), "r": np.eye(2)[[0, 1, 0]]}

    class Known:
        device, name = torch.device("cpu"), "tuned"

        def raw(self, split):
            return vectors[split.name].astype(np.float32)

        __call__ = raw

    def gaps(rule):
        readouts = SimpleNamespace(trained=[], fit=lambda *_: {"probe": (np.eye(2), np.zeros(2), rule)})
        root = {"object": {"train": train, "val": val, "r": r}}
        return evaluate.score(Known(), [val, r], root, None, 2, 0, readouts)[0]["object/r"]

    found = gaps("probe by rule A")
    clean = "clean is val val 01234567 by the same classes"
    for readout, rule in (("knn", "20 neighbours at T 0.07, reference train 01234567"), ("probe", "probe by rule A")):
        assert found[rule][f"{readout} top-1"].value == pytest.approx(2 / 3)
        assert found[f"{clean}, {rule}"][f"gap of {readout} top-1"].value == pytest.approx(1 / 3)
    assert f"{clean}, probe by rule A" not in gaps("probe by rule B")


def test_experts_are_held_against_what_is_better_when_higher():
    config = {"domains": ["object"], "counts": {"object": 10}}
    metrics = {"knn top-1": 0.8, "head top-5": 0.9, "tar@far=0.01": 0.5, "mAP": 0.4, "accuracy": 0.9, "pair auc": 0.9,
               "gap of knn top-1": 0.3, "accuracy sd": 0.1, "eer": 0.2, "d-prime": 2.0, "pair d-prime": 2.0,
               "retention of knn top-1": 0.9, "unseen-class knn top-1": 0.5, "retention of unseen-class knn top-1": 0.9}

    def made(name):
        rows = {("object", "val", m, "p"): (evaluate.Row(name, "tuned", "object", "val", "p", m, v, v, v, 5),
                                            np.full(3, v)) for m, v in metrics.items()}
        return evaluate.Scored(Path(name), config, 0, rows)

    table = evaluate.compare_experts([made("run")], [[made("expert")]], set(), 0.01)
    assert [row["metric"] for row in table] == ["knn top-1", "head top-5", "tar@far=0.01", "mAP", "accuracy",
                                                "pair auc", "unseen-class knn top-1"]
