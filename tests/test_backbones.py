"""Networks and their weights: downloads, activations, and files however they were saved, whoever saved them."""

import re
import zipfile

import pytest
import torch
from safetensors.torch import save_file

import models.backbones
import models.weights
from data_prep import InputError
from models.backbones import Network, load_backbone

# ---------------------------------------------------------------- networks


def test_the_width_is_what_comes_out():
    model = load_backbone(Network(None, model="mobilenetv3_small_050", weights="none", image_size=64))
    assert model.dim == model.eval()(torch.zeros(1, 3, 64, 64)).shape[1] != model.net.num_features


def test_the_activation_is_the_one_that_the_weights_were_trained_with():
    import open_clip

    for name, tag in open_clip.list_pretrained():
        resolved = models.backbones.resolve_backbone(Network(None, model=f"{name}/{tag}"))[1]
        if open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"):
            assert open_clip.get_model_config(resolved)["quick_gelu"], (name, tag)
        else:
            assert resolved == name
    library, name, _ = models.backbones.resolve_backbone(Network(None, model="ViT-B-32/openai"))
    net = models.backbones.build_network(library, name, 32)[0]
    assert type(net.visual.transformer.resblocks[0].mlp.gelu) is open_clip.transformer.QuickGELU
    with pytest.raises(InputError, match="no weights 'opnai' for ViT-B-32; it has openai, laion400m_e31"):
        models.backbones.resolve_backbone(Network(None, model="ViT-B-32/opnai"))


def test_timms_activation_is_the_one_that_the_weights_were_trained_with():
    import timm

    for name in timm.list_pretrained():
        library, resolved, _ = models.backbones.resolve_backbone(Network(None, model=name))
        quick = "natively QuickGELU" in str(timm.get_pretrained_cfg(name).notes)
        assert library == "timm" and timm.is_model(resolved) and ("quickgelu" in resolved or not quick)
        assert quick or resolved == name
        assert timm.get_pretrained_cfg(resolved).tag == timm.get_pretrained_cfg(name).tag
    _, name, _ = models.backbones.resolve_backbone(Network(None, model="vit_base_patch32_clip_224.openai"))
    activation = models.backbones.build_network("timm", name, 32)[0].blocks[0].mlp.act
    assert "QuickGELU" in type(activation).__name__
    with pytest.raises(InputError, match=r"timm has no weights 'resnet18\.foo'; it has resnet18\.a1_in1k"):
        models.backbones.resolve_backbone(Network(None, model="resnet18.foo"))


def httpx_error() -> Exception:
    """An error of the hub's client, which is no OSError."""
    return type("ConnectError", (Exception,), {"__module__": "httpx2"})("connection refused")


@pytest.mark.parametrize("error, is_one", [
    (OSError("no route to host"), True), (RuntimeError("Failed to download weights for tag 'openai': down"), True),
    (httpx_error(), True), (KeyError("a defect"), False), (RuntimeError("CUDA error: misaligned address"), False),
])  # fmt: skip
def test_only_a_failed_download_is_called_one(error, is_one, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(models.backbones, "build_network", fails)
    monkeypatch.setattr(models.backbones, "fail_fast_offline", lambda: None)
    with pytest.raises(InputError if is_one else type(error)) as raised:
        models.backbones.download_network(Network(None, model="test_vit"), "timm", "test_vit", None, "")
    assert ("cannot be downloaded" in str(raised.value)) == is_one


def test_a_proxy_resolves_names(monkeypatch):
    import huggingface_hub.constants as hub

    def no_dns(*_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(models.backbones.socket, "getaddrinfo", no_dns)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for proxy, offline in (("http://proxy:3128", False), (None, True)):
        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("https_proxy", proxy) if proxy else monkeypatch.delenv("https_proxy")
        models.backbones.fail_fast_offline()
        assert offline == hub.HF_HUB_OFFLINE


# ---------------------------------------------------------------- files of weights


def test_weights_of_another_architecture_name_the_keys(demo_root, tmp_path):
    clip = models.backbones.build_network("open_clip", "tiny", 32)[0].state_dict()
    save_file({"stem.weight": torch.zeros(3)}, tmp_path / "wrong.safetensors")
    save_file({**clip, "visual.head.proj.weight": torch.zeros(3, 3)}, tmp_path / "shape.safetensors")

    def load(name: str):
        load_backbone(Network("clip", "tiny", weights=str(tmp_path / name), image_size=32))

    with pytest.raises(InputError, match=r"lacks positional_embedding, .* more; the network lacks stem.weight$"):
        load("wrong.safetensors")
    with pytest.raises(InputError, match=r"visual.head.proj.weight is \(3, 3\), not \(64, 64\)"):
        load("shape.safetensors")
    torch.save({"weight": print}, tmp_path / "pickle.pt")
    with pytest.raises(InputError, match="not a file of plain tensors"):
        load("pickle.pt")


SAVED = {  # how training scripts save one and the same state dict, and what it has to be called
    "plain": lambda s: s, "ddp": lambda s: prefixed(s, "module."), "compiled": lambda s: prefixed(s, "_orig_mod."),
    "both": lambda s: prefixed(s, "module._orig_mod."), "other way": lambda s: prefixed(s, "_orig_mod.module."),
    "timm": lambda s: {"epoch": 3, "state_dict": s, "optimizer": {"state": {0: {"m": s["cls_token"]}}}, "args": None},
    "model": lambda s: {"model": s}, "net": lambda s: {"net": s}, "only one": lambda s: {"model_ema": s},
    "lightning": lambda s: {"state_dict": prefixed(s, "model.") | {"loss.weight": torch.zeros(2)}, "epoch": 1},
    "backbone": lambda s: prefixed(s, "backbone."), "half": lambda s: {key: v.half() for key, v in s.items()},
    "dino:teacher": lambda s: {"student": {}, "teacher": prefixed(s, "backbone.") | {"head.w": torch.zeros(2)}},
    "two:model_ema": lambda s: {"model": {key: v + 1 for key, v in s.items()}, "model_ema": s},
    "beside": lambda s: s | {"epoch": 3},
}


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + key: value for key, value in state.items()}


def test_weights_load_however_they_were_saved(tmp_path):
    import argparse

    import timm

    net = timm.create_model("test_vit", num_classes=0, img_size=32)
    state = net.state_dict()

    def loads(name: str, tolerance: float = 0.0) -> None:
        other = timm.create_model("test_vit", num_classes=0, img_size=32)
        models.backbones.fill_weights(other, "timm", models.weights.read_weights(str(tmp_path / name)), name)
        for key, value in other.state_dict().items():
            assert (value - state[key]).abs().max() <= tolerance, (name, key)

    for name, form in SAVED.items():
        torch.save(form(state), tmp_path / name.partition(":")[0])
        loads(name, 1e-3 if name == "half" else 0.0)
    save_file(prefixed(state, "_orig_mod."), tmp_path / "tensors.pt")  # a name says nothing of what is in the file
    torch.save(state, tmp_path / "pickle.safetensors")
    loads("tensors.pt"), loads("pickle.safetensors")
    torch.save({"teacher": state, "student": state}, tmp_path / "pair")
    torch.save({"state_dict": state, "args": argparse.Namespace(a=1)}, tmp_path / "namespace")
    for name, words in (("pair", r"several sets of weights: give --weights pair:teacher \(or student\)"),
                        ("pair:ema", "no weights 'ema'; it has teacher, student"),
                        ("namespace", r"holds argparse.Namespace, which could run code\); .* weights_only=False")):
        with pytest.raises(InputError, match=words) as error:
            models.weights.read_weights(str(tmp_path / name))
        assert "\n" not in error.value.message


def small_clip():
    import open_clip

    vision = open_clip.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=16, image_size=32)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=20, width=24, heads=2, layers=2)
    return open_clip.CLIP(16, vision, text, quick_gelu=True)


def test_weights_of_transformers_are_recognised():
    import timm

    net = small_clip()
    state, theirs = net.state_dict(), {}
    for tower, prefix, blocks in (("vision_model", "visual.", 2), ("text_model", "", 2)):
        for i in range(blocks):
            at, to = f"{prefix}transformer.resblocks.{i}.", f"{tower}.encoder.layers.{i}."
            for kind in ("weight", "bias"):
                for part, value in zip("qkv", state[f"{at}attn.in_proj_{kind}"].chunk(3), strict=True):
                    theirs[f"{to}self_attn.{part}_proj.{kind}"] = value
                for a, b in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                             ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
                    theirs[f"{to}{b}.{kind}"] = state[f"{at}{a}.{kind}"]
    for a, b in (("visual.class_embedding", "vision_model.embeddings.class_embedding"),
                 ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
                 ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
                 ("visual.ln_pre.weight", "vision_model.pre_layrnorm.weight"), ("logit_scale", "logit_scale"),
                 ("visual.ln_pre.bias", "vision_model.pre_layrnorm.bias"),
                 ("visual.ln_post.weight", "vision_model.post_layernorm.weight"),
                 ("visual.ln_post.bias", "vision_model.post_layernorm.bias"),
                 ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
                 ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
                 ("ln_final.weight", "text_model.final_layer_norm.weight"),
                 ("ln_final.bias", "text_model.final_layer_norm.bias")):
        theirs[b] = state[a]
    theirs |= {"visual_projection.weight": state["visual.proj"].T, "text_projection.weight": state["text_projection"].T,
               "vision_model.embeddings.position_ids": torch.arange(5)[None]}
    other = small_clip()
    models.backbones.fill_weights(other, "open_clip", theirs, "clip")
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in state.items())

    for name in ("vit_tiny_patch16_dinov3_qkvb", "vit_small_patch16_dinov3"):
        net = timm.create_model(name, num_classes=0, img_size=32)
        for bias in (p for key, p in net.named_parameters() if key.endswith("bias")):
            torch.nn.init.normal_(bias)
        state, theirs = net.state_dict(), {"embeddings.mask_token": torch.zeros(1)}
        for key, value in state.items():
            key = key.replace("blocks.", "layer.").replace("cls_token", "embeddings.cls_token")
            key = key.replace("reg_token", "embeddings.register_tokens")
            key = key.replace("patch_embed.proj", "embeddings.patch_embeddings").replace("mlp.fc1", "mlp.up_proj")
            key = key.replace("gamma_1", "layer_scale1.lambda1").replace("gamma_2", "layer_scale2.lambda1")
            key = key.replace("mlp.fc2", "mlp.down_proj").replace("attn.proj", "attention.o_proj")
            if key.endswith("attn.qkv.weight"):
                at, parts = key.removesuffix("attn.qkv.weight"), zip("qkv", value.chunk(3), strict=True)
                theirs |= {f"{at}attention.{part}_proj.weight": part_value for part, part_value in parts}
                if "qkvb" not in name:  # published with biases that are all 0
                    theirs |= {f"{at}attention.{part}_proj.bias": torch.zeros(len(value) // 3) for part in "qv"}
            else:
                theirs[re.sub(r"attn\.([qv])_bias", r"attention.\1_proj.bias", key)] = value
        other = timm.create_model(name, num_classes=0, img_size=32)
        models.backbones.fill_weights(other, "timm", theirs, name)
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in state.items())


def test_an_archive_of_torchscript_is_read_and_not_run(tmp_path, monkeypatch):
    """As OpenAI published CLIP: half precision, its settings as tensors."""
    import open_clip

    class Image(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net
            for name, child in net.named_children():
                self.add_module(name, child)
            for name, value in net._parameters.items():
                self.register_parameter(name, value)
            for name in ("input_resolution", "context_length", "vocab_size"):
                self.register_buffer(name, torch.tensor(32))
            del self.net

        def forward(self, images):
            return self.visual(images) * self.logit_scale + self.ln_final.weight.sum()

    net = small_clip()
    torch.jit.trace(Image(net).half().float(), torch.zeros(1, 3, 32, 32)).save(str(tmp_path / "clip.pt"))
    monkeypatch.setattr(torch.jit, "load", None)
    state = models.weights.read_weights(str(tmp_path / "clip.pt"))
    assert {"visual.conv1.weight", "input_resolution", "logit_scale"} <= state.keys()
    other = small_clip()
    models.backbones.fill_weights(other, "open_clip", state, "clip.pt")
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in net.state_dict().items())
    with pytest.raises(InputError, match="trained with QuickGELU: use --backbone clip"):
        models.backbones.fill_weights(open_clip.CLIP(16, {"layers": 1, "width": 16, "head_width": 16, "image_size": 32},
                                              {"layers": 1, "width": 16, "heads": 1}), "open_clip", state, "clip.pt")
    with zipfile.ZipFile(tmp_path / "clip.pt") as whole, zipfile.ZipFile(tmp_path / "evil.pt", "w") as evil:
        for name in whole.namelist():
            data = whole.read(name)
            evil.writestr(name, b"cos\nsystem\n(S'touch evil'\ntR." if name.endswith("/data.pkl") else data)
    with pytest.raises(InputError, match=r"holds os.system, which could run code"):
        models.weights.read_weights(str(tmp_path / "evil.pt"))


def test_position_embeddings_resample(tmp_path):
    small = load_backbone(Network(None, model="vit_tiny_patch16_224", weights="none", image_size=32))
    save_file(small.net.state_dict(), tmp_path / "vit.safetensors")
    large = load_backbone(Network(None, model="vit_tiny_patch16_224", weights=str(tmp_path / "vit.safetensors"),
                                  image_size=64))
    assert large.net.pos_embed.shape[1] == 17 and torch.equal(large.net.blocks[0].mlp.fc1.weight,
                                                              small.net.blocks[0].mlp.fc1.weight)
