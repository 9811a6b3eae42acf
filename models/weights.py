"""Weight files: those of others, read without executing code and converted; those of a run, with a checksum."""

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from data_prep import InputError, write_atomically


def read_weights(name: str) -> dict[str, torch.Tensor]:
    """A state dict from a file of safetensors, PyTorch (tensors and plain values only) or TorchScript; runs no code.

    `name`: FILE, or FILE:WRAPPER where it holds several sets of weights, such as `teacher` and `student`.
    """
    file, _, wrapper = (name, "", "") if Path(name).is_file() else name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise InputError(f"--weights: no file {name}; give 'pretrained', 'none' or a safetensors/pt file")
    try:
        with open(path, "rb") as opened:
            head = opened.read(9)
        if head[8:] == b"{":  # by content: suffixes are not reliable
            state = load_file(path)
        elif head[:2] == b"PK" and is_torchscript(path):
            state = read_torchscript(path)
        else:
            state = torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        kind = f"it holds {unsafe[1]}, which could run code" if unsafe else type(error).__name__
        raise InputError(
            f"--weights {path}: not a file of plain tensors ({kind}); if you trust it, extract its tensors: "
            f"python -c \"import torch; s = torch.load('{path.name}', weights_only=False); "
            "torch.save(s['state_dict'], 'plain.pt')\" (the key may be another, such as model)") from error
    state = unwrap(state, wrapper, path)
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def unwrap(state: object, wrapper: str, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a loaded file: under `wrapper`, else under a common name, else those of the only dictionary."""
    while isinstance(state, dict):
        inner = {key: value for key, value in state.items() if isinstance(value, dict) and any(
            isinstance(one, torch.Tensor | dict) for one in value.values()) and not re.search("optim|sched", str(key))}
        if wrapper:
            if wrapper not in inner:
                raise InputError(f"--weights {path}: no weights {wrapper!r}; it has {', '.join(inner) or 'none'}")
            state, wrapper = inner[wrapper], ""
            continue
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        if tensors and all(isinstance(key, str) for key in tensors):
            return tensors
        common = [key for key in ("state_dict", "model", "net") if key in inner]
        if len(inner) > 1 and not common:
            first, *others = inner
            raise InputError(f"--weights {path}: holds several sets of weights: give --weights {path.name}:{first} (or "
                             f"{', '.join(others)})")
        state = inner[[*common, *inner][0]] if inner else None
    raise InputError(f"--weights {path}: holds no dictionary of tensors")


def is_torchscript(path: Path) -> bool:
    """Whether a zip is an archive of torch.jit, as OpenAI published CLIP."""
    with zipfile.ZipFile(path) as file:
        return any(re.fullmatch(r"[^/]+/constants\.pkl", name) for name in file.namelist())


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a TorchScript archive, by name; its code is not read."""

    class Module:  # in place of every class in the archive
        pass

    class Tensors(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            if module.startswith("__torch__"):
                return type(name, (Module,), {})
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return lambda data, offset, size, stride, *_: torch.as_strided(data, size, stride, offset).clone()
            if (module, name) == ("collections", "OrderedDict"):
                return dict
            if module == "torch.jit._pickle" and name.startswith(("build_", "restore_")):
                return lambda values, *_: values
            if module == "torch" and name.endswith("Storage"):  # torch.FloatStorage and the like
                return getattr(torch, name)._dtype
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")

        def persistent_load(self, key: tuple) -> torch.Tensor:
            _, dtype, number, *_ = key
            return torch.frombuffer(bytearray(file.read(f"{folder}/data/{number}")), dtype=dtype)

    def collect(module: Module, prefix: str) -> None:
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                state[prefix + name] = value
            elif isinstance(value, Module):
                collect(value, f"{prefix}{name}.")

    state: dict[str, torch.Tensor] = {}
    with zipfile.ZipFile(path) as file:
        folder = file.namelist()[0].partition("/")[0]
        collect(Tensors(file.open(f"{folder}/data.pkl")).load(), "")
    return state


# Keys of the library `transformers` -> keys of OpenAI's CLIP and of timm's DINOv3. In `transformers`, projections are
# transposed and q, k and v are separate.
CLIP_KEYS = [
    (r"^vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."), (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_model\.final_layer_norm\.", "ln_final."), (r"^visual_projection\.weight", "visual.proj"),
    (r"^text_projection\.weight", "text_projection"), (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."), (r"\.self_attn\.qkv\.", ".attn.in_proj_"),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."), (r"\.mlp\.fc2\.", ".mlp.c_proj."),
]
DINO_KEYS = [
    (r"^embeddings\.register_tokens", "reg_token"), (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.", ""), (r"^layer\.", "blocks."), (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.qkv\.", ".attn.qkv."), (r"\.attention\.([qv])_bias", r".attn.\1_bias"),
    (r"\.layer_scale([12])\.lambda1", r".gamma_\1"), (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
]


def from_transformers(state: dict[str, torch.Tensor], expected: Collection[str]) -> dict[str, torch.Tensor]:
    """Convert weights of `transformers` (CLIP, DINOv3) to the layout of open_clip or timm; others are unchanged."""
    clip = "vision_model.embeddings.class_embedding" in state
    if not clip and "embeddings.register_tokens" not in state:
        return state
    state = {key: value for key, value in state.items()
             if not key.endswith((".position_ids", "mask_token")) and "rope" not in key}
    for key in [key for key in state if re.search(r"\.q_proj\.weight$", key)]:
        prefix = key.removesuffix("q_proj.weight")
        state[f"{prefix}qkv.weight"] = torch.cat([state.pop(f"{prefix}{part}_proj.weight") for part in "qkv"])
        biases = {part: state.pop(f"{prefix}{part}_proj.bias") for part in "qkv"
                  if f"{prefix}{part}_proj.bias" in state}
        if clip:
            state[f"{prefix}qkv.bias"] = torch.cat([biases[part] for part in "qkv"])
        elif any(k.endswith("attn.q_bias") for k in expected) or any(bias.any() for bias in biases.values()):
            state |= {f"{prefix}{part}_bias": bias for part, bias in biases.items() if part != "k"}  # else all are 0
    result = {}
    for key, value in state.items():
        if key in ("visual_projection.weight", "text_projection.weight"):
            value = value.T
        for pattern, name in CLIP_KEYS if clip else DINO_KEYS:
            key = re.sub(pattern, name, key)
        result[key] = value
    return result


def strip_prefixes(state: dict[str, torch.Tensor], expected: Collection[str]) -> dict[str, torch.Tensor]:
    """Remove the prefixes that compilers, trainers and wrapping modules add to names."""
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    while not any(key in expected for key in state):
        counts = {prefix: sum(key.startswith(prefix) for key in state) for prefix in
                  ("module.", "model.", "backbone.", "net.")}
        prefix = max(counts, key=counts.get)
        if not counts[prefix]:
            break
        # keys without the prefix belong to other modules, e.g. a projection head
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state


def from_openai(state: dict[str, torch.Tensor], net: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """Remove the settings that OpenAI's archives store as tensors; weights from other sources are unchanged."""
    if "input_resolution" not in state:
        return state
    if not any(type(module).__name__ == "QuickGELU" for module in net.modules()):
        raise InputError(f"--weights {path}: OpenAI's weights were trained with QuickGELU: use --backbone clip, or "
                         "the --model whose name ends in -quickgelu")
    settings = ("input_resolution", "context_length", "vocab_size", "attn_mask")
    return {key: value for key, value in state.items() if key.rpartition(".")[2] not in settings}


# ---------------------------------------------------------------- files of a run


def digest(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of tensors on the CPU, their names, dtypes and shapes, and their metadata."""
    header = {key: [str(value.dtype), list(value.shape)] for key, value in sorted(tensors.items())}
    sha256 = hashlib.sha256(json.dumps([header, metadata], sort_keys=True).encode())
    for key in header:
        sha256.update(tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    """Write a safetensors file with the digest of its contents in its metadata, which `read_tensors` checks."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    metadata = metadata | {"sha256": digest(tensors, metadata)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file of a run; InputError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except Exception as error:  # safetensors raises its own type
        raise damaged(path, str(error)) from error
    if (expected := metadata.pop("sha256", None)) and digest(tensors, metadata) != expected:
        raise damaged(path, "its contents have changed: the SHA-256 differs")
    if wrong := [key for key, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise damaged(path, f"{wrong[0]} holds non-finite numbers")
    return tensors, metadata


def damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: damaged ({what}): restore it, or continue the run with --resume")
