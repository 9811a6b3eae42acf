"""A run's model in a form for others, checked against the run and with its card: `python train.py export --help`.

What is written computes what the run computes, or the command ends with an error and leaves nothing behind.
"""

import hashlib
import importlib.util
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from data_prep import FREE_ON_RESUME, InputError, write_atomically
from models.backbones import TINY_CLIP, Backbone
from models.runs import Run, load_foundation, load_tuned


class FromPixels(nn.Module):
    """A backbone that normalises its images itself: pixels [B, 3, S, S], RGB 0..1 -> embeddings [B, D]."""

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(model.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(model.std).view(3, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model((pixels - self.mean) / self.std)


def build_in_library(model: Backbone) -> tuple[str, nn.Module]:
    """The library call that makes the bare network, as code for the model card, and what it returns."""
    import open_clip
    import timm

    library, name = model.library, model.name
    names, options = [name], {}
    if name == "tiny" and library == "open_clip":
        build, names = open_clip.CLIP, []
        options = TINY_CLIP | {"vision_cfg": TINY_CLIP["vision_cfg"] | {"image_size": model.image_size}}
    elif library == "open_clip":
        build, options = open_clip.create_model, {"force_image_size": model.image_size}
    else:
        build, options = timm.create_model, {"num_classes": 0, "img_size": model.image_size}
        if isinstance(pool := getattr(model.net, "global_pool", None), str):
            options["global_pool"] = pool
    logging.disable(logging.WARNING)  # open_clip's, that the weights are random: they are filled in later
    try:
        net = build(*names, **options)
    except TypeError:  # convolutional networks take any size and no such argument
        del options["img_size"]
        net = build(*names, **options)
    finally:
        logging.disable(logging.NOTSET)
    arguments = [repr(name) for name in names] + [f"{key}={value!r}" for key, value in options.items()]
    return f"{library}.{build.__name__}({', '.join(arguments)})", net


def to_safetensors(model: Backbone, path: Path) -> tuple[str, Callable]:
    """Write the weights in the library's own keys; returns code that uses them, and what that code computes."""
    about = {"mean": model.mean, "std": model.std, "image_size": model.image_size, "interpolation": model.interpolation}
    net = {key: value.contiguous() for key, value in model.net.state_dict().items()}
    metadata = {"format": "pt", "preprocessing": json.dumps(about)}
    write_atomically(path, lambda temporary: save_file(net, temporary, metadata=metadata))
    call, net = build_in_library(model)
    net.load_state_dict(load_file(path), strict=True)
    forward = "encode_image" if model.library == "open_clip" else "forward"
    code = [f"import {model.library}, torch", "from safetensors.torch import load_file", "",
            f"net = {call}", f"net.load_state_dict(load_file({path.name!r}))",
            f"mean = torch.tensor({model.mean}).view(3, 1, 1)", f"std = torch.tensor({model.std}).view(3, 1, 1)",
            f"embeddings = net.eval().{forward}((pixels - mean) / std)"]
    project = torch.eye(model.dim)
    if model.project is not None:  # not part of the library's architecture: a file of its own keeps loading strict
        extra = path.with_name(f"{path.stem}.projection.safetensors")
        tensors = {"project": model.project.weight.detach().contiguous()}
        write_atomically(extra, lambda temporary: save_file(tensors, temporary))
        project = load_file(extra)["project"].T
        code.append(f"embeddings = embeddings @ load_file({extra.name!r})['project'].T")
    alone = FromPixels(Backbone(net, model.library, model.name, 0, model.image_size)).eval()
    return "\n".join(code), lambda pixels: alone(pixels) @ project


def to_onnx(model: Backbone, path: Path) -> tuple[str, Callable]:
    """Write an ONNX graph from pixels to embeddings for batches of any size; returns as `to_safetensors`."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise InputError(f"--to onnx needs {' and '.join(missing)}: pip install onnxscript onnxruntime")
    import onnxruntime

    example = torch.zeros(2, 3, model.image_size, model.image_size)
    logging.disable(logging.WARNING)  # the exporter's notes to its own authors
    try:
        with warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(FromPixels(model).eval(), (example,), dynamo=True, verbose=False,
                                        input_names=["pixels"], output_names=["embeddings"],
                                        dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # of torch.export, the decompositions or the translation
        raise InputError(f"--to onnx: this network cannot be traced ({type(error).__name__}): take --to safetensors, "
                         "or see why with --debug") from error
    finally:
        logging.disable(logging.NOTSET)
    program.model.metadata_props["interpolation"] = model.interpolation
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    code = ["import onnxruntime", "", f"session = onnxruntime.InferenceSession({path.name!r})",
            "embeddings = session.run(None, {'pixels': pixels})[0]"]
    return "\n".join(code), lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])


FORMATS = {"safetensors": to_safetensors, "onnx": to_onnx}


@torch.no_grad()
def largest_difference(model: Backbone, embed: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Largest absolute difference of a unit embedding's component between a model and its exported form."""
    generator, worst = torch.Generator().manual_seed(0), []
    for batch in (1, 3):  # two sizes: a graph may have kept the one that it was traced with
        pixels = torch.rand(batch, 3, model.image_size, model.image_size, generator=generator)
        ours, theirs = FromPixels(model)(pixels), embed(pixels)
        worst.append((F.normalize(ours, dim=1) - F.normalize(theirs, dim=1)).abs().max())
    return float(torch.stack(worst).max())  # NaN stays NaN


@torch.no_grad()
def mix_with_foundation(run: Run, model: Backbone, alpha: float) -> None:
    """WiSE-FT (arXiv 2109.01903): weights (1 - alpha) foundation + alpha tuned, in place.

    It often keeps most of what was learnt and brings back much of what was forgotten. The run's own linear layer has
    no counterpart in the foundation and stays.
    """
    if run.config["weights"] == "none":
        raise InputError(f"--wise-ft: {run.folder} started from random weights, there is no foundation to mix with: "
                         "leave it out")
    before = load_foundation(run).net.state_dict()
    for key, value in model.net.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.lerp(before[key].to(value), value, alpha))


def export_run(run: Run, form: str, out: Path | None, tolerance: float, alpha: float = 1.0) -> int:
    """Write a run's model in another form, with its card, after a check that it still computes the same.

    `alpha` < 1 mixes it with the foundation first.

    Everything is written into a scratch folder and moved only if it passed: what is found under its name is good.
    """
    mixed = f"-wise{alpha:g}" if alpha < 1 else ""
    out = out or run.folder / "export" / f"{run.folder.resolve().name}{mixed}.{form}"
    if out.suffix != f".{form}":
        raise InputError(f"--out {out}: want a file that ends in .{form}")
    if out.exists():
        raise InputError(f"{out} exists: remove it, or choose another --out")
    scores = read_scores(run.folder / "eval" / "results.json")
    model = load_tuned(run)
    if alpha < 1:
        mix_with_foundation(run, model, alpha)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as scratch:
            code, embed = FORMATS[form](model, Path(scratch) / out.name)
            worst = largest_difference(model, embed)
            verdict = (f"max abs difference of unit embeddings from the run's own: {worst:.1e} "
                       f"(tolerance {tolerance:g})")
            if not worst <= tolerance:
                print(f"error: {out} was not written: {verdict}", file=sys.stderr)
                return 1
            card = Path(scratch) / f"{out.name}.md"
            card.write_text(write_card(run, model, sorted(Path(scratch).iterdir()), code, verdict, scores, alpha))
            for file in sorted(Path(scratch).iterdir(), key=lambda file: file.name == out.name):  # the model last
                os.replace(file, out.with_name(file.name))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error}); name a folder that has room and is "
                         "yours to write to") from error
    print(f"{out}: {verdict}; model card: {card.name}")
    return 0


def read_scores(path: Path) -> list[dict]:
    """The rows that evaluate.py wrote; none where the run was not evaluated."""
    try:
        rows = json.loads(path.read_text()) if path.exists() else []
        return [{"name": f"{row['domain']}/{row['split']}", **row} for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: damaged ({error}): run evaluate.py again") from error


def write_card(run: Run, model: Backbone, files: list[Path], code: str, verdict: str, scores: list[dict],
               alpha: float = 1.0) -> str:
    """The model card, Markdown: what the model is, how it is loaded, what it was trained on and how, and its limits."""
    config, size = run.config, model.image_size
    library, name = model.library, model.name
    sources, people = config.get("sources", {}), [domain for domain in run.classes if domain != "object"]
    lines = [f"# {run.folder.resolve().name}", "",
             f"{library}'s `{name}`, fine-tuned on {', '.join(run.classes)} in one embedding space of {model.dim} "
             "dimensions; embeddings are compared by cosine.", "", "## Use", "",
             f"Input: RGB scaled to 0..1, {size} x {size} pixels, resized with antialiased {model.interpolation} "
             "interpolation: `pixels`, float32 [B, 3, S, S]. The scores below add the embedding of the mirror image.",
             "", "```python", code, "```", "", f"Checked on random images: {verdict}.", ""]
    if alpha < 1:
        lines += [f"These weights are a mixture: {alpha:g} of the fine-tuned ones, {1 - alpha:g} of the foundation's "
                  "(WiSE-FT). The scores below are the fine-tuned model's own: this mixture was not scored.", ""]
    for path in files:
        with open(path, "rb") as file:
            lines.append(f"- `{path.name}`: sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}")
    lines += ["", "## Data", "", "| domain | source | images | classes | drawn in training | passes | shards made as |",
              "| --- | --- | --- | --- | --- | --- | --- |"]
    for domain, classes in run.classes.items():
        source, drawn = sources.get(domain, {}), config["counts"][domain]
        known = [source.get("source", "not recorded"), f"{source['images']:,}" if source else ""]
        passes = [f"{drawn / source['images']:.1f}", f"{source['size']} px, {source['fit']}"] if source else ["", ""]
        lines.append(f"| {' | '.join([domain, *known, f'{len(classes):,}', f'{drawn:,}', *passes])} |")
    lines += ["", "Shards, by the hash of their plan: "
              + ", ".join(f"{domain} `{plan[:12]}`" for domain, plan in config["shards"].items()) + ".", "",
              "## Training", "", f"Code: commit {config['git_commit'] or 'unknown'}, "
              + ", ".join(f"{package} {number}" for package, number in config["versions"].items())
              + f". Optimiser steps: {config['steps']:,}. Options:", "", "| option | value |", "| --- | --- |"]
    left_out = FREE_ON_RESUME | ({"size"} if config["model"] else set())
    for key, value in run.options.items():
        if key not in left_out and value is not None and value is not False:
            shown = Path(value).name if key == "weights" else value
            lines.append(f"| {key} | {shown} |")
    lines += ["", "## Scores", ""]
    if scores:
        lines += ["Fractions with 95 % intervals over identities; foundation: the backbone before fine-tuning.", "",
                  "| split | protocol | metric | foundation | tuned | count |", "| --- | --- | --- | --- | --- | --- |"]
        table: dict = {}
        for row in scores:
            table.setdefault((row["name"], row["protocol"], row["metric"]), {})[row["weights"]] = row
        for key, pair in table.items():
            cells = [f"{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" if (r := pair.get(weights)) else ""
                     for weights in ("foundation", "tuned")]
            lines.append(f"| {' | '.join([*key, *cells])} | {next(iter(pair.values()))['count']:,} |")
    else:
        lines.append("None: the run was exported without an evaluation (`python evaluate.py --run RUN`).")
    lines += ["", "## Intended use and limits", "", *(CARD_PEOPLE if people else []), *CARD_LIMITS]
    return "\n".join(lines) + "\n"


CARD_PEOPLE = [
    "- Made for research on recognising people, and objects beside them, with one model. Images of faces and bodies "
    "are personal data, and embeddings that tell people apart are biometric data: have a legal ground and, as a rule, "
    "the consent of those pictured before you compute, keep or share them.",
    "- Not for surveillance, for identifying strangers, or for decisions about people without a human who answers for "
    "them. A cosine is not proof of identity: set thresholds on your own data, for the error that you can bear.",
    "- Error rates differ between groups of people, cameras and years; nothing here measures that for your population.",
]
CARD_LIMITS = [
    "- The scores hold for the splits named above and images prepared as theirs; others may do worse.",
    "- The terms of the untouched weights and of every training set bind this model too: check both before you use or "
    "pass it on.",
]
