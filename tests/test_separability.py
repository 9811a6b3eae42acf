"""Separability of analyze.py on planted structure: tasks and sources told apart, and what a format gives away."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import protocols.separability
from protocols.results import Separability, Sources, Space
from protocols.separability import (
    Canon,
    balanced_accuracy,
    classify,
    crop_padding,
    separability,
    sources_of,
    unseen_sources,
)
from reports.analysis import report_separability
from tests.test_subspaces import SHARED, D, orthogonal, pairs_of, planted, transfer


def test_a_task_apart_by_its_mean_alone_is_separable_and_not_after_centring():
    (basis,) = orthogonal(D, SHARED)
    shift = np.random.default_rng(5).normal(size=D)
    embedded, tasks = planted([basis, basis], offsets=[np.zeros(D), 2.0 * shift / np.linalg.norm(shift)])
    ids = [np.repeat(np.arange(60), 6), np.repeat(np.arange(60, 120), 6)]
    fit, test = ([embedded[t.domain][i] for t in tasks] for i in (0, 1))
    apart = separability(fit, test, ids, 50, 0)
    assert set(apart) == {"logistic", "lda", "svm", "0/1"} and min(f.value for f in apart.values()) > 0.97
    # without the means nothing linear is left, although the tasks differ in length
    centred = separability([x - x.mean(0) for x in fit], [x - x.mean(0) for x in test], ids, 50, 0)
    assert all(f.low < 0.56 and 0.4 < f.value < 0.62 for f in centred.values())
    pairs = pairs_of(transfer(embedded, tasks, SHARED, 50, 0, controls=False))
    assert pairs["object", "face_hq"]["kept"] > 0.95  # apart, and yet of one subspace


def test_a_fit_that_did_not_converge_is_told(monkeypatch):
    rng, unfinished = np.random.default_rng(0), Counter()
    easy = [rng.normal(size=(60, 3)) + shift for shift in (0, 1)]
    classify("logistic", easy, easy, unfinished)
    assert not unfinished
    monkeypatch.setattr(protocols.separability, "make_classifier", lambda name: LogisticRegression(max_iter=1))
    classify("logistic", easy, easy, unfinished)
    assert unfinished == {"logistic": 1}
    figure = {"value": 1.0, "low": 1.0, "high": 1.0}
    space = Space(figure, figure, figure, {}, {"logistic": False, "lda": True, "svm": True})
    text = "\n".join(report_separability(Separability(9, 0.5, {"tuned": space}, {}, [], {"body": Sources("x")})))
    assert "| tuned | 100.0 [100.0, 100.0] (not converged) | 100.0 [100.0, 100.0] | 100.0" in text


def test_balanced_accuracy_weighs_tasks_alike():
    right = [np.array([True] * 90 + [False] * 10), np.array([False] * 10)]
    figure = balanced_accuracy(right, [np.arange(100), np.arange(100, 110)], 100, 0)
    assert figure.value == pytest.approx(0.45) and figure.low <= 0.45 <= figure.high


def fake_split(name: str, sources: list[str], ood: bool = False):
    return SimpleNamespace(name=name, labels=np.arange(len(sources)), protocol={"name": "x", "ood": ood}, folder=name,
                           domain="body", classes=[f"{name} {i}" for i in range(len(sources))],
                           index={"provenance": {"source": "merge", "plan": "", "data_set": []}},
                           fields=lambda row: {"source": sources[row]})


def test_a_source_that_was_left_out_can_be_mistaken():
    """Domain 0 has two sources of which one looks like domain 1: seen it is told apart, unseen it is not."""
    rng = np.random.default_rng(0)
    mixed = fake_split("train", ["a"] * 60 + ["b"] * 60)
    plain, test = fake_split("plain", ["c"] * 120), fake_split("test", ["a"] * 40 + ["b"] * 40)
    centre = {"a": [0, 0, 0], "b": [9, 0, 1.5], "c": [9, 0, 0]}
    noise = rng.normal(size=(120, 3)) * 0.3

    def features(split, rows):
        return np.array([centre[split.fields(row)["source"]] for row in rows]) + noise[rows]

    tasks = [SimpleNamespace(domain="face_hq", train=mixed), SimpleNamespace(domain="body", train=plain)]
    others = {"face_hq": [(test, np.arange(80))], "body": [(plain, np.arange(50))]}
    fitted = {"tuned": [features(mixed, np.arange(120)), features(plain, np.arange(120))]}
    tested = {"tuned": [features(test, np.arange(80)), features(plain, np.arange(50))]}
    ids = [np.arange(80).astype(str), np.arange(100, 150).astype(str)]
    rows = unseen_sources({"tuned": features}, fitted, tested, ids, tasks, [np.arange(120)] * 2, others, 100,
                          20, 0)
    found = {(r.domain, r.source): r.spaces["tuned"]["recall"] for r in rows}
    assert set(found) == {("face_hq", "a"), ("face_hq", "b")}  # body has one source alone
    assert found["face_hq", "b"] < 0.2 and found["face_hq", "a"] < 0.9
    spaces = separability(fitted["tuned"], tested["tuned"], ids, 20, 0)
    assert spaces["logistic"].value > 0.97
    assert sources_of(fake_split("sketch", ["a", "a"], ood=True), np.arange(2)).tolist() == ["a (sketch)"] * 2


def test_sources_are_data_sets_whatever_command_prepared_them():
    def sources(command: str, *data_set: str) -> list[str]:
        split = SimpleNamespace(name="train", protocol=None, fields=lambda row: {"source": ("lfw", "casia")[row]},
                                index={"provenance": {"source": command, "data_set": list(data_set)}})
        return sources_of(split, np.arange(2)).tolist()

    assert sources("folder", "lfw") == sources("pairs", "lfw") == ["lfw", "lfw"]
    assert sources("folder", "casia") == ["casia", "casia"]
    assert sources("merge", "lfw", "casia") == sources("degrade", "lfw", "casia") == ["lfw", "casia"]
    assert sources("merge", "merge") == ["lfw", "casia"]  # merged by an older version


def test_padding_is_cropped_and_pictures_are_not():
    rng = np.random.default_rng(0)
    image = torch.full((3, 60, 60), 100, dtype=torch.uint8)
    image[:, :, 20:40] = torch.from_numpy(rng.integers(0, 255, (3, 60, 20), dtype=np.uint8))
    assert crop_padding(image).shape == (3, 60, 30)  # at least half of a side stays
    image[:, :, 12:48] = torch.from_numpy(rng.integers(0, 255, (3, 60, 36), dtype=np.uint8))
    assert torch.equal(crop_padding(image), image[:, :, 14:46])  # and two lines, which JPEG has mixed
    busy = torch.from_numpy(rng.integers(0, 255, (3, 50, 50), dtype=np.uint8))
    assert torch.equal(crop_padding(busy), busy)


def test_one_format_leaves_no_size_padding_or_sharpness():
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(0, 255, (3, 8, 8), dtype=np.uint8))
    sharp = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)  # 128 x 128, every detail 16 pixels wide
    padded = torch.full((3, 128, 128), 90, dtype=torch.uint8)
    padded[:, :, 32:96] = sharp[:, :, ::2]
    images = [sharp, padded]
    split = SimpleNamespace(name="test", folder="folder", domain="body", image=lambda row: images[row],
                            missing=np.zeros(len(images), dtype=bool))
    view = Canon(split, np.array([1, 0]), 16)
    a, b = view.image(1).float(), view.image(0).float()
    assert len(view) == 2 and a.shape == b.shape == (3, 128, 128) and view.name.startswith("test-canon16-")
    assert (a - b)[:, 8:-8, 16:-16].abs().mean() < 25 < (sharp.float() - padded.float()).abs().mean()
    spectrum = torch.fft.rfft2(a).abs().mean(0)
    assert spectrum[20:44, 20:44].mean() < 0.01 * spectrum[:8, :8].mean()  # no detail finer than 16 pixels
