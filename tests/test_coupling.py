"""Gradient conflicts, PCGrad, the look at fixed images, cache, averages, report and benchmark of training."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import data_prep.loaders
import reports.training
import train
from data_prep import InputError
from data_prep.format import ordered_tests
from models.head import HeadSettings
from tests.conftest import TINY, script
from tests.test_distributed import K, make
from tests.test_schedule import LOSSES, make_head, step_gradients
from tools.conflicts import DomainGradients, add_gradients, conflicts, project_conflicts


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_conflicts_by_hand():
    """Two layers, two domains: (3, 4 | 1) and (-4, 3 | 1) are orthogonal in layer 0, equal in layer 1."""
    a = [torch.tensor([3.0, 4.0]), torch.tensor([[1.0]])]
    b = [torch.tensor([-4.0, 3.0]), torch.tensor([[1.0]])]
    norms, cosines = conflicts([a, b], [0, 1])
    assert norms[:, 0].tolist() == pytest.approx([5, 1, math.sqrt(26)])
    assert cosines[:, 0, 1].tolist() == pytest.approx([0, 1, 1 / 26]) and cosines[2, 0, 0] == pytest.approx(1)
    assert conflicts([a, [torch.zeros(2), torch.zeros(1, 1)]], [0, 1])[1][2, 0, 1].isnan()


def test_pcgrad_is_its_algorithm():
    """Against a transcription in numpy; by hand: (1, 0) and (-1, 1) become (1/2, 1/2) and (0, 1)."""
    whole = project_conflicts([[torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])]], seed=0, step=0)
    assert whole[0].tolist() == pytest.approx([0.5, 1.5])
    g = torch.Generator().manual_seed(0)
    gradients = [[torch.randn(3, 2, generator=g, dtype=torch.float64), torch.randn(4, generator=g).double()]
                 for _ in range(4)]
    flat = [np.concatenate([v.numpy().ravel() for v in domain]) for domain in gradients]
    rng, total = np.random.default_rng((7, 5)), np.zeros(10)
    for i in range(4):
        own = flat[i].copy()
        for j in rng.permutation(4):
            if j != i and own @ flat[j] < 0:
                own -= own @ flat[j] / (flat[j] @ flat[j]) * flat[j]
        total += own
    found = project_conflicts(gradients, seed=7, step=5)
    np.testing.assert_allclose(np.concatenate([v.numpy().ravel() for v in found]), total, rtol=1e-12)


@pytest.mark.parametrize("coupling", ["domain", "sample"])
def test_the_domains_gradients_add_up_to_the_steps(coupling, tmp_path):
    plan, results = [[4, 4, 4, 4]], []
    for watch in (False, True):
        model, weight, images, labels = make()
        head = make_head(weight, HeadSettings(LOSSES, coupling=coupling))
        hook = DomainGradients(model, head, list("abcd"), tmp_path, pcgrad=False, every=1, seed=0) if watch else None
        batches = [(images[:, :4].flatten(0, 1), labels[:, :4].flatten(), torch.arange(K).repeat_interleave(4))]
        backbone, own, _ = step_gradients(model, head, batches, plan, hook=hook)
        results.append([*backbone, own])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
    # and each is the gradient of its own domain's images alone
    alone, _, _ = step_gradients(model, head, [(images[1, :4], labels[1, :4], torch.full((4,), 1))], plan)
    for one, other in zip(hook.by_domain[1], alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
    line, = lines(tmp_path / "conflict.jsonl")
    assert line["step"] == 1 and len(line["cosine"]) == 6 and len(line["cosine_by_layer"]["a~b"]) == 2
    norm = torch.cat([g.flatten() for g in alone]).norm()
    assert line["norm"]["b"] == pytest.approx(float(norm), rel=1e-10)


@pytest.fixture(scope="module")
def watched(demo_root, tmp_path_factory):
    run = tmp_path_factory.mktemp("watched") / "run"
    script("train.py", *TINY, "--data", demo_root, "--out", run, "--schedule", "A", "--coupling", "pcgrad",
           "--conflict-every", "2", "--eval-every", "2", "--ema", "0.5", "--images", "96", "--head-warmup", "0",
           "--log-every", "1")
    return run


def test_a_watched_run_writes_what_it_saw(watched):
    conflict, looks = lines(watched / "conflict.jsonl"), lines(watched / "probe.jsonl")
    assert [record["step"] for record in conflict] == [1, 3, 5] and [r["step"] for r in looks] == [0, 2, 4, 6]
    for record in conflict:
        assert len(record["cosine"]) == 6 and all(-1 <= v <= 1 for v in record["cosine"].values())
        assert all(v > 0 for v in record["norm"].values())
    assert all(0 <= score <= 1 for look in looks for score in look["auc"].values())
    domains = [name.split("/")[0] for name in looks[0]["auc"]]
    assert domains == ["object", "face_hq", "face_lq", "body", "object"]  # the last one out of distribution
    record = lines(watched / "log.jsonl")[-1]
    assert record["images/body"] == 24 and record["norm/body"] > 0 and record["passes/body"] == pytest.approx(24 / 288)
    report = (watched / "report.md").read_text()
    assert "| body | 24 |" in report and "conflict.png" in report and "object~face_hq" in report
    assert all((watched / name).stat().st_size > 5000 for name in ("curves.png", "conflict.png"))


@pytest.mark.parametrize("steps", [[4], [10, 20]])
def test_curves_are_told_apart_and_no_legend_lies_on_them(steps, tmp_path, monkeypatch):
    names, figures = ["object/val", "object/collage", "object/art", "face_hq/a", "face_hq/b"], []
    monkeypatch.setattr(reports.training, "save_figure", lambda figure, path: figures.append(figure))
    log = [{"step": step} | {f"{key}/{domain}": 0.5 for key in ("loss", "top1", "target_cosine")
                             for domain in ("object", "face_hq")} for step in steps]
    looks = [{"step": step, "auc": dict.fromkeys(names, 0.5)} for step in (0, *steps)]
    reports.training.draw_curves(tmp_path / "x.png", log, looks, ["object", "face_hq"])
    figures[0].canvas.draw()
    panels = figures[0].axes
    assert {ax.get_xlabel() for ax in panels} == {"optimiser step"} and len(panels) == 4
    legends = [ax.get_legend().get_window_extent() for ax in panels if ax.get_legend()]
    assert len(legends) == 2 and not any(legend.overlaps(ax.bbox) for legend in legends for ax in panels)
    looks_of = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in panels[-1].lines]
    assert len(looks_of) == len(set(looks_of)) == len(names)
    assert all(line.get_marker() == "." for ax in panels[:3] for line in ax.lines)  # also a log of one line is seen
    assert all(tick == int(tick) for ax in panels for tick in ax.get_xticks())
    one = [look for look, name in zip(looks_of, names, strict=True) if name.startswith("object")]
    assert len({style for _, style, _ in one}) == len({marker for *_, marker in one}) == 3  # also without colours


def test_pcgrad_changes_the_backbone_alone_at_first(demo_root, tmp_path, monkeypatch):
    """One step: the class weights of both couplings are the same, the backbones are not."""
    monkeypatch.setattr(train, "CLIP", math.inf)  # else each is scaled by its own norm
    for coupling in ("domain", "pcgrad"):
        options = options_of(demo_root, tmp_path / coupling, "--schedule", "A", "--coupling", coupling, "--images",
                             "16", "--head-warmup", "0")
        train.run_steps(train.set_up(options, {}))
    weights = [load_file(tmp_path / c / "head.safetensors")["weight"] for c in ("domain", "pcgrad")]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-7)
    nets = [load_file(tmp_path / c / "model.safetensors") for c in ("domain", "pcgrad")]
    assert any(not torch.equal(nets[0][key], nets[1][key]) for key in nets[0])


def test_a_fallen_task_is_named(demo_root, tmp_path, capsys):
    job = train.set_up(options_of(demo_root, tmp_path / "run", "--eval-every", "1", "--splits", "object/val"), {})
    job.tally.start = {"object/val": 1.5}

    class Board:
        add_scalar = staticmethod(lambda *_: None)

    job.board = Board
    train.look_at_fixed_images(job, 7)
    assert "WARNING: step 7: object/" in capsys.readouterr().err


def split_of(domain: str, name: str, /, **protocol) -> SimpleNamespace:
    return SimpleNamespace(domain=domain, name=name, protocol=protocol or None, labels=np.zeros(4, dtype=int))


def test_which_split_stands_for_a_domain(monkeypatch, capsys):
    """Never one to train on, whatever its name; the trained classes' own before another's; as --splits says."""
    classes = {"name": "classification"}
    root = {"object": [split_of("object", "atlas"), split_of("object", "birds", **classes, reference="atlas"),
                       split_of("object", "train"), split_of("object", "val", **classes, reference="train"),
                       split_of("object", "art", **classes, reference="birds", ood=True),
                       split_of("object", "sketch", **classes, reference="train", ood=True)],
            "face_hq": [split_of("face_hq", "casia"), split_of("face_hq", "lfw", name="verification"),
                        split_of("face_hq", "train")],
            "body": [split_of("body", "market"), split_of("body", "train")]}
    assert [s.name for s in ordered_tests(root["object"])] == ["val", "birds"]
    assert [s.name for s in ordered_tests(root["object"], ood=True)] == ["sketch", "art"]
    monkeypatch.setattr(train, "open_root", lambda *_: {d: {s.name: s for s in splits} for d, splits in root.items()})
    options = train.Options(domains=["object", "face_hq", "body"])
    names = [f"{s.domain}/{s.name}" for s in train.probe_splits(options)]
    assert names == ["object/val", "face_hq/lfw", "object/sketch"]
    out = capsys.readouterr().out
    assert "--eval-every evaluates object/val, face_hq/lfw, object/sketch (--splits chooses)" in out
    assert "leaves out body, which has no test split" in out
    chosen = train.probe_splits(train.Options(splits="object/birds,face_hq/lfw", domains=["face_hq"]))
    assert [s.name for s in chosen] == ["birds", "lfw"]
    for names, words in (("face_hq/casia", "is a training split"), ("face_hq/ijbc", "has no split 'face_hq/ijbc'")):
        with pytest.raises(InputError, match=words):
            train.probe_splits(train.Options(splits=names))


def options_of(demo_root, out, *more) -> train.Options:
    arguments = [*TINY, "--data", demo_root, "--out", out, *more]
    context = train.main.make_context("train.py", [str(word) for word in arguments])
    return train.settle_options(context, dict(context.params))[0]


def test_average_of_the_weights_in_closed_form(demo_root, tmp_path):
    """EMA_t = EMA + (1 - min(d, (1 + t)/(10 + t))) (w_t - EMA); a step that is skipped moves nothing."""
    job = train.set_up(options_of(demo_root, tmp_path / "run", "--ema", "0.3"), {})
    expected = [p.detach().clone() for p in job.parameters]
    for step, finite in enumerate([True, False, True]):
        for p in job.parameters:
            p.grad = torch.full_like(p, 1.0 if finite else math.nan)
        taken = train.update(job, torch.tensor(1.0 if finite else math.nan))
        job.average.update(step + 1 - job.health[0], taken)
        assert taken == finite
        t = 1 + step - (step > 0)
        if finite:
            decay = min(0.3, (1 + t) / (10 + t))
            expected = [e + (1 - decay) * (p.detach() - e) for e, p in zip(expected, job.parameters, strict=True)]
    for one, other in zip(job.average.values, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert job.health.tolist() == [1, 0]
    inside = job.parameters[-1].detach().clone()
    with train.averaged(job):
        torch.testing.assert_close(job.parameters[-1].data, expected[-1], rtol=1e-5, atol=1e-7)
    assert torch.equal(job.parameters[-1], inside)


def test_the_cache_changes_nothing(demo_root, tiny_run, tmp_path):
    script("train.py", *TINY, "--schedule", "B", "--data", demo_root, "--out", tmp_path / "run", "--cache", "ram")
    for name in ("model.safetensors", "head.safetensors"):
        one, other = load_file(tiny_run / name), load_file(tmp_path / "run" / name)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_grad_checkpointing_changes_rounding_at_most(demo_root, tmp_path):
    common = ["--backbone", "eva02", "--size", "tiny", "--weights", "none", "--image-size", "28", "--workers", "0",
              "--batch", "8", "--images", "16", "--data", demo_root, "--device", "cpu", "--head-init", "random"]
    for name, more in (("plain", []), ("checkpointed", ["--grad-checkpointing"])):
        script("train.py", *common, "--out", tmp_path / name, *more)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "checkpointed"))
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-5)


def test_a_cache_that_does_not_fit_is_refused(demo_root, tmp_path, monkeypatch):
    monkeypatch.setattr(data_prep.loaders, "free_bytes", lambda device: 1 << 20)  # a batch fits, the splits do not
    with pytest.raises(InputError, match=r"--cache ram: the images take .* GiB are free"):
        train.set_up(options_of(demo_root, tmp_path / "run", "--cache", "ram"), {})
    assert not (tmp_path / "run").exists()  # the same command without --cache then needs no other --out


def test_bench_says_where_the_time_goes(demo_root, tmp_path):
    tiny = [word for word in TINY if word not in ("--images", "64")]
    script("train.py", "bench", *tiny, "--data", demo_root, "--cache", "ram", "--rounds", "1", "--count", "2", "--json",
           tmp_path / "bench.json")
    result = json.loads((tmp_path / "bench.json").read_text())
    assert set(result["share_of_time"]) == {"input", "loss", "logging"}
    assert all(0 <= share < 1 for share in result["share_of_time"].values())
    assert result["images_per_second"]["real"] > 0 and 0 < result["MFU"] < 1.5 and result["gflop_per_image"] > 0


@pytest.mark.parametrize("arguments, words", [
    (["--coupling", "pcgrad", "--schedule", "B"], "--coupling pcgrad needs one backward pass per domain"),
    (["--cache", "ram", "--degrade"], "--degrade changes the images in every pass"),
    (["--cache", "gpu"], "--cache gpu needs a CUDA device"),
    (["--shard-head", "--negatives", "all"], "it excludes --negatives all"),
])  # fmt: skip
def test_bad_input_is_one_line(arguments, words, demo_root, tmp_path):
    result = script("train.py", *TINY, "--data", demo_root, "--out", tmp_path / "run", *arguments, check=2)
    assert words in result.stderr and "Traceback" not in result.stderr


def test_frozen_parameters_are_left_out_of_the_domains_gradients():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    head, gradients = nn.Parameter(torch.ones(1, 2)), []
    add_gradients(gradients, (model(torch.ones(1, 2)) * head).sum(), model, head, keep=False)
    assert len(gradients) == 2 and head.grad is not None
