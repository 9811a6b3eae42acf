"""Forced choice: stimuli and trials in the format of the model-vs-human toolbox, and what is computed of them."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import cohen_kappa_score

import evaluate
from data_prep import InputError
from data_prep.format import Split, stimulus_of
from data_prep.sources.stimuli import CATEGORIES
from protocols.bootstrap import Unscorable
from protocols.choice import Decisions, agreement, choose, score_choice, score_decisions
from protocols.humans import NO_ANSWER, UNSEEN, read_humans, read_trials
from protocols.results import Row, read_rows
from tests.conftest import mutated
from tests.test_body_sources import prepared, write_files

HEADER = "subj,session,trial,rt,object_response,category,condition,imagename"
CAT, DOG, TABBY, PUG = (CATEGORIES.index("cat"), CATEGORIES.index("dog"), "n02123045", "n02110958")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Three stimuli of each of cat, dog and oven; a reference with two classes of dogs, one of cats, one of fish."""
    folder = tmp_path_factory.mktemp("choice")
    write_files(folder / "edges", {f"{name}/{name}{i}.png": None for name in ("cat", "dog", "oven") for i in (1, 2, 3)})
    write_files(folder / "train", {f"{name}/{i}.jpg": None for name in (TABBY, PUG, "n02106662", "n01440764")
                                   for i in range(2)})
    (folder / "categories.csv").write_text(f"wnid,category\n{TABBY},cat\n{PUG},dog\nn02106662,dog\n")
    prepared("folder", folder / "train", folder / "data/object/train")
    prepared("stimuli", folder / "edges", folder / "data/object/edges", "--classes", folder / "categories.csv")
    return folder


@pytest.fixture(scope="module")
def edges(root) -> Split:
    return Split(root / "data/object/edges")


def write_trials(path: Path, answers: dict[str, list[str]], header: str = HEADER) -> Path:
    """A file in which each observer answers to cat1..3, dog1..3, oven1..3."""
    names = [f"{name}{i}" for name in ("cat", "dog", "oven") for i in (1, 2, 3)]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        for observer, told in answers.items():
            for i, (name, answer) in enumerate(zip(names, told, strict=False), 1):
                category = name.rstrip("123")
                image = f"{i:04d}_edg_s01_0_{category}_00_{name}.png"
                writer.writerow([observer, 1, i, 0.9, answer, category, 0, image])
    return path


# ---------------------------------------------------------------- stimuli


@pytest.mark.parametrize("image, stimulus", [
    ("0001_edg_s01_0_oven_00_oven10.png", "oven10"),
    ("0001_s5n_s01_0_bird_00_bird2-clock3.png", "bird2-clock3"),
    ("cat7-elephant1.png", "cat7-elephant1"),
    ("0001_nse_s01_0.03_elephant_10_n02504458_7209.png", "n02504458_7209"),
    ("0001_nse_s01_0.03_elephant_10_n02504458_7209", "n02504458_7209"),  # without an ending: not .03_elephant...
    ("0001_ske_s01_0_boat_00_boat-0068-sketch-23.png", "boat-0068-sketch-23"),
    (r" D:\stimuli\edge\0001_edg_s01_0_oven_00_Oven10.PNG ", "oven10"),
    ("datasets/edge/dnn/session-1/oven10.JPEG", "oven10"),
])
def test_a_stimulus_is_the_last_part_of_its_name(image, stimulus):
    assert stimulus_of(image) == stimulus


def test_stimuli_know_their_name_and_categories(edges):
    assert edges.protocol == {"name": "choice", "reference": "train", "ood": True, "choices": list(CATEGORIES),
                              "groups": {"cat": [TABBY], "dog": [PUG, "n02106662"]}}
    assert [edges.fields(row)["stimulus"] for row in (0, 4, 8)] == ["cat1", "dog2", "oven3"]
    assert [edges.classes[label] for label in edges.labels] == ["cat"] * 3 + ["dog"] * 3 + ["oven"] * 3


def test_cue_conflicts_keep_their_texture(tmp_path):
    src = write_files(tmp_path / "cue", {"cat/cat7-elephant1.png": None, "cat/cat7-cat2.png": None,
                                         "elephant/elephant1-oven3.png": None})
    split = prepared("stimuli", src, tmp_path / "object/cue")
    assert [split.fields(row).get("texture") for row in range(3)] == ["cat", "elephant", "oven"]


def test_the_toolbox_s_folders_of_sessions(tmp_path):
    src = write_files(tmp_path / "contrast", {"dnn/session-1/0001_cop_dnn_c05_dog_10_n02085620_7.png": None,
                                              "dnn/session-1/0002_cop_dnn_c05_cat_10_n02123045_9.png": None})
    split = prepared("stimuli", src, tmp_path / "object/contrast")
    assert [(split.classes[split.labels[row]], split.fields(row)["stimulus"]) for row in (0, 1)] == [
        ("dog", "n02085620_7"), ("cat", "n02123045_9")]


@pytest.mark.parametrize("files, options, words", [
    ({"edges/cat/cat1.png": None, "lines/cat/cat1.png": None}, (), "both the stimulus 'cat1'"),
    ({"cat/cat1.png": None}, ("--classes", "dawg"), "'dawg' is not a category of the stimuli"),
    ({"cat/cat1.png": None}, ("--part", "train"), "stimuli is for test splits of objects")])
def test_bad_stimuli(files, options, words, tmp_path):
    write_files(tmp_path / "src", files)
    (tmp_path / "dawg").write_text("class,category\nn1,cat\nn2,dawg\n")
    with pytest.raises(InputError, match=words):
        prepared("stimuli", tmp_path / "src", tmp_path / "object/x",
                 *(tmp_path / option if option == "dawg" else option for option in options))


# ---------------------------------------------------------------- trials


def test_trials_are_read_as_they_come(edges, tmp_path):
    """Upper-case headers, spaces, missing answers, folders before an image's name, several files, a byte order mark."""
    first = write_trials(tmp_path / "a.csv", {"s1": ["cat", "NA", "", "dog", "dog", " Cat ", "oven", "oven", "knife"]},
                         HEADER.replace("session", "Session").replace("subj", " Subj"))
    text = first.read_text().replace("0001_edg", r"C:\images/0001_edg").replace("rt,", "rt , ")
    first.write_text("\ufeff" + text, encoding="utf-8")
    second = write_trials(tmp_path / "b.csv", {"s2": ["cat", "cat"]})
    trials = read_trials([first, second], edges)
    assert trials.observers == ["s1", "s2"] and trials.conditions.tolist() == ["0"] * 9
    knife, oven = CATEGORIES.index("knife"), CATEGORIES.index("oven")
    assert trials.answers.tolist() == [[CAT, NO_ANSWER, NO_ANSWER, DOG, DOG, CAT, oven, oven, knife],
                                       [CAT, CAT] + [UNSEEN] * 7]


def test_accuracy_is_over_all_trials_and_no_answer_is_an_error(edges, tmp_path):
    """Two observers by hand: 6 and 4 of 9 right, mean 5/9 (as 87.125 % and 75.3125 % are means over real observers)."""
    trials = read_trials([write_trials(tmp_path / "a.csv", {
        "s1": ["cat", "cat", "cat", "dog", "dog", "na", "oven", "na", "cat"],
        "s2": ["cat", "cat", "na", "dog", "na", "na", "knife", "oven", "na"]})], edges)
    figures, _ = score_choice({}, np.array([CAT, DOG]), edges, np.ones(9, bool), trials, 2, 0)
    accuracy = {scope: found["human accuracy (mean of observers)"].value for scope, found in figures.items()}
    assert accuracy == pytest.approx({"2 of 16 categories": 4 / 6, "16 of 16 categories": 5 / 9})


def test_trials_of_stimuli_that_are_not_there_are_counted(edges, tmp_path, capsys):
    path = write_trials(tmp_path / "a.csv", {"s1": ["cat"] * 3})
    path.write_text(path.read_text().replace("_cat1", "_cat9"))
    assert read_trials([path], edges).answers[0, 0] == UNSEEN
    assert "object/edges: 2 trials of 1 observers; 1 of other stimuli are left out" in capsys.readouterr().out


@pytest.mark.parametrize("old, new, words", [
    ("object_response", "response", "line 1 lacks the column 'object_response'"),
    ("1,1,0.9,cat,cat", "1,1,0.9,cat,oven", "line 2: .* shows 'oven', in object/edges 'cat'"),
    ("1,1,0.9,cat", "1,1,0.9,aeroplane", "line 2: the answer 'aeroplane' is none of airplane, bear"),
    ("s1,1,2", ",1,2", "line 3: no observer"),
    ("_cat2.png", "_cat1.png", "line 3: s1 has answered .* before"),
    ("cat,cat,0,0002", "cat,cat,0002", "line 3: not as many fields"),
    (".png", "7.png", "no trial of a stimulus of object/edges")])
def test_bad_trials(old, new, words, edges, tmp_path):
    path = write_trials(tmp_path / "a.csv", {"s1": ["cat", "cat"]})
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match=words):
        read_humans((str(path),), {"object/edges": edges})


def test_damaged_trials_are_refused_in_one_line(edges, tmp_path):
    whole = write_trials(tmp_path / "a.csv", {"s1": ["cat", "dog", "na", "dog"], "s2": ["cat"]}).read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for _ in range(300):
        (tmp_path / "a.csv").write_bytes(mutated(whole, rng))
        try:
            read_humans((str(tmp_path / "a.csv"),), {"object/edges": edges})
        except InputError as error:
            assert 0 < len(error.message) < 700 and "\n" not in error.message, error.message
            refused += 1
    assert refused > 100


def test_two_splits_with_the_same_stimuli_have_to_be_told_apart(edges, tmp_path):
    """The toolbox's edges and silhouettes have the same names: a guess would score one by the answers to the other."""
    path, splits = write_trials(tmp_path / "edge.csv", {"s1": ["cat"]}), {"object/edges": edges, "object/lines": edges}
    for word, among in ((path, splits), (f"object/line={path}", splits),
                        (f"object/val={path}", {"object/edges": edges})):
        with pytest.raises(InputError, match=r"want SPLIT=.*/edge.csv with one of object/edges"):
            read_humans((str(word),), among)
    with pytest.raises(InputError, match="no split of `data_prep stimuli` is scored here"):
        read_humans((str(path),), {})
    assert list(read_humans((f"object/lines={path}",), splits)[1]) == ["object/lines"]
    assert list(read_humans((str(tmp_path),), {"object/edges": edges})[1]) == ["object/edges"]  # a folder of files
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_humans((str(tmp_path / "empty"),), splits)


# ---------------------------------------------------------------- what is computed


def test_error_consistency_by_hand():
    """A errs on 2 of 8, B on these and 2 more: they agree on 6 of 8, expected .75 x .5 + .25 x .5 = .5, kappa .5."""
    a, b = np.arange(8) < 6, np.arange(8) < 4
    accuracy, observed, kappa = agreement(np.array([a, b]), np.ones((2, 8), bool), np.ones(8))
    assert accuracy[:, 0].tolist() == [0.75, 0.5] and observed[0, 1] == 0.75 and kappa[0, 1] == kappa[1, 0] == 0.5
    # errors on other stimuli than the other's: A errs on 4..7, B on 0..3: observed 0, expected .5, kappa -1
    assert agreement(np.array([~b, b]), np.ones((2, 8), bool), np.ones(8))[2][0, 1] == -1
    # two that never err agree by necessity: nothing is known of their errors
    assert np.isnan(agreement(np.ones((2, 8), bool), np.ones((2, 8), bool), np.ones(8))[2][0, 1])


def test_error_consistency_is_cohen_s_kappa_of_what_both_saw():
    rng = np.random.default_rng(0)
    seen, weights = rng.random((4, 60)) < 0.8, rng.integers(0, 4, 60)
    right = (rng.random((4, 60)) < 0.6) & seen
    accuracy, _, kappa = agreement(right, seen, weights)
    for i, j in ((0, 1), (2, 3)):
        both = seen[i] & seen[j]
        assert kappa[i, j] == pytest.approx(cohen_kappa_score(right[i, both], right[j, both],
                                                              sample_weight=weights[both]))
        assert accuracy[i, j] == pytest.approx(np.average(right[i, both], weights=weights[both]))


def test_a_model_that_answers_as_an_observer_is_as_right_and_as_wrong():
    rng = np.random.default_rng(1)
    truth, answers = rng.integers(0, 16, 160), rng.integers(0, 16, 160)
    anna = np.where(rng.random(160) < 0.7, truth, answers)
    found = score_decisions(Decisions({"copy": anna}, {"anna": anna}, truth, np.full(160, -1)), 20, 0)
    assert found["copy error consistency with people"].value == 1
    assert found["copy observed consistency with people"].value == 1
    assert found["copy top-1"].value == found["accuracy of observer anna"].value == (anna == truth).mean()
    assert found["copy minus human accuracy"].value == found["copy share of observers beaten"].value == 0
    assert "error consistency among people" not in found  # one observer has no other
    assert found["copy top-1"].low < found["copy top-1"].value < found["copy top-1"].high


def test_a_model_is_held_against_each_observer_on_that_observer_s_stimuli():
    truth, u = np.zeros(6, int), UNSEEN
    models = {"m": np.array([0, 0, 0, 1, 1, 1])}
    people = {"a": np.array([0, 0, 0, 0, u, u]), "b": np.array([u, u, u, u, 0, 1])}
    found = score_decisions(Decisions(models, people, truth, np.full(6, -1)), 2, 0)
    assert found["m minus human accuracy"].value == pytest.approx(((0.75 - 1) + (0 - 0.5)) / 2)
    assert found["accuracy of observer b"].value == 0.5


def test_shape_share_counts_choices_of_either_cue_where_they_conflict():
    """Five conflicts and one picture whose cues agree, which does not count; of the five 2 by shape, 1 by texture."""
    truth, texture = np.array([0, 0, 0, 0, 0, 0]), np.array([1, 1, 1, 1, 1, 0])
    found = score_decisions(Decisions({"m": np.array([0, 0, 1, 2, NO_ANSWER, 0])}, {}, truth, texture), 2, 0)
    assert found["m shape share"].value == pytest.approx(2 / 3) and found["m top-1"].value == 0.5
    assert "m shape share" not in score_decisions(Decisions({"m": truth}, {}, truth, truth), 2, 0)


@pytest.fixture(scope="module")
def embedded(edges) -> tuple[np.ndarray, tuple[np.ndarray, Split]]:
    """Cats lie on axis 0, two classes of dogs on axes 1 and 2, fish on axis 3; the last stimulus is a fish."""
    reference = Split(edges.folder.parent / "train")
    axis = {TABBY: 0, PUG: 1, "n02106662": 2, "n01440764": 3}
    y = np.eye(4, dtype=np.float32)[[axis[reference.classes[label]] for label in reference.labels]]
    x = np.eye(4, dtype=np.float32)[[0, 0, 1, 1, 2, 0, 2, 0, 3]]
    return x, (y, reference)


def test_models_choose_among_the_categories_that_the_reference_has(edges, embedded):
    x, reference = embedded
    text = np.eye(16, 4, dtype=np.float32)[:, [2, 3, 0, 1]]  # of airplane and bear, which are not chosen among
    text[[CAT, DOG]] = np.eye(4)[[0, 1]]
    models, among = choose(x, edges, reference, np.eye(4)[[3, 2, 1, 0]] * 5,
                           ["n01440764", "n02106662", PUG, TABBY], {"zero-shot 1": text})
    c, d = CAT, DOG
    assert among.tolist() == [CAT, DOG]
    assert models["nearest-mean"].tolist() == [c, c, d, d, d, c, d, c, c]  # fish: equally far, the first
    assert models["head"].tolist() == models["nearest-mean"].tolist()  # of dogs the mean over two classes
    assert models["knn"][:8].tolist() == [c, c, d, d, d, c, d, c]
    assert models["zero-shot 1"][[0, 2, 5]].tolist() == [c, d, c]
    figures, first = score_choice(models, among, edges, np.ones(9, bool), None, 2, 0)
    assert list(figures) == ["2 of 16 categories"] and first.truth.tolist() == [c] * 3 + [d] * 3  # no oven
    top = figures["2 of 16 categories"]["nearest-mean top-1"]
    assert (top.value, top.chance, top.count) == (pytest.approx(4 / 6), 0.5, 6)


def test_class_weights_that_lack_a_category_do_not_choose(edges, embedded):
    x, reference = embedded
    models, _ = choose(x, edges, reference, np.eye(4), ["n01440764", "n02106662", PUG, "n1"], {})
    assert list(models) == ["nearest-mean", "knn"]


def test_a_reference_without_the_categories_is_refused(edges, embedded):
    x, (y, reference) = embedded
    with pytest.raises(Unscorable, match="--classes FILE"):
        choose(x, edges, (np.full_like(y, np.nan), reference), None, [], {})


def test_conditions_are_told_apart(edges, tmp_path):
    path = write_trials(tmp_path / "a.csv", {"s1": ["cat", "cat", "cat", "cat", "dog", "dog"]})
    path.write_text("\n".join(line.replace(",0,", ",c50,") if "_dog" in line else line.replace(",0,", ",c100,")
                              for line in path.read_text().splitlines()))
    trials = read_trials([path], edges)
    models = {"nearest-mean": np.array([CAT, DOG, DOG, DOG, DOG, DOG, CAT, CAT, CAT])}
    figures, _ = score_choice(models, np.array([CAT, DOG]), edges, np.ones(9, bool), trials, 2, 0)
    value = {scope: found["nearest-mean minus human accuracy"].value for scope, found in figures.items()
             if scope.startswith("2 of")}
    assert value == pytest.approx({"2 of 16 categories": (4 - 5) / 6, "2 of 16 categories, condition c100": -2 / 3,
                                   "2 of 16 categories, condition c50": 1 / 3})


# ---------------------------------------------------------------- evaluate.py


@pytest.fixture(scope="module")
def evaluated(root, tmp_path_factory) -> tuple[Path, list[Row]]:
    """A folder of results of an untouched tiny CLIP beside two observers, and its rows."""
    out = tmp_path_factory.mktemp("evaluated")
    people = write_trials(out / "edge.csv", {"anna": ["cat"] * 6 + ["oven"] * 3,
                                             "b|n": ["cat"] * 3 + ["dog", "na", "na"]})
    arguments = ["--backbone", "clip", "--size", "tiny", "--weights", "none", "--image-size", "32", "--probe", "0",
                 "--data", root / "data", "--out", out / "run", "--humans", people, "--bootstrap", "20",
                 "--workers", "0", "--prompts", "1", "--device", "cpu", "--sheet"]
    assert evaluate.main.main([str(a) for a in arguments], standalone_mode=False) == 0
    return out / "run/eval", read_rows(out / "run/eval")


def test_evaluation_writes_people_and_model(evaluated):
    _, rows = evaluated
    value = {(row.readout, row.measure, row.rule.split(",")[0]): row.value for row in rows if row.readout != "observer"}
    assert value["people", "accuracy", "2 of 16 categories"] == pytest.approx((3 / 6 + 4 / 6) / 2)
    assert value["people", "accuracy", "16 of 16 categories"] == pytest.approx((6 / 9 + 4 / 6) / 2)
    # both right on the cats, anna wrong on all dogs, b|n on two: observed 5/6; expected 1/2 x 2/3 + 1/2 x 1/3 = 1/2
    assert value["people", "error consistency", "2 of 16 categories"] == pytest.approx((5 / 6 - 1 / 2) / (1 - 1 / 2))
    readouts = {row.readout for row in rows if row.measure == "lead"}
    assert readouts == {"nearest-mean", "knn", "zero-shot 1"}  # untouched: no trained class weights
    for name in readouts:
        assert value[name, "lead", "2 of 16 categories"] == pytest.approx(
            value[name, "top-1", "2 of 16 categories"] - value["people", "accuracy", "2 of 16 categories"])
    chance = {(row.kind, row.readout): row.chance for row in rows if row.measure in ("top-1", "accuracy")}
    assert chance["choice", "nearest-mean"] == 1 / 2 and chance["human choices", "people"] == 1 / 16
    assert [row.metric for row in rows if row.headline] == ["nearest-mean top-1"]


def test_the_report_shows_people_and_model(evaluated):
    folder, _ = evaluated
    report = (folder / "report.md").read_text()
    assert "## Forced choice beside people" in report and "](choices.png)" in report
    assert "object/edges (out of distribution) | nearest-mean top-1 | 50.0 |" in report
    assert "| 6 | 2 | 58.3 [" in report and "50.0 to 66.7 | 6.2 |" in report  # stimuli, observers, mean, range, chance
    for name in ("choices", "sheet-object-edges"):
        with Image.open(folder / f"{name}.png") as image:
            assert min(image.size) > 300


def test_a_reference_without_the_categories_is_refused_before_anything_is_embedded(root, tmp_path):
    prepared("stimuli", root / "edges", tmp_path / "data/object/edges")  # without --classes
    shutil.copytree(root / "data/object/train", tmp_path / "data/object/train")
    with pytest.raises(InputError, match="has none of the categories: prepare it again with --classes FILE"):
        evaluate.main.main(["--backbone", "clip", "--size", "tiny", "--weights", "none",
                            "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")], standalone_mode=False)
