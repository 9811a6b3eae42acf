"""A run folder: its files, its weights, its checkpoints. What lies where: README, "A run folder".

Every stage reads runs by this module; train.py alone writes them.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from backbones import Backbone, fill_weights, library_state, load_backbone
from data_prep import InputError
from data_prep.shards import Split
from train_ranks import Ranks, head_slices

if TYPE_CHECKING:
    from train import Job

RUN_ROLES = ("unified", "expert", "sequential")  # of a run, for `analyze.py claims`
LOGS = ("log.jsonl", "probe.jsonl", "conflict.jsonl")  # of a run, one record a line, each with its step
STOPPED = 75  # exit code of a run that was stopped with a checkpoint (EX_TEMPFAIL: a scheduler may requeue it)
NOT_OPTIONS = {"recipe", "role", "steps", "counts", "git_commit", "argv", "versions", "shards",
               "sources"}  # of config.json
FREE_ON_RESUME = {"workers", "device", "cache", "compile", "grad_checkpointing", "shard_head", "log_every",
                  "save_every", "keep", "resume", "data", "out", "max_skipped", "max_bad", "config", "recipe"}


# ---------------------------------------------------------------- files


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name, sync it, rename it: the old one stays whole until the new one is."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors would keep its files from everybody else
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except InputError:  # not of this file: a loader process died meanwhile
        temporary.unlink(missing_ok=True)
        raise
    except Exception as error:  # torch and safetensors report a full disk in ways of their own, or not at all
        free = shutil.disk_usage(path.parent).free >> 20 if path.parent.is_dir() else 0
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error}; {free:,} MiB free there); what was saved before is "
                         "intact") from error


def make_folder(path: Path, option: str) -> None:
    """Make a folder for results, where it is not there; InputError names the option that asked for it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option}: {path} cannot be made a folder ({error.strerror}): choose another, or move "
                         "away what is there") from error


def write_json(path: Path, value: dict) -> None:
    """Write JSON for people: indented, atomic."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def read_json(path: Path) -> dict:
    """An object that write_json wrote; InputError where the file is damaged."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}): restore it, or run the stage that wrote it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: damaged (no JSON object): restore it, or run the stage that wrote it again")
    return value


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file of a run; InputError where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # safetensors raises a kind of its own
        raise InputError(f"{path}: damaged ({error}): restore it, or continue the run with --resume") from error


def append(path: Path, record: dict) -> None:
    """Add a line to a .jsonl file of the run; NaN has no place in JSON and becomes null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    try:
        with open(path, "a") as file:
            file.write(json.dumps(plain(record)) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}); the last checkpoint is intact: make room, then "
                         "continue with --resume") from error


def read_lines(path: Path) -> list[dict]:
    """The records of a .jsonl file of a run; none where it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def provenance(splits: list[Split]) -> dict:
    """Versions and commit of the code, and which shards: for config.json."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    packages = ("torch", "torchvision", "timm", "open_clip_torch", "numpy")
    return {"git_commit": commit or None, "argv": sys.argv[1:],
            "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
            "shards": {split.domain: split.index["provenance"]["plan"] for split in splits},
            "sources": describe_sources(splits)}


def describe_sources(splits: list[Split]) -> dict[str, dict]:
    """Where the images of each domain come from and how they became square: the shards may be gone one day."""
    return {split.domain: {"source": split.index["provenance"]["source"], "images": len(split),
                           "classes": len(split.classes), "size": split.size,
                           **{key: split.index.get(key) for key in ("fit", "quality")}} for split in splits}


def find_run(config: dict, splits: list[Split]) -> str:
    """What the output folder holds: "nothing", "unfinished" or "complete"; InputError where it may not be continued."""
    folder = Path(config["out"])
    if not (folder / "config.json").exists():
        return "nothing"
    if not config["resume"]:
        raise InputError(f"{folder} already holds a run: continue it with --resume, or choose another --out")
    old = read_json(folder / "config.json")
    if differing := [key for key, value in config.items() if key not in FREE_ON_RESUME and old.get(key) != value]:
        key = differing[0]
        raise InputError(f"--resume {folder}: --{key.replace('_', '-')} was {old.get(key)!r} and is now "
                         f"{config[key]!r}; give what the run was started with (see its config.json)")
    for split in splits:
        if old["shards"][split.domain] != split.index["provenance"]["plan"]:
            raise InputError(f"--resume {folder}: {split.folder} is not the split that the run was started with")
    return "complete" if (folder / "done.json").exists() else "unfinished"


# ---------------------------------------------------------------- weights


def save_weights(folder: Path, model: Backbone, head: torch.Tensor, splits: list[Split]) -> None:
    """Write model.safetensors (the library's own keys) and head.safetensors (class names in its metadata)."""
    net = library_state(model.net)
    write_atomically(folder / "model.safetensors", lambda path: save_file(net, path))
    tensors = {"weight": head.detach().contiguous()}
    if model.project is not None:
        tensors["project"] = model.project.weight.detach().contiguous()
    classes = {"classes": json.dumps({split.domain: split.classes for split in splits})}
    write_atomically(folder / "head.safetensors", lambda path: save_file(tensors, path, metadata=classes))


@dataclass
class Run:
    """A finished run, as later stages read it."""

    folder: Path
    config: dict
    head: torch.Tensor  # float32 [C, D]
    classes: dict[str, list[str]]  # per trained domain
    class_ranges: dict[str, tuple[int, int]]  # rows of the head


def load_run(folder: Path, allow_partial: bool = False) -> Run:
    """Read a run folder.

    Raises:
        InputError: no run there, or (unless allow_partial) one that has not finished.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no run: it has no config.json; train one with `python train.py --out {folder}`")
    whole = (folder / "done.json").is_file() or folder.resolve().parent.name == "checkpoints"  # of --keep
    if not whole and not allow_partial:
        raise InputError(f"{folder} has not finished (no done.json): continue it with --resume or pass --allow-partial")
    config = read_json(folder / "config.json")
    if missing := {"backbone", "model", "size", "image_size", "embed_dim", "seed", "domains", "data",
                   "counts", "steps", "shards", "versions", "git_commit"} - set(config):
        raise InputError(f"{folder}/config.json lacks {min(missing)!r}: restore it, or train the run again")
    if not (folder / "head.safetensors").is_file():
        raise InputError(f"{folder} holds no weights yet (no head.safetensors): continue it with `train.py --resume`")
    tensors, metadata = read_tensors(folder / "head.safetensors")
    head, classes = tensors["weight"], json.loads(metadata["classes"])
    ends = np.cumsum([len(names) for names in classes.values()])
    ranges = {d: (int(end) - len(classes[d]), int(end)) for d, end in zip(classes, ends, strict=True)}
    return Run(folder, config, head, classes, ranges)


def load_tuned(run: Run) -> Backbone:
    """The fine-tuned backbone of a run, in eval mode."""
    model, path = load_backbone(run.config | {"weights": "none"}), run.folder / "model.safetensors"
    fill_weights(model.net, model.library, read_tensors(path)[0], path)
    if model.project is not None:
        model.project.weight.data.copy_(read_tensors(run.folder / "head.safetensors")[0]["project"])
    return model.eval()


def load_foundation(run: Run) -> Backbone:
    """The untouched backbone that a run started from (without the run's own linear layer), in eval mode."""
    return load_backbone(run.config | {"embed_dim": 0}).eval()


def whole_head(tensor: torch.Tensor, job: Job) -> torch.Tensor | None:
    """A tensor with one row per class of this rank's slice, with the rows of all ranks.

    Of a sharded head on rank 0 alone, in the memory of its CPU: no GPU need hold what was sharded for its size.
    """
    if job.rows is None:
        return tensor
    own, ranks, counts = tensor.cpu(), job.ranks, [len(split.classes) for split in job.splits]
    if ranks.rank:
        torch.distributed.send(own, 0, group=ranks.control)
        return None
    whole = torch.empty(sum(counts), *own.shape[1:], dtype=own.dtype)
    for rank in range(ranks.world):
        rows = head_slices(counts, rank, ranks.world)[0]
        part = own if rank == 0 else torch.empty(len(rows), *own.shape[1:], dtype=own.dtype)
        if rank:
            torch.distributed.recv(part, rank, group=ranks.control)
        whole[rows] = part
    return whole


@contextlib.contextmanager
def averaged(job: Job) -> Iterator[None]:
    """Inside, the trainable parameters are their running averages, where --ema keeps any."""
    swap = [] if job.ema is None else list(zip(job.parameters, job.ema, strict=True))
    for parameter, average in swap:
        parameter.data, average.data = average.data, parameter.data
    yield
    for parameter, average in swap:
        parameter.data, average.data = average.data, parameter.data


def export_weights(job: Job, folder: Path) -> None:
    """Write what the run is for: its weights, or their running averages."""
    with averaged(job):
        head = whole_head(job.head.detach(), job)
        if job.ranks.rank == 0:
            save_weights(folder, job.model, head, job.splits)


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(job: Job, step: int) -> None:
    """Write the weights, then last/state.pt: everything that step `step` starts from, whatever the number of ranks.

    In this order a run that is killed in between repeats the steps since the former state, and ends with both.
    """
    folder, ranks, state = job.folder, job.ranks, job.optimizer.state_dict()
    last = max(state["state"], default=None)  # the class weights: last group, last number
    if last is not None:
        state["state"][last] = {key: whole_head(v, job) if v.ndim else v for key, v in state["state"][last].items()}
    head = whole_head(job.head.detach(), job)
    average = None if job.ema is None else [*job.ema[:-1], whole_head(job.ema[-1], job)]
    export_weights(job, folder)
    if ranks.rank == 0:
        (folder / "last").mkdir(exist_ok=True)
        state = {"step": step, "model": job.model.state_dict(), "head": head, "optimizer": state,
                 "tally": job.tally, "health": job.health, "ema": average, "norms": job.norms}
        write_atomically(folder / "last" / "state.pt", lambda path: torch.save(state, path))
    ranks.wait()


def load_checkpoint(job: Job) -> int:
    """Restore what save_checkpoint wrote; returns the next step."""
    path = job.folder / "last" / "state.pt"
    rows = slice(None) if job.rows is None else job.rows.cpu()
    try:
        # of a sharded head every rank reads its own rows alone
        state = torch.load(path, "cpu", weights_only=True, mmap=job.rows is not None)
    except Exception as error:  # a damaged zip, a foreign pickle
        what = type(error).__name__
        raise InputError(f"{path}: damaged ({what}): restore it, or start anew in another --out") from error
    job.model.load_state_dict(state["model"])
    job.head.data.copy_(state["head"][rows])
    if moments := state["optimizer"]["state"]:
        last = max(moments)
        moments[last] = {key: v[rows] if v.ndim else v for key, v in moments[last].items()}
    job.optimizer.load_state_dict(state["optimizer"])
    if job.ema is not None:
        for average, saved in zip(job.ema, [*state["ema"][:-1], state["ema"][-1][rows]], strict=True):
            average.copy_(saved)
    job.health.copy_(state["health"])
    if job.norms is not None:
        job.norms.copy_(state["norms"])
    job.tally.update(state["tally"])
    return state["step"]


def kept_steps(run: Path) -> dict[int, Path]:
    """The checkpoints that --keep left in a run, by step."""
    found = ((folder.name.removeprefix("step-"), folder) for folder in (run / "checkpoints").glob("step-*"))
    return dict(sorted((int(step), folder) for step, folder in found if step.isdigit()))


def keep_checkpoint(job: Job, step: int) -> None:
    """--keep: RUN/checkpoints/step-NNNNNNNN, a run folder of its own. What is too old goes when it is complete.

    The newest ones stay, and the best by the mean AUC of --eval-every, to which the link `best` leads.
    """
    folder = job.folder / "checkpoints" / f"step-{step:08d}"
    scratch = folder.with_suffix(".tmp")
    if job.ranks.rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    try:
        export_weights(job, scratch)
        if job.ranks.rank == 0:
            counts = dict(zip(job.config["domains"], job.plan[:step].sum((0, 1)).tolist(), strict=True))
            config = read_json(job.folder / "config.json") | {"steps": step, "counts": counts}
            write_json(scratch / "config.json", config)
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before it could write its state
            os.replace(scratch, folder)
            drop_checkpoints(job.folder, job.config["keep"])
    finally:
        if job.ranks.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
    job.ranks.wait()


def drop_checkpoints(run: Path, keep: int) -> None:
    """Leave the newest `keep` checkpoints of a run and the best one, and point `best` at that."""
    steps, link = kept_steps(run), run / "checkpoints" / "best"
    scores = {look["step"]: np.mean([*look["auc"].values()]) for look in read_lines(run / "probe.jsonl") if look["auc"]}
    best = max((step for step in steps if step in scores), key=scores.get, default=None)
    if best is not None:
        (fresh := link.with_suffix(".tmp")).unlink(missing_ok=True)
        fresh.symlink_to(steps[best].name)
        os.replace(fresh, link)
    for step in [step for step in list(steps)[:-keep] if step != best]:
        shutil.rmtree(steps[step])


def forget_after(folder: Path, step: int) -> None:
    """Cut what a run left about steps after `step`, where it goes on: they come again."""
    for log in (folder / name for name in LOGS if (folder / name).exists()):
        kept = []
        for line in log.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line that was cut
                kept += [line] if json.loads(line)["step"] <= step else []
        write_atomically(log, lambda path, kept=kept: path.write_text("".join(f"{line}\n" for line in kept)))
    for late in [place for number, place in kept_steps(folder).items() if number > step]:
        shutil.rmtree(late)


class StopRequest:
    """Set by SIGTERM, SIGINT or a file RUN/STOP: the run ends after the current step. A second signal exits at once."""

    def __init__(self, folder: Path, ranks: Ranks = Ranks()) -> None:
        self.file, self.reason = folder / "STOP" if ranks.rank == 0 else None, ""  # one looks and tells the others
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number: int, _frame) -> None:
        if self.reason:
            for process in multiprocessing.active_children():  # nobody would read what they send
                process.kill()
            os._exit(128 + number)
        self.reason = signal.Signals(number).name

    def __bool__(self) -> bool:
        if not self.reason and self.file and self.file.exists():
            self.reason = "file STOP"
        return bool(self.reason)
