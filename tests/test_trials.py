"""Trials for people: how they are drawn, and their page, rated in a real browser."""

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

import click
import numpy as np
import pytest

import evaluate
from data_prep.__main__ import cli
from data_prep.format import Split
from protocols.humans import RATING_COLUMNS, find_row
from tests.conftest import script
from tests.test_humans import write_ratings
from tests.test_train import spoil_jpeg
from tools.trials import draw_pairs, draw_trials

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
