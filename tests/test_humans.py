"""What evaluate.py makes of the ratings of people: known answers, paired intervals, bad files."""

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from data_prep import InputError
from data_prep.format import Split
from protocols.bootstrap import bootstrap_counts
from protocols.humans import RATING_COLUMNS, Rating, read_ratings, score_humans
from reports.tables import human_verdict
from tools.trials import draw_pairs


def write_ratings(path: Path, rows: list) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([RATING_COLUMNS, *rows])
    return path


# ---------------------------------------------------------------- raters and model


class Fake:
    """What `score_humans` needs of a split: labels, and the people on its images."""

    def __init__(self, domain: str, labels: list[int]) -> None:
        self.domain, self.name, self.labels, self.classes = domain, "test", np.array(labels), ["a", "b", "c", "d"]
        self.index = {"provenance": {"source": domain, "plan": domain}}

    def __len__(self) -> int:
        return len(self.labels)

    def fields(self, row: int) -> dict:
        return {"person": f"{self.labels[row]}"}


def vectors(*cosines: float) -> np.ndarray:
    """Unit vectors [2 n, 2] of which the rows 2 i and 2 i + 1 have the cosine i."""
    rows = [((1.0, 0.0), (c, np.sqrt(1 - c**2))) for c in cosines]
    return np.array(rows).reshape(-1, 2)


def rate(split: Fake, rater: str, *values: float) -> list[Rating]:
    """Ratings of the pairs (0, 1), (2, 3), ... of a split."""
    same = split.labels[0::2] == split.labels[1::2]
    return [Rating(f"{split.domain}/test", 2 * i, 2 * i + 1, bool(same[i]), rater, value)
            for i, value in enumerate(values)]


# two pairs of one person, then two of two people
FACES, THINGS = Fake("face_hq", [0, 0, 1, 1, 2, 3, 0, 2]), Fake("object", [0, 0, 1, 1, 2, 3, 0, 2])


def test_auc_of_raters_and_model_by_hand():
    # the model: genuine 0.9, 0.4; impostors 0.5, 0.1: of four (genuine, impostor) three are right: 3/4.
    # ann: genuine 3, 1; impostors 1, -3: 3 > 1, 3 > -3, 1 = 1 (half), 1 > -3: 3.5/4. ben: -1, 0 against 2, -2: 2/4
    x = {"face_hq/test": vectors(0.9, 0.4, 0.5, 0.1)}
    ratings = rate(FACES, "ann", 3, 1, 1, -3) + rate(FACES, "ben", -1, 0, 2, -2)
    found = score_humans(ratings, {"face_hq/test": FACES}, x, 20, 0)
    assert found.keys() == {"face_hq/test"}  # one domain: nothing to average over
    assert {metric: figure.value for metric, figure in found["face_hq/test"].items()} == pytest.approx({
        "AUC of rater ann": 3.5 / 4, "AUC of rater ben": 2 / 4, "AUC on human trials": 3 / 4,
        "human AUC (mean of raters)": (3.5 + 2) / 8, "model minus human AUC": 3 / 4 - (3.5 + 2) / 8,
        "share of raters beaten": 1 / 2})
    assert found["face_hq/test"]["AUC on human trials"].count == 4
    # half the pairs are shown the other way round: the same pairs, the same figures
    turned = [Rating(r.split, r.right, r.left, r.same, r.rater, r.value) for r in ratings]
    again = score_humans(turned, {"face_hq/test": FACES}, x, 20, 0)["face_hq/test"]
    assert all(again[metric].draws == pytest.approx(figure.draws, nan_ok=True)
               for metric, figure in found["face_hq/test"].items())


def test_the_model_is_scored_on_the_trials_of_each_rater_alone():
    # ben has not seen the second pair: on the rest the model is right in 2 of 2; over both raters (3/4 + 1) / 2
    x = {"face_hq/test": vectors(0.9, 0.4, 0.5, 0.1)}
    ben = [r for r in rate(FACES, "ben", 3, 0, -1, 3) if r.left != 2]
    found = score_humans(rate(FACES, "ann", 3, 1, 1, -3) + ben, {"face_hq/test": FACES}, x, 5, 0)
    values = {metric: figure.value for metric, figure in found["face_hq/test"].items()}
    assert values["AUC on human trials"] == (3 / 4 + 1) / 2 and values["AUC of rater ben"] == (1 + 0.5) / 2
    assert values["model minus human AUC"] == pytest.approx((3 / 4 - 3.5 / 4 + 1 - 1.5 / 2) / 2)


def test_all_domains_at_once_by_hand(capsys):
    # faces: model 3/4, ann 3.5/4; objects: model 4/4, ann 2/4 (-1, 0 against 2, -2). Everything: 7/8 against 5.5/8.
    # cat rated faces alone, and is not part of it; dan saw pairs of one kind alone, and is nowhere
    splits = {"object/test": THINGS, "face_hq/test": FACES}
    x = {"face_hq/test": vectors(0.9, 0.4, 0.5, 0.1), "object/test": vectors(0.9, 0.8, 0.5, 0.1)}
    ratings = rate(FACES, "ann", 3, 1, 1, -3) + rate(THINGS, "ann", -1, 0, 2, -2) + rate(FACES, "cat", -3, -3, 3, 3)
    found = score_humans(ratings + rate(FACES, "dan", 3, 2), splits, x, 20, 0)
    assert list(found) == ["object/test", "face_hq/test", "everything"]
    assert {metric: figure.value for metric, figure in found["everything"].items()} == pytest.approx({
        "AUC of rater ann": 5.5 / 8, "AUC on human trials": 7 / 8, "human AUC (mean of raters)": 5.5 / 8,
        "model minus human AUC": 1.5 / 8, "share of raters beaten": 1})
    assert "AUC of rater cat" in found["face_hq/test"] and found["everything"]["AUC on human trials"].count == 8
    assert "dan rated only pairs of one kind in face_hq/test" in capsys.readouterr().out


def planted(rng, people: int, model: float, human: float):
    """A split of `people` with 4 images each; scores and ratings of its pairs are d' = model and human, plus noise."""
    labels = np.repeat(np.arange(people), 4)
    split = SimpleNamespace(domain="face_hq", name="test", labels=labels, classes=[str(i) for i in range(people)])
    pairs, same = draw_pairs(labels, np.full(len(labels), -1), np.full(len(labels), -1), 2 * people, 0)
    rows = np.stack([2 * np.arange(len(pairs)), 2 * np.arange(len(pairs)) + 1], 1)
    split = Fake("face_hq", labels[pairs].ravel().tolist())
    split.classes = [str(i) for i in range(people)]
    cosine = np.clip(0.15 * (model * same + rng.normal(size=len(pairs))), -0.99, 0.99)
    ratings = [Rating("face_hq/test", a, b, bool(s), f"rater {k}", float(np.clip(human * s + rng.normal(), -3, 3)))
               for k in range(4) for (a, b), s in zip(rows.tolist(), same, strict=True)]
    return ratings, {"face_hq/test": split}, {"face_hq/test": vectors(*cosine)}


@pytest.mark.parametrize("model, human, verdict", [(3.0, 1.0, "above humans"), (0.5, 2.5, "below humans"),
                                                   (1.5, 1.5, "undecided")])
def test_the_sign_of_a_planted_difference(model, human, verdict):
    ratings, splits, x = planted(np.random.default_rng(1), 60, model, human)
    found = score_humans(ratings, splits, x, 200, 0)["face_hq/test"]
    lead = found["model minus human AUC"]
    assert human_verdict(lead) == verdict and lead.low < lead.value < lead.high and lead.readout == "lead"
    assert found["share of raters beaten"].value == pytest.approx({"above humans": 1, "below humans": 0}.get(
        verdict, found["share of raters beaten"].value))
    # against scikit-learn, rater by rater
    for rater in ("rater 0", "rater 3"):
        own = [r for r in ratings if r.rater == rater]
        assert found[f"AUC of rater {rater}"].value == pytest.approx(
            roc_auc_score([r.same for r in own], [r.value for r in own]))


def test_the_interval_of_a_difference_is_paired():
    """A model that answers as the rater does, but for a constant gain: what makes pairs hard for both cancels out."""
    rng = np.random.default_rng(0)
    ratings, splits, _ = planted(rng, 60, 1.0, 1.0)
    ratings = [r for r in ratings if r.rater == "rater 0"]
    x = {"face_hq/test": vectors(*(np.array([r.value for r in ratings]) / 4))}
    found = score_humans(ratings, splits, x, 200, 0)["face_hq/test"]
    assert found["model minus human AUC"].low == found["model minus human AUC"].high == 0
    assert found["AUC on human trials"].high - found["AUC on human trials"].low > 0.05
    # literally: people drawn with the same counts for both sides
    split = splits["face_hq/test"]
    people, inverse = np.unique(split.labels.astype(str), return_inverse=True)
    a, b = inverse[[r.left for r in ratings]], inverse[[r.right for r in ratings]]
    same, values = np.array([r.same for r in ratings]), np.array([r.value for r in ratings])
    weights = [np.where(same, w[a], w[a] * w[b]) for w in bootstrap_counts(np.arange(len(people)), 200, 0)]
    expected = [roc_auc_score(same, values, sample_weight=w) for w in weights]
    draws = np.sort(found["AUC on human trials"].draws)
    np.testing.assert_allclose(draws.mean(), np.mean(expected), atol=0.01)
    np.testing.assert_allclose(found["AUC on human trials"].low, np.quantile(expected, 0.025), atol=0.03)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("row, words", [
    (["face_hq/nowhere", "{a}", "{b}", "ann", "1"], "line 3: 'face_hq/nowhere' is not a split that is scored here"),
    (["face_hq/test", "{a}", "999999999", "ann", "1"], "line 3: face_hq/test has no image '999999999'"),
    (["face_hq/test", "{a}", "{b}", "ann", "4"], "line 3: rating '4': want a number from -3"),
    (["face_hq/test", "{a}", "{b}", "ann", "nan"], "line 3: rating 'nan'"),
    (["face_hq/test", "{a}", "{b}", "ann", "same"], "line 3: rating 'same'"),
    (["face_hq/test", "{a}", "{a}", "ann", "1"], "line 3: an image against itself"),
    (["face_hq/test", "{a}", "{b}", "  ", "1"], "line 3: no rater"),
    (["face_hq/test", "{b}", "{a}", "zoe", "1"], "line 3: zoe has rated this pair before, "),
    (["face_hq/test", "{a}", "{b}", "ann"], "line 3: not as many fields"),
    (["face_hq/test", "{a}", "{b}", "ann", "1", "2"], "line 3: not as many fields"),
])  # fmt: skip
def test_bad_ratings_are_named_by_their_line(row, words, demo_root, tmp_path):
    split = Split(demo_root / "face_hq/test")
    keys = {"a": split.jpeg(0)[0], "b": split.jpeg(1)[0]}
    path = write_ratings(tmp_path / "r.csv", [["face_hq/test", keys["a"], keys["b"], "zoe", "2"],
                                              [word.format(**keys) for word in row]])
    with pytest.raises(InputError) as error:
        read_ratings([path], {"face_hq/test": split})
    assert words in error.value.format_message() and "\n" not in error.value.format_message()


@pytest.mark.parametrize("text, words", [
    ("split,left_key,right_key,rater\n", "lacks the column 'rating'"), ("", "lacks the column 'split'"),
    (",".join(RATING_COLUMNS) + "\n", "no ratings in it"), (None, "cannot be read"),
    (b"\xff\xfe\xff", "cannot be read"),
])  # fmt: skip
def test_bad_files_of_ratings(text, words, tmp_path):
    path = tmp_path / "r.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=words):
        read_ratings([path], {})


def test_raters_of_one_kind_of_pair_alone_cannot_be_scored():
    with pytest.raises(InputError, match="no rater has rated both"):
        score_humans(rate(FACES, "dan", 3, 2), {"face_hq/test": FACES},
                     {"face_hq/test": vectors(0.9, 0.4, 0.5, 0.1)}, 5, 0)
