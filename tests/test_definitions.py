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
    with pytest.raises(InputError, match="^train: no readable image") as error:
        evaluate.score_classification(np.eye(2), split, (np.full((2, 2), np.nan), train), None, [], 0, 0)
    assert "\n" not in error.value.message


def test_no_answer_is_not_right_by_real(monkeypatch):
    split, train = classified([0, 1], ["a", "b"], "val"), classified([2, 2], ["a", "b", "c"], "train")
    monkeypatch.setattr(evaluate, "true_in_real", lambda split: np.array([[True, False], [False, True]]))
    found = evaluate.score_classification(np.eye(2), split, (np.eye(2), train), None, [], 0, 0)
    assert found["knn ReaL"].value == found["nearest-mean ReaL"].value == 0 and found["knn ReaL"].count == 2
