"""Backbones of timm and open_clip: the list, construction, weights, fine-tuning recipes, embeddings."""

import contextlib
import difflib
import logging
import re
import socket
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data_prep import InputError
from data_prep.format import Split
from data_prep.loaders import load
from data_prep.stream import Batches, Look
from models.weights import from_openai, from_transformers, read_weights, strip_prefixes

SIZES = ("tiny", "small", "base", "large")
# Family -> size -> (library, name, pretrained tag or None).
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
IMAGE_SIZE = {"clip": 224, "eva02": 224, "dinov3": 256}  # pixels, without --image-size
# Optimiser options of each backbone where weights are loaded, unless the command line or --config gives them. Losses
# and augmentations are left out, so that a grid compares backbones on the same task. The defaults are common to all:
# AdamW, class weights at 1e-3 (arcface_torch's ViTs), gradients clipped at 1, a cosine to 1 % after 5 % of warm-up.
RECIPES = {
    "clip": {
        "lr": 2e-5,  # mean over blocks with the decay: 4e-6; CLIP-ReID trains all of CLIP at 5e-6, batch 64
        "layer_decay": 0.8,  # EVA-02's for large models, 0.8 to 0.85
        "drop_path": 0.0,  # as in CLIP and CLIP-ReID
        "weight_decay": 0.05,  # FRoundation; CLIP: 0.2, CLIP-ReID: 1e-4
    },
    "eva02": {  # the authors' ImageNet fine-tuning of the same weights, batch 512 (EVA-02/asuka/README.md)
        "lr": 2e-5,
        "layer_decay": 0.85,
        "drop_path": 0.15,
        "weight_decay": 0.05,
        "warmup": 0.1,  # 2 of 20 epochs
    },
    "eva02-base": {"lr": 5e-5, "layer_decay": 0.8},  # same source
    "dinov3": {
        "lr": 1e-5,  # DeiT III, base to huge; users of DINOv2 report 1e-5 to 1e-7 (dinov2#252)
        "layer_decay": 0.8,  # EVA-02's
        "drop_path": 0.1,  # EVA-02: 0.15, DeiT III: 0.2 and more, both with more epochs
        "weight_decay": 0.05,  # EVA-02's; DeiT III: 0.1
    },
    # With --lora, overrides the backbone's recipe: FRoundation (CLIP and DINOv2 on faces, batch 512); with so few
    # parameters, no stochastic depth is needed.
    "lora": {"lr": 1e-4, "layer_decay": 1.0, "drop_path": 0.0},
}
# For the demo and the tests, without published weights. Its image tower is a ConvNeXt, as in OpenCLIP's convnext
# models, because a transformer learns almost nothing from scratch in the minutes of a demo.
TINY_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64},
    "text_cfg": {"layers": 2, "width": 64, "heads": 2, "context_length": 77, "vocab_size": 49408},
}


@dataclass(frozen=True)
class Network:
    """Choice of network, weights and input size."""

    backbone: str | None  # a family of BACKBONES; None: see model
    size: str = "large"
    model: str | None = None  # any name of timm or open_clip
    weights: str = "pretrained"  # or "none", or a file
    image_size: int | None = None  # pixels; None: the family's or the model's own
    embed_dim: int = 0  # width of one linear layer after the backbone; 0: none
    seed: int = 0  # of random weights

    @classmethod
    def of(cls, values: Any, **changes) -> "Network":
        """From options, or from the configuration of a run."""
        given = values if isinstance(values, dict) else vars(values)
        return cls(**{field.name: given[field.name] for field in fields(cls)} | changes)

    @property
    def name(self) -> str:
        return (self.model or f"{self.backbone}-{self.size}").replace("/", "_")


class Backbone(nn.Module):
    """An image tower of timm or open_clip and the format of its input.

    Attributes: net (the library's module, with its key names), library, name (in the library), dim (width D of the
    embedding), image_size (pixels), mean and std (per RGB channel, images scaled to 0..1), interpolation ("bilinear" or
    "bicubic"), look (these four together).
    """

    def __init__(self, net: nn.Module, library: str, name: str, embed_dim: int, image_size: int | None) -> None:
        super().__init__()
        self.net, self.library, self.name = net, library, name
        if library == "open_clip":
            import open_clip

            settings = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD,
                        "interpolation": "bicubic"} | open_clip.get_model_preprocess_cfg(net)
            size = net.visual.image_size
            net.requires_grad_(False)
            net.visual.requires_grad_(True)  # the frozen text tower keeps zero-shot classification possible
        else:
            import timm

            settings = timm.data.resolve_model_data_config(net)
            size = settings["input_size"]
        self.image_size = image_size or (size[-1] if isinstance(size, tuple) else size)
        self.project = None
        with torch.no_grad():  # the width is measured, because its name depends on the library
            width = self.eval()(torch.zeros(1, 3, self.image_size, self.image_size)).shape[1]
        self.mean, self.std = tuple(settings["mean"]), tuple(settings["std"])
        self.interpolation = "bilinear" if settings["interpolation"] == "bilinear" else "bicubic"
        self.look = Look(self.image_size, self.mean, self.std, self.interpolation)
        self.dim = embed_dim or width
        if embed_dim:
            self.project = nn.Linear(width, embed_dim, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed normalised images [B, 3, S, S] to [B, D], not L2-normalised."""
        x = self.net.encode_image(images) if self.library == "open_clip" else self.net(images)
        return x if self.project is None else self.project(x)

    def train(self, mode: bool = True) -> "Backbone":
        """As nn.Module.train, but BatchNorm statistics stay frozen: no layer may mix the samples of a batch."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def layers(self) -> dict[str, int]:
        """Trainable parameter -> depth, 0 at the input; projections belong to the top layer."""
        from timm.models._manipulate import group_with_matcher

        tower, prefix = self.net, "net."
        if self.library == "open_clip" and hasattr(self.net.visual, "trunk"):  # a timm network inside CLIP
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


def resolve_backbone(network: Network) -> tuple[str, str, str | None]:
    """(library, model name, pretrained tag: None where no weights exist) of --backbone and --size, or of --model."""
    import open_clip
    import timm

    if not network.model:
        return BACKBONES[network.backbone][network.size]
    name, _, tag = network.model.partition("/")
    if timm.is_model(name):
        try:
            notes = getattr(timm.get_pretrained_cfg(name), "notes", None) or ()  # a network of one's own has no such
        except RuntimeError as error:
            tags = ", ".join(timm.list_pretrained(name.partition(".")[0]))
            raise InputError(f"--model: timm has no weights {name!r}; it has {tags or 'none'}") from error
        # the activation depends on the tag
        quick = any("QuickGELU" in note for note in notes) and "_quickgelu_" not in name
        return "timm", name.replace("_clip_", "_clip_quickgelu_") if quick else name, ""
    if name in open_clip.list_models():
        if tag and not (settings := open_clip.get_pretrained_cfg(name, tag)):
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
            raise InputError(f"--model: open_clip has no weights {tag!r} for {name}; it has {tags or 'none'}")
        quick = tag and settings.get("quick_gelu") and not open_clip.get_model_config(name).get("quick_gelu")
        return "open_clip", name + "-quickgelu" * bool(quick), tag or None
    close = difflib.get_close_matches(name, [*timm.list_models(), *open_clip.list_models()], n=3)
    hint = f"; similar names: {', '.join(close)}" if close else "; any timm or open_clip name is valid"
    raise InputError(f"--model: neither timm nor open_clip has {name!r}{hint}")


def build_network(library: str, name: str, image_size: int | None, **pretrained) -> tuple[nn.Module, str]:
    """The library's module without a classifier, at an input size (None: the model's); and the call as code."""
    import open_clip
    import timm

    names = [name]
    if library == "timm":
        # timm pools DINOv3's tokens by default; its authors use the class token
        token = {"global_pool": "token"} if name.startswith("vit_") and "dinov3" in name else {}
        build, options = timm.create_model, {"num_classes": 0, "img_size": image_size} | token
    elif name == "tiny":
        build, names = open_clip.CLIP, []
        options = TINY_CLIP | {"vision_cfg": TINY_CLIP["vision_cfg"] | {"image_size": image_size}}
    else:
        build, options = open_clip.create_model, {"force_image_size": image_size}
    try:
        net = build(*names, **options, **pretrained)
    except TypeError:  # convolutional networks take any size and no such argument
        options.pop("img_size", None)
        net = build(*names, **options, **pretrained)
    arguments = [repr(name) for name in names] + [f"{key}={value!r}" for key, value in options.items()]
    return net, f"{library}.{build.__name__}({', '.join(arguments)})"


def fill_weights(net: nn.Module, library: str, state: dict[str, torch.Tensor], path: Path | str) -> None:
    """Load a state dict strictly; position embeddings are resampled, classifiers left out."""
    expected = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    original = state
    try:
        original = state = from_transformers(strip_prefixes(state, expected), expected)
        if library == "open_clip":
            from open_clip.model import resize_pos_embed

            state = from_openai(state, net, path)
            resize_pos_embed(state, net)
        else:
            classifiers = net.default_cfg.get("classifier") or ()
            for classifier in [classifiers] if isinstance(classifiers, str) else classifiers:
                state = {key: value for key, value in state.items() if not key.startswith(f"{classifier}.")}
            convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
            with contextlib.redirect_stdout(None):  # it prints skipped keys
                state = convert(state, net) if convert else state
        # some exports drop BatchNorm's step counters, which frozen statistics do not use
        state = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")} | state
    except (KeyError, RuntimeError, AttributeError, IndexError, ValueError):
        state = original  # unknown keys broke the library's conversion; they are reported below
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    missing, unknown = [key for key in expected if key not in shapes], [key for key in shapes if key not in expected]
    wrong = [f"{k} is {shapes[k]}, not {expected[k]}" for k in expected if k in shapes and expected[k] != shapes[k]]
    if missing or unknown or wrong:
        lists = [f"{what} {', '.join(keys[:3])}" + f" and {len(keys) - 3} more" * (len(keys) > 3)
                 for what, keys in (("the file lacks", missing), ("the network lacks", unknown)) if keys]
        raise InputError(f"--weights {path}: not the weights of this architecture: {'; '.join([*lists, *wrong[:3]])}"
                         + f" and {len(wrong) - 3} more shapes" * (len(wrong) > 3))
    net.load_state_dict(state)


def load_backbone(network: Network) -> Backbone:
    """An untouched backbone; InputError if its name is unknown or its weights cannot be had or do not fit."""
    library, name, tag = resolve_backbone(network)
    size = network.image_size or (None if network.model else IMAGE_SIZE[network.backbone])
    torch.manual_seed(network.seed)
    logging.disable(logging.ERROR)  # of the hub clients: errors are reported below in one line
    try:
        if network.weights == "pretrained":
            net = download_network(network, library, name, size, tag)
        else:
            net, _ = build_network(library, name, size)
            if network.weights != "none":
                fill_weights(net, library, read_weights(network.weights), network.weights)
        return Backbone(net, library, name, network.embed_dim, size)
    except (AssertionError, ValueError, RuntimeError) as error:
        setting = f"--image-size {network.image_size}" if network.image_size else f"input size {size or 'of the model'}"
        raise InputError(f"{setting} does not fit {name}: {str(error).splitlines()[0]}") from error
    finally:
        logging.disable(logging.NOTSET)


def download_network(network: Network, library: str, name: str, size: int | None, tag: str | None) -> nn.Module:
    """The network with its published weights, from the hub or its cache."""
    if tag is None:
        choice = network.model or f"{network.backbone} {network.size}"
        hint = " or, for OpenCLIP's, --model NAME/TAG" if library == "open_clip" and network.model else ""
        raise InputError(f"{choice} has no weights to download: give --weights none or --weights FILE{hint}")
    try:
        fail_fast_offline()
        return build_network(library, name, size, pretrained=tag or True)[0]
    except Exception as error:  # the hub clients raise many types, open_clip a single one
        client = re.match(r"huggingface_hub|httpx|requests|urllib3", type(error).__module__)
        if not client and not isinstance(error, OSError) and not str(error).startswith("Failed to download"):
            raise
        raise InputError(
            f"the weights of {name} cannot be downloaded ({str(error).splitlines()[0][:120]}): download them on "
            "another machine and give --weights FILE, or use random weights with --weights none"
        ) from error


def fail_fast_offline() -> None:
    """Without a network, read the hub's cache at once instead of after a minute of retries and warnings."""
    import huggingface_hub.constants as hub

    if {"https", "all"} & urllib.request.getproxies().keys():  # the proxy resolves names
        return
    try:
        socket.getaddrinfo(hub.ENDPOINT.split("//")[-1].split("/")[0], 443)
    except OSError:
        hub.HF_HUB_OFFLINE = True


# ---------------------------------------------------------------- weights and embeddings


def library_state(net: nn.Module) -> dict[str, torch.Tensor]:
    """The weights under the library's key names, with low-rank updates merged."""
    state = net.state_dict()
    for key in [key for key in state if key.endswith(".original")]:
        path, _, name = key.removesuffix(".original").rpartition(".parametrizations.")
        state[f"{path}.{name}"] = getattr(net.get_submodule(path), name).detach()
    return {key: value.contiguous() for key, value in state.items() if ".parametrizations." not in key}


@torch.no_grad()
def embed_rows(model: Backbone, split: Split, rows: np.ndarray, device: torch.device, batch: int, workers: int = 0,
               flip: bool = False) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Yield (rows [b], embeddings [b, D] float32) of the readable images of a split, uncropped.

    `flip`: add the embedding of the mirror image.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    model.eval()
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (model.mean, model.std))
    size, mode = [model.image_size] * 2, InterpolationMode(model.interpolation)
    for good, images in load(Batches(split, rows, batch), 0, workers, device.type == "cuda"):
        if len(good):
            x = resize(images.to(device, non_blocking=True).float(), size, interpolation=mode, antialias=True)
            x = (x.clamp(0, 255) / 255 - mean) / std
            yield good, (model(x) + model(x.flip(3)) if flip else model(x)).float()


@torch.no_grad()
def text_weights(model: Backbone, names: list[str], device: torch.device,
                 templates: Sequence[str] = ("a photo of a {}.",)) -> torch.Tensor:
    """Unit CLIP text embeddings [C, D] of class names, each the mean over prompts, where {} stands for the name."""
    import open_clip

    tokenizer = open_clip.get_tokenizer("ViT-B-32" if model.name == "tiny" else model.name)
    prompts = tokenizer([text.replace("{}", name.replace("_", " ")) for text in templates for name in names])
    x = torch.cat([model.net.encode_text(part.to(device)).float() for part in prompts.split(256)])
    return F.normalize(F.normalize(x, dim=1).view(len(templates), len(names), -1).mean(0), dim=1)
