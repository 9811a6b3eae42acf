"""What a training step must not do: wait for the device, compile again, differentiate what is not there."""

import json
import traceback
from pathlib import Path

import click
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import data_prep.loaders
import models.head
import train
from data_prep import InputError
from data_prep.loaders import free_bytes
from data_prep.stream import erase_patches
from models.runs import STOPPED, forget_after
from tests.conftest import ROOT, TINY, script
from tests.test_coupling import lines


def run_here(*arguments) -> None:
    assert train.main([str(a) for a in arguments], standalone_mode=False) == 0


class Waits(TorchDispatchMode):
    """Notes what would make the CPU wait for a GPU: values read back, shapes that depend on values, lists sent."""

    KINDS = ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "equal")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        mask = name == "index" and any(v is not None and v.dtype == torch.bool for v in arguments[1])
        if name in self.KINDS or mask:
            frames = [frame for frame in traceback.extract_stack() if "/tests/" not in frame.filename]
            place = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if str(ROOT) in f.filename and ".venv" not in
                     f.filename][-1:]
            self.found.append(f"{name} {place}")
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("more", [
    (), ("--negatives", "all"), ("--ema", "0.9"), ("--loss", "adaface;object=combined:e=0.1,w=2"),
    ("--sample-classes", "object=0.5,face_hq=0.5,face_lq=1,body=0.5"), ("--head-init", "text-frozen"),
    ("--schedule", "A", "--coupling", "pcgrad"),
])  # fmt: skip
def test_a_step_never_waits_for_the_device(demo_root, tmp_path, monkeypatch, more):
    """All that would be on a GPU but for the loss, whose own kernels take that place there."""
    inside, found, loss, taken = Waits(), [], models.head.margin_loss, train.take_step

    def apart(*arguments, **options):
        before = len(inside.found)
        result = loss(*arguments, **options)
        del inside.found[before:]
        return result

    def watched(job, forward, batches, step, passes):
        batches = [tuple(v for v in batch) for batch in batches]
        with inside:
            result = taken(job, forward, iter(batches), step, passes)
        if step:  # the first may build what is kept
            found.extend(inside.found)
        inside.found.clear()
        return result

    monkeypatch.setattr(models.head, "margin_loss", apart)
    monkeypatch.setattr(train, "take_step", watched)
    run_here(*TINY, "--data", demo_root, "--out", tmp_path / "run", *more)
    # AdamW on the CPU asks for nothing either; the backward pass of the reference loss may index by numbers
    assert found == []


def test_erasing_sends_no_list_to_the_device():
    with Waits() as inside:
        erase_patches(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4))
    assert inside.found == []


@pytest.mark.parametrize("schedule, extra", [("A", ("--coupling", "pcgrad")), ("B", ())])
def test_compiled_backbones_are_compiled_once_and_looked_into(demo_root, tmp_path, monkeypatch, schedule, extra):
    """With the looks at conflicts, whose backward passes keep the graph, between ordinary steps."""
    compiled, real = [], torch.nn.Module.compile

    def backend(graph, example):
        compiled.append([tuple(v.shape) for v in example if isinstance(v, torch.Tensor) and v.ndim == 4][-1:])
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: real(
        self, backend=aot_autograd(fw_compiler=backend), **options))
    torch._dynamo.reset()
    try:
        run_here(*TINY, "--data", demo_root, "--out", tmp_path / "run", "--schedule", schedule, *extra, "--compile",
                 "--conflict-every", "2", "--head-warmup", "0.17", "--images", "96")  # an ordinary step comes first
    finally:
        torch._dynamo.reset()
    assert [line["step"] for line in lines(tmp_path / "run/conflict.jsonl")] == [3, 5]
    assert 1 <= len(compiled) <= 4, compiled  # forward and backward of one shape, and of a graph that is kept


def test_a_domain_that_is_not_there_costs_no_backward_pass(demo_root, tmp_path, monkeypatch):
    calls, real = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    run_here(*TINY, "--data", demo_root, "--out", tmp_path / "run", "--schedule", "A", "--coupling", "pcgrad",
             "--head-warmup", "0")
    assert len(calls) == 4 * 4  # four steps of four batches, a domain each


def test_a_stop_during_the_start_is_kept(demo_root, tmp_path, monkeypatch):
    run, real = tmp_path / "run", train.starting_weights

    def slow(*arguments, **options):
        (run / "STOP").touch()
        return real(*arguments, **options)

    run.mkdir()
    (run / "STOP").touch()  # an older one says nothing
    run_here(*TINY, "--data", demo_root, "--out", run, "--images", "32")
    assert (run / "done.json").exists() and not (run / "STOP").exists()
    monkeypatch.setattr(train, "starting_weights", slow)
    out = tmp_path / "other"
    run = out
    assert train.main([*map(str, (*TINY, "--data", demo_root, "--out", out))], standalone_mode=False) == STOPPED
    assert lines(out / "log.jsonl")[-1]["step"] == 1


def test_a_cut_line_of_a_log_is_left_out(tmp_path):
    log = tmp_path / "probe.jsonl"
    log.write_text('{"step": 2, "auc": {}}\n{"step": 4, "auc": {"object/val": 0.5}\n')
    forget_after(tmp_path, 4)
    assert log.read_text() == '{"step": 2, "auc": {}}\n'
    for damaged in ('{"step": 3}', '{"step": 3, "auc": [1]}', '{"step": 3, "auc": {"object/val": "x"}}', '[]', "\xff",
                    '{"step": 3, "auc": {"cars/val": 0.5}}', '{"step": "3", "auc": {}}', "[" * 10**5):
        log.write_text(f'{{"step": 2, "auc": {{"body/test": 0.5}}}}\n{damaged}\n')
        (tmp_path / "conflict.jsonl").write_text('{"step": 3}\n')
        (tmp_path / "log.jsonl").write_text('{"step": 3, "loss": "x"}\n{"step": 4, "loss": 1, "collapsed_at": null}\n')
        forget_after(tmp_path, 4)
        assert log.read_text().count("\n") == 1 and not (tmp_path / "conflict.jsonl").read_text()
        assert (tmp_path / "log.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("options, words", [
    (("--epochs", "inf"), "inf is not in the range 0<x<=1000000000.0"),
    (("--lr", "nan"), "nan is not a finite number"),
    (("--schedule", "A", "--mix", "0"), "--mix sets the shares of schedule B"),
    (("--schedule", "alternate", "--mix-ramp", "object:1->0.5"), "--mix-ramp changes the shares of schedule B"),
    (("--device", "cuda:99"), "--device cuda"),
])
def test_what_means_nothing_is_refused(demo_root, tmp_path, options, words):
    options = [*TINY, "--data", demo_root, "--out", tmp_path / "run", *options]
    if "--epochs" in options:
        del options[options.index("--images") : options.index("--images") + 2]
    with pytest.raises(click.ClickException) as error:
        train.main([str(a) for a in options], standalone_mode=False)
    assert error.value.message.startswith(words)
    assert not (tmp_path / "run").exists()


def test_more_starts_that_are_refused_in_one_line(demo_root, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "config.json").write_text(json.dumps({"options": {"erase": [1, 2]}}))
    for options, words in ((("--out", tmp_path / "file" / "x"), "cannot be written"),
                           (("--config", tmp_path / "config.json"), "erase is [1, 2]: want text")):
        failed = script("train.py", *TINY, "--data", demo_root, "--out", tmp_path / "run", *options, check=2)
        assert words in failed.stderr and "Traceback" not in failed.stderr


def test_the_cache_counts_every_process_of_the_machine(demo_root, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(data_prep.loaders, "free_bytes", lambda device: 30 << 20)
    with pytest.raises(InputError, match="for each of 4 processes here"):
        run_here(*TINY, "--data", demo_root, "--out", tmp_path / "run", "--cache", "ram")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    run_here(*TINY, "--data", demo_root, "--out", tmp_path / "other", "--cache", "ram", "--images", "16")


def test_free_memory_counts_what_linux_would_give_back():
    free = free_bytes(torch.device("cpu"))
    assert 64 << 20 < free < 1 << 50


def test_a_run_of_one_domain_says_that_nothing_conflicts(demo_root, tmp_path, capsys):
    run_here(*TINY, "--data", demo_root, "--out", tmp_path / "run", "--domains", "body", "--conflict-every", "1",
             "--shard-head", "--images", "32")
    said = capsys.readouterr().out
    assert "no gradients conflict" in said and "one process holds all class weights" in said
    assert not (tmp_path / "run/conflict.jsonl").exists()


def test_a_path_that_is_no_utf8_is_one_line(demo_root, tmp_path):
    """As in a locale of ASCII without Python's UTF-8 mode: TensorBoard cannot write there."""
    error = script("train.py", *TINY, "--data", demo_root, "--out", tmp_path / "t\udce9", check=2).stderr
    assert "the path is not UTF-8" in error.splitlines()[-1] and "Traceback" not in error
