"""Templates, 1:1 and 1:N: against scikit-learn, literal transcriptions and cases by hand."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from data_prep import InputError
from protocols.bootstrap import bootstrap_counts
from protocols.pairs import roc, tar_at_far
from protocols.templates import (
    SCORE_BINS,
    Templates,
    find_tail,
    pool_templates,
    score_listed,
    score_template_pairs,
    score_template_search,
    score_templates,
    tar_at_nearest_far,
)
from tests.test_evaluate import FakeSplit, unit


class FakeTemplates(FakeSplit):
    """A template set without images."""

    def __init__(self, labels, **columns):
        super().__init__(labels, {"name": "templates"}, **columns)
        self.index, self.folder = {"columns": list(columns)}, Path("fake")

    def __len__(self):
        return len(self.labels)


# ---------------------------------------------------------------- 1:1


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


def tail_of(scores, same, target):
    """As `score_template_pairs` finds it: from the highest impostors, or from all pairs where these do not do."""
    others = int((~same).sum())
    for need in (int(1.5 * target * others) + 2, others + 1):
        if tail := find_tail(scores, same, target, need):
            return tail
    raise AssertionError("no tail")


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("need", [1, 20, 700, 4000, 4001])
def test_a_tail_holds_the_highest_scores(need, ties):
    rng = np.random.default_rng(need)
    same = np.arange(5000) % 5 == 0  # 4,000 impostors
    scores = ((rng.integers(-9, 10, 5000) if ties else 9 * rng.normal(size=5000)) + 8.0 * same).astype(np.float32)
    found = find_tail(scores, same, 0, need)
    least = -np.inf if need > 4000 else np.sort(scores[~same])[-need]
    assert (np.diff(scores[found.pairs]) <= 0).all() and len(set(found.pairs)) == len(found.pairs)
    # but for pairs behind the last point: it may be no corner, and then has no genuine pair
    lost = set(np.flatnonzero(scores >= least)) - set(found.pairs)
    assert not same[list(lost)].any() and (need > 1 or len(found.pairs) < 5000) and (need < 4001 or not lost)
    assert find_tail(scores, same, 0.9, 20) is None or ties  # 20 impostors do not tell the TAR at a FAR of 0.9


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
    scores, same = score_listed(templates.vectors, a, b, block=5), pairs[:, 2] == 1
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


# ---------------------------------------------------------------- 1:N


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
