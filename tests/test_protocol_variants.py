"""Rules of scoring beside the customary ones, each against a literal transcription or a case computed by hand."""

import numpy as np
import pytest
from scipy.interpolate import interp1d

import evaluate
from tests.test_evaluate import FakeSplit, unit

# ---------------------------------------------------------------- insightface's TAR@FAR of folds


def literal_val(distances, same, folds, far_target, thresholds):
    """calculate_val of insightface's verification.py, threshold by threshold: mean TAR, its SD, mean FAR."""

    def rates(threshold, some):
        accepted = distances[some] < threshold
        genuine, impostors = same[some], ~same[some]
        return (accepted & genuine).sum() / genuine.sum(), (accepted & impostors).sum() / impostors.sum()

    tars, fars = [], []
    for fold in np.unique(folds):
        far_train = np.array([rates(threshold, folds != fold)[1] for threshold in thresholds])
        threshold = 0.0
        if far_train.max() >= far_target:  # SciPy of today refuses "slinear" where a FAR repeats; "linear" is the same
            threshold = float(interp1d(far_train, thresholds, kind="linear")(far_target))
        tar, far = rates(threshold, folds == fold)
        tars.append(tar)
        fars.append(far)
    return np.mean(tars), np.std(tars), np.mean(fars)


def made_pairs(seed, count):
    rng = np.random.default_rng(seed)
    x = unit(rng.normal(size=(count, 12)))
    same = rng.random(count) < 0.5
    y = unit(np.where(same[:, None], x, 0) + 0.35 * rng.normal(size=(count, 12)))
    return x, y, same, np.arange(count) * 10 // count


@pytest.mark.parametrize("seed, target", [(0, 1e-3), (1, 1e-3), (2, 1e-2), (3, 0.137)])
def test_tar_of_interpolated_thresholds_equals_a_literal_transcription(seed, target):
    x, y, same, folds = made_pairs(seed, 2600)  # 1,170 impostors or so in nine folds: no target is one of their FARs
    found = evaluate.grid_tar((x * y).sum(1), same, folds, target=target)
    expected = literal_val(((x - y) ** 2).sum(1), same, folds, target, np.arange(0, 4, 0.001))
    assert list(found) == [f"tar@far={target:g}", f"tar@far={target:g} sd", f"far found for {target:g}"]
    assert list(found.values()) == pytest.approx(expected, abs=1e-12) and 0 < expected[0] < 1 and expected[1] > 0


def test_tar_of_an_interpolated_threshold_by_hand():
    # impostors at squared distances 0.5005 and 1.5005: FAR is 0 up to the threshold 0.5, then 1/2 from 0.501 on; 1 from
    # 1.501 on. A target of 1/4 lies half-way between 0.5 and 0.501: 0.5005 is the threshold. Genuine pairs of the fold:
    # 0.5004 is below it, 0.5006 is not
    def at(*distances):
        return 1 - np.array(distances) / 2

    scores = np.concatenate([at(0.5005, 1.5005, 0.2), at(0.5004, 0.5006, 0.5003)])
    same, folds = np.array([0, 0, 1, 1, 1, 0], dtype=bool), np.array([0, 0, 0, 1, 1, 1])
    found = evaluate.grid_tar(scores, same, folds, target=0.25)
    # fold 0 by fold 1: one impostor at 0.5003, FAR 1/4 at 0.50025: the pair at 0.2 is accepted, no impostor is
    # fold 1: one of two genuine pairs, and the impostor at 0.5003
    assert list(found.values()) == pytest.approx([(1 + 1 / 2) / 2, 1 / 4, (0 + 1) / 2])
    # no threshold accepts a quarter of the impostors that lie opposite (4 is not below 3.999): nothing is accepted
    far_off = evaluate.grid_tar(np.array([1.0, -1, 1, -1]), np.tile([True, False], 2), np.repeat([0, 1], 2))
    assert list(far_off.values()) == [0, 0, 0]
    assert np.isnan(list(evaluate.grid_tar(scores, np.ones(6, bool), folds).values())).all()


def test_tar_of_interpolated_thresholds_weighs_pairs_as_repetition():
    x, y, same, folds = made_pairs(5, 400)
    counts = np.random.default_rng(0).integers(0, 3, 400)
    again, scores = np.repeat(np.arange(400), counts), (x * y).sum(1)
    assert evaluate.grid_tar(scores, same, folds, counts, 0.05) == pytest.approx(
        evaluate.grid_tar(scores[again], same[again], folds[again], target=0.05))


def test_tar_of_interpolated_thresholds_is_a_row_where_nine_folds_support_it():
    rule = "10 folds, thresholds 0 to 4 by 0.001 on the squared distance, interpolated to the FAR of the other folds"
    for impostors, offered in ((1120, True), (1110, False)):  # 1,008 and 999 in nine folds
        x, y, _, _ = made_pairs(6, impostors + 30)
        same, place = np.arange(impostors + 30) < 30, np.arange(impostors + 30)
        y[same] = unit(x[same] + 0.1)
        pairs = np.stack([place, place + len(x), same, place % 10], 1)
        split = FakeSplit(np.append(place, np.where(same, place, place + len(x))),
                          {"name": "verification", "folds": 10}, pairs=pairs)
        found, _ = evaluate.score_verification(np.concatenate([x, y]), split, 3, 0)
        assert (rule in found) == offered
        if offered:
            assert list(found)[-1] == rule and found[rule]["tar@far=0.001"].count == impostors + 30
            assert np.isfinite(found[rule]["tar@far=0.001"].draws).all()
