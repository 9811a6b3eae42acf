"""From the stream to the step: draws by key, loader processes that fit, chunks and classes a step ahead, the update."""

import threading
from collections import namedtuple

import numpy as np
import pytest
import torch

import data_prep.loaders
import train
from data_prep import InputError, say_once
from data_prep.format import open_root
from data_prep.loaders import enough_loaders, one_ahead
from data_prep.stream import FinishedImages, Look, Stream, from_cache, make_images, scramble, uniforms
from models.adapt import LayerwiseAdamW
from tests.test_coupling import options_of

CPU = torch.device("cpu")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("one-ahead")]


# ---------------------------------------------------------------- draws


def test_draws_are_those_of_splitmix64():
    """The published first outputs for the seed 1234567."""
    states = np.uint64(1234567) + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, 6, dtype=np.uint64)
    assert scramble(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423,
                                         4593380528125082431, 16408922859458223821]


def test_draws_are_uniform_and_a_function_of_the_key_alone():
    sample = np.arange(20_000)
    u = uniforms(11, 3, 2, sample // 5000, sample)
    assert u.shape == (20_000, 11) and u.min() >= 0 and u.max() < 1
    some = np.array([19_999, 7, 7])
    assert (uniforms(11, 3, 2, some // 5000, some) == u[some]).all()
    assert (uniforms(4, 3, 2, 0, some[1:]) == u[7, :4]).all()
    assert np.abs(u.mean(0) - 0.5).max() < 5 / 12**0.5 / 20_000**0.5 and np.abs(u.var(0) - 1 / 12).max() < 0.003
    every = np.concatenate([u, np.roll(u, 1, axis=0), uniforms(11, 4, 2, sample // 5000, sample)], axis=1)
    correlation = np.corrcoef(every.T) - np.eye(33)
    assert np.abs(correlation).max() < 5 / 20_000**0.5  # between draws, neighbouring samples and seeds
    assert len(np.unique(u[:, 0])) == 20_000


# ---------------------------------------------------------------- memory


def shared(monkeypatch, gib: float) -> None:
    say_once.cache_clear()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(data_prep.loaders.shutil, "disk_usage", lambda path: usage(0, 0, int(gib * 2**30)))
    monkeypatch.setattr(data_prep.loaders, "free_bytes", lambda device: 64 << 30)


def test_loader_processes_are_those_that_the_shared_memory_holds(monkeypatch, capsys):
    """1,024 images of 224 pixels are 0.144 GiB: 15 processes with 4 of them each, and two on their way, take 8.9."""
    item = 1024 * 3 * 224**2
    shared(monkeypatch, 9.0)
    assert enough_loaders(15, item) == 15 and enough_loaders(0, item) == 0 and capsys.readouterr().out == ""
    shared(monkeypatch, 4.0)
    assert enough_loaders(15, item) == enough_loaders(15, item) == 6  # (4 / 0.1436 - 2) / 4
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in (
        "--workers 15", "take 8.90 GiB", "4.00 GiB of /dev/shm are free: 6 are started", "--shm-size 9g", "--ipc=host"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert enough_loaders(15, item) == 2
    shared(monkeypatch, 0.0625)  # Docker's own
    with pytest.raises(InputError) as error:
        enough_loaders(15, item)
    assert "too little for one: use --workers 0, or enlarge it (docker run --shm-size 18g" in error.value.message
    assert "\n" not in error.value.message


def test_a_run_starts_with_the_loaders_that_fit(demo_root, tmp_path, monkeypatch):
    shared(monkeypatch, 16 * 3 * 32**2 * 4 * 11 / 2**30)  # 2 x 4 chunks and two on their way, and one to spare
    job = train.set_up(options_of(demo_root, tmp_path / "run", "--workers", "9", "--head-init", "random"), {})
    assert job.options.workers == 2


# ---------------------------------------------------------------- a step ahead


def test_items_are_made_one_ahead_and_errors_come_in_their_place():
    made = []

    def items():
        for i in range(4):
            made.append(i)
            yield i
        raise InputError("damaged")

    ahead = one_ahead(items(), CPU)
    assert next(ahead) == 0 and next(ahead) == 1
    while len(made) < 3:  # the third is made without being asked for
        pass
    assert next(ahead) == 2 and next(ahead) == 3 and threads()
    with pytest.raises(InputError, match="damaged"):
        next(ahead)
    assert not threads()
    ahead = one_ahead(iter(range(9)), CPU)
    next(ahead)
    ahead.close()  # as at the end of a run that was stopped
    assert not threads()
    assert list(one_ahead(iter(range(9)), CPU)) == list(range(9))


def test_classes_are_drawn_a_step_ahead_bit_for_bit(demo_root, tmp_path):
    few = ["--batch", "8", "--micro-batch", "4", "--domains", "face_hq,body", "--sample-classes",
           "object=1,face_hq=0.4,face_lq=1,body=0.4"]
    job = train.set_up(options_of(demo_root, tmp_path / "run", *few), {})
    feed, plain = train.make_feed(job), train.make_feed(job)
    plain.draw = None
    feed.start(0), plain.start(0)
    for step in range(4):
        if step == 2:  # as a resumed run
            feed.chunks.close()
            feed.start(step)
        batches = list(feed.next_step())
        rows = job.head.step_rows.rows
        images, labels, domains = zip(*plain.next_step(), strict=True)
        drawn, begin = job.head.draw_classes(step, list(labels), list(domains))
        assert job.head.step_rows.rows is rows  # it holds only when the step begins
        begin()
        assert torch.equal(job.head.step_rows.rows, rows) and len(batches) == 2
        for found, *expected in zip(batches, images, drawn, domains, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    feed.chunks.close()
    assert not threads()


def test_a_cache_gives_the_images_that_its_rows_name(demo_root):
    splits = [open_root(demo_root)[domain]["train"] for domain in ("object", "body")]
    cache = [torch.randint(0, 256, (len(split), 20, 20, 3), dtype=torch.uint8) for split in splits]
    stream = Stream(splits, np.full((3, 2), 5), seed=1, crop=[1.0, 1.0],
                    readable=[np.ones(len(split), dtype=bool) for split in splits])
    named = stream[1]
    chunk = from_cache(cache, named, False)
    assert [bank.shape for bank in chunk.banks] == [(5, 20, 20, 3)] * 2
    assert [len(bank) for bank in named.banks] == [0, 0]
    for d, row, own in zip(named.domain.tolist(), named.row.tolist(), chunk.row.tolist(), strict=True):
        assert torch.equal(chunk.banks[d][own], cache[d][row])


def test_finished_images_reuse_their_memory_and_are_not_overwritten(demo_root):
    splits, look = [open_root(demo_root)["body"]["train"]], Look(32, (0.5,) * 3, (0.5,) * 3)
    stream = Stream(splits, np.array([[6], [4], [6]]), seed=1, crop=[0.5])
    finished = FinishedImages(stream, None, look)
    found = [finished[c].images for c in range(3)]
    for c, images in enumerate(found):
        assert torch.equal(images, make_images(stream[c], look, CPU))
    assert finished.bytes.size == 6 * 3 * splits[0].size ** 2


# ---------------------------------------------------------------- the update


def test_the_update_is_that_of_torch_bit_for_bit():
    """Also where a parameter has no gradient yet, where a step is left out, and after a checkpoint of the other."""
    def make(kind):
        torch.manual_seed(0)
        groups = [{"params": [torch.nn.Parameter(torch.randn(3, 5)) for _ in range(n)], "lr": 0.1 * 0.8**n,
                   "weight_decay": 0.05 * (n % 2)} for n in (1, 2, 3)]
        return kind(groups, lr=1e-3, betas=(0.9, 0.999), fused=True)

    ours, theirs = make(LayerwiseAdamW), make(torch.optim.AdamW)
    for step in range(6):
        if step == 4:
            state, other = theirs.state_dict(), ours.state_dict()
            ours.load_state_dict(state), theirs.load_state_dict(other)
        for one in (ours, theirs):
            generator = torch.Generator().manual_seed(step)
            for i, p in enumerate(p for group in one.param_groups for p in group["params"]):
                gradient = torch.randn(3, 5, generator=generator)
                p.grad = gradient if i % 3 or step > 1 else None
            one.found_inf = torch.tensor(float(step == 3))
            one.step()
        for a, b in zip(*([p for group in one.param_groups for p in group["params"]] for one in (ours, theirs)),
                        strict=True):
            assert torch.equal(a, b) and ours.state[a].keys() == theirs.state[b].keys()
            assert all(torch.equal(ours.state[a][key], theirs.state[b][key]) for key in ours.state[a])
