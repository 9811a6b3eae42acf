"""Templates, search among distractors, changes of clothes: against scikit-learn and literal transcriptions."""

import csv
import json
import shutil
from functools import partial
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_curve

import evaluate
from data_prep import InputError
from data_prep.format import Record, Source, Split, open_root
from data_prep.write import write_split
from protocols.bootstrap import bootstrap_counts, intervals, weighted_mean
from protocols.classify import nearest_rows
from protocols.pairs import roc, tar_at_far
from protocols.results import Row
from protocols.search import (
    Search,
    draw_galleries,
    mates_in,
    name_identities,
    score_gallery,
    search_gallery,
    search_on,
    tpir_at_fpir,
)
from protocols.templates import (
    BINS,
    SCORE_BINS,
    Templates,
    collect_scores,
    find_tail,
    pool_templates,
    score_listed,
    score_template_pairs,
    score_template_search,
    score_templates,
    tar_at_nearest_far,
)
from protocols.unified import Member, choose_crowd, make_members, score_unified
from reports.rows import rows_of, write_draws, write_rows
from tests.conftest import script
from tests.test_evaluate import FakeSplit, unit


class FakeTemplates(FakeSplit):
    """A template set without images."""

    def __init__(self, labels, **columns):
        super().__init__(labels, {"name": "templates"}, **columns)
        self.index, self.folder = {"columns": list(columns)}, Path("fake")

    def __len__(self):
        return len(self.labels)


# ---------------------------------------------------------------- templates, 1:1


def literal_pooling(x, quality, templates, medias):
    """image2template_feature of insightface's ijb_evals.py: media means, their sum, normalised."""
    found = {}
    for t in np.unique(templates):
        rows = np.flatnonzero(templates == t)
        features = x[rows] * quality[rows, None]
        medium = [features[medias[rows] == m].mean(0) for m in np.unique(medias[rows])]
        found[int(t)] = unit(np.sum(medium, axis=0))
    return found


def template_case(seed, people=12, images=400, spread=1.0):
    """Images of `people` in 60 templates, each template with a few media, and all pairs of templates."""
    rng = np.random.default_rng(seed)
    templates = rng.permutation(np.arange(images) % 60) * 7 + 3
    labels = (templates // 7) % people
    x = (rng.normal(size=(people, 8))[labels] + spread * rng.normal(size=(images, 8))).astype(np.float32)
    ids = np.unique(templates)
    pairs = np.array([(a, b, (a // 7) % people == (b // 7) % people) for i, a in enumerate(ids) for b in ids[:i]])
    pairs = pairs[rng.permutation(len(pairs))]
    columns = {"template": templates, "media": rng.integers(0, 5, images), "quality": rng.random(images)}
    return x, FakeTemplates(labels, template_pairs=pairs, **columns)


@pytest.mark.parametrize("seed", range(3))
def test_pooling_equals_a_literal_transcription(seed):
    x, split = template_case(seed)
    found = pool_templates(x, split, split.column("quality"))
    expected = literal_pooling(x, split.column("quality"), split.column("template"), split.column("media"))
    assert found.ids.tolist() == sorted(expected) and found.enrolled.all()
    np.testing.assert_allclose(found.vectors, [expected[i] for i in found.ids], atol=1e-5)


def test_pooling_by_hand():
    # a video of two images (2, 0), (0, 0) and a photograph (0, 3): mean (1, 0) + (0, 3), so the direction (1, 3) / √10
    x = np.array([[2, 0], [0, 0], [0, 3]], dtype=np.float32)
    split = FakeTemplates([0, 0, 0], template=np.full(3, 5), media=np.array([1, 1, 2]))
    vector = pool_templates(x, split, np.ones(3)).vectors[0]
    np.testing.assert_allclose(vector, np.array([1, 3]) / np.sqrt(10), rtol=1e-6)
    x[2] = np.nan  # an unreadable image is no part of its template
    np.testing.assert_allclose(pool_templates(x, split, np.ones(3)).vectors[0], [1, 0])


def literal_tpr(scores, same, targets):
    """The end of ijb_evals.py's 1:1: the flipped curve, the smallest (distance, place)."""
    fpr, tpr, _ = roc_curve(same, scores)
    fpr, tpr = np.flipud(fpr), np.flipud(tpr)
    return [tpr[min(zip(abs(fpr - t), range(len(fpr)), strict=True))[1]] for t in targets]


def in_parts(scores, size=97):
    """Pairs as `score_listed` hands them out: some at a time, in another order; cosines."""
    order = np.random.default_rng(0).permutation(len(scores))
    for start in range(0, len(scores), size):
        yield order[start : start + size], (scores / 32).astype(np.float32)[order[start : start + size]]


def tail_of(scores, same, target):
    """As `score_template_pairs` finds it: from the highest impostors, or from all pairs where these do not do."""
    others = int((~same).sum())
    for need in (int(1.5 * target * others) + 2, others + 1):
        if tail := find_tail(collect_scores(in_parts(scores), same, need), same, target):
            return tail
    raise AssertionError("no tail")


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("need", [1, 20, 700, 4000, 4001])
def test_collected_scores_are_the_highest_in_full_and_all_in_bins(need, ties):
    rng = np.random.default_rng(need)
    same = np.arange(5000) % 5 == 0  # 4,000 impostors
    scores = (rng.integers(-9, 10, 5000) if ties else 9 * rng.normal(size=5000)) + 8.0 * same
    scores[rng.random(5000) < 0.02] = -64  # a cosine of -2: never accepted
    cosine = (scores / 32).astype(np.float32)
    found = collect_scores(in_parts(scores), same, need)
    assert found.bins.sum(1).tolist() == [4000, 1000] and found.bins[:, 0].sum() == (scores == -64).sum()
    assert (np.diff(found.scores) <= 0).all() and (cosine[found.pairs] == found.scores).all()
    least = -2 if need > 4000 else np.sort(cosine[~same])[-need]
    assert set(np.flatnonzero(cosine >= least)) <= set(found.pairs) and len(set(found.pairs)) == len(found.pairs)
    assert found.whole == (len(found.pairs) == 5000)
    if need < 4000:
        assert len(found.pairs) < 5000  # what is below is let go
    edges = np.linspace(-1, 1, BINS + 1)
    for kind in (0, 1):
        expected = np.histogram(np.clip(cosine[(same == kind) & (cosine > -1.5)], -1, 1), edges)[0]
        # a cosine at an edge may fall to either side of it
        assert np.abs(np.cumsum(found.bins[kind, 1:]) - np.cumsum(expected)).max() <= (400 if ties else 2)


@pytest.mark.parametrize("decimals", [None, 2, 1])  # rounded: ties, also along diagonals of the curve
@pytest.mark.parametrize("separation", [0, 2, 20])  # 20: a curve of three points
@pytest.mark.parametrize("seed", range(3))
def test_tar_at_far_equals_scikit_learn_by_both_rules(decimals, separation, seed):
    rng = np.random.default_rng(seed)
    same = rng.random(4000) < 0.1
    scores = (rng.normal(size=4000) + separation * same).astype(np.float32)
    scores = scores if decimals is None else scores.round(decimals)
    targets = [0.1, 0.03, 0.01, 0.001]
    tail = tail_of(scores, same, max(targets))
    ends = np.append(tail.start[1:], len(tail.pairs)) - 1
    accepted = same[tail.pairs]
    far = np.append(0, np.cumsum(~accepted)[ends]) / (~same).sum()
    tar, corner = np.append(0, np.cumsum(accepted)[ends]) / same.sum(), np.append(True, tail.corner)
    assert [tar_at_nearest_far(far[corner], tar[corner], t) for t in targets] == pytest.approx(
        literal_tpr(scores, same, targets), abs=1e-12)
    x, y = roc(scores, same)
    assert [tar_at_far(far, tar, t) for t in targets] == pytest.approx(
        [y[x <= t].max() for t in targets], abs=1e-12)


def test_nearest_and_strict_far_by_hand():
    # g i g i i g, as thresholds fall: (FAR, TAR) = (0, 1/3) (1/3, 1/3) (1/3, 2/3) (2/3, 2/3) (1, 2/3) (1, 1)
    scores, same = np.arange(6, 0, -1.0), np.array([1, 0, 1, 0, 0, 1], dtype=bool)
    tail = tail_of(scores, same, 1.0)
    far, tar = np.array([0, 0, 1, 1, 2, 3, 3]) / 3, np.array([0, 1, 1, 2, 2, 2, 3]) / 3
    assert tail.pairs.tolist() == [0, 1, 2, 3, 4, 5]
    assert tar_at_nearest_far(far, tar, 0.3) == pytest.approx(2 / 3)  # 1/3 is nearer than 0, though above 0.3
    assert tar_at_far(far, tar, 0.3) == pytest.approx(1 / 3)


@pytest.mark.parametrize("seed", range(2))
def test_template_verification_from_end_to_end(seed):
    x, split = template_case(seed)
    found, curve = score_templates(x, split, 20, 0)
    pooled = literal_pooling(x, np.ones(len(x)), split.column("template"), split.column("media"))
    pairs = split.column("template_pairs")
    scores = np.array([pooled[a] @ pooled[b] for a, b, _ in pairs])
    rule = "1:1, means of media weighted by norm, nearest FAR"
    metrics = [f"tar@far={t:g}" for t in (0.1, 0.01, 0.001)]  # 1,650 impostors support no finer one
    assert next(iter(found)) == "1:1, means of media weighted by norm x detector score, nearest FAR"
    assert list(found[rule]) == metrics and all(f.low <= f.value <= f.high for f in found[rule].values())
    assert [found[rule][m].value for m in metrics] == pytest.approx(
        literal_tpr(scores, pairs[:, 2] == 1, [0.1, 0.01, 0.001]), abs=0.01)  # float32 may swap near ties
    assert not any(rule.startswith("1:N") for rule in found)
    # what is drawn is the curve of the customary pooling, and all scores
    pooled = literal_pooling(x, split.column("quality"), split.column("template"), split.column("media"))
    scores, same = np.array([pooled[a] @ pooled[b] for a, b, _ in pairs]), pairs[:, 2] == 1
    far, tar = roc(scores, same)
    exact = [tar_at_far(far, tar, f) for f in curve["far"]]
    np.testing.assert_allclose(curve["tar"][1:], exact[1:], atol=0.01)  # the first is where nothing is accepted
    assert (np.diff(curve["far"]) >= 0).all() and curve["far"][-1] == curve["tar"][-1] == 1
    for kind, mask in (("same", same), ("different", ~same)):
        expected = np.histogram(scores[mask], SCORE_BINS)[0]
        assert curve[kind].sum() == mask.sum() and np.abs(curve[kind] - expected).max() <= 2


def test_the_bootstrap_of_templates_equals_repeated_people():
    """One resampling, written out: pairs of people drawn several times are there so often."""
    x, split = template_case(5)
    templates = pool_templates(x, split, np.ones(len(x)))
    pairs = split.column("template_pairs")
    found = score_template_pairs(templates, pairs, 3, 7)[0]["strict"]["tar@far=0.01"]
    a, b = (templates.places(column) for column in pairs[:, :2].T)
    scores, same = np.empty(len(pairs), dtype=np.float32), pairs[:, 2] == 1
    for places, some in score_listed(templates.vectors, a, b, block=5):
        scores[places] = some
    np.testing.assert_allclose(scores, (templates.vectors[a] * templates.vectors[b]).sum(1), atol=1e-6)
    for draw, counts in zip(found.draws, bootstrap_counts(np.arange(12), 3, 7), strict=True):
        left, right = counts[templates.identity[a]], counts[templates.identity[b]]
        far, tar = roc(scores, same, np.where(same, left, left * right))
        assert draw == pytest.approx(tar_at_far(far, tar, 0.01), abs=1e-12)


@pytest.mark.parametrize("first", [0, 1 << 25])  # numbers looked up in a table, and too large for one
def test_a_template_without_images_is_never_accepted(first):
    # genuine: 1-2 alike, 1-9 lost; impostors 1-3 ten times and 2-9: TAR is 1/2 at every FAR, and 9 belongs to person 0
    x = np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32)
    pairs = np.array([[1, 2, 1], [1, 9, 1], [3, 9, 0], *[[1, 3, 0]] * 10]) + np.array([first, first, 0])
    split = FakeTemplates([0, 0, 1], template=np.array([1, 2, 3]) + first, media=np.array([1, 2, 3]),
                          template_pairs=pairs)
    templates = pool_templates(x, split, np.ones(3))
    assert templates.enrolled.tolist() == [True, True, True, False] and templates.identity.tolist() == [0, 0, 1, 0]
    found, _ = score_template_pairs(templates, pairs, 2, 0)
    assert found["strict"]["tar@far=0.1"].value == 0.5 and found["nearest"]["tar@far=0.1"].value == 0.5
    few = FakeTemplates([0, 0, 1], template=np.array([1, 2, 3]), media=np.array([1, 2, 3]), template_pairs=pairs[:2])
    with pytest.raises(InputError, match="its lists support no figure"):
        score_templates(x, few, 2, 0)


# ---------------------------------------------------------------- templates, 1:N


def literal_search(query_feats, gallery_feats, query_ids, reg_ids, fars):
    """evaluation_1N of insightface's ijb_evals.py, for one gallery: hits at 1, 5, 10 and TPIR at each FPIR."""
    hits, pos, neg, strangers = np.zeros(3), [], [], []
    for feature, person in zip(query_feats, query_ids, strict=True):
        similarity = gallery_feats @ feature
        if person in reg_ids:
            order = np.argsort(similarity)[::-1]
            place = np.flatnonzero(reg_ids[order] == person)[0]
            hits += [place < 1, place < 5, place < 10]
            pos.append(similarity[reg_ids == person][0])
            neg.append(similarity[reg_ids != person].max())
        else:
            strangers.append(similarity.max())
    top = np.sort(strangers)[::-1]
    thresholds = [top[max(int(len(top) * f) - 1, 0)] for f in fars]
    pos, neg = np.array(pos), np.array(neg)
    return hits, [((pos > neg) & (pos > t)).mean() for t in thresholds]


@pytest.mark.parametrize("seed", range(4))
def test_template_search_equals_a_literal_transcription(seed):
    rng = np.random.default_rng(seed)
    people, probes = 40, 500
    identity = np.concatenate([np.arange(people), rng.integers(0, people, probes)])
    vectors = unit(rng.normal(size=(people, 6))[identity] + 0.5 * rng.normal(size=(people + probes, 6)))
    templates = Templates(np.arange(len(identity)), vectors.astype(np.float32), identity,
                          np.ones(len(identity), dtype=bool))
    galleries, listed = [np.arange(22), np.arange(22, people)], np.arange(people, people + probes)
    found = score_template_search(templates, galleries, listed, 10, 0)
    both = [literal_search(templates.vectors[listed], templates.vectors[g], identity[listed], identity[g], [0.1, 0.01])
            for g in galleries]
    hits, tpir = sum(h for h, _ in both) / probes, np.mean([t for _, t in both], axis=0)
    assert {k: f.value for k, f in found.items()} == pytest.approx(
        dict(zip(["rank-1", "rank-5", "rank-10", "tpir@fpir=0.1", "tpir@fpir=0.01"], [*hits, *tpir], strict=True)))


@pytest.mark.parametrize("people", [300, 60, 4])  # without a mate now and then; a few; so many that a sort serves all
@pytest.mark.parametrize("ties", [False, True])
def test_a_search_on_a_device_is_the_same(people, ties):
    rng = np.random.default_rng(people)
    labels, cameras = rng.integers(0, people, 700), rng.integers(0, 3, 700)
    x = rng.integers(-2, 3, size=(700, 4)).astype(np.float32) if ties else unit(rng.normal(size=(700, 9)))
    probes, gallery = rng.permutation(700)[:200], np.sort(rng.permutation(700)[:450])

    def mates(probe):
        places = np.flatnonzero(labels[gallery] == labels[probe])
        same = cameras[gallery[places]] == cameras[probe]
        return places[~same], places[same]

    here = search_gallery(x, probes, gallery, mates)
    there = search_on(torch.device("cpu"), x, probes, gallery, mates, 450 * 64, x)
    assert [ranks.tolist() for ranks in here.ranks] == [ranks.tolist() for ranks in there.ranks]
    np.testing.assert_array_equal(here.first, there.first)
    np.testing.assert_allclose(here.correct, there.correct, rtol=1e-6)
    np.testing.assert_allclose(here.wrong, there.wrong, rtol=1e-6)
    assert np.isinf(here.first).any() or people < 300
    assert max(map(len, here.ranks)) >= 12 or people > 4


def test_tpir_by_hand():
    # strangers' best scores 0.9 0.8 ... 0.0: at FPIR 0.2 the threshold is the second, 0.8. Mated: 0.85 first: a hit;
    # 0.95 but beaten by 0.97; 0.7 first but below: 1 of 3. Weight 0 for the highest stranger: 9 left, floor(1.8) = 1
    mated = np.arange(13) < 3
    wrong = np.append([0.5, 0.97, 0.1], np.arange(9, -1, -1) / 10)
    own = np.append([0.85, 0.95, 0.7], np.full(10, -np.inf))
    search = Search([], np.zeros(13), own, wrong)
    assert tpir_at_fpir(search, mated, 0.2) == pytest.approx(1 / 3)
    weights = np.ones(13)
    weights[3] = 0
    assert tpir_at_fpir(search, mated, 0.2, weights) == pytest.approx(1 / 3)  # the threshold is still 0.8
    weights[4] = 0
    assert tpir_at_fpir(search, mated, 0.2, weights) == pytest.approx(1 / 3)  # 0.7: not above it
    weights[5] = 0
    assert tpir_at_fpir(search, mated, 0.2, weights) == pytest.approx(2 / 3)  # 0.6


# ---------------------------------------------------------------- identification with distractors


def test_search_in_blocks_equals_a_full_matrix(monkeypatch):
    rng = np.random.default_rng(0)
    labels = np.append(rng.integers(0, 30, 300), np.full(200, -1))
    roles = np.append(rng.integers(0, 2, 300), np.full(200, 2))
    x = unit(rng.normal(size=(500, 6)) + rng.normal(size=(31, 6))[labels]).astype(np.float32)
    q, g = np.flatnonzero(roles == 0), np.flatnonzero(roles > 0)
    mates = mates_in(labels[g])
    for size in (1, 1000, 1 << 26):
        found = search_gallery(x, q, g, lambda p: (mates(labels[p]), []), size)
        for i, p in enumerate(q):
            order = g[np.argsort(-(x[g] @ x[p]), kind="stable")]
            assert found.ranks[i].tolist() == (np.flatnonzero(labels[order] == labels[p]) + 1).tolist()
            assert found.wrong[i] == pytest.approx((x[g] @ x[p])[labels[g] != labels[p]].max(), abs=1e-6)


def test_open_set_identification_uses_probes_without_a_mate():
    rng = np.random.default_rng(1)
    labels, roles = np.concatenate([np.arange(20), np.arange(20), np.arange(20, 40), -np.ones(30, int)]), np.repeat(
        [1, 0, 0, 2], [20, 20, 20, 30])
    x = unit(rng.normal(size=(90, 5)) + 2 * rng.normal(size=(41, 5))[labels])
    found, _ = score_gallery(x, FakeSplit(labels, {"name": "identification"}, role=roles), 5, 0)
    g = np.flatnonzero(roles > 0)
    hits, tpir = literal_search(x[20:60], x[g], labels[20:60], labels[g], [0.1])
    assert list(found) == ["rank-1", "rank-5", "rank-20", "tpir@fpir=0.1"]  # 20 strangers do not support 0.01
    assert found["rank-1"].value == hits[0] / 20 and found["tpir@fpir=0.1"].value == pytest.approx(tpir[0])
    assert found["rank-1"].count == 20 and found["tpir@fpir=0.1"].count == 40


# ---------------------------------------------------------------- changes of clothes


def literal_clothes(x, ids, cams, clothes, roles, mode):
    """evaluate_with_clothes of Simple-CCReID, one query after the other: mAP and rank-1."""
    q, g = np.flatnonzero(roles == 0), np.flatnonzero(roles > 0)
    aps, firsts = [], []
    for i in q:
        order = g[np.argsort(-(x[g] @ x[i]), kind="stable")]
        mine, cam, worn = ids[order] == ids[i], cams[order] == cams[i], clothes[order] == clothes[i]
        junk = mine & (cam | {"general": np.zeros(len(g), bool), "cross-clothes": worn, "same-clothes": ~worn}[mode])
        matches = mine[~junk]
        if matches.any():
            ranks = np.flatnonzero(matches) + 1
            aps.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
            firsts.append(ranks[0] == 1)
    return np.mean(aps), np.mean(firsts), len(firsts)


@pytest.mark.parametrize("mode", ["general", "cross-clothes", "same-clothes"])
@pytest.mark.parametrize("seed", range(3))
def test_clothes_rules_equal_a_literal_transcription(mode, seed):
    rng = np.random.default_rng(seed)
    ids, cams, roles = rng.integers(0, 15, 300), rng.integers(0, 3, 300), (rng.random(300) < 0.7).astype(int)
    clothes = 3 * ids + rng.integers(0, 3, 300)
    x = unit(rng.normal(size=(300, 6)) + 0.8 * rng.normal(size=(45, 6))[clothes])
    split = FakeSplit(ids, {"name": "reid", "variants": ["general", "cross-clothes", "same-clothes"]}, role=roles,
                      camera=cams, clothes=clothes)
    found, _ = score_gallery(x, split, 0, 0, mode)
    ap, first, count = literal_clothes(x, ids, cams, clothes, roles, mode)
    assert (found["mAP"].value, found["rank-1"].value, found["mAP"].count) == pytest.approx((ap, first, count))


def test_clothes_rules_by_hand():
    # probe: person 0, camera 0, clothes 0. From near to far: same clothes elsewhere; person 1; other clothes, camera 0
    # (junk by every rule); other clothes, camera 1
    x = unit(np.array([[1, 0], [1, 0.1], [1, 0.2], [1, 0.3], [1, 0.4]]))
    split = FakeSplit([0, 0, 1, 0, 0], {"name": "reid"}, role=np.array([0, 1, 1, 1, 1]),
                      camera=np.array([0, 1, 1, 0, 1]), clothes=np.array([0, 0, 5, 1, 1]))
    scored = {mode: {name: f.value for name, f in score_gallery(x, split, 0, 0, mode)[0].items()}
              for mode in ("general", "cross-clothes", "same-clothes")}
    assert scored["general"]["mAP"] == pytest.approx((1 + 2 / 3) / 2)
    assert scored["cross-clothes"]["mAP"] == 0.5 and scored["cross-clothes"]["rank-1"] == 0
    assert scored["same-clothes"]["mAP"] == 1


def test_single_shot_is_the_mean_over_drawn_galleries():
    rng = np.random.default_rng(3)
    ids, roles = np.repeat(np.arange(12), 10), np.tile([0] * 3 + [1] * 7, 12)
    cams = roles.copy()
    x = unit(rng.normal(size=(120, 5)) + 0.9 * rng.normal(size=(12, 5))[ids])
    split = FakeSplit(ids, {"name": "reid", "draws": 10}, role=roles, camera=cams, clothes=cams)
    found, _ = score_gallery(x, split, 5, 4, "cross-clothes single-shot")
    q, g = np.flatnonzero(roles == 0), np.flatnonzero(roles == 1)
    hits, seen = [], set()
    for places in draw_galleries(ids[g], 10, 4):
        gallery = g[places]
        assert sorted(ids[gallery]) == list(range(12))  # one image of each person
        seen |= set(gallery.tolist())
        hits.append(np.mean([ids[gallery[np.argmax(x[gallery] @ x[i])]] == ids[i] for i in q]))
    assert found["rank-1"].value == pytest.approx(np.mean(hits)) and len(seen) > 30 and "mAP" not in found
    again, _ = score_gallery(x, split, 5, 4, "cross-clothes single-shot")
    assert again["rank-1"].value == found["rank-1"].value  # seeded


# ---------------------------------------------------------------- all domains at once


class FakeMember(Member):
    """A domain of the unified gallery, from arrays."""

    def __init__(self, domain, x, who, roles=None, cameras=None, protocol="reid"):
        split = FakeSplit(np.maximum(who, 0), {"name": protocol}, **({} if cameras is None else {"camera": cameras}))
        split.domain = domain
        rows = np.arange(len(x))
        super().__init__(split, x, who, rows if roles is None else np.flatnonzero(roles == 0),
                         rows if roles is None else np.flatnonzero(roles > 0), np.full(len(x), -1), rows[:0])


def literal_unified(members):
    """One probe after the other against one list of everything; a value per figure."""
    sums: dict = {}
    for me in members:
        for probe in me.probes:
            entries = []  # score, domain, right
            for you in members:
                for row in you.gallery:
                    mine = me.who[probe] == you.who[row]
                    camera = me.split.optional("camera")
                    if me is you and (row == probe or (mine and me.split.protocol["name"] == "reid"
                                                       and camera[row] == camera[probe])):
                        continue
                    entries.append((float(me.x[probe] @ you.x[row]), you.split.domain, mine))
            own = [e for e in entries if e[1] == me.split.domain]
            name = me.split.domain
            for other in {e[1] for e in entries} - {name}:
                there = [e for e in entries if e[1] == other]
                if any(e[2] for e in there):
                    sums.setdefault((name, f"rank-1 in {other}"), []).append(max(there)[2])
            if any(e[2] for e in own):
                sums.setdefault((name, "rank-1 alone"), []).append(max(own)[2])
                sums.setdefault((name, "rank-1 in the crowd"), []).append(max(entries)[2])
                for other in (m.split.domain for m in members):
                    sums.setdefault((name, f"nearest is {other}"), []).append(max(entries)[1] == other)
    return {key: np.mean(values) for key, values in sums.items()}


@pytest.mark.parametrize("seed", range(3))
def test_unified_gallery_equals_a_literal_transcription(seed):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(30, 6))

    def vectors(who):
        return unit(centres[who] + 0.9 * rng.normal(size=(len(who), 6)))

    object_, hq, lq, body = (rng.integers(a, b, 60) for a, b in ((20, 30), (0, 12), (0, 12), (4, 16)))
    roles, cameras = (rng.random(60) < 0.6).astype(int), rng.integers(0, 3, 60)
    members = [FakeMember("object", vectors(object_), object_, protocol="classification"),
               FakeMember("face_hq", vectors(hq), hq, protocol="verification"),
               FakeMember("face_lq", vectors(lq), lq, roles, protocol="identification"),
               FakeMember("body", vectors(body), body, roles, cameras)]
    found = score_unified(members, 10, 0)
    values = {(domain, metric): f.value for domain, by in found.items() for metric, f in by.items()}
    expected = literal_unified(members)
    assert {key: v for key, v in values.items() if key[0] != "all"} == pytest.approx(expected)
    tasks = [expected[d, "rank-1 in the crowd"] for d in ("object", "face_hq", "face_lq", "body")]
    assert values["all", "average rank-1 in the crowd"] == pytest.approx(np.mean(tasks))
    assert values["all", "worst rank-1 in the crowd"] == pytest.approx(min(tasks))
    assert ("object", "rank-1 in body") not in values  # nobody is both: absent, not 0


def test_unified_gallery_by_hand():
    # person 0's blurred face at 0 degrees: nearest of its own domain is person 1 at 20 (wrong), its mate at 40; nearest
    # of all is person 0's sharp face at 10 (right, in another domain): a miss alone, a hit in the crowd. Person 1's
    # blurred probe at 25 has its mate at 20 as nearest anywhere.
    def at(*degrees):
        return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], 1)

    lq = FakeMember("face_lq", at(0, 40, 20, 25), np.array([0, 0, 1, 1]), np.array([0, 1, 1, 0]),
                    protocol="identification")
    hq = FakeMember("face_hq", at(10, 80, 10, 80), np.array([0, 1, 0, 1]), np.array([1, 1, 0, 0]),
                    protocol="identification")
    found = {d: {m: f.value for m, f in by.items()} for d, by in score_unified([hq, lq], 5, 0).items()}
    assert found["face_lq"] == {"rank-1 alone": 0.5, "rank-1 in the crowd": 1.0, "nearest is face_hq": 0.5,
                                "nearest is face_lq": 0.5, "rank-1 in face_hq": 0.5}  # 25 is nearer to 10 than to 80
    assert found["face_hq"]["rank-1 alone"] == 1 and found["face_hq"]["rank-1 in face_lq"] == 0
    assert found["all"]["worst rank-1 alone"] == 0.5 and found["all"]["average rank-1 alone"] == 0.75

    # person 0's blurred mate cannot be read: its probe misses alone, and finds the sharp face at 10 in the crowd
    lq.gallery, lq.unread = np.array([2]), np.array([1])
    found = {m: f for m, f in score_unified([hq, lq], 5, 0)["face_lq"].items()}
    assert found["rank-1 alone"].value == 0.5 and found["rank-1 alone"].count == 2
    assert found["rank-1 in the crowd"].value == 1


def test_people_are_joined_across_domains_by_what_the_source_proves(demo_root):
    splits = choose_crowd([split for by_name in open_root(demo_root).values() for split in by_name.values()
                           if split.protocol])
    assert [(s.domain, s.name) for s in splits] == [("object", "val"), ("face_hq", "test"), ("face_lq", "test"),
                                                    ("body", "test")]
    things, sharp, blurred, bodies = (set(name_identities(split)) for split in splits)
    assert sharp == blurred == bodies and len(sharp) == 8 and all(name.startswith("person demo-") for name in sharp)
    assert not things & sharp and all(name.startswith("object/") for name in things)
    rng = np.random.default_rng(0)
    members = make_members(splits, [rng.normal(size=(len(s), 4)) for s in splits], 20, 0)
    assert [len(m.probes) for m in members] == [20, 20, 20, 20] and len(members[1].gallery) == 64
    assert (members[3].split.column("role")[members[3].probes] == 0).all()


# ---------------------------------------------------------------- comparing runs


def write_run(folder, values, people, seed=0, images="set x", config=None, resampling=0):
    """A run folder with one figure: the mean of a value per sample, resampled by person."""
    (folder / "eval").mkdir(parents=True)
    found = intervals(lambda w: {"rank-1": weighted_mean(values, w)},
                      bootstrap_counts(people, 400, resampling), len(values))
    results = rows_of(found, Row(folder.name, "tuned", "body", "test", kind="reid", rule="general", images=images))
    write_rows(folder / "eval", [row for row, _ in results])
    write_draws(folder / "eval", results, resampling)
    options = {"schedule": "B", **(config or {}), "seed": seed, "out": str(folder)}
    (folder / "config.json").write_text(json.dumps(options))
    return folder


def compared(tmp_path, *arguments):
    code = evaluate.main.main(["compare", *map(str, arguments), "--out", str(tmp_path / "c")], standalone_mode=False)
    assert code == 0
    return json.loads((tmp_path / "c/comparison.json").read_text())


def test_differences_are_paired_by_person(tmp_path):
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(80), 5)
    hard = rng.random(80)[people]  # what both runs find hard
    a, b = hard + 0.01 * rng.random(400), hard + 0.1 + 0.01 * rng.random(400)
    first, second = (write_run(tmp_path / name, values, people, config={"schedule": name})
                     for name, values in (("a", a), ("b", b)))
    reference, row = compared(tmp_path, first, second)
    assert reference["difference"] is None and row["difference"] == pytest.approx((b - a).mean())
    # literally: people drawn with the same counts in both, the spread of the mean of differences
    draws = [np.average(b - a, weights=w) for w in bootstrap_counts(people, 400, 0)]
    interval = [row["difference_low"], row["difference_high"]]
    assert interval == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=1e-6)
    assert row["difference_high"] - row["difference_low"] < 0.1 * (row["high"] - row["low"])  # far below either's own
    with open(tmp_path / "c/comparison.csv") as file:
        table = list(csv.DictReader(file))
    assert [t["runs"] for t in table] == ["a", "b"] and float(table[1]["difference"]) == row["difference"]
    assert "| **+" in (tmp_path / "c/comparison.md").read_text()


def test_seeds_are_averaged_by_hand(tmp_path):
    # run x with seeds 0 and 1: means 0.5 and 0.7, so 0.6 with SD 0.1414; run y: 0.9: a lead of 0.3
    people, ones = np.arange(10), np.ones(10)
    runs = [write_run(tmp_path / "x-s0", 0.5 * ones, people, 0), write_run(tmp_path / "x-s1", 0.7 * ones, people, 1),
            write_run(tmp_path / "y-s0", 0.9 * ones, people, 0, config={"schedule": "A"})]
    x, y = compared(tmp_path, *runs)
    assert (x["runs"], x["seeds"], y["seeds"]) == ("x-s0 x-s1", 2, 1) and x["value"] == pytest.approx(0.6)
    assert x["seed_sd"] == pytest.approx(np.sqrt(0.02)) and y["seed_sd"] is None
    assert [y["difference"], y["difference_low"], y["difference_high"]] == pytest.approx([0.3] * 3, abs=1e-6)


@pytest.mark.parametrize("change, words", [
    ({"images": "set y"}, "body/test rank-1: only"),
    ({"resampling": 1}, "resampled differently"), ({"people": np.arange(9)}, "10 samples in"),
    ("draws", "draws.npz: cannot be read"), ("rows", "results.json: missing"), ("twice", "a run is named twice"),
    ("splits", "no figure in common on these --splits"), ("one", "no figures of the foundation weights"),
    ("out", "cannot be created as a folder"),
])  # fmt: skip
def test_bad_comparisons(change, words, tmp_path):
    people = np.arange(10)
    first, more = write_run(tmp_path / "a", np.ones(10), people), change if isinstance(change, dict) else {}
    people = more.pop("people", people)
    second = write_run(tmp_path / "b", np.ones(len(people)), people, **more)
    if isinstance(change, str) and change in ("draws", "rows"):
        (second / "eval" / {"draws": "draws.npz", "rows": "results.json"}[change]).unlink()
    special = {"twice": [first, first], "one": [first], "splits": [first, second, "--splits", "face_hq/lfw"],
               "out": [first, second, "--out", first / "config.json"]}
    arguments = special.get(str(change), [first, second])
    with pytest.raises(click.ClickException) as error:
        evaluate.main.main(["compare", "--out", str(tmp_path / "c"), *map(str, arguments)], standalone_mode=False)
    assert words in error.value.format_message() and "\n" not in error.value.format_message()


def test_compare_as_a_script(tiny_run, tmp_path):
    """One run alone: against its own untouched backbone."""
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    script("evaluate.py", "--run", tmp_path / "run", "--splits", "face_hq/test,body/test", "--bootstrap", "20",
           "--workers", "0")
    result = script("evaluate.py", "compare", tmp_path / "run", "--out", tmp_path / "c")
    rows = json.loads((tmp_path / "c/comparison.json").read_text())
    lead = next(r for r in rows if (r["split"], r["metric"], r["weights"]) == ("test", "mAP", "tuned"))
    before, after = (next(r["value"] for r in rows if (r["metric"], r["weights"]) == ("mAP", w))
                     for w in ("foundation", "tuned"))
    assert lead["difference"] == pytest.approx(after - before) and "| body/test | rank-1 |" in result.stdout
    assert "| body/test | mAP |" in (tmp_path / "c/comparison.md").read_text() and "| mAP |" not in result.stdout
    assert (tmp_path / "c/comparison.png").stat().st_size > 5000
    assert {r["split"] for r in rows} == {"test", "everything"}
    failed = script("evaluate.py", "compare", tmp_path / "none", check=2)
    assert failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr


# ---------------------------------------------------------------- leaks


def test_nearest_rows_equal_a_full_matrix():
    rng = np.random.default_rng(0)
    x, y = unit(rng.normal(size=(50, 5))), unit(rng.normal(size=(90, 5)))
    x[3], y[:10] = np.nan, np.nan
    scores, good = np.nan_to_num(x @ y.T, nan=-np.inf), np.arange(50) != 3
    for k in (1, 4, 85):  # 80 can be found
        rows, cosines = nearest_rows(x, y, k, block=7, width=31)
        order = np.argsort(-scores, axis=1)[:, :k]
        np.testing.assert_array_equal(rows[good, :80], order[good, :80])
        np.testing.assert_allclose(cosines[good], np.take_along_axis(scores, order, 1)[good], rtol=1e-6)
        assert (rows[3] == -1).all() and (cosines[3] == -np.inf).all() and (rows[:, 80:] == -1).all()
    rows, _ = nearest_rows(y, y, 2, itself=True, block=7, width=31)
    inner = y @ y.T
    np.fill_diagonal(inner, -np.inf)
    np.testing.assert_array_equal(rows[10:], np.argsort(-np.nan_to_num(inner, nan=-np.inf), axis=1)[10:, :2])


def test_leaked_images_are_listed_and_left_out(demo_root, tiny_run, tmp_path):
    root, base, val = tmp_path / "data", *(Split(demo_root / name) for name in ("object/train", "object/val"))
    for split in (base, val):
        shutil.copytree(split.folder, root / "object" / split.name)
    images = [(base, row) for row in (0, 5, 9)] + [(val, row) for row in range(30)]
    records = [Record(partial(bytes, split.jpeg(row)[1]), f"{split.name} {row}", split.classes[split.labels[row]])
               for split, row in images]
    protocol = {"name": "classification", "reference": "train", "ood": False}
    write_split(root / "object/mixed", Source(records, protocol), source_name="folder", size=base.size, fit="crop",
                quality=95, train=False)
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    options = ["leaks", "--run", tmp_path / "run", "--data", root, "--bootstrap", "5", "--workers", "0"]
    result = script("evaluate.py", *options, "--threshold", "0.99999")
    with open(tmp_path / "run/eval/leaks.csv") as file:
        found = list(csv.DictReader(file))
    assert sorted(int(leak["row"]) for leak in found) == [0, 1, 2] and "object/mixed" in result.stdout
    assert {leak["train_key"] for leak in found} == {base.jpeg(row)[0] for row in (0, 5, 9)}
    assert all(leak["identity"] == leak["train_identity"] for leak in found)
    rows = json.loads((tmp_path / "run/eval/leaks.json").read_text())
    counts = {("without 3 leaked" in r["protocol"], r["metric"]): r["count"] for r in rows}
    assert counts[False, "knn top-1"] == 33 and counts[True, "knn top-1"] == 30
    assert "no test image has" in script("evaluate.py", *options, "--splits", "object/val", "--threshold", "1").stdout
    everything = script("evaluate.py", *options, "--threshold", "-1", check=2)
    assert "no image left to score" in everything.stderr and everything.stderr.count("\n") == 1
    assert "give --run RUN" in script("evaluate.py", "leaks", check=2).stderr
