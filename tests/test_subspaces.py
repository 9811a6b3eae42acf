"""The measures of analyze.py on embeddings with planted structure, where the right answer is known, or by hand."""

from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

import protocols.subspaces
from protocols.bootstrap import Estimate, bootstrap_counts, needed
from protocols.explore import d_primes, draw_up_map, explore_transfer, measure_components
from protocols.sharing import (
    debiased_cka,
    measure_sharing,
    participation_ratio,
    principal_angles,
    scatter_ratio,
    subspace_overlap,
)
from protocols.subspaces import (
    RANDOM_SEEDS,
    Trial,
    components_needed,
    determined,
    hits_by_k,
    hits_one_by_one,
    kept,
    principal_components,
    show_needed,
)
from protocols.tasks import Task, vectors_of

D, SHARED = 64, 20


def task_of(name: str, ids: np.ndarray) -> Task:
    """A task scored as people are: the nearest other image."""
    every = np.arange(len(ids))
    split = SimpleNamespace(labels=ids)
    mates = [np.flatnonzero((ids == i) & (every != row)) for row, i in enumerate(ids)]
    return Task(name, split, split, every, every, every, every, ids, mates, list(every[:, None]))


def planted(bases: list[np.ndarray], people: int = 60, shots: int = 6, noise: float = 0.02, inside: float = 0.0,
            seed: int = 0, offsets: list[np.ndarray] | None = None) -> tuple[dict, list[Task]]:
    """One task per basis [k, D]: identities live in its span, shots differ by noise; fit and test people differ.

    `noise` goes in every direction, `inside` only in the span: the more of it, the more of its dimensions are needed.
    """
    rng = np.random.default_rng(seed)
    embedded, tasks = {}, []
    for name, basis, offset in zip(("object", "face_hq", "face_lq", "body"), bases, offsets or [0.0] * 4, strict=False):
        def draw(basis=basis, offset=offset):
            x = np.repeat(rng.normal(size=(people, len(basis))), shots, axis=0)
            x = (x + inside * rng.normal(size=x.shape)) @ basis + offset
            x = x + noise * rng.normal(size=x.shape)
            return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

        tasks.append(task_of(name + "*", np.repeat(np.arange(people), shots)))
        embedded[name + "*"] = (draw(), draw())
    return embedded, tasks


def orthogonal(D: int, *sizes: int, seed: int = 0) -> list[np.ndarray]:
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0]
    return [q[a : a + k] for a, k in zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True)]


def pairs_of(result: dict) -> dict:
    return {(p["fit"].strip("*"), p["test"].strip("*")): p for p in result["pairs"]}


def transfer(embedded, tasks, headline, draws, seed, foundation=None, controls=True, delete=(0, 0), importance=0,
             device="cpu") -> dict:
    """A transfer and, by `controls`, what is explored beside it, as one dictionary."""
    found, curves, bases = protocols.subspaces.transfer(embedded, tasks, headline, draws, seed, foundation, device)
    pairs = [asdict(pair) for pair in found.pairs]
    if controls:
        explored, more = explore_transfer(embedded, tasks, found, curves, bases, draws, seed, delete, importance,
                                          device)
        pairs, curves = [p | asdict(e) for p, e in zip(pairs, explored, strict=True)], curves + more
    return asdict(found) | {"pairs": pairs, "curves": curves, "bases": bases}


def measure_curve(task, vectors, mean, basis, ks, counts):
    return Trial(task, vectors, counts).curve("", "", mean, basis, ks)


# ---------------------------------------------------------------- the sweep


def sweep_case(dtype, objects: bool, n: int = 45, D: int = 40):
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 9, n)
    if objects:
        mates, ignored, m = list(ids[:, None]), [ids[:0]] * n, 9
        task = Task("object", None, None, ids, ids, ids, np.arange(9), ids, mates, ignored)
    else:
        task = task_of("face_hq", ids)
        keep = [i for i in range(n) if len(task.mates[i])]
        task.mates, task.ignored, m = [task.mates[i] for i in keep], [task.ignored[i] for i in keep], n
        n = len(keep)
    scale = 1 / np.sqrt(1 + np.arange(D))
    return (rng.normal(size=(n, D)) * scale).astype(dtype), (rng.normal(size=(m, D)) * scale).astype(dtype), task


@pytest.mark.parametrize("objects", [True, False])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_fast_sweep_equals_the_slow_one(dtype, objects):
    probe, gallery, task = sweep_case(dtype, objects)
    every = list(range(1, 41))
    slow = hits_one_by_one(probe, gallery, task, every)
    fast = hits_by_k(probe, gallery, task, every)
    np.testing.assert_array_equal(fast, slow)
    np.testing.assert_allclose(fast.mean(1), slow.mean(1), atol=1e-6)
    assert 0.02 < slow.mean() < 0.9 and not slow[0].any()  # one coordinate: all ties, which count against a probe
    some = [1, 2, 7, 8, 30, 40]  # steps of more than one coordinate go through another operation
    np.testing.assert_array_equal(hits_by_k(probe, gallery, task, some), slow[[k - 1 for k in some]])
    np.testing.assert_array_equal(hits_by_k(probe, gallery, task, every, size=7 * len(gallery)), slow)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_fast_sweep_on_a_gpu():
    probe, gallery, task = sweep_case(np.float64, False)
    every = list(range(1, 41))
    np.testing.assert_array_equal(hits_by_k(probe, gallery, task, every, "cuda"),
                                  hits_one_by_one(probe, gallery, task, every))


def test_ignored_vectors_neither_help_nor_hurt():
    x = np.array([[1.0, 0.0], [0.9, 0.1], [0.6, 0.8], [0.0, 1.0]])
    task = Task("body", None, None, x, x[:1], x, np.arange(4), np.zeros(1), [np.array([2])], [np.array([0, 1])])
    assert hits_by_k(x[:1], x, task, [2]).all()  # the copy and a neighbour do not count: 2 is nearest
    task.ignored = [np.array([0])]
    assert not hits_by_k(x[:1], x, task, [2]).any()
    assert task.chance() == pytest.approx(1 / 3)


def test_class_means_of_images_in_any_order():
    """Training images not in the order of the classes: each must stand for its own class, one or two a class."""
    x = np.eye(4)
    labels = np.arange(4)
    for group in (np.array([2, 0, 3, 1]), np.array([2, 0, 3, 1, 0])):
        task = Task("object", None, None, labels, labels, np.arange(len(group)), group, labels,
                    list(labels[:, None]), [labels[:0]] * 4)
        probe, gallery = vectors_of(task, (x[group], x))
        np.testing.assert_allclose(gallery, x)
        assert hits_by_k(probe, gallery, task, [4]).all()


def test_components_needed_by_hand():
    ks = [1, 2, 4, 8]
    share = np.array([[0.5, 0.99, 0.98, 1.0], [0.5, 0.99, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, np.nan]])
    found = components_needed(share, ks, 0.99)
    np.testing.assert_array_equal(found, [8, 2, 1, np.nan])  # in the first, 4 falls below again; unknown in the last
    assert components_needed(np.array([0.5, 0.9, 1.0, 0.98]), ks, 0.99) == np.inf  # not even the largest
    assert components_needed(share[1], ks, 0.99) == 2
    assert kept(np.array([0.4, 0.2]), 0.6, 0.2).tolist() == pytest.approx([0.5, 0.0])
    assert np.isnan(kept(np.array([0.4]), 0.2, 0.2)).all()  # not above chance: nothing to keep


# ---------------------------------------------------------------- transfer


@pytest.fixture(scope="module")
def shared():
    (basis,) = orthogonal(D, SHARED)
    embedded, tasks = planted([basis] * 3, inside=1.0)
    return transfer(embedded, tasks, SHARED, 50, 0, foundation=embedded, delete=(0, SHARED)), embedded, tasks


def test_tasks_in_one_shared_subspace_serve_each_other(shared):
    result = shared[0]
    for pair in pairs_of(result).values():
        assert pair["raw"] > 0.5 and pair["kept"] > 0.99
        assert SHARED - 1 <= pair["k99"]["value"] <= SHARED + 1  # all of it is needed, and no more
        assert 17 <= pair["k95"]["low"] <= pair["k95"]["value"] <= pair["k95"]["high"] <= SHARED
        assert pair["k95_random"] > 2 * SHARED  # random subspaces of 64 dimensions need more
        assert pair["over_random"]["low"] > 0 and pair["random"]["value"] < pair["low"]


def test_the_controls_behave_as_they_should(shared):
    result, embedded, tasks = shared
    for pair in pairs_of(result).values():
        assert pair["bottom"]["value"] < 0.05  # the last 20 of 64 hold noise
        assert pair["pooled"]["value"] > 0.97  # the same subspace once more
        assert pair["over_foundation"] == {"value": 0.0, "low": 0.0, "high": 0.0}  # "untouched" is the space itself
        assert abs(pair["own_mean"]["value"] - pair["kept"]) < 0.05  # means are alike
        assert pair["deleted"]["value"] < 0.05  # without the shared subspace nothing is left
    curves = {(c.kind, c.fit, c.test): c for c in result["curves"]}
    a, b = "object*", "face_hq*"
    assert sum(c.kind == "random" for c in result["curves"]) == 3 * 3 * RANDOM_SEEDS
    deleted, bottom = curves["deleted", a, b], curves["bottom", a, b]
    assert deleted.ks[-1] < D and deleted.at(24).value < 0.1 < 0.8 < deleted.at(1).value
    assert bottom.ks[-1] == D and bottom.kept[-1] == 1
    # deleting the first k is what a space without them scores: by hand, from scratch
    mean, basis, _ = result["bases"][a]
    task = tasks[1]
    rest = ((embedded[b][1] - mean) @ basis[:, 24:]).astype(np.float32)
    by_hand = hits_one_by_one(rest, rest, task, [D - 24]).mean()
    assert deleted.score[deleted.ks.index(24)] == pytest.approx(by_hand, abs=0.01)
    again = transfer(embedded, tasks, SHARED, 3, 0, controls=False)
    assert {c.kind for c in again["curves"]} == {"components", "random"} and "pooled" not in again["pairs"][0]


def test_tasks_in_orthogonal_subspaces_do_not():
    a, b = orthogonal(D, SHARED, SHARED)
    embedded, tasks = planted([a, b])
    pairs = pairs_of(transfer(embedded, tasks, SHARED, 50, 0))
    for own, other in (("object", "face_hq"), ("face_hq", "object")):
        assert pairs[own, own]["kept"] > 0.97 and pairs[own, own]["k95"]["value"] <= SHARED
        assert pairs[own, other]["kept"] < 0.6 and pairs[own, other]["k95"]["value"] > SHARED
        assert pairs[own, other]["random"]["value"] > 0.6
        assert pairs[own, other]["over_random"]["high"] < 0  # worse than random: exactly the wrong subspace


def test_centring_by_either_mean():
    """Far from the fitted task's mean, all images of a task point one way once projected: its own mean parts them."""
    (basis,) = orthogonal(D, SHARED)
    embedded, tasks = planted([basis, basis], inside=1.0, offsets=[np.zeros(D), 6 * basis[0]])
    result = transfer(embedded, tasks, SHARED, 20, 0)
    a, b = "object*", "face_hq*"
    curves = {(c.kind, c.fit, c.test): c for c in result["curves"]}
    x, turn = embedded[b][1], result["bases"][a][1]
    scores = {}
    for kind, mean in (("components", result["bases"][a][0]), ("own mean", result["bases"][b][0])):
        z = ((x - mean) @ turn[:, :SHARED]).astype(np.float32)
        scores[kind] = hits_one_by_one(z, z, tasks[1], [SHARED]).mean()
        curve = curves[kind, a, b]
        assert curve.score[curve.ks.index(SHARED)] == pytest.approx(scores[kind], abs=0.004)
    assert scores["own mean"] > scores["components"] + 0.01


def test_rank_limit_is_marked_and_tasks_are_fitted_on_equally_many():
    (basis,) = orthogonal(D, SHARED)
    few = transfer(*planted([basis], people=30, shots=6), SHARED, 2, 0, controls=False)
    many = transfer(*planted([basis], people=60, shots=6), SHARED, 2, 0, controls=False)
    assert few["images_per_task"] == 180 and few["rank_limited"] and not many["rank_limited"]
    embedded, tasks = planted([basis, basis])
    tasks[1].fit = tasks[1].fit[:100]
    assert transfer(embedded, tasks, SHARED, 2, 0, controls=False)["images_per_task"] == 100


def turned_and_shuffled(embedded: dict, tasks: list[Task], seed: int) -> dict:
    """The same data: all dimensions turned at random, the images that are fitted on in another order."""
    rng = np.random.default_rng(seed)
    (turn,) = orthogonal(D, D, seed=seed)
    return {name: (base[rng.permutation(len(base))] @ turn, test @ turn) for name, (base, test) in embedded.items()}


def test_equal_decompositions_give_equal_answers():
    """40 images determine 39 of 64 components. 50 dimensions hold identities, so that neither 39 of them nor any
    basis of the other 25 may decide k99: it is beyond 39, and what is within does not depend on the decomposition."""
    (basis,) = orthogonal(D, 50)
    embedded, tasks = planted([basis, basis], inside=0.9, noise=0.05)
    for task in tasks:
        task.fit = np.arange(40)
    embedded = {name: (base[:40], test) for name, (base, test) in embedded.items()}
    plain = transfer(embedded, tasks, 99, 40, 0, foundation=embedded, delete=(10, 60), importance=100)
    other = turned_and_shuffled(embedded, tasks, 5)
    again = transfer(other, tasks, 99, 40, 0, foundation=other, delete=(10, 60), importance=100)
    assert plain["limit"] == again["limit"] == 39 and plain["images_per_task"] == 40
    for one, two in zip(plain["pairs"], again["pairs"], strict=True):
        assert one["k"] == two["k"] == 39  # 99 are not determined
        assert one["k99"]["value"] is None and one["k99"]["above"] == 39
        assert (one["deleted"]["from"], one["deleted"]["to"]) == (10, 39) and len(one["importance"]["change"]) == 39
        for key in ("k99", "k95"):
            assert one[key] == two[key]
            assert max(filter(None, one[key].values())) <= 39
        for key in ("kept", "full"):
            assert one[key] == pytest.approx(two[key], abs=1e-6)
        for key in ("bottom", "own_mean", "foundation", "deleted"):
            assert one[key]["value"] == pytest.approx(two[key]["value"], abs=1e-6)
        np.testing.assert_allclose(one["importance"]["change"], two["importance"]["change"], atol=1e-6)
    for one, two in zip(plain["curves"], again["curves"], strict=True):
        # without all 39 nothing would be left but the basis of the rest
        assert one.ks[-1] == (32 if one.kind == "deleted" else 39) and one.kind == two.kind
        if one.kind not in ("random", "pooled"):  # other subspaces of turned data; half of the images, the first ones
            np.testing.assert_allclose(one.score, two.score, atol=1e-6, err_msg=one.kind)
    rows, turned = (measure_components(data, tasks, result["bases"], result["limit"], 0)
                    for data, result in ((embedded, plain), (other, again)))
    assert {row["component"] for row in rows} == set(range(1, 40))
    for key in ("variance", "identity_dprime"):
        np.testing.assert_allclose([row[key] for row in rows], [row[key] for row in turned], rtol=1e-3, atol=1e-5)


def test_dead_dimensions_and_repeated_images_determine_nothing():
    (basis,) = orthogonal(D, SHARED)
    embedded, tasks = planted([basis, basis], noise=0)  # 360 images in 20 of 64 dimensions
    assert 18 <= transfer(embedded, tasks, 99, 2, 0, controls=False)["limit"] <= D
    x = np.random.default_rng(0).normal(size=(30, D))
    assert determined(principal_components(np.repeat(x, 4, axis=0))[2], 120) == 29  # 30 pictures, four times each
    x = np.pad(np.random.default_rng(0).normal(size=(200, 40)), ((0, 0), (0, 24)))
    assert determined(principal_components(x)[2], 200) == 40
    assert determined(principal_components(np.ones((9, D)))[2], 9) == 1


def test_components_that_are_not_enough_are_told():
    shown = show_needed(Estimate(np.inf, np.array([30.0] * 30 + [np.inf] * 10)), 39)
    assert shown == {"value": None, "low": 30, "high": None, "above": 39} and needed([shown]) == "> 39 [30, > 39]"
    assert needed([shown, {"value": 20, "low": 10, "high": 29}]) == "> 30 [20, > 34]"  # seeds
    assert show_needed(Estimate(np.nan, np.array([1.0])), 39) == {"value": None, "low": None, "high": None}
    assert needed([{"value": None, "low": None, "high": None}]) == "-"


def test_intervals_resample_identities():
    """Each identity is right or wrong as a whole: 20 identities, half right, give an interval of binomial width."""
    ids = np.repeat(np.arange(20), 10)
    task = task_of("face_hq", ids)
    x = np.zeros((200, 4))
    x[np.arange(200), 0] = 1
    x[:, 1] = np.where(ids < 10, ids + 1.0, 0)  # ten people differ, ten are all alike
    counts = np.array(list(bootstrap_counts(ids, 400, 0)), dtype=np.float32)
    curve = measure_curve(task, (x, x), np.zeros(4), np.eye(4), [1, 4], counts)
    assert curve.score.tolist() == [0, 0.5] and curve.kept[1] == 1
    low, high = np.quantile(curve.draws[:, 0], [0.025, 0.975])
    assert (curve.draws[:, 1] == 1).all() and low < curve.kept[0] < high < 0  # chance is 9 / 199


def test_components_equal_scikit_learn():
    x = np.random.default_rng(0).normal(size=(200, 12)) @ np.diag(np.arange(1, 13))
    mean, vectors, variances = principal_components(x)
    pca = PCA().fit(x)
    np.testing.assert_allclose(mean, x.mean(0))
    np.testing.assert_allclose(variances, pca.explained_variance_, rtol=1e-9)
    np.testing.assert_allclose(np.abs((vectors * pca.components_.T).sum(0)), 1, rtol=1e-6)


# ---------------------------------------------------------------- sharing


def test_overlap_and_angles_by_hand():
    e = np.eye(4)
    a, b = e[:, :2], np.stack([e[:, 0], np.cos(np.pi / 3) * e[:, 1] + np.sin(np.pi / 3) * e[:, 2]], 1)
    np.testing.assert_allclose(principal_angles(a, b), [0, 60], atol=1e-6)
    assert subspace_overlap(a, b) == pytest.approx((1 + 0.25) / 2)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 2)))[0]
    assert subspace_overlap(a @ turn, b) == pytest.approx(0.625)  # of the span, not of the basis
    q = np.linalg.qr(np.random.default_rng(1).normal(size=(400, 400)))[0]
    assert subspace_overlap(q[:, :100], np.eye(400)[:, :100]) == pytest.approx(0.25, abs=0.02)  # k / D


def test_participation_ratio_by_hand():
    assert participation_ratio(np.array([1.0, 1, 1, 0])) == pytest.approx(3)
    assert participation_ratio(np.array([3.0, 1])) == pytest.approx(16 / 10)


def test_debiased_cka():
    """By the definition of the unbiased HSIC with its sums written out; 1 for a rotation, 0 for unrelated spaces."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(7, 5))

    def hsic(k, l):
        n, total = len(k), 0.0
        k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))
        for i in range(n):
            for j in range(n):
                total += k[i, j] * l[j, i]
                total += sum(k[i, j] * l[p, q] for p in range(n) for q in range(n)) / (n - 1) / (n - 2)
                total -= 2 / (n - 2) * sum(k[i, j] * l[j, q] for q in range(n))
        return total / n / (n - 3)

    k, l = x @ x.T, y @ y.T
    assert debiased_cka(x, y) == pytest.approx(hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l)))
    x = rng.normal(size=(60, 40))
    turn = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    assert debiased_cka(x, 3 * x @ turn + 5) == pytest.approx(1)
    unrelated = [debiased_cka(rng.normal(size=(60, 40)), rng.normal(size=(60, 40))) for _ in range(20)]
    assert abs(np.mean(unrelated)) < 0.05  # the plain CKA of such spaces is 0.4


def test_scatter_and_d_prime_by_hand():
    # class means 1 and 5 about 3: 4 images x 2²; images about their class mean: 4 x 1²
    assert scatter_ratio(np.array([[0.0], [2], [4], [6]]), np.array([7, 7, 9, 9])) == pytest.approx(16 / 4)
    a, b = np.array([[1.0, 5], [3, 5]]), np.array([[-1.0, 5], [1, 5]])
    d = d_primes(a, b)
    assert d[0] == pytest.approx((2 - 0) / 1) and np.isnan(d[1])  # both variances are 1; the other column is constant


def test_single_components_tell_tasks_and_identities_apart(shared):
    (basis,) = orthogonal(D, SHARED)
    embedded, tasks = planted([basis, basis], noise=0.2, offsets=[np.zeros(D), 3 * basis[3]])
    bases = {t.domain: principal_components(embedded[t.domain][0]) for t in tasks}
    rows = measure_components(embedded, tasks, bases, D, 0)
    assert len(rows) == 2 * 2 * D
    own = [r for r in rows if r["fit"] == "object*" == r["test"]]
    first, last = (np.mean([r["identity_dprime"] for r in part]) for part in (own[:10], own[-10:]))
    assert first > 0.5 > 0.1 > abs(last)
    along = np.abs(bases["object*"][1].T @ basis[3])  # the offset's share in each component
    apart = np.array([abs(r["task_dprime"]) for r in own])
    assert np.corrcoef(along, apart)[0, 1] > 0.8 and along.argmax() == apart.argmax()
    assert sum(r["variance"] for r in own) == pytest.approx(1)


def test_sharing_finds_the_planted_subspaces(shared):
    result, embedded, tasks = shared
    found = asdict(measure_sharing(embedded, tasks, result["bases"], SHARED))
    assert found["chance"] == SHARED / D
    for pair in found["pairs"]:
        assert pair["overlap"] > 0.8 and pair["explained"] > 0.6
        assert pair["smallest_angle"] <= pair["median_angle"] <= pair["largest_angle"]
        assert (pair["overlap"] == pytest.approx(1)) == (pair["a"] == pair["b"])
    one = found["tasks"]["object*"]
    assert one["components_for_50"] < one["components_for_90"] < one["components_for_95"] and one["scatter_ratio"] > 1
    a, b = orthogonal(D, SHARED, SHARED)
    embedded, tasks = planted([a, b])
    bases = {t.domain: principal_components(embedded[t.domain][0]) for t in tasks}
    apart = [p for p in measure_sharing(embedded, tasks, bases, SHARED).pairs if p.a != p.b]
    assert all(p.overlap < 0.02 and p.explained < 0.05 for p in apart)


# ---------------------------------------------------------------- the map


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_the_map_keeps_planted_tasks_apart(method):
    a, b = orthogonal(D, 3, 3)
    embedded, tasks = planted([a, b], people=12, shots=8, offsets=[4 * a[0], 4 * b[0]])
    points = draw_up_map(embedded, tasks, method, 0, most=60)
    assert len(points) == 120 and {p["identity"] for p in points} == {-1, *range(8)}
    xy, task = np.array([(p["x"], p["y"]) for p in points]), np.array([p["task"] for p in points])
    means = np.array([xy[task == t.domain].mean(0) for t in tasks])
    nearest = np.linalg.norm(xy[:, None] - means, axis=2).argmin(1)
    assert (nearest == (task == tasks[1].domain)).mean() > 0.95
