"""Trials for people, rated in a real browser, and what evaluate.py makes of ratings, experts and published figures."""

import base64
import csv
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import evaluate
from data_prep import InputError, read_lines
from data_prep.__main__ import cli
from data_prep.format import Split
from protocols.bootstrap import bootstrap_counts, intervals, margin, weighted_mean
from protocols.humans import RATING_COLUMNS, Rating, find_row, read_ratings, score_humans
from protocols.pairs import SCORE_BINS, score_verification
from protocols.results import Row, read_stages
from reports.rows import rows_of, write_draws, write_rows
from reports.tables import (
    beside,
    datasets_of,
    draw_stages,
    human_verdict,
    read_published,
    show_published,
    show_stages,
    to_html,
)
from tests.conftest import TINY, script
from tests.test_train import spoil_jpeg
from tools.trials import draw_pairs, draw_trials
from train import Options, plan_batches

CHROMIUM, DRIVER = (next(filter(None, map(shutil.which, names)), None)
                    for names in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",)))
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the name that WebDriver gives to a reference to an element


@pytest.fixture(scope="module")
def trials(demo_root, tmp_path_factory) -> Path:
    """The folder of a page with 6 trials of each domain of the demo."""
    out = tmp_path_factory.mktemp("trials")
    result = script("-m", "data_prep", "trials", "--src", demo_root, "--out", out, "--pairs", "6")
    assert "pictures of people" in result.stdout and "24 trials" in result.stdout
    return out


def draw(*arguments) -> None:
    cli.main(["trials", *map(str, arguments)], standalone_mode=False)


def score(*arguments) -> None:
    """evaluate.py in this process."""
    assert evaluate.main.main([str(a) for a in arguments], standalone_mode=False) == 0


def listed(folder: Path) -> list[dict]:
    with open(folder / "trials.csv", newline="") as file:
        return list(csv.DictReader(file))


def truth(root: Path, trial: dict) -> bool:
    split = Split(root / trial["split"])
    return len({split.labels[find_row(split, trial[key])] for key in ("left_key", "right_key")}) == 1


def write_ratings(path: Path, rows: list) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([RATING_COLUMNS, *rows])
    return path


# ---------------------------------------------------------------- drawing


def test_trials_are_balanced_and_spread(demo_root, trials):
    rows = listed(trials)
    assert Counter(row["split"] for row in rows) == dict.fromkeys(
        ("object/val", "face_hq/test", "face_lq/test", "body/test"), 6)
    assert all(sum(truth(demo_root, row) for row in rows if row["split"] == name) == 3
               for name in {row["split"] for row in rows})
    answers = [truth(demo_root, row) for row in rows]
    assert answers != sorted(answers) and answers != sorted(answers, reverse=True)
    again = trials / "again"
    draw("--src", demo_root, "--out", again, "--pairs", "6")
    assert (again / "index.html").read_bytes() == (trials / "index.html").read_bytes()


def test_no_image_is_shown_twice_where_there_are_enough():
    labels = np.repeat(np.arange(12), 5)
    nothing = np.full(60, -1)
    pairs, same = draw_pairs(labels, nothing, nothing, 24, 0)
    assert len(pairs) == 24 and same.sum() == 12 and ((labels[pairs[:, 0]] == labels[pairs[:, 1]]) == same).all()
    assert len(np.unique(pairs)) == 48
    assert set(Counter(labels[pairs[same, 0]]).values()) == {1}  # 12 people, 12 pairs: each once
    assert set(Counter(labels[pairs[~same]].ravel()).values()) == {2}
    assert not np.array_equal(draw_pairs(labels, nothing, nothing, 24, 1)[0], pairs)
    # four people with 3 images, one with 20: who has new images left comes before those whose turn it is
    labels = np.repeat(np.arange(5), [3, 3, 3, 3, 20])
    pairs, same = draw_pairs(labels, nothing[:32], nothing[:32], 16, 0)
    assert len(np.unique(pairs[same])) == 16 and set(labels[pairs[same]].ravel()) == set(range(5))
    # few images: they come again, but no pair does; and no more of one kind than of the other
    pairs, same = draw_pairs(np.array([0, 0, 0, 1]), nothing[:4], nothing[:4], 24, 0)
    assert same.sum() == 3 and (~same).sum() == 3 and len({frozenset(pair) for pair in pairs.tolist()}) == 6


def test_both_kinds_are_drawn_across_cameras():
    labels, camera = np.repeat(np.arange(6), 4), np.tile([0, 0, 1, 1], 6)
    pairs, _ = draw_pairs(labels, camera, np.full(24, -1), 12, 0)
    assert len(pairs) == 12 and (camera[pairs[:, 0]] != camera[pairs[:, 1]]).all()
    assert not len(draw_pairs(labels, np.zeros(24, dtype=int), np.full(24, -1), 12, 0)[0])
    pairs, _ = draw_pairs(np.where(labels < 2, labels, -1), camera, np.full(24, -1), 40, 0)
    assert (labels[pairs] < 2).all()  # unlabelled images are never shown


def test_damaged_images_are_not_shown(demo_root, tmp_path):
    shutil.copytree(demo_root / "face_hq/test", tmp_path / "face_hq/test")
    first, _ = draw_trials(Split(tmp_path / "face_hq/test"), 10, 0)
    spoil_jpeg(tmp_path / "face_hq/test", int(first[0, 0]))
    pairs, same = draw_trials(Split(tmp_path / "face_hq/test"), 10, 0)
    assert first[0, 0] not in pairs and len(pairs) == 10 and same.sum() == 5


@pytest.mark.parametrize("place, words", [
    ("face_hq/train", "a training split"), ("nowhere", "no shards"), ("twice", "is named twice")])
def test_bad_places(place, words, demo_root, tmp_path):
    places = [demo_root, demo_root / "body/test"] if place == "twice" else [demo_root / place]
    options = [option for path in places for option in ("--src", path)]
    with pytest.raises(click.ClickException) as error:
        draw(*options, "--out", tmp_path / "t")
    assert words in error.value.format_message() and "\n" not in error.value.format_message()


# ---------------------------------------------------------------- the page, in a browser


class Browser:
    """A headless Chromium by the WebDriver protocol: as much of it as these tests need."""

    def __init__(self, folder: Path) -> None:
        self.downloads = folder / "downloads"
        self.downloads.mkdir()
        self.log = open(folder / "chromedriver.log", "w+")  # noqa: SIM115 (open as long as the process writes)
        self.process = subprocess.Popen([DRIVER, "--port=0"], stdout=self.log, stderr=self.log, text=True)
        try:
            self.root, self.session = f"http://127.0.0.1:{self.wait(self.port)}", ""
            arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                         f"--user-data-dir={folder / 'profile'}", "--window-size=1000,900"]
            options = {"binary": CHROMIUM, "args": arguments,
                       "prefs": {"download.default_directory": str(self.downloads)}}
            made = self.call("POST", "/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
            self.session = f"/session/{made['sessionId']}"
        except BaseException:
            self.process.kill()
            raise

    def port(self) -> str | None:
        self.log.seek(0)
        found = re.search(r"started successfully on port (\d+)", self.log.read())
        return found and found[1]

    @staticmethod
    def wait(for_what, seconds: float = 30):
        """What a function returns once that is true."""
        end = time.monotonic() + seconds
        while not (found := for_what()):
            assert time.monotonic() < end, "the browser did not answer in time"
            time.sleep(0.05)
        return found

    def call(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def open(self, page: Path) -> None:
        self.call("POST", f"{self.session}/url", {"url": page.resolve().as_uri()})

    def run(self, code: str):
        return self.call("POST", f"{self.session}/execute/sync", {"script": f"return {code}", "args": []})

    def press(self, keys: str) -> None:
        """Key presses as a person makes them, to whatever has the focus."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", f"{self.session}/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def click(self, selector: str) -> None:
        found = self.call("POST", f"{self.session}/element", {"using": "css selector", "value": selector})
        self.call("POST", f"{self.session}/element/{found[ELEMENT]}/click", {})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("GET", f"{self.session}/screenshot")))

    def close(self) -> None:
        try:
            if self.session:
                self.call("DELETE", self.session)
        finally:
            self.process.terminate()
            self.process.wait(10)
            self.log.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip("no Chromium with chromedriver here (Debian: apt-get install chromium chromium-driver)")
    found = Browser(tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


BACKSPACE = "\ue003"


def test_a_page_is_rated_resumed_and_read_back(browser, trials, demo_root, tiny_run, tmp_path, capsys):
    page, rows, name = trials / "index.html", listed(trials), 'Ann "A", x'
    right = {(row["split"], row["left_key"]): truth(demo_root, row) for row in rows}

    def look() -> tuple[dict, int]:
        """The trial on the screen, by its left picture, and the progress."""
        source = browser.run("document.getElementById('left').src").partition("base64,")[2]
        for row in rows:
            split = Split(demo_root / row["split"])
            if split.jpeg(find_row(split, row["left_key"]))[1] == base64.b64decode(source):
                shown.add((row["split"], row["left_key"]))
                return row, browser.run("document.getElementById('bar').value")
        raise AssertionError("the page shows a picture that no trial has")

    def rate(count: int) -> None:
        for _ in range(count):
            row, _ = look()
            browser.press("7" if right[row["split"], row["left_key"]] else "2")

    shown: set = set()
    browser.open(page)
    assert browser.run("document.getElementById('trial').hidden")
    browser.press("7")  # no trial is shown yet: nothing is rated
    browser.click("#rater")
    browser.press(name)
    browser.press("\ue007")
    assert look()[1] == 0
    rate(9)
    browser.press("1" + BACKSPACE)  # a slip is taken back
    assert look()[1] == 9
    before = look()[0]
    browser.press("9")  # no such rating
    assert look() == (before, 9)
    rate(1)

    browser.open(page)  # a reload: the name is known, the rest goes on
    assert "10 of 24" in browser.run("document.getElementById('known').textContent")
    browser.click("#who button")
    assert look()[1] == 10
    rate(14)
    assert browser.run("document.getElementById('trial').hidden") and len(shown) == 24
    browser.click("#save")
    path = browser.wait(lambda: next(browser.downloads.glob("*.csv"), None))
    with open(path, newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == list(RATING_COLUMNS) and {row["rater"] for row in table} == {name}
    assert [{key: row[key] for key in rows[0]} for row in table] == rows
    assert all(int(row["rating"]) == (3 if right[row["split"], row["left_key"]] else -2) for row in table)

    orders = []  # another rater sees the same trials in another order; the same one always in the same
    for rater in ("b", "c", "b"):
        browser.open(page)
        browser.run("localStorage.clear()")
        browser.run(f"begin({rater!r})")
        orders.append(browser.run("order"))
    assert orders[0] == orders[2] != orders[1] and sorted(orders[1]) == list(range(24))

    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    other = write_ratings(tmp_path / "other.csv", [[*row.values(), "b", (-1) ** i] for i, row in enumerate(rows)])
    score("--run", tmp_path / "run", "--humans", path, "--humans", other, "--bootstrap", 10, "--workers", 0,
          "--crowd", 0)
    found = {(r["weights"], r["domain"], r["metric"]): r for r in json.loads(
        (tmp_path / "run/eval/results.json").read_text()) if r["protocol"].startswith("human trials")}
    assert found["tuned", "all", f"AUC of rater {name}"]["value"] == 1  # rated without a mistake
    other_auc = found["tuned", "all", "AUC of rater b"]["value"]
    assert found["tuned", "all", "human AUC (mean of raters)"]["value"] == pytest.approx((1 + other_auc) / 2)
    assert {domain for _, domain, _ in found} == {"object", "face_hq", "face_lq", "body", "all"}
    assert "everything             model minus human AUC" in capsys.readouterr().out
    text = (tmp_path / "run/eval/report.md").read_text()
    assert "| everything | 24 | 2 |" in text and "| face_hq/test | 6 | 2 | " in text
    with open(tmp_path / "run/eval/results.csv") as file:
        assert sum(row["protocol"].startswith("human trials") for row in csv.DictReader(file)) == len(found)


def test_the_page_is_offline_and_does_not_tell(browser, trials, tmp_path):
    text = (trials / "index.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", text) and "fetch(" not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert set(data["trials"][0]) == {*RATING_COLUMNS[:3], "question"}  # no truth, no label, no name
    browser.open(trials / "index.html")
    browser.run("begin('d')")
    assert browser.wait(lambda: browser.run("document.getElementById('left').naturalWidth"))
    # what a page must not do is forbidden by the page itself, should a change to it forget
    blocked = """new Promise(done => {
        document.addEventListener("securitypolicyviolation", event => done(event.blockedURI), {once: true});
        new Image().src = "http://127.0.0.1:9/x.png";
        setTimeout(() => done("nothing"), 5000);
    })"""
    assert browser.run("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0
    assert browser.run(blocked) == "http://127.0.0.1:9/x.png"
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


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


# ---------------------------------------------------------------- experts


def write_scored(folder: Path, config: dict, values: dict[str, np.ndarray], people: np.ndarray) -> Path:
    """An evaluated run with one headline a domain, the mean of a value per probe; resampled by person."""
    (folder / "eval").mkdir(parents=True)
    results = []
    for domain, own in values.items():
        found = intervals(lambda w, own=own: {"rank-1": weighted_mean(own, w)},
                          bootstrap_counts(people, 300, 0), len(own))
        results += rows_of(found, Row(folder.name, "tuned", domain, "test", kind="reid", rule="general"))
    write_rows(folder / "eval", [row for row, _ in results])
    write_draws(folder / "eval", results, 0)
    options = {"backbone": "clip", "size": "tiny", "model": None, "weights": "none", "image_size": 32, "embed_dim": 0,
               "seed": 0, "schedule": "B", "out": str(folder)}
    (folder / "config.json").write_text(json.dumps(options | config))
    return folder


ALL = {"domains": ["face_hq", "body"], "counts": {"face_hq": 1000, "body": 1000}}


def one(domain: str, images: int = 1000, **more) -> dict:
    return {"domains": [domain], "counts": {domain: images}, **more}


def compared(out: Path, *arguments) -> list[dict]:
    code = evaluate.main.main(["compare", *map(str, arguments), "--out", str(out)], standalone_mode=False)
    assert code == 0
    return json.loads((out / "comparison.json").read_text())


@pytest.mark.parametrize("lead, spread, delta, verdict", [
    (0.0, 0.01, 0.01, "non-inferior"),  # as good, and 400 probes of 100 people tell it
    (0.05, 0.01, 0.01, "non-inferior"),  # better
    (-0.05, 0.01, 0.01, "inferior"),
    (-0.05, 0.01, 0.1, "non-inferior"),  # worse by less than what matters
    (0.0, 1.0, 0.01, "undecided"),  # as good, but it could be otherwise
])  # fmt: skip
def test_non_inferiority_of_planted_differences(lead, spread, delta, verdict, tmp_path, capsys):
    rng, people = np.random.default_rng(3), np.repeat(np.arange(100), 4)
    hard = rng.uniform(0.3, 0.7, 100)[people]  # what both find hard: far wider than delta, and it cancels out
    noise = spread * rng.normal(size=400)
    run = write_scored(tmp_path / "run", ALL, {"face_hq": hard + lead + noise - noise.mean(), "body": hard}, people)
    expert = write_scored(tmp_path / "expert", one("face_hq"), {"face_hq": hard, "body": 0 * hard}, people)
    (row,) = compared(tmp_path / "c", run, expert, "--experts", "--delta", delta)
    assert row["verdict"] == verdict and row["difference"] == pytest.approx(lead, abs=1e-6)
    assert (row["domain"], row["run"], row["expert"], row["delta"]) == ("face_hq", "run", "expert", delta)
    assert row["low"] <= row["difference"] <= row["high"]
    if spread < 1:
        assert row["high"] - row["low"] < 0.01 < np.ptp(hard)
    text = capsys.readouterr().out
    assert f"On the headlines together: {verdict}; no expert of body was given" in text
    with open(tmp_path / "c/comparison.csv") as file:
        (line,) = csv.DictReader(file)
    assert {"difference", "low", "high", "delta", "verdict"} < line.keys() and line["verdict"] == verdict
    assert (tmp_path / "c/comparison.png").stat().st_size > 5000


def test_a_saturated_metric_asks_for_a_tenth_of_the_experts_error(tmp_path):
    # 99.5 against 99.8: within a point, but a point would be five times what the expert gets wrong
    people = np.arange(1000)
    expert, run = np.ones(1000), np.ones(1000)
    expert[:2], run[:5] = 0, 0
    folders = [write_scored(tmp_path / "run", ALL, {"face_hq": run}, people),
               write_scored(tmp_path / "expert", one("face_hq"), {"face_hq": expert}, people)]
    (row,) = compared(tmp_path / "c", *folders, "--experts")
    assert row["delta"] == pytest.approx(0.0002) and row["verdict"] != "non-inferior"
    assert [margin(value, 0.01) for value in (0.5, 0.9, 0.95, 1.0)] == pytest.approx([0.01, 0.01, 0.005, 0])
    assert [margin(value, 0.1) for value in (0.5, 0.95)] == pytest.approx([0.1, 0.005])
    # a run that makes no mistake where its expert makes none is not inferior, though the margin is 0
    perfect = [write_scored(tmp_path / name, config, {"face_hq": np.ones(1000)}, people)
               for name, config in (("p", ALL), ("q", one("face_hq")))]
    assert compared(tmp_path / "d", *perfect, "--experts")[0]["verdict"] == "non-inferior"


def test_seeds_of_run_and_experts_are_averaged(tmp_path):
    people, ones = np.arange(50), np.ones(50)
    runs = [write_scored(tmp_path / f"run-s{s}", ALL | {"seed": s}, {"face_hq": v * ones, "body": v * ones}, people)
            for s, v in enumerate((0.4, 0.6))]
    experts = [write_scored(tmp_path / f"{d}-s{s}", one(d, seed=s), {d: v * ones}, people)
               for d, v in (("face_hq", 0.45), ("body", 0.7)) for s in (0, 1)]
    face, body = compared(tmp_path / "c", runs[0], *experts, runs[1], "--experts")
    assert (face["run"], face["expert"]) == ("run-s0 run-s1", "face_hq-s0 face_hq-s1")
    assert face["difference"] == pytest.approx(0.05) and face["verdict"] == "non-inferior"
    assert body["difference"] == pytest.approx(-0.2) and body["verdict"] == "inferior"


@pytest.mark.parametrize("config, words", [
    (one("face_hq", 5000), "saw 5,000 images of face_hq"), (one("object"), "was not trained on object"),
    (one("face_hq", model="vit"), "starts from another backbone"), (ALL | {"schedule": "A"}, "is no expert"),
])  # fmt: skip
def test_experts_that_do_not_match_are_refused(config, words, tmp_path):
    people = np.arange(20)
    run = write_scored(tmp_path / "run", ALL, {"face_hq": np.ones(20)}, people)
    expert = write_scored(tmp_path / "e", config, {"face_hq": np.ones(20), "object": np.ones(20)}, people)
    with pytest.raises(InputError, match=words):
        compared(tmp_path / "c", run, expert, "--experts")


@pytest.mark.parametrize("options, words", [
    (["--delta", "0.02"], "give --experts too"), (["--experts", "--weights", "foundation"], "leave it out"),
    (["--experts"], "want RUN and at least one expert")])
def test_options_of_compare_that_contradict(options, words, tmp_path):
    run = write_scored(tmp_path / "run", ALL, {"face_hq": np.ones(9)}, np.arange(9))
    with pytest.raises(InputError, match=words):
        compared(tmp_path / "c", run, *options)


# ---------------------------------------------------------------- published figures, stages, the report


def test_published_figures_have_sources_and_known_metrics():
    rows = read_published()
    humans, experts = ([row for row in rows if row.kind == kind] for kind in ("human", "expert"))
    assert len(humans) >= 5 and len(experts) > 100 and all(row.source and row.who for row in rows)
    assert not any(row.same_protocol for row in humans)  # people were never asked in the way a model is
    assert len({(r.kind, r.dataset, r.domain, r.metric, r.who, r.protocol) for r in rows}) == len(rows)
    # the units: percent in the file, as printed there
    (lfw,) = [row for row in humans if row.dataset == "lfw"]
    assert lfw.value == pytest.approx(0.9753) and min(row.value for row in rows) > 0.3


def test_published_figures_stand_beside_the_data_set_that_they_are_of(tmp_path):
    rows = read_published()
    names = ["face_hq/LFW", "face_lq/lfw", "body/market-1501", "object/val", "face_lq/tinyface"]
    assert datasets_of(names, (), rows) == {"face_hq/LFW": "lfw", "body/market-1501": "market1501",
                                            "face_lq/tinyface": "tinyface"}  # a degraded LFW is not LFW
    given = datasets_of(names, ("object/val=ImageNet", "face_hq/LFW="), rows)
    assert given["object/val"] == "imagenet" and "face_hq/LFW" not in given
    for word, said in (("object/val=cifar", "nothing is published of 'cifar'"), ("object/x=lfw", "want SPLIT=DATASET"),
                       ("object/val", "want SPLIT=DATASET")):
        with pytest.raises(InputError, match=said):
            datasets_of(names, (word,), rows)

    def row(domain, split, rule, flip, weights="tuned"):
        return Row("r", weights, domain, split, "", "rank-1", 0.5, 0.4, 0.6, 9, rule=rule, flip=flip)

    mine = [row("body", "market-1501", "general", False, "foundation"), row("body", "market-1501", "general", False),
            row("face_lq", "tinyface", "whole gallery", True)]
    found = beside(mine, datasets_of(names, (), rows), rows)
    same = {(one.who, name, one.metric): one.comparable(r) for one, name, r in found}
    assert same["ViT-B baseline", "body/market-1501", "rank-1"] and not same["OSNet x1.0", "body/market-1501", "rank-1"]
    assert same["ViT-B AdaFace WebFace4M", "face_lq/tinyface", "rank-1"]
    assert not any(same[key] for key in same if key[2] == "accuracy")
    text = "\n".join(show_published(found))
    assert "| face_hq/LFW | accuracy | not computed | 97.53 | people, averaged | no |" in text
    assert "| body/market-1501 | rank-1 | 50.0 (tuned) | 94.60 | ViT-B baseline | yes |" in text
    flipped = [row("body", "market-1501", "general", True)]
    found = beside(flipped, {"body/market-1501": "market1501"}, rows)
    assert found and not any(one.comparable(r) for one, _, r in found)
    assert show_published([]) == []
    (tmp_path / "humans.csv").write_text("dataset,domain,metric,protocol,value,who,source,same_protocol,requires\n"
                                         "lfw,face_hq,accuracy,x,97.5,people,,no,\n")
    with pytest.raises(InputError, match=r"humans.csv, line 2: not a published figure"):
        read_published(tmp_path)


def test_stages_of_a_sequential_run_by_hand(tmp_path):
    # 10 steps, three domains: the stages end after steps 4, 7 and 10 (floor(3 s / 10) grows at s = 4 and 7)
    config = {"order": ["body", "object", "face_hq"], "domains": ["object", "face_hq", "body"], "steps": 10}
    options = Options(schedule="sequential", domains=config["order"], batch=8, images=80)
    plan = plan_batches(options, [range(100)] * 3)[:, 0]
    assert [config["domains"][k] for k in plan.argmax(1)] == ["body"] * 4 + ["object"] * 3 + ["face_hq"] * 3
    assert read_stages(tmp_path, config) is None
    assert "--eval-every 3" in "\n".join(show_stages(None, config))
    looks = [{"step": step, "auc": {"body/test": 0.5 + auc, "object/val": 0.6}}
             for step, auc in ((0, 0), (2, 0.1), (4, 0.4), (6, 0.3), (8, 0.2), (10, 0.1))]
    (tmp_path / "probe.jsonl").write_text("\n".join(map(json.dumps, looks)))
    stages = read_stages(tmp_path, config)
    assert stages.names == ["start", "body", "object", "face_hq"] and stages.steps == [0, 4, 6, 10]
    assert stages.ends == [0, 4, 7, 10] and stages.tasks == ["body/test", "object/val"]
    assert np.array(stages.scores)[:, 0] == pytest.approx([0.5, 0.9, 0.8, 0.6])
    text = "\n".join(show_stages(stages, config))
    assert "| object | 6 of 7 | 80.0 | 60.0 |" in text and "| lost | | 30.0 | 0.0 |" in text
    draw_stages(tmp_path / "stages.png", stages)
    assert (tmp_path / "stages.png").stat().st_size > 5000


def test_the_report_of_a_sequential_run_holds_everything(demo_root, tmp_path):
    run = tmp_path / "seq"
    script("train.py", *TINY, "--schedule", "sequential", "--eval-every", "1", "--data", demo_root, "--out", run)
    score("--run", run, "--bootstrap", 5, "--workers", 0, "--no-foundation", "--crowd", 0,
          "--published", "body/test=market1501")
    text, page = ((run / "eval" / name).read_text() for name in ("report.md", "report.html"))
    looks = read_lines(run / "probe.jsonl")
    end = looks[-1]["auc"]["face_hq/test"]
    assert [look["step"] for look in looks] == [0, 1, 2, 3, 4] and text.count("\n| body | 4 |") == 1
    assert re.search(rf"\| body \| 4 \| [\d.]+ \| {100 * end:.1f} \|", text)
    pictures = re.findall(r"!\[[^\]]*\]\((\S+)\)", text)
    assert pictures == ["bars.png", "roc.png", "cmc.png", "scores.png", "stages.png"]
    # self-contained, and the same content: every picture inside, every cell of every table
    inside = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(data) for data in inside] == [(run / "eval" / name).read_bytes() for name in pictures]
    assert page.count("<img") == len(pictures) and not re.search(r"(src|href)=\"(?!data:)", page)
    cells = sum(line.count("|") - 1 for line in text.splitlines() if line.startswith("|") and "| --- |" not in line)
    assert page.count("<td>") + page.count("<th>") == cells
    assert "<td>TransReID README</td>" in page and page.count("<h2>") == text.count("\n## ")


def test_the_page_of_a_report_escapes_what_it_is_told(tmp_path):
    page = to_html(["# <b>", "", "a **b** `c` <script> & ![x](../y.png)", "", "| h |", "| --- |", "| <i> |"],
                   tmp_path)
    assert "<script>" not in page and "<i>" not in page and "<title>&lt;b&gt;</title>" in page
    assert "<b>b</b> <code>c</code>" in page and "<img" not in page


def test_score_distributions_count_every_pair():
    class Pairs:
        labels, folder, protocol = np.array([0, 0, 1, 1]), "fake", {"folds": 2}

        def column(self, name):
            return np.array([[0, 1, 1, 0], [2, 3, 1, 1], [0, 2, 0, 0], [1, 3, 0, 1]])

    x = vectors(0.5, -0.3)
    _, curve = score_verification(x, Pairs(), 2, 0)
    assert curve["same"].sum() == 2 and curve["different"].sum() == 2
    middle = (SCORE_BINS[1:] + SCORE_BINS[:-1]) / 2
    assert sorted(middle[curve["same"] > 0].round(2)) == [-0.3, 0.5]
