"""Search: distractors, open sets, changes of clothes, single shots; against literal transcriptions."""

import numpy as np
import pytest
import torch

from protocols.search import Search, draw_galleries, mates_in, score_gallery, search_gallery, tpir_at_fpir
from tests.test_evaluate import FakeSplit, unit
from tests.test_templates import literal_search

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
    there = search_gallery(x, probes, gallery, mates, 450 * 64, device=torch.device("cpu:0"))  # by torch
    assert [ranks.tolist() for ranks in here.ranks] == [ranks.tolist() for ranks in there.ranks]
    np.testing.assert_array_equal(here.first, there.first)
    np.testing.assert_allclose(here.correct, there.correct, rtol=1e-6)
    np.testing.assert_allclose(here.wrong, there.wrong, rtol=1e-6)
    assert np.isinf(here.first).any() or people < 300
    assert max(map(len, here.ranks)) >= 12 or people > 4


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


def test_a_cmc_ends_where_the_gallery_does():
    split = FakeSplit([0, 1, 0, 1, 2], {"name": "identification"}, role=np.array([0, 0, 1, 1, 1]))
    _, curve = score_gallery(unit(np.random.default_rng(0).normal(size=(5, 3))), split, 2, 0)
    assert len(curve["cmc"]) == 3 and curve["cmc"][-1] == 1


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
