"""A run folder: its files, its weights, its checkpoints. What lies where: README, "A run folder".

Every stage reads runs by this module; train.py alone writes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import zipfile
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
from data_prep import DOMAINS, InputError
from data_prep.shards import Split, fits
from train_ranks import Ranks, head_slices

if TYPE_CHECKING:
    from train import Job

RUN_ROLES = ("unified", "expert", "sequential")  # of a run, for `analyze.py claims`
LOGS = ("log.jsonl", "probe.jsonl", "conflict.jsonl")  # of a run, one record a line, each with its step
STOPPED = 75  # exit code of a run that was stopped with a checkpoint (EX_TEMPFAIL: a scheduler may requeue it)
NOT_OPTIONS = {"recipe", "role", "steps", "counts", "git_commit", "argv", "versions", "shards",
               "sources", "weights_sha256"}  # of config.json
FREE_ON_RESUME = {"workers", "micro_batch", "device", "cache", "compile", "grad_checkpointing", "shard_head",
                  "log_every", "save_every", "keep", "resume", "data", "out", "max_skipped", "max_bad", "config",
                  "recipe"}


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
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error}): restore it, or run the stage that wrote it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: damaged (no JSON object): restore it, or run the stage that wrote it again")
    return value


def digest(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of tensors on the CPU, with their names, types and shapes, and of the metadata beside them."""
    about = {key: [str(value.dtype), list(value.shape)] for key, value in sorted(tensors.items())}
    whole = hashlib.sha256(json.dumps([about, metadata], sort_keys=True).encode())
    for key in about:
        whole.update(tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    """Write a safetensors file with the digest of its contents in its metadata: `read_tensors` compares it."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    metadata = metadata | {"sha256": digest(tensors, metadata)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file of a run; InputError where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except Exception as error:  # safetensors raises a kind of its own
        raise damaged(path, str(error)) from error
    if (expected := metadata.pop("sha256", None)) and digest(tensors, metadata) != expected:
        raise damaged(path, "its contents are not what was written: their SHA-256 differs")
    if wrong := [key for key, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise damaged(path, f"{wrong[0]} holds numbers that are not finite")
    return tensors, metadata


def damaged(path: Path, what: str) -> InputError:
    """The error about a file of a run that a stage cannot use."""
    return InputError(f"{path}: damaged ({what}): restore it, or continue the run with --resume")


def append(path: Path, record: dict) -> None:
    """Add a line to a .jsonl file of the run; NaN has no place in JSON and becomes null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with writing(path), open(path, "a") as file:
        file.write(json.dumps(plain(record)) + "\n")


def read_lines(path: Path) -> list[dict]:
    """The records of a .jsonl file of a run, none where there is no file; a last one that a kill cut is left out."""
    lines, records = path.read_bytes().splitlines() if path.exists() else [], []
    for number, line in enumerate(lines, 1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            if number < len(lines):
                raise InputError(f"{path}, line {number}: damaged ({error}): remove the line") from error
    return records


def hash_file(path: Path) -> str | None:
    """SHA-256 of a file; None where there is none."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_of(config: dict) -> str | None:
    """What tells the weights that a run started from: the SHA-256 of their file, wherever it lies, or their name."""
    name = config.get("weights")
    return config.get("weights_sha256") or (hash_file(Path(name)) if isinstance(name, str) else None) or name


def provenance(splits: list[Split], weights: str) -> dict:
    """Versions and commit of the code, which shards, and the file of weights by its hash: for config.json."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    packages = ("torch", "torchvision", "timm", "open_clip_torch", "numpy")
    return {"git_commit": commit or None, "argv": sys.argv[1:],
            "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
            "shards": {split.domain: split.index["provenance"]["plan"] for split in splits},
            "weights_sha256": hash_file(Path(weights)), "sources": describe_sources(splits)}


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
    old = read_config(folder)
    if differing := [key for key, value in config.items() if key not in FREE_ON_RESUME and old.get(key) != value
                     and not (key == "weights" and weights_of(old) == weights_of(config))]:  # its file may have moved
        key = differing[0]
        raise InputError(f"--resume {folder}: --{key.replace('_', '-')} was {old.get(key)!r} and is now "
                         f"{config[key]!r}; give what the run was started with (see its config.json)")
    for split in splits:
        if old["shards"].get(split.domain) != split.index["provenance"]["plan"]:
            raise InputError(f"--resume {folder}: {split.folder} is not the split that the run was started with")
    return "complete" if (folder / "done.json").exists() else "unfinished"


# ---------------------------------------------------------------- weights


def save_weights(folder: Path, model: Backbone, head: torch.Tensor, splits: list[Split]) -> None:
    """Write model.safetensors (the library's own keys) and head.safetensors (class names in its metadata)."""
    write_tensors(folder / "model.safetensors", library_state(model.net))
    tensors = {"weight": head} | ({} if model.project is None else {"project": model.project.weight})
    write_tensors(folder / "head.safetensors", tensors,
                  classes=json.dumps({split.domain: split.classes for split in splits}))


# what stages read of a config.json: a type, several of which one has to fit, or a list of such things
CONFIG = {
    "backbone": (str, None), "model": (str, None), "size": str, "weights": str, "image_size": (int, None),
    "embed_dim": int, "seed": int, "domains": [str], "data": str, "counts": {}, "steps": int, "shards": {},
    "versions": {}, "git_commit": (str, None),
}


def read_config(folder: Path) -> dict:
    """config.json of a run; InputError where what stages read of it is missing or of another kind."""
    path, config = folder / "config.json", read_json(folder / "config.json")
    if missing := CONFIG.keys() - config.keys():
        raise InputError(f"{path} lacks {min(missing)!r}: restore it, or train the run again")
    for key, kinds in CONFIG.items():
        value = config[key]
        if not any(value is None if kind is None else fits(value, kind)
                   for kind in (kinds if isinstance(kinds, tuple) else (kinds,))):
            raise InputError(f"{path}: {key} is {str(value)[:60]!r}: restore it, or train the run again")
    domains = config["domains"]
    if not domains or sorted(set(domains), key=DOMAINS.index if set(domains) <= set(DOMAINS) else None) != domains:
        raise InputError(f"{path}: domains is {str(domains)[:60]}: restore it, or train the run again")
    if not all(fits(config["counts"].get(name), int) and isinstance(config["shards"].get(name), str)
               for name in domains):
        raise InputError(f"{path}: counts and shards do not name every domain: restore it, or train the run again")
    return config


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
    config = read_config(folder)
    if not (path := folder / "head.safetensors").is_file():
        raise InputError(f"{folder} holds no weights yet (no head.safetensors): continue it with `train.py --resume`")
    tensors, metadata = read_tensors(path)
    head = tensors.get("weight")
    try:
        classes = json.loads(metadata["classes"])
    except (KeyError, ValueError, RecursionError) as error:
        raise damaged(path, "no class names") from error
    if not isinstance(classes, dict) or list(classes) != config["domains"] or not all(
            fits(names, [str]) for names in classes.values()):
        raise damaged(path, "its class names are no list for each domain")
    ends = np.cumsum([len(names) for names in classes.values()])
    if head is None or not head.is_floating_point() or head.ndim != 2 or len(head) != ends[-1]:
        form = "none" if head is None else f"{head.dtype} {list(head.shape)}"
        raise damaged(path, f"its class weights are {form}, want float [{ends[-1]}, width], one row a class")
    ranges = {d: (int(end) - len(classes[d]), int(end)) for d, end in zip(classes, ends, strict=True)}
    return Run(folder, config, head.float(), classes, ranges)


def load_tuned(run: Run) -> Backbone:
    """The fine-tuned backbone of a run, in eval mode."""
    model, path = load_backbone(run.config | {"weights": "none"}), run.folder / "model.safetensors"
    fill_weights(model.net, model.library, read_tensors(path)[0], path)
    if run.head.shape[1] != model.dim:
        raise damaged(run.folder / "head.safetensors", f"class weights of width {run.head.shape[1]}, not {model.dim}")
    if model.project is not None:
        project = read_tensors(run.folder / "head.safetensors")[0].get("project")
        if project is None or project.shape != model.project.weight.shape:
            raise damaged(run.folder / "head.safetensors", "no linear layer of the width --embed-dim")
        model.project.weight.data.copy_(project)
    return model.eval()


def load_foundation(run: Run) -> Backbone:
    """The untouched backbone that a run started from (without the run's own linear layer), in eval mode."""
    path, told = Path(str(run.config.get("weights"))), run.config.get("weights_sha256")
    if told and hash_file(path) not in (None, told):
        raise InputError(f"{path}: not the file that {run.folder} started from (its SHA-256 differs): restore that, or "
                         "leave the untouched backbone out with --no-foundation")
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
def writing(path: Path) -> Iterator[None]:
    """Inside, what cannot be written to the disk is bad input that names the path."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); the last checkpoint is intact: make "
                         "room, then continue with --resume") from error


@contextlib.contextmanager
def averaged(job: Job) -> Iterator[None]:
    """Inside, the trainable parameters are their running averages, where --ema keeps any."""
    swap = [] if job.ema is None else list(zip(job.parameters, job.ema, strict=True))
    for parameter, average in swap:
        parameter.data, average.data = average.data, parameter.data
    try:
        yield
    finally:
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
    job.saved = step
    ranks.wait()


def misfit(state: object, job: Job) -> str:
    """What in a state file does not fit the run, "" where all does: an optimiser would read beyond a short moment."""
    keys = ("step", "model", "head", "optimizer", "tally", "health", "ema", "norms")
    if not isinstance(state, dict) or (missing := [key for key in keys if key not in state]):
        return f"lacks {missing[0]}" if isinstance(state, dict) else "no dictionary"
    whole = torch.Size([sum(len(split.classes) for split in job.splits), *job.head.shape[1:]])
    shapes = [p.shape for p in job.parameters[:-1]] + [whole]

    def tensor(value: object, shape: torch.Size, kind: torch.dtype = torch.float32) -> bool:
        return isinstance(value, torch.Tensor) and value.shape == shape and value.dtype == kind

    def tensors(values: object, like: dict[str, torch.Tensor]) -> bool:
        return isinstance(values, dict) and values.keys() == like.keys() and all(
            tensor(values[key], value.shape, value.dtype) for key, value in like.items())

    moments = state["optimizer"].get("state") if isinstance(state["optimizer"], dict) else None
    sound = {
        "step": type(state["step"]) is int and 0 <= state["step"] <= job.steps,
        "model": tensors(state["model"], job.model.state_dict()),
        "head": tensor(state["head"], whole),
        "optimizer": isinstance(moments, dict) and all(
            i in range(len(shapes)) and isinstance(own, dict) and own.keys() == {"step", "exp_avg", "exp_avg_sq"}
            and tensor(own["step"], torch.Size()) and tensor(own["exp_avg"], shapes[i])
            and tensor(own["exp_avg_sq"], shapes[i]) for i, own in moments.items()),
        "tally": isinstance(state["tally"], dict) and state["tally"].keys() >= {"skipped", "bad", "seconds"}
        and all(isinstance(state["tally"][key], int | float) for key in ("skipped", "bad", "seconds")),
        "health": tensor(state["health"], torch.Size([2]), torch.int64),
        "ema": job.ema is None or (isinstance(state["ema"], list) and len(state["ema"]) == len(shapes)
                                   and all(map(tensor, state["ema"], shapes))),
        "norms": job.norms is None or tensor(state["norms"], job.norms.shape, torch.float64),
    }
    return next((f"{key} is not what this run saves" for key, good in sound.items() if not good), "")


def load_checkpoint(job: Job) -> int:
    """Restore what save_checkpoint wrote; returns the next step."""
    path = job.folder / "last" / "state.pt"
    rows = slice(None) if job.rows is None else job.rows.cpu()
    try:
        if job.ranks.rank == 0:  # PyTorch reads past a checksum
            with zipfile.ZipFile(path) as file:
                if bad := file.testzip():
                    raise ValueError(f"the checksum of {bad} differs")
        # of a sharded head every rank reads its own rows alone
        state = torch.load(path, "cpu", weights_only=True, mmap=job.rows is not None)
        wrong = misfit(state, job)
    except Exception as error:  # a damaged zip, a foreign pickle
        wrong = str(error).splitlines()[0][:120] if isinstance(error, ValueError) else type(error).__name__
    if wrong:
        raise InputError(f"{path}: damaged ({wrong}): restore it, or start anew in another --out")
    job.model.load_state_dict(state["model"])
    job.head.data.copy_(state["head"][rows])
    if moments := state["optimizer"]["state"]:
        last = max(moments)
        moments[last] = {key: v[rows] if v.ndim else v for key, v in moments[last].items()}
    # the groups are the options' own, which are those that the run was started with
    job.optimizer.load_state_dict(job.optimizer.state_dict() | {"state": moments})
    if job.ema is not None:
        for average, saved in zip(job.ema, [*state["ema"][:-1], state["ema"][-1][rows]], strict=True):
            average.copy_(saved)
    job.health.copy_(state["health"])
    if job.norms is not None:
        job.norms.copy_(state["norms"])
    job.tally.update(state["tally"])
    job.saved = state["step"]
    return state["step"]


def kept_steps(run: Path) -> dict[int, Path]:
    """The checkpoints that --keep left in a run, by step."""
    found = ((folder.name.removeprefix("step-"), folder) for folder in (run / "checkpoints").glob("step-*")
             if folder.is_dir() and not folder.is_symlink())
    return dict(sorted((int(step), folder) for step, folder in found if step.isdigit()))


def keep_checkpoint(job: Job, step: int) -> None:
    """--keep: RUN/checkpoints/step-NNNNNNNN, a run folder of its own. What is too old goes when it is complete.

    The newest ones stay, and the best by the mean AUC of --eval-every, to which the link `best` leads.
    """
    if job.health[1]:  # within a streak of steps that were not finite
        return
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
        for line in log.read_bytes().splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # a line that was cut
                kept += [line] if json.loads(line)["step"] <= step else []
        write_atomically(log, lambda path, kept=kept: path.write_bytes(b"".join(line + b"\n" for line in kept)))
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
