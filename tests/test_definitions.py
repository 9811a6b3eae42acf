"""What the figures mean at the edges of their definitions: ties, lost mates, empty references, resamplings of one kind.

Each against a case computed by hand or a slow literal transcription.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import protocols.classify
import protocols.templates
from data_prep import InputError
from protocols.bootstrap import bootstrap_counts
from protocols.classify import class_means, fit_probe, nearest_mean, nearest_neighbours, score_classification
from protocols.pairs import (
    d_prime,
    equal_error_rate,
    fold_accuracy,
    grid_accuracy,
    roc,
    score_pairs,
    score_verification,
    tar_at_far,
)
from protocols.results import Row, Scored
from protocols.search import score_gallery, search_gallery
from protocols.templates import (
    find_tail,
    pool_templates,
    score_listed,
    score_template_pairs,
    score_template_search,
    tar_at_nearest_far,
)
from reports.rows import clean_of, score
from tests.test_evaluate import FakeSplit, unit
from tests.test_templates import FakeTemplates, tail_of
from tools.compare import compare_experts


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
    found = score_classification(x, split, (x, train), np.zeros((8, 8)), classes, 0, 0)
    # a head of zeros answers a to everything; its five best are a to e
    assert found["head top-1"].value == 1 / 8 and found["head top-5"].value == 5 / 8
    # h has the words of b: what shows an h is taken for a b
    twins = np.eye(8)
    twins[7] = twins[1]
    shown = np.eye(8)[[0, 1, 2, 3, 4, 5, 6, 1]]
    found = score_classification(shown, split, (x, train), None, [], 0, 0, linear={
        "zero-shot 1": (twins, np.zeros(8))})
    assert found["zero-shot 1 top-1"].value == 7 / 8 and found["zero-shot 1 top-5"].value == 1


def test_top_5_equals_a_stable_sort():
    rng = np.random.default_rng(0)
    classes, truth = [f"{i:02}" for i in range(12)], rng.integers(0, 12, 300)
    x, w = rng.integers(-1, 2, (300, 3)).astype(float), rng.integers(-1, 2, (12, 3)).astype(float)
    val, train = (classified(truth, classes, name) for name in ("val", "train"))
    found = score_classification(x, val, (x, train), None, [], 0, 0, linear={"probe": (w, np.zeros(12))})
    order = np.argsort(-(x @ w.T), axis=1, kind="stable")
    for k in (1, 5):
        assert found[f"probe top-{k}"].value == pytest.approx((order[:, :k] == truth[:, None]).any(1).mean())


# ---------------------------------------------------------------- references without votes


def test_where_nothing_votes_there_is_no_answer():
    x, none = np.eye(2, dtype=np.float32), np.zeros((0, 2), dtype=np.float32)
    assert nearest_neighbours(x, none, np.zeros(0, int), 2, False).tolist() == [-1, -1]
    assert nearest_neighbours(x[:1], x[:1], np.zeros(1, int), 2, True).tolist() == [-1]  # itself alone
    assert nearest_neighbours(none, none, np.zeros(0, int), 2, True).tolist() == []
    assert nearest_mean(x, np.zeros((2, 2))).tolist() == [-1, -1]
    assert nearest_mean(x[:1], class_means(x[:1], np.zeros(1, int), 2), np.zeros(1, int)) == [-1]


def test_an_image_that_is_its_own_reference_alone_is_a_miss():
    split = classified([0], ["a", "b"], "val")
    found = score_classification(np.eye(2)[:1], split, (np.eye(2)[:1], split), None, [], 0, 0)
    assert {name: f.value for name, f in found.items()} == {"nearest-mean top-1": 0, "knn top-1": 0}


def test_a_reference_without_an_image_of_the_split_s_classes_votes_for_none():
    split, train = classified([0, 1], ["a", "b"], "val"), classified([2, 2], ["a", "b", "c"], "train")
    found = score_classification(np.eye(2), split, (np.eye(2), train), None, [], 0, 0)
    assert {name: f.value for name, f in found.items()} == {"nearest-mean top-1": 0, "knn top-1": 0}


def test_an_unreadable_reference_is_named():
    split, train = classified([0, 1], ["a", "b"], "val"), classified([0, 1], ["a", "b"], "train")
    with pytest.raises(InputError, match=r"^train: no readable image") as error:
        score_classification(np.eye(2), split, (np.full((2, 2), np.nan), train), None, [], 0, 0)
    assert "\n" not in error.value.message


def test_a_reference_that_is_scored_by_joined_classes_leaves_each_image_out_of_its_own_class():
    """b counts as a; without itself the only b has no class that is near, and c is nearer than a."""
    split = classified([0, 0, 1, 2, 2], ["a", "b", "c"], "val")
    x = np.array([[1, 0], [1, 0], [0, 1], [0.1, 1], [0.1, 1]]) / np.array([[1], [1], [1], [1.01**0.5], [1.01**0.5]])
    found = score_classification(x, split, (x, split), None, [], 0, 0, {"a": ["a", "b"]}, only=["a", "c"])
    assert found["nearest-mean top-1"].value == found["knn top-1"].value == 4 / 5


def test_no_answer_is_not_right_by_real(monkeypatch):
    split, train = classified([0, 1], ["a", "b"], "val"), classified([2, 2], ["a", "b", "c"], "train")
    monkeypatch.setattr(protocols.classify, "true_in_real", lambda split: np.array([[True, False], [False, True]]))
    found = score_classification(np.eye(2), split, (np.eye(2), train), None, [], 0, 0)
    assert found["knn ReaL"].value == found["nearest-mean ReaL"].value == 0 and found["knn ReaL"].count == 2


# ---------------------------------------------------------------- gaps between clean and shifted images


def test_clean_images_are_of_all_the_shifted_classes():
    train, shifted = classified([0], ["a"], "train"), classified([0, 1, 1], ["a", "b", "c"], "r", ood=True)
    other, some, empty, whole = (classified(labels, classes, name) for labels, classes, name in (
        ([0, 0], ["x"], "other"), ([0, 0], ["a"], "some"), ([0, 0], ["a", "b"], "empty"),
        ([0, 1], ["b", "a"], "whole")))
    assert clean_of(shifted, [shifted, other]) is None  # none of them: once a division by zero
    assert clean_of(shifted, [shifted, some, empty]) is None
    assert clean_of(shifted, [shifted, other, some, empty, whole]) is whole  # c has no image to compare
    assert clean_of(shifted, [train, whole]) is whole  # the reference lacks b
    assert clean_of(whole, [shifted, some]) is None  # not shifted
    grouped = classified([0, 1], ["a", "b"], "objectnet", ood=True, groups={"a": ["d", "e"]})
    fine = classified([0, 1], ["e", "b"], "fine")
    assert clean_of(grouped, [grouped, some, fine]) is fine and clean_of(shifted, [fine]) is None


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
        return score(Known(), [val, r], root, None, 2, 0, readouts)[0]["object/r"]

    found = gaps("probe by rule A")
    clean = "clean is val val 01234567 by the same classes"
    for readout, rule in (("knn", "20 neighbours at T 0.07, reference train 01234567"), ("probe", "probe by rule A")):
        assert found[rule][f"{readout} top-1"].value == pytest.approx(2 / 3)
        assert found[f"{clean}, {rule}"][f"gap of {readout} top-1"].value == pytest.approx(1 / 3)
    assert f"{clean}, probe by rule A" not in gaps("probe by rule B")


def test_experts_are_held_against_what_is_better_when_higher():
    config = {"domains": ["object"], "counts": {"object": 10}}
    metrics = {"knn top-1": 0.8, "head top-5": 0.9, "tar@far=0.01": 0.5, "mAP": 0.4, "accuracy": 0.9, "pair auc": 0.9,
               "lost": 0.3, "accuracy sd": 0.1, "eer": 0.2, "d-prime": 2.0, "pair d-prime": 2.0,
               "kept": 0.9, "unseen-class knn top-1": 0.5, "crowd": 0.9, "rated": 0.9, "unshifted": 0.9}
    kinds = {"lost": "gap", "kept": "retention", "crowd": "unified", "rated": "human trials", "unshifted": "clean"}

    def made(name):
        rows = [Row(name, "tuned", "object", "val", "", m, v, v, v, 5, kind=kinds.get(m, "classification"), measure=m)
                for m, v in metrics.items()]
        return Scored(Path(name), config, 0, {row.key: (row, np.full(3, row.value)) for row in rows})

    table = compare_experts([made("run")], [[made("expert")]], set(), 0.01)
    assert [row["metric"] for row in table] == ["knn top-1", "head top-5", "tar@far=0.01", "mAP", "accuracy",
                                                "pair auc", "unseen-class knn top-1"]


# ---------------------------------------------------------------- mates that are lost


def literal_lost(x, labels, roles, fpir):
    """Identification as NIST counts it: (rank-1, TPIR) where a mate that was not enrolled is a miss."""
    listed, hits, found, strangers = set(labels[roles > 0]) - {-1}, [], [], []
    gallery = [g for g in np.flatnonzero(roles > 0) if np.isfinite(x[g, 0])]
    for p in np.flatnonzero((roles == 0) & np.isfinite(x[:, 0])):
        scores = sorted(((x[g] @ x[p], labels[g] == labels[p]) for g in gallery), reverse=True)
        if labels[p] in listed:
            hits.append(scores[0][1])
            found.append(scores[0])
        else:
            strangers.append(scores[0][0])
    threshold = sorted(strangers, reverse=True)[max(int(len(strangers) * fpir) - 1, 0)]
    return np.mean(hits), np.mean([mate and score > threshold for score, mate in found])


def test_a_probe_whose_mate_is_unreadable_is_a_miss_and_no_stranger():
    # at degrees; gallery: A 0, B 90 (unreadable), probes: A 10, B 1, ten strangers from 30 on
    degrees = np.deg2rad([0, 90, 10, 1, *range(30, 40)])
    x = np.stack([np.cos(degrees), np.sin(degrees)], 1)
    x[1] = np.nan
    labels, roles = np.array([0, 1, 0, 1, *[-1] * 10]), np.array([1, 1, 0, 0, *[0] * 10])
    found, _ = score_gallery(x, FakeSplit(labels, {"name": "identification"}, role=roles), 0, 0)
    # A's probe is found above the nearest stranger, at cos 30; as a stranger, B's at cos 1 would keep it out
    assert {name: (f.value, f.count) for name, f in found.items()} == {
        "rank-1": (0.5, 2), "rank-5": (0.5, 2), "rank-20": (0.5, 2), "tpir@fpir=0.1": (0.5, 12)}


@pytest.mark.parametrize("seed", range(3))
def test_identification_with_unreadable_images_equals_a_literal_count(seed):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(20), np.arange(40), -np.ones(30, int)])
    roles = np.repeat([1, 0, 2], [20, 40, 30])
    x = unit(rng.normal(size=(90, 5)) + 2 * rng.normal(size=(41, 5))[labels])
    x[rng.permutation(20)[:5]] = np.nan
    x[20 + rng.permutation(40)[:5]] = np.nan
    found, _ = score_gallery(x, FakeSplit(labels, {"name": "identification"}, role=roles), 0, 0)
    assert (found["rank-1"].value, found["tpir@fpir=0.1"].value) == pytest.approx(literal_lost(x, labels, roles, 0.1))


def test_re_identification_still_leaves_probes_without_a_relevant_item_uncounted():
    x = unit(np.array([[1, 0], [0, 1], [1, 0.1], [0.1, 1.0]]))
    x[3] = np.nan
    split = FakeSplit([0, 1, 0, 1], {"name": "reid"}, role=np.array([0, 0, 1, 1]), camera=np.array([0, 0, 1, 1]))
    assert score_gallery(x, split, 0, 0)[0]["rank-1"].count == 1


def test_templates_whose_mates_are_not_enrolled():
    """Gallery 1: A at 0 degrees, B unreadable; gallery 2: C at 180, E at 270."""
    # probes 4 to 7: A 10, B 1, C unreadable, E 265; 8 to 17: A; 18 to 27: E; 99 has no image, nobody knows whose it is
    degrees = np.deg2rad([0, 90, 180, 270, 10, 1, 185, 265, *range(20, 30), *range(30, 40)])
    x = np.stack([np.cos(degrees), np.sin(degrees)], 1).astype(np.float32)
    x[[1, 6]] = np.nan
    labels, probes = [0, 1, 2, 3, 0, 1, 2, 3, *[0] * 10, *[3] * 10], np.array([*range(4, 28), 99])
    split = FakeTemplates(labels, template=np.arange(28), media=np.arange(28), template_probes=probes[:, None],
                          template_gallery=np.array([[0, 0], [1, 0], [2, 1], [3, 1]]))
    templates = pool_templates(x, split, np.ones(28))
    assert np.flatnonzero(~templates.enrolled).tolist() == [1, 6, 28]
    assert templates.identity[:28].tolist() == labels and templates.identity[28] < -1
    found = score_template_search(templates, [np.array([0, 1]), np.array([2, 3])], probes, 0, 0)
    # found: A's 11 and E's 11 of 25. TPIR in gallery 1: the nearest of 12 strangers (C, E's) scores cos 30, A's more;
    # B and 99 are missed: 11/13. In gallery 2: the nearest of 12 strangers (A's, B) scores cos 91, E's at 265 more,
    # E's from 30 on at most cos 120; C and 99 are missed: 1/13
    assert {name: f.value for name, f in found.items()} == pytest.approx({
        "rank-1": 22 / 25, "rank-5": 22 / 25, "rank-10": 22 / 25, "tpir@fpir=0.1": 6 / 13})


# ---------------------------------------------------------------- pairs: folds, resamplings of one kind, short tails


def paired(pairs, folds, count):
    return FakeSplit(np.arange(count) // 2, {"name": "verification", "folds": folds}, pairs=np.array(pairs))


def test_folds_that_are_dealt_say_so_and_do_not_hang_on_what_is_readable():
    rng = np.random.default_rng(0)
    x = unit(np.repeat(rng.normal(size=(40, 3)), 2, axis=0) + 0.7 * rng.normal(size=(80, 3)))
    pairs = [(2 * (i // 2), 2 * (i // 2) + 1 if i % 2 else (2 * i + 7) % 80, i % 2, 0) for i in range(80)]
    exact = "10 folds, dealt, exact thresholds, strict FAR"
    assert list(score_verification(x, paired(pairs, 1, 80), 0, 0)[0]) == [
        exact, "10 folds, dealt, thresholds 0 to 4 by 0.01 on the squared distance"]
    given = [(a, b, same, i % 10) for i, (a, b, same, _) in enumerate(pairs)]
    x[[0, 1, 31]] = np.nan
    one, ten = (score_verification(x, paired(listed, folds, 80), 3, 0)[0]
                for listed, folds in ((pairs, 1), (given, 10)))
    for rule, figures in ten.items():
        for name, figure in figures.items():
            dealt = one[rule.replace("10 folds", "10 folds, dealt")][name]
            assert (dealt.value, dealt.count, *dealt.draws) == (figure.value, figure.count, *figure.draws)
    assert "10 folds, exact thresholds, strict FAR" in ten and figures["accuracy"].count < 80


def test_tar_at_far_of_one_kind_alone_is_not_known():
    scores, same = np.array([3.0, 2, 1]), np.array([True, False, True])
    for weights in ([1, 0, 1], [0, 1, 0]):  # no impostor; no genuine pair
        curve = roc(scores, same, np.array(weights))
        assert np.isnan([tar_at_far(*curve, 0.1), tar_at_nearest_far(*curve, 0.1)]).all()


@pytest.mark.parametrize("genuine_first", [True, False])
def test_resamplings_of_templates_without_a_kind_of_pairs_do_not_count(genuine_first):
    # a genuine pair of person 0, ten impostor pairs of 0 and 1. Where the genuine pair scores highest, TAR is 1 in
    # every resampling that has both people; else it is 0
    degrees = np.deg2rad([0, 10, 90] if genuine_first else [0, 90, 10])
    x = np.stack([np.cos(degrees), np.sin(degrees)], 1).astype(np.float32)
    split = FakeTemplates([0, 0, 1], template=np.arange(3), media=np.arange(3))
    pairs = np.array([[0, 1, 1], *[[0, 2, 0]] * 10])
    found, _ = score_template_pairs(pool_templates(x, split, np.ones(3)), pairs, 40, 0)
    for rule in ("nearest", "strict"):
        figure = found[rule]["tar@far=0.1"]
        both = np.array([counts.min() > 0 for counts in bootstrap_counts(np.arange(2), 40, 0)])
        assert 0 < both.sum() < 40 and np.isnan(figure.draws[~both]).all()
        assert figure.low == figure.value == figure.high == genuine_first


def test_the_interval_with_a_hub_person_equals_that_of_the_whole_list(monkeypatch):
    """Person 0 is alike everybody: a resampling without 0 has none of the highest impostors."""
    rng, people = np.random.default_rng(0), 30
    centres = unit(rng.normal(size=(people, 64)))
    centres[:, 0] = 1.0  # what all share, and 0 has nothing else
    centres[0] = np.eye(64)[0]
    x = unit(np.repeat(unit(centres), 2, axis=0) + 0.12 * rng.normal(size=(2 * people, 64)))
    x[:2] = centres[0]
    labels = np.arange(2 * people) // 2
    hub = [(a, b, 0) for a in (0, 1) for b in range(2, 2 * people)]
    rest = [(a, b, 0) for a, b in rng.integers(2, 2 * people, (600, 2)) if labels[a] != labels[b]]
    pairs = np.array([(2 * i, 2 * i + 1, 1) for i in range(people)] + hub + rest)
    split = FakeTemplates(labels, template=np.arange(2 * people), media=np.arange(2 * people))
    templates = pool_templates(x.astype(np.float32), split, np.ones(2 * people))
    found, _ = score_template_pairs(templates, pairs, 60, 3)
    scores = score_listed(templates.vectors, pairs[:, 0], pairs[:, 1])
    same, left = pairs[:, 2] == 1, []
    for target in (0.1, 0.01):
        expected = []
        for counts in bootstrap_counts(np.arange(people), 60, 3):
            a, b = counts[labels[pairs[:, 0]]], counts[labels[pairs[:, 1]]]
            expected.append(tar_at_far(*roc(scores, same, np.where(same, a, a * b)), target))
            left.append(counts[0])
        np.testing.assert_allclose(found["strict"][f"tar@far={target:g}"].draws, expected, atol=1e-12)
    assert 0 in left and np.ptp(expected) > 0
    monkeypatch.setattr(protocols.templates, "find_tail",
                        lambda scores, same, target, need: find_tail(scores, same, target, len(pairs)))
    whole, _ = score_template_pairs(templates, pairs, 60, 3)
    for rule, figures in whole.items():
        for name, figure in figures.items():
            assert (figure.value, *figure.draws) == (found[rule][name].value, *found[rule][name].draws)


# ---------------------------------------------------------------- the linear probe


def test_a_probe_of_one_image_a_class_is_fitted_without_a_choice():
    y = np.eye(3, dtype=np.float32)
    w, b, strength = fit_probe(y, np.arange(3), 3, torch.device("cpu"), (0.5, 0.1))
    assert strength == 0.5 and (y @ w.T + b).argmax(1).tolist() == [0, 1, 2]
    # the minimum of mean cross-entropy + 0.25 |W|², by slow descent
    z = torch.from_numpy((y - y.mean(0)) / np.sqrt(y.var(0).mean()))
    v = torch.zeros(3, 4, requires_grad=True)
    for _ in range(3000):
        loss = torch.nn.functional.cross_entropy(z @ v[:, :3].T + v[:, 3], torch.arange(3))
        (gradient,) = torch.autograd.grad(loss + 0.25 * (v[:, :3] ** 2).sum(), v)
        v = (v - 0.3 * gradient).detach().requires_grad_()
    np.testing.assert_allclose(y @ w.T + b, (z @ v[:, :3].T + v[:, 3]).detach().numpy(), atol=2e-3)


# ---------------------------------------------------------------- adversarial cases


def test_everything_alike_is_no_better_than_chance():
    """All scores equal: AUC a half, nobody first, EER a half, and TAR at a small FAR nothing."""
    scores, same = np.full(1000, 0.25), np.arange(1000) % 2 == 0
    far, tar = roc(scores, same)
    assert far.tolist() == [0, 1] and np.trapezoid(tar, far) == 0.5 and tar_at_far(far, tar, 0.1) == 0
    assert equal_error_rate(far, tar) == 0.5 and np.isnan(d_prime(scores, same))
    assert fold_accuracy(scores, same, np.arange(1000) // 100) == 0.5
    assert grid_accuracy(scores, same, np.arange(1000) // 100)["accuracy"] == 0.5


@pytest.mark.parametrize("mates", [3, 20])  # counted one by one, and by one sort
def test_ties_with_impostors_count_against_every_mate(mates):
    x = np.zeros((1 + 2 * mates, 4), dtype=np.float32)
    x[:, 0] = 1  # mates and impostors score alike
    gallery = np.arange(1, len(x))
    found = search_gallery(x, np.array([0]), gallery, lambda p: (np.arange(mates), []))
    assert found.ranks[0].tolist() == list(range(mates + 1, 2 * mates + 1)) and found.wrong[0] == 1
    x[mates + 1 :, 0], x[mates + 1 :, 1] = 0.6, 0.8  # now they score lower
    found = search_gallery(x, np.array([0]), gallery, lambda p: (np.arange(mates), []))
    assert found.ranks[0].tolist() == list(range(1, mates + 1)) and found.wrong[0] == pytest.approx(0.6)


def literal_torchreid(x, ids, cams, queries):
    """eval_market1501 of torchreid's metrics/rank.py, its loop kept as it is."""
    distmat, q, g = 1 - x[:queries] @ x[queries:].T, slice(0, queries), slice(queries, None)
    indices = np.argsort(distmat, axis=1, kind="stable")
    all_cmc, all_ap = [], []
    for q_idx in range(queries):
        order = indices[q_idx]
        remove = (ids[g][order] == ids[q][q_idx]) & (cams[g][order] == cams[q][q_idx])
        raw_cmc = (ids[g][order] == ids[q][q_idx]).astype(int)[~remove]
        if not np.any(raw_cmc):
            continue  # the query's identity does not appear in the gallery
        cmc = raw_cmc.cumsum()
        cmc[cmc > 1] = 1
        all_cmc.append(cmc[:10])
        tmp = [value / (i + 1.0) for i, value in enumerate(raw_cmc.cumsum())]
        all_ap.append((np.asarray(tmp) * raw_cmc).sum() / raw_cmc.sum())
    return np.mean(all_cmc, axis=0), np.mean(all_ap), len(all_ap)


@pytest.mark.parametrize("people", [4, 60])  # many mates a query, and few
def test_queries_without_mates_are_skipped_as_torchreid_does(people):
    rng = np.random.default_rng(people)
    ids, cams = rng.integers(0, people, 260), rng.integers(0, 3, 260)
    ids[:5] = people + np.arange(5)  # identities absent from the gallery
    ids[5], cams[60:][ids[60:] == 1] = 1, 0
    cams[5] = 0  # and one whose every image was taken by the query's own camera
    roles = (np.arange(260) >= 60).astype(int)
    x = unit(rng.normal(size=(people + 5, 6))[ids] + rng.normal(size=(260, 6)))
    found, curve = score_gallery(x, FakeSplit(ids, {"name": "reid"}, role=roles, camera=cams), 3, 0)
    cmc, ap, counted = literal_torchreid(x, ids, cams, 60)
    assert counted <= 54 and found["mAP"].count == counted and found["mAP"].value == pytest.approx(ap)
    np.testing.assert_allclose(curve["cmc"][:10], cmc)


def test_one_image_has_nothing_to_be_scored_by():
    x = np.ones((1, 3)) / np.sqrt(3)
    assert score_pairs(x, np.array([0]), 2, 0) == {}
    with pytest.raises(InputError, match="none of 1 probes can be scored: the gallery does not show the person"):
        score_gallery(x, FakeSplit([0], {"name": "identification"}, role=np.array([0])), 2, 0)
    with pytest.raises(InputError, match="all genuine or all impostors"):
        score_verification(x, FakeSplit([0], {"name": "verification", "folds": 10},
                                        pairs=np.array([[0, 0, 1, 0]])), 2, 0)


def test_gaussian_scores_have_the_rates_that_theory_gives():
    """Impostors N(0, 1), genuine N(d', 1): TAR at FAR f is Φ(d' - Φ⁻¹(1 - f)), and AUC is Φ(d' / √2)."""
    from scipy.stats import norm

    rng, n, d = np.random.default_rng(0), 200_000, 2.0
    same = np.arange(2 * n) < n
    scores = (rng.normal(size=2 * n) + d * same).astype(np.float32)
    far, tar = roc(scores, same)
    assert np.trapezoid(tar, far) == pytest.approx(norm.cdf(d / np.sqrt(2)), abs=0.001)
    assert d_prime(scores, same) == pytest.approx(d, abs=0.005)
    assert equal_error_rate(far, tar) == pytest.approx(norm.cdf(-d / 2), abs=0.001)
    tail = tail_of(scores, same, 0.1)
    ends = np.append(tail.start[1:], len(tail.pairs)) - 1
    accepted = same[tail.pairs]
    tail_far, tail_tar = np.cumsum(~accepted)[ends] / n, np.cumsum(accepted)[ends] / n
    for f in (0.1, 1e-2, 1e-3, 1e-4):
        expected = norm.cdf(d - norm.isf(f))
        assert tar_at_far(far, tar, f) == pytest.approx(expected, abs=0.01)
        assert tar_at_far(tail_far, tail_tar, f) == tar_at_far(far, tar, f)
        assert tar_at_nearest_far(tail_far, tail_tar, f) == pytest.approx(expected, abs=0.01)
