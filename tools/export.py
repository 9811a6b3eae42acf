"""Export a run's model, with a model card: `python train.py export --help`.

The exported model is compared with the run's; if they differ, nothing is written.
"""

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

from data_prep import FREE_ON_RESUME, InputError, hash_file, literal, write_atomically
from models.backbones import Backbone, build_network
from models.runs import Run, load_foundation, load_tuned
from protocols.bootstrap import FEW_NOTE
from protocols.results import Row, read_rows
from reports.rows import tabulate


class FromPixels(nn.Module):
    """A backbone with its normalisation: pixels [B, 3, S, S], RGB 0..1 -> embeddings [B, D]."""

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(model.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(model.std).view(3, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model((pixels - self.mean) / self.std)


def to_safetensors(model: Backbone, path: Path) -> tuple[str, Callable]:
    """Write the weights under the library's keys; returns code that loads them, and its function."""
    preprocessing = {name: getattr(model, name) for name in ("mean", "std", "image_size", "interpolation")}
    net = {key: value.contiguous() for key, value in model.net.state_dict().items()}
    metadata = {"format": "pt", "preprocessing": json.dumps(preprocessing)}
    write_atomically(path, lambda temporary: save_file(net, temporary, metadata=metadata))
    net, call = build_network(model.library, model.name, model.image_size)
    net.load_state_dict(load_file(path), strict=True)
    forward = "encode_image" if model.library == "open_clip" else "forward"
    code = [f"import {model.library}, torch", "from safetensors.torch import load_file", "",
            f"net = {call}", f"net.load_state_dict(load_file({path.name!r}))",
            f"mean = torch.tensor({model.mean}).view(3, 1, 1)", f"std = torch.tensor({model.std}).view(3, 1, 1)",
            f"embeddings = net.eval().{forward}((pixels - mean) / std)"]
    project = torch.eye(model.dim)
    if model.project is not None:  # in a separate file, so that the library loads the weights strictly
        extra = path.with_name(f"{path.stem}.projection.safetensors")
        tensors = {"project": model.project.weight.detach().contiguous()}
        write_atomically(extra, lambda temporary: save_file(tensors, temporary))
        project = load_file(extra)["project"].T
        code.append(f"embeddings = embeddings @ load_file({extra.name!r})['project'].T")
    rebuilt = FromPixels(Backbone(net, model.library, model.name, 0, model.image_size)).eval()
    return "\n".join(code), lambda pixels: rebuilt(pixels) @ project


def to_onnx(model: Backbone, path: Path) -> tuple[str, Callable]:
    """Write an ONNX graph from pixels to embeddings, for any batch size; returns as `to_safetensors`."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise InputError(f"--to onnx needs {' and '.join(missing)}: pip install onnxscript onnxruntime")
    import onnxruntime

    example = torch.zeros(2, 3, model.image_size, model.image_size)
    try:
        with warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(FromPixels(model).eval(), (example,), dynamo=True, verbose=False,
                                        input_names=["pixels"], output_names=["embeddings"],
                                        dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # many types
        raise InputError(f"--to onnx: this network cannot be traced ({type(error).__name__}): use --to safetensors; "
                         "--debug shows the reason") from error
    program.model.metadata_props["interpolation"] = model.interpolation
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    code = ["import onnxruntime", "", f"session = onnxruntime.InferenceSession({path.name!r})",
            "embeddings = session.run(None, {'pixels': pixels})[0]"]
    return "\n".join(code), lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])


FORMATS = {"safetensors": to_safetensors, "onnx": to_onnx}


@torch.no_grad()
def largest_difference(model: Backbone, embed: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Largest absolute difference in a component of unit embeddings between a model and its export."""
    generator, worst = torch.Generator().manual_seed(0), []
    for batch in (1, 3):  # two sizes: a graph may be specialised to the traced one
        pixels = torch.rand(batch, 3, model.image_size, model.image_size, generator=generator)
        ours, theirs = FromPixels(model)(pixels), embed(pixels)
        worst.append((F.normalize(ours, dim=1) - F.normalize(theirs, dim=1)).abs().max())
    return float(torch.stack(worst).max())  # NaN stays NaN


@torch.no_grad()
def interpolate_weights(run: Run, model: Backbone, alpha: float) -> None:
    """WiSE-FT (arXiv 2109.01903), in place: (1 - alpha) untouched + alpha fine-tuned weights.

    The linear layer of --embed-dim, which the untouched backbone lacks, keeps its weights.
    """
    if run.config["weights"] == "none":
        raise InputError(f"{run.folder} started from random weights: leave --wise-ft out")
    untouched = load_foundation(run).net.state_dict()
    for key, value in model.net.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.lerp(untouched[key].to(value), value, alpha))


def export_run(run: Run, form: str, out: Path | None, tolerance: float, alpha: float) -> int:
    """`train.py export`: write model and card into a scratch folder, and move them if the model passes the check.

    `alpha`: see `interpolate_weights`; 1: fine-tuned weights only. Returns the exit code.
    """
    mixed = f"-wise{alpha:g}" if alpha < 1 else ""
    out = out or run.folder / "export" / f"{run.folder.resolve().name}{mixed}.{form}"
    if out.suffix != f".{form}":
        raise InputError(f"--out {out}: want a file that ends in .{form}")
    if out.exists():
        raise InputError(f"{out} exists: remove it, or choose another --out")
    evaluation = run.folder / "eval"
    scores = read_rows(evaluation) if (evaluation / "results.json").exists() else []
    model = load_tuned(run)
    if alpha < 1:
        interpolate_weights(run, model, alpha)
    logging.disable(logging.WARNING)  # open_clip warns of random weights, which are loaded later
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as scratch:
            code, embed = FORMATS[form](model, Path(scratch) / out.name)
            worst = largest_difference(model, embed)
            check = f"largest difference of unit embeddings from the run's: {worst:.1e} (tolerance {tolerance:g})"
            if not worst <= tolerance:
                print(f"error: {out} was not written: {check}", file=sys.stderr)
                return 1
            card = Path(scratch) / f"{out.name}.md"
            card.write_text(write_card(run, model, sorted(Path(scratch).iterdir()), code, check, scores, alpha))
            for file in sorted(Path(scratch).iterdir(), key=lambda file: file.name == out.name):  # the model last
                os.replace(file, out.with_name(file.name))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error}); choose a folder that is writable and "
                         "has room") from error
    finally:
        logging.disable(logging.NOTSET)
    print(f"{out}: {check}; model card: {card.name}")
    return 0


def write_card(run: Run, model: Backbone, files: list[Path], code: str, check: str, scores: list[Row],
               alpha: float) -> str:
    """The model card (Markdown): use, training data, training, scores, limits."""
    config, size = run.config, model.image_size
    library, name = model.library, model.name
    sources, people = config.get("sources", {}), [domain for domain in run.classes if domain != "object"]
    lines = [f"# {literal(run.folder.resolve().name)}", "",
             f"{library}'s `{name}`, fine-tuned on {', '.join(run.classes)} in one embedding space of {model.dim} "
             "dimensions; embeddings are compared by cosine.", "", "## Use", "",
             f"Input: RGB scaled to 0..1, {size} x {size} pixels, resized with antialiased {model.interpolation} "
             "interpolation: `pixels`, float32 [B, 3, S, S]. The scores below add the embedding of the mirror image.",
             "", "```python", code, "```", "", f"Checked on random images: {check}.", ""]
    if alpha < 1:
        lines += [f"WiSE-FT: {alpha:g} x fine-tuned + {1 - alpha:g} x untouched weights. The scores below are of the "
                  "fine-tuned weights; the interpolated ones were not evaluated.", ""]
    lines += [f"- {literal(path.name)}: sha256 {hash_file(path)}" for path in files]
    lines += ["", "## Data", "", "| domain | source | images | classes | drawn in training | passes | format |",
              "| --- | --- | --- | --- | --- | --- | --- |"]
    for domain, classes in run.classes.items():
        source, drawn = sources.get(domain, {}), config["counts"][domain]
        origin = [literal(source.get("source", "not recorded")), f"{source['images']:,}" if source else ""]
        fit = literal(str(source.get("fit")))
        passes = [f"{drawn / source['images']:.1f}", f"{source['size']} px, {fit}"] if source else ["", ""]
        lines.append(f"| {' | '.join([domain, *origin, f'{len(classes):,}', f'{drawn:,}', *passes])} |")
    lines += ["", "Shards (SHA-256 of their plan): "
              + ", ".join(f"{domain} {literal(config['shards'][domain][:12])}" for domain in run.classes) + ".", "",
              "## Training", "", f"Code: commit {literal(config['git_commit'] or 'unknown')}, "
              + literal(", ".join(f"{package} {number}" for package, number in config["versions"].items()))
              + f". Optimiser steps: {config['steps']:,}. Options:", "", "| option | value |", "| --- | --- |"]
    left_out = FREE_ON_RESUME | ({"size"} if config["model"] else set())
    for key, value in run.options.items():
        if key not in left_out and value is not None and value is not False:
            shown = Path(value).name if key == "weights" else value
            lines.append(f"| {key} | {literal(str(shown))} |")
    lines += ["", "## Scores", ""]
    if scores:
        lines += ["Percent (d-prime: as it is) with 95 % bootstrap intervals over identities; foundation: before "
                  f"fine-tuning. {FEW_NOTE}.", "", *tabulate(scores)]
    else:
        lines.append("None: the run was not evaluated (`python evaluate.py --run RUN`) before its export.")
    lines += ["", "## Intended use and limits", "", *(CARD_PEOPLE if people else []), *CARD_LIMITS]
    return "\n".join(lines) + "\n"


CARD_PEOPLE = [
    "- Intended for research on recognising people and objects with one model. Images of faces and bodies are personal "
    "data, and embeddings that identify people are biometric data: computing, storing or sharing them requires a legal "
    "basis and usually the consent of the people in the images.",
    "- Not intended for surveillance, for identifying strangers, or for decisions about people without human "
    "responsibility. A cosine is no proof of identity: set thresholds on your own data, for an acceptable error rate.",
    "- Error rates differ between groups of people, cameras and years; they were not measured for your population.",
]
CARD_LIMITS = [
    "- The scores hold for the splits above and for images prepared in the same way; others may score lower.",
    "- The licences of the untouched weights and of every training set also apply to this model.",
]
