"""Backbones of timm and open_clip: what there is, how each is built, filled with weights and made ready for training.

What is fine-tuned how (RECIPES) stands here too; options are read by their names from a run's configuration.
"""

import contextlib
import difflib
import logging
import math
import pickle
import re
import socket
import sys
import urllib.request
import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from data_prep import InputError

SIZES = ("tiny", "small", "base", "large")

# Family -> size -> (library, name, pretrained tag or None), and the input size where --image-size is not given.
BACKBONES = {
    "clip": {
        "tiny": ("open_clip", "tiny", None),
        "small": ("open_clip", "ViT-B-32-quickgelu", "openai"),
        "base": ("open_clip", "ViT-B-16-quickgelu", "openai"),
        "large": ("open_clip", "ViT-L-14-quickgelu", "openai"),
    },
    "eva02": {
        "tiny": ("timm", "eva02_tiny_patch14_336.mim_in22k_ft_in1k", ""),
        "small": ("timm", "eva02_small_patch14_336.mim_in22k_ft_in1k", ""),
        "base": ("timm", "eva02_base_patch14_448.mim_in22k_ft_in22k_in1k", ""),
        "large": ("timm", "eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", ""),
    },
    "dinov3": {
        "tiny": ("timm", "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", ""),
        "small": ("timm", "vit_small_patch16_dinov3.lvd1689m", ""),
        "base": ("timm", "vit_base_patch16_dinov3.lvd1689m", ""),
        "large": ("timm", "vit_large_patch16_dinov3.lvd1689m", ""),
    },
}
IMAGE_SIZE = {"clip": 224, "eva02": 224, "dinov3": 256}
# How each foundation is fine-tuned: fills the options that neither the command line nor --config gave, where weights
# are loaded; from a random start the options' own defaults hold. The loss and the augmentations are not in it: a grid
# over backbones compares them on the same task. What all share is in the defaults: AdamW, class weights at 1e-3
# (arcface_torch's ViTs), gradients clipped at 1, a cosine to 1 % after 5 % of warm-up.
RECIPES = {
    "clip": {
        "lr": 2e-5,  # with the decay 4e-6 on average over the blocks; CLIP-ReID trains all of CLIP at 5e-6, batch 64
        "layer_decay": 0.8,  # EVA-02's for large models, 0.8 to 0.85
        "drop_path": 0.0,  # neither CLIP's training nor CLIP-ReID drops any
        "weight_decay": 0.05,  # FRoundation's; CLIP's own was 0.2, CLIP-ReID's 1e-4
    },
    "eva02": {  # the authors' ImageNet fine-tuning of the same weights, batch 512 (EVA-02/asuka/README.md)
        "lr": 2e-5,
        "layer_decay": 0.85,
        "drop_path": 0.15,
        "weight_decay": 0.05,
        "warmup": 0.1,  # 2 of 20 epochs
    },
    "eva02-base": {"lr": 5e-5, "layer_decay": 0.8},  # as above, for the base size
    "dinov3": {
        "lr": 1e-5,  # DeiT III fine-tunes base to huge at it; for DINOv2 users found 1e-5 to 1e-7 (dinov2#252)
        "layer_decay": 0.8,  # as above
        "drop_path": 0.1,  # below EVA-02's 0.15 and DeiT III's 0.2 and more: we train for fewer epochs
        "weight_decay": 0.05,  # EVA-02's; DeiT III has 0.1
    },
    # On top of the backbone's with --lora: FRoundation, CLIP and DINOv2 on faces, batch 512. Every block alike, and so
    # few parameters need no dropped paths.
    "lora": {"lr": 1e-4, "layer_decay": 1.0, "drop_path": 0.0},
}
# CLIP in miniature, for the demo and the tests: no weights of it exist. Its image tower is a ConvNeXt, as in OpenCLIP's
# convnext models, because a transformer learns next to nothing from scratch in the minutes of a demo.
TINY_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64},
    "text_cfg": {"layers": 2, "width": 64, "heads": 2, "context_length": 77, "vocab_size": 49408},
}


class Backbone(nn.Module):
    """An image tower of timm or open_clip with what it needs to know about its input.

    Attributes: dim (width D of the embedding), image_size (pixels), mean and std (per RGB channel, images scaled to
    0..1), interpolation ("bilinear" or "bicubic"), net (the library's own module, with its own key names).
    """

    def __init__(self, net: nn.Module, library: str, embed_dim: int, image_size: int) -> None:
        super().__init__()
        self.net, self.library, self.image_size = net, library, image_size
        if library == "open_clip":
            import open_clip

            settings = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD,
                        "interpolation": "bicubic"} | open_clip.get_model_preprocess_cfg(net)
            net.requires_grad_(False)
            net.visual.requires_grad_(True)  # the text tower stays as it is: it keeps zero-shot alive
        else:
            import timm

            settings = timm.data.resolve_model_data_config(net)
        with torch.no_grad():  # networks of different origin name their width differently: look at what comes out
            probe = torch.zeros(1, 3, image_size, image_size)
            width = (net.eval().encode_image(probe) if library == "open_clip" else net.eval()(probe)).shape[1]
        self.mean, self.std = tuple(settings["mean"]), tuple(settings["std"])
        self.interpolation = "bilinear" if settings["interpolation"] == "bilinear" else "bicubic"
        self.dim = embed_dim or width
        self.project = nn.Linear(width, embed_dim, bias=False) if embed_dim else None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed normalised images [B, 3, S, S] to [B, D], not L2-normalised."""
        x = self.net.encode_image(images) if self.library == "open_clip" else self.net(images)
        return x if self.project is None else self.project(x)

    def train(self, mode: bool = True) -> "Backbone":
        """As nn.Module.train, but BatchNorm keeps its statistics: no layer may mix the samples of a batch."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def layers(self) -> dict[str, int]:
        """Trainable parameter -> depth, 0 at the input; projections count as the top. For layer-wise learning rates."""
        from timm.models._manipulate import group_with_matcher

        tower, prefix = self.net, "net."
        if self.library == "open_clip" and hasattr(self.net.visual, "trunk"):  # a network of timm's inside CLIP
            tower, prefix = self.net.visual.trunk, "net.visual.trunk."
        if tower is self.net and self.library == "open_clip":
            matcher = {
                "stem": r"^visual\.(?:conv1|class_embedding|positional_embedding|ln_pre)",
                "blocks": [(r"^visual\.transformer\.resblocks\.(\d+)", None), (r".", (99999,))],
            }
        else:
            matcher = tower.group_matcher(coarse=False)
        named = [(name, p) for name, p in tower.named_parameters() if p.requires_grad]
        depth = {prefix + n: d for n, d in group_with_matcher(iter(named), matcher, reverse=True).items()}
        deepest = max(depth.values(), default=0)
        return {name: depth.get(name, deepest) for name, p in self.named_parameters() if p.requires_grad}


def resolve_backbone(config: dict) -> tuple[str, str, str | None]:
    """(library, model name, pretrained tag: None where no weights exist) of --backbone and --size, or of --model."""
    import open_clip
    import timm

    if not config["model"]:
        return BACKBONES[config["backbone"]][config["size"]]
    name, _, tag = config["model"].partition("/")
    if timm.is_model(name):
        return "timm", name, ""
    if name in open_clip.list_models():
        if tag and not (settings := open_clip.get_pretrained_cfg(name, tag)):
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
            raise InputError(f"--model: open_clip has no weights {tag!r} for {name}; it has {tags or 'none'}")
        # the tag knows with which activation its weights were trained, the plain name does not
        quick = tag and settings.get("quick_gelu") and not open_clip.get_model_config(name).get("quick_gelu")
        return "open_clip", name + "-quickgelu" * bool(quick), tag or None
    close = difflib.get_close_matches(name, [*timm.list_models(), *open_clip.list_models()], n=3)
    hint = f"; near it: {', '.join(close)}" if close else "; any timm or open_clip name will do"
    raise InputError(f"--model: neither timm nor open_clip knows {name!r}{hint}")


def build_network(library: str, name: str, image_size: int | None, **pretrained) -> nn.Module:
    """The library's own module without a classifier, at an input size (None: the model's own)."""
    if library == "open_clip":
        import open_clip

        if name == "tiny":
            vision = TINY_CLIP["vision_cfg"] | ({"image_size": image_size} if image_size else {})
            return open_clip.CLIP(**TINY_CLIP | {"vision_cfg": open_clip.CLIPVisionCfg(**vision),
                                                 "text_cfg": open_clip.CLIPTextCfg(**TINY_CLIP["text_cfg"])})
        return open_clip.create_model(name, force_image_size=image_size, **pretrained)
    import timm

    # timm pools DINOv3's tokens by default; its authors use the class token
    token = {"global_pool": "token"} if name.startswith("vit_") and "dinov3" in name else {}
    options = pretrained | {"num_classes": 0} | token
    try:
        return timm.create_model(name, **options, **({"img_size": image_size} if image_size else {}))
    except TypeError:  # convolutional networks take any size and no such argument
        return timm.create_model(name, **options)


def read_weights(name: str) -> dict[str, torch.Tensor]:
    """A state dict from a file: safetensors, PyTorch's that hold tensors and plain values only, or TorchScript.

    Args:
        name: FILE, or FILE:WRAPPER where it holds several sets of weights, such as `teacher` and `student`.

    Nothing in the file is run.
    """
    file, _, wrapper = (name, "", "") if Path(name).is_file() else name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise InputError(f"--weights: no file {name}; give 'pretrained', 'none' or a safetensors/pt file")
    try:
        with open(path, "rb") as opened:
            head = opened.read(9)
        if head[8:] == b"{":  # by content, since files of both kinds go by any name
            state = load_file(path)
        elif head[:2] == b"PK" and is_torchscript(path):
            state = read_torchscript(path)
        else:
            state = torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        kind = f"it holds {unsafe[1]}, which could run code" if unsafe else type(error).__name__
        raise InputError(
            f"--weights {path}: not a file of plain tensors ({kind}); if you trust it, keep its tensors alone: "
            f"python -c \"import torch; s = torch.load('{path.name}', weights_only=False); "
            "torch.save(s['state_dict'], 'plain.pt')\" (the key may be another, such as model)") from error
    state = unwrap(state, wrapper, path)
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def unwrap(state: object, wrapper: str, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a loaded file: those under `wrapper`, else of a usual one, else of the only one there."""
    while isinstance(state, dict):
        inner = {key: value for key, value in state.items() if isinstance(value, dict) and any(
            isinstance(one, torch.Tensor | dict) for one in value.values()) and not re.search("optim|sched", str(key))}
        if wrapper:
            if wrapper not in inner:
                raise InputError(f"--weights {path}: no weights {wrapper!r} in it; it has {', '.join(inner) or 'none'}")
            state, wrapper = inner[wrapper], ""
            continue
        usual = [key for key in ("state_dict", "model", "net") if key in inner] or list(inner)
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        if tensors and all(isinstance(key, str) for key in tensors):
            return tensors
        if len(usual) > 1 and usual[0] not in ("state_dict", "model", "net"):
            raise InputError(f"--weights {path}: holds several sets of weights: say --weights {path.name}:{usual[0]} "
                             f"(or {', '.join(usual[1:])})")
        state = state[usual[0]] if usual else None
    raise InputError(f"--weights {path}: holds no dictionary of tensors")


STORAGES = {"HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32,
            "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
            "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
            "BoolStorage": torch.bool}


def is_torchscript(path: Path) -> bool:
    """Whether a zip is an archive of torch.jit, as OpenAI published CLIP."""
    with zipfile.ZipFile(path) as file:
        return any(re.fullmatch(r"[^/]+/constants\.pkl", name) for name in file.namelist())


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a TorchScript archive under their names; its code is not even read."""

    class Module:  # stands for every class of the archive: it holds attributes
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
            if module == "torch" and name in STORAGES:
                return STORAGES[name]
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


# Layouts of the library `transformers`, as (its key, ours): CLIP into OpenAI's, DINOv3 into timm's. Its projections are
# transposed, and its q, k and v are apart.
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
    """Weights in the layout of `transformers` (CLIP, DINOv3) in that of open_clip or timm; others as they are."""
    clip = "vision_model.embeddings.class_embedding" in state
    if not clip and "embeddings.register_tokens" not in state:
        return state
    state = {key: value for key, value in state.items()
             if not key.endswith((".position_ids", "mask_token")) and "rope" not in key}
    for key in [key for key in state if re.search(r"\.q_proj\.weight$", key)]:
        at = key.removesuffix("q_proj.weight")
        state[f"{at}qkv.weight"] = torch.cat([state.pop(f"{at}{part}_proj.weight") for part in "qkv"])
        biases = {part: state.pop(f"{at}{part}_proj.bias") for part in "qkv" if f"{at}{part}_proj.bias" in state}
        if clip:
            state[f"{at}qkv.bias"] = torch.cat([biases[part] for part in "qkv"])
        elif any(k.endswith("attn.q_bias") for k in expected) or any(bias.any() for bias in biases.values()):
            state |= {f"{at}{part}_bias": bias for part, bias in biases.items() if part != "k"}  # else all are 0
    result = {}
    for key, value in state.items():
        if key in ("visual_projection.weight", "text_projection.weight"):
            value = value.T
        for pattern, name in CLIP_KEYS if clip else DINO_KEYS:
            key = re.sub(pattern, name, key)
        result[key] = value
    return result


def strip_prefixes(state: dict[str, torch.Tensor], expected: Collection[str]) -> dict[str, torch.Tensor]:
    """The weights without what compilers, trainers and wrapping modules put before their names."""
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    while not any(key in expected for key in state):
        counts = {prefix: sum(key.startswith(prefix) for key in state) for prefix in
                  ("module.", "model.", "backbone.", "net.")}
        prefix = max(counts, key=counts.get)
        if not counts[prefix]:
            break
        # what lies beside them is of another module: a classifier, a projection head
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state


def from_openai(state: dict[str, torch.Tensor], net: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """The weights of an archive by OpenAI without the settings that it holds as tensors; others as they are."""
    if "input_resolution" not in state:
        return state
    if not any(type(module).__name__ == "QuickGELU" for module in net.modules()):
        raise InputError(f"--weights {path}: OpenAI's weights, trained with QuickGELU: take --backbone clip, or "
                         "the --model of that name with -quickgelu at its end")
    settings = ("input_resolution", "context_length", "vocab_size", "attn_mask")
    return {key: value for key, value in state.items() if key.rpartition(".")[2] not in settings}


def fill_weights(net: nn.Module, library: str, state: dict[str, torch.Tensor], path: Path | str) -> None:
    """Load a state dict strictly, with position embeddings resampled and classifiers of other sizes left out."""
    expected = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    given = state
    try:
        given = state = from_transformers(strip_prefixes(state, expected), expected)
        if library == "open_clip":
            from open_clip.model import resize_pos_embed

            state = from_openai(state, net, path)
            resize_pos_embed(state, net)
        else:
            classifiers = net.default_cfg.get("classifier") or ()
            for classifier in [classifiers] if isinstance(classifiers, str) else classifiers:
                state = {key: value for key, value in state.items() if not key.startswith(f"{classifier}.")}
            convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
            with contextlib.redirect_stdout(None):  # it prints what it passes over
                state = convert(state, net) if convert else state
        # BatchNorm's step counters carry nothing while its statistics stay frozen, and some exports drop them
        state = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")} | state
    except (KeyError, RuntimeError, AttributeError, IndexError, ValueError):
        state = given  # the library's own conversion met keys that it does not know: name those
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    missing, foreign = [key for key in expected if key not in shapes], [key for key in shapes if key not in expected]
    wrong = [f"{k} is {shapes[k]}, not {expected[k]}" for k in expected if k in shapes and expected[k] != shapes[k]]
    if missing or foreign or wrong:
        lists = [f"{what} {', '.join(keys[:3])}" + f" and {len(keys) - 3} more" * (len(keys) > 3)
                 for what, keys in (("the network wants", missing), ("the file holds", foreign)) if keys]
        raise InputError(f"--weights {path}: not the weights of this architecture: {'; '.join([*lists, *wrong[:3]])}"
                         + f" and {len(wrong) - 3} more shapes" * (len(wrong) > 3))
    net.load_state_dict(state)


def load_backbone(config: dict) -> Backbone:
    """Build the untouched backbone of a configuration.

    Args:
        config: the keys backbone, size, model, weights ("pretrained", "none" or a file), image_size (None: the
            family's default), embed_dim (0: none) and seed (a random start is a function of it).

    Raises:
        InputError: unknown model, weights that cannot be had, or weights of another architecture.
    """
    library, name, tag = resolve_backbone(config)
    size = config["image_size"] or (None if config["model"] else IMAGE_SIZE[config["backbone"]])
    torch.manual_seed(config["seed"])
    logging.disable(logging.ERROR)  # the hub clients' own pages about what ends here in one line
    try:
        if config["weights"] == "pretrained":
            net = download_network(config, library, name, size, tag)
        else:
            net = build_network(library, name, size)
            if config["weights"] != "none":
                fill_weights(net, library, read_weights(config["weights"]), config["weights"])
        if size is None:
            import timm

            is_clip = library == "open_clip"
            size = net.visual.image_size if is_clip else timm.data.resolve_model_data_config(net)["input_size"][-1]
            size = size[0] if isinstance(size, tuple) else size
        return Backbone(net, library, config["embed_dim"], size)
    except (AssertionError, ValueError, RuntimeError) as error:
        what = f"--image-size {config['image_size']}" if config["image_size"] else f"input size {size}"
        raise InputError(f"{what} does not fit {name}: {str(error).splitlines()[0]}") from error
    finally:
        logging.disable(logging.NOTSET)


def download_network(config: dict, library: str, name: str, size: int | None, tag: str | None) -> nn.Module:
    """The network with its published weights, from the libraries' hubs or their cache."""
    if tag is None:
        which = config["model"] or f"{config['backbone']} {config['size']}"
        more = " or, for OpenCLIP's, --model NAME/TAG" if library == "open_clip" and config["model"] else ""
        raise InputError(f"{which} has no weights to download: give --weights none or --weights FILE{more}")
    try:
        fail_fast_offline()
        return build_network(library, name, size, pretrained=tag or True)
    except Exception as error:  # the hub clients raise a dozen kinds, open_clip one that it makes of all
        client = re.match(r"huggingface_hub|httpx|requests|urllib3", type(error).__module__)
        if not client and not isinstance(error, OSError) and not str(error).startswith("Failed to download"):
            raise
        raise InputError(
            f"the weights of {name} cannot be downloaded ({str(error).splitlines()[0][:120]}): fetch them on a "
            "machine with network and give --weights FILE, or start at random with --weights none"
        ) from error


def fail_fast_offline() -> None:
    """Without a route to the hub use its cache at once, instead of a minute of retries and a page of warnings."""
    import huggingface_hub.constants as hub

    if {"https", "all"} & urllib.request.getproxies().keys():  # the proxy resolves names
        return
    try:
        socket.getaddrinfo(hub.ENDPOINT.split("//")[-1].split("/")[0], 443)
    except OSError:
        hub.HF_HUB_OFFLINE = True


# ---------------------------------------------------------------- what of the backbone is trained


class LowRank(nn.Module):
    """A matrix [out, in] plus a product of two thin ones that starts at 0: W + 16/√r · up @ down (rsLoRA).

    Source: arXiv 2106.09685 (LoRA), 2312.03732 (the √r); FRoundation's alpha of 16. As a parametrisation of torch's it
    reaches the fused projections of every library alike, nn.MultiheadAttention's too, which hold no Linear to wrap.
    """

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))
        self.scale = 16 / math.sqrt(rank)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # in bf16 it would not be the matrix that is exported
            return weight + self.scale * (self.up @ self.down)


def choose_trained(model: Backbone, config: dict) -> None:
    """Apply --drop-path, --freeze-blocks and --lora to an untouched backbone; its outputs stay what they were."""
    if config["drop_path"]:
        add_drop_path(model, config["drop_path"])
    if frozen := config["freeze_blocks"]:
        layers = model.layers()
        if frozen >= (deepest := max(layers.values())):
            raise InputError(f"--freeze-blocks {frozen}: this network has {deepest} levels and trains the last: "
                             f"take up to {deepest - 1}, or --head-warmup 1, which trains the class weights alone")
        for name, parameter in model.named_parameters():
            if layers.get(name, deepest) <= frozen:  # 0 is what comes before the first block
                parameter.requires_grad_(False)
    if config["lora"]:
        add_low_rank(model, config["lora"])


def add_low_rank(model: Backbone, rank: int) -> None:
    """Freeze the network but for low-rank updates of its attention's query, key and value projections (--lora)."""
    projection = re.compile(r".*\.(in_proj_weight|(qkv|[qkv]_proj)\.weight)")
    found = [name for name, p in model.net.named_parameters() if p.requires_grad and projection.fullmatch(name)]
    model.net.requires_grad_(False)
    for name in found:
        path, _, weight = name.rpartition(".")
        module = model.net.get_submodule(path)
        nn.utils.parametrize.register_parametrization(module, weight, LowRank(getattr(module, weight), rank))
    if not found:
        raise InputError(f"--lora {rank}: this network has no attention projections to adapt: take a transformer, or "
                         "leave it out")


def add_drop_path(model: Backbone, rate: float) -> None:
    """Stochastic depth: in training a residual branch is left out for a sample, the more often the higher it lies.

    Source: arXiv 1603.09382, linear from 0 at the lowest block to `rate` at the top one. open_clip's towers have no
    such option; the place of their layer scale, empty in the published models, is the end of the branch.
    """
    from timm.layers import DropPath

    tower = model.net.visual if model.library == "open_clip" else model.net
    ends = ("drop_path", "drop_path1", "drop_path2", "ls_1", "ls_2")
    blocks = [(module, [end for end in ends if isinstance(getattr(module, end, None), nn.Identity | DropPath)])
              for module in tower.modules()]
    blocks = [(module, found) for module, found in blocks if found]
    if not blocks:
        raise InputError(f"--drop-path {rate:g}: this network has no residual branches to drop: leave it out")
    for (module, found), probability in zip(blocks, np.linspace(0, rate, len(blocks)).tolist(), strict=True):
        for end in found:
            setattr(module, end, DropPath(probability))


def library_state(net: nn.Module) -> dict[str, torch.Tensor]:
    """The weights under the library's own key names, low-rank updates merged into the matrices that they change."""
    state = net.state_dict()
    for key in [key for key in state if key.endswith(".original")]:
        path, _, name = key.removesuffix(".original").rpartition(".parametrizations.")
        state[f"{path}.{name}"] = getattr(net.get_submodule(path), name).detach()
    return {key: value.contiguous() for key, value in state.items() if ".parametrizations." not in key}
