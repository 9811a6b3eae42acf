"""The five changes of docs/extending.md, each applied to a copy of the project and run on the demo corpus."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY, script
from tests.test_layout import tracked


def sections() -> dict[str, tuple[str, str]]:
    """Heading -> kind ("diff" or "python") and text of the block below it."""
    found = {}
    for part in (ROOT / "docs/extending.md").read_text().split("\n## ")[1:]:
        kind, _, block = part.partition("```")[2].partition("\n")
        found[part.partition("\n")[0]] = (kind, block.partition("```")[0])
    return found


def extended(heading: str, folder: Path) -> Path:
    """A copy of the project with one change applied; returns its folder."""
    for name in tracked():
        if not name.endswith(".png"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    kind, block = sections()[heading]
    if kind == "diff":
        applied = subprocess.run(["git", "apply", "-"], cwd=folder, input=block, text=True, capture_output=True)
        assert applied.returncode == 0, applied.stderr
    else:
        name = re.search(r"python (\w+\.py) ", block)
        (folder / name[1]).write_text(block)
    return folder


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_every_change_is_short_and_touches_one_file():
    blocks = sections()
    assert list(blocks) == ["A third schedule", "Another loss", "Your own backbone", "Your own protocol",
                            "Your own data source"]
    for heading, (kind, block) in blocks.items():
        assert len(block.splitlines()) <= 40, heading
        assert max(map(len, block.splitlines())) <= 121, heading  # a sign of the patch and 120
        assert kind == "python" or block.count("\n+++ ") == 1, heading


def test_a_third_schedule(demo_root, tmp_path):
    project = extended("A third schedule", tmp_path / "project")
    code = ("import sys, train; options = train.Options(backbone='clip', schedule='C', batch=16, images=32)\n"
            "splits = train.open_training(sys.argv[1], options.trained)\n"
            "print(train.plan_batches(options, splits).tolist())")
    plan = json.loads(script("-c", code, demo_root, cwd=project).stdout)
    step = [[2, 2, 0, 0], [0, 2, 2, 0], [0, 0, 2, 2], [2, 0, 0, 2]]  # two neighbours a batch, around the ring
    assert plan == [step, step]
    run = tmp_path / "run"
    script("train.py", *TINY, "--schedule", "C", "--data", demo_root, "--out", run, cwd=project)
    facts = json.loads((run / "config.json").read_text())["facts"]
    assert (run / "done.json").exists() and facts["role"] == "unified"
    assert facts["counts"] == dict.fromkeys(("object", "face_hq", "face_lq", "body"), 16)
    refused = script("train.py", *TINY, "--batch", "20", "--schedule", "C", "--data", demo_root, cwd=project, check=2)
    assert refused.stderr == "error: --schedule C needs two domains or more and a --batch divisible by 8\n"


def test_another_loss(demo_root, tmp_path):
    project = extended("Another loss", tmp_path / "project")
    # one sample at 60 degrees from its class and at 90 from the only other of its domain: m = 0.25, gamma = 4 give
    # positive 4 * 0.75 * (0.5 - 0.75) = -0.75 and negative 4 * 0.25 * (0 - 0.25) = -0.25, so ln(1 + e^0.5) = 0.974077
    code = ("import torch; from models.head import circle_loss\n"
            "w = torch.tensor([[1., 0, 0], [0.5, 0.75 ** 0.5, 0], [0, 0, 1.]]); x = torch.tensor([[2., 0, 0]])\n"
            "m, s, one = torch.tensor([9., 0.25]), torch.tensor([9., 4.]), torch.ones(2)\n"  # of each domain
            "n, label, domain = torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([1])\n"
            "r = circle_loss(x, w, label, domain, [(0, 1), (1, 3)], scale=s, margin_additive=m, domain_weight=one,\n"
            "                domain_count=n)\n"
            "print(r.loss.item(), r.target_cos.item(), r.correct.item())")
    loss, cosine, correct = script("-c", code, cwd=project).stdout.split()
    assert float(loss) == pytest.approx(0.974077 / 2, abs=1e-5)  # the other domain has no sample: K stays 2
    assert float(cosine) == pytest.approx(0.5, abs=1e-6) and correct == "True"
    run = tmp_path / "run"
    script("train.py", *TINY, "--images", "640", "--log-every", "10", "--loss", "cosface:m=0.25,s=16",
           "--margin-ramp", "0", "--data", demo_root, "--out", run, cwd=project)
    assert losses(run)[-1] < 0.9 * losses(run)[0]


def test_an_own_backbone(demo_root, tmp_path):
    project, run = extended("Your own backbone", tmp_path / "project"), tmp_path / "run"
    options = ["--model", "patchnet", *TINY[TINY.index("--weights"):]]
    script("train.py", *options, "--data", demo_root, "--out", run, cwd=project)
    code = ("import sys, numpy, torch; from pathlib import Path; from data_prep.format import Split\n"
            "from models.backbones import embed_rows; from models.runs import load_run, load_tuned\n"
            "model = load_tuned(load_run(Path(sys.argv[1])))\n"
            "rows, x = next(embed_rows(model, Split(Path(sys.argv[2])), numpy.arange(5), torch.device('cpu'), 5))\n"
            "layers = model.layers()\n"
            "print(*x.shape, bool(x.isfinite().all()), layers['net.stem.weight'] < layers['net.out.weight'])")
    assert script("-c", code, run, demo_root / "body/test", cwd=project).stdout.split() == ["5", "96", "True", "True"]


def test_an_own_protocol(tiny_run, tmp_path):
    project = extended("Your own protocol", tmp_path / "project")
    # images at 0, 60, 70 and 80 degrees, of identities 0 0 1 1. Triplet (0, 1, 2): its pair is 60 degrees apart, its
    # images 1 and 2 only 10: wrong. Triplet (2, 3, 0): 10 degrees against 70 and 80: right
    code = ("import numpy as np; from odd_one_out import draw_triplets, score_triplets\n"
            "a, labels = np.radians([0, 60, 70, 80]), np.array([0, 0, 1, 1])\n"
            "x, triplets = np.stack([np.cos(a), np.sin(a)], 1), np.array([[0, 1, 2], [2, 3, 0]])\n"
            "f = score_triplets(x, labels, triplets, 100, seed=0)['odd one out']\n"
            "t = labels[draw_triplets(labels, 50, seed=0)]\n"
            "print(f.value, f.low, f.high, len(t) > 10 and bool(((t[:, 0] == t[:, 1]) & (t[:, 1] != t[:, 2])).all()))")
    assert script("-c", code, cwd=project).stdout.split() == ["0.5", "0.5", "0.5", "True"]
    lines = script("odd_one_out.py", tiny_run, cwd=project).stdout.splitlines()
    splits = [line.split(":")[0] for line in lines]
    assert len(splits) == 2 * len(set(splits)) and {"object/val", "face_hq/test", "body/test"} <= set(splits)
    values = [[float(v) for v in re.findall(r"\d\.\d+", line)] for line in lines]
    assert all(0 < low <= value <= high <= 1 for value, low, high in values)
