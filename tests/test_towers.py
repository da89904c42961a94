"""Towers of transformers and timm: the libraries' own tokens as a grid, the processors' own preprocessing, safe folders."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from test_hub import hostile_file, hub, server  # noqa: F401 (fixtures)
from test_image_encoder import PICTURE

from mmfuse.files import MmfuseError
from mmfuse.image_encoder import make_image_encoder, to_tokens
from mmfuse.towers import REVISIONS


def tower(kind):
    import transformers as t
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=50, max_position_embeddings=16)
    torch.manual_seed(0)
    return {"clip": lambda: t.CLIPModel(t.CLIPConfig(vision_config=small, text_config=text)),
            "clip_vision": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**small)),
            "siglip": lambda: t.SiglipModel(t.SiglipConfig(vision_config=small, text_config=text)),
            "siglip_vision": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**small)),
            "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**small)),
            "dinov2_registers": lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**small, num_register_tokens=3)),
            "vit": lambda: t.ViTModel(t.ViTConfig(**small)),
            "convnext": lambda: t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], image_size=64)),
            "resnet": lambda: t.ResNetModel(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
            }[kind]().eval()


@pytest.mark.parametrize("kind", ["clip", "clip_vision", "siglip", "siglip_vision", "dinov2", "dinov2_registers", "vit", "convnext", "resnet"])
def test_towers_from_a_folder(kind, tmp_path):
    model = tower(kind)
    model.save_pretrained(tmp_path / "model")
    encoder = make_image_encoder(f"hf:{tmp_path / 'model'}")
    size = encoder.size
    x = torch.randn(2, 3, size, size)
    vision = getattr(model, "vision_model", model)
    with torch.no_grad(): want, got = vision(x).last_hidden_state, encoder(x)
    if kind.startswith("clip"): want = vision.post_layernorm(want)
    if want.ndim == 4: want = to_tokens(want)
    P = encoder.grid_size[0] * encoder.grid_size[1]
    torch.testing.assert_close(got, want[:, -P:], rtol=1e-4, atol=1e-5)
    assert got.shape == (2, P, encoder.dim)
    wide = encoder(torch.randn(1, 3, 64, 96))
    assert wide.shape[1] * 64 * 64 == encoder(torch.randn(1, 3, 64, 64)).shape[1] * 64 * 96
    assert str(tmp_path) not in encoder.key and encoder.key.startswith("hf:model-")
    random = make_image_encoder(f"hf:{tmp_path / 'model'}", pretrained=False)
    assert random(x).shape == got.shape and not torch.allclose(random(x), got)


@pytest.mark.parametrize("processor,picture", [("CLIPImageProcessor", dict(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})),
                                               ("SiglipImageProcessor", dict(size={"height": 32, "width": 32})),
                                               ("ViTImageProcessor", dict(size={"height": 32, "width": 32}))])
def test_the_transform_of_a_tower_is_its_processors(processor, picture, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind = {"C": "clip_vision", "S": "siglip_vision", "V": "vit"}[processor[0]]
    tower(kind).save_pretrained(tmp_path)
    theirs = getattr(transformers, processor)(**picture)
    theirs.save_pretrained(tmp_path)
    want = theirs(PICTURE, return_tensors="pt")["pixel_values"][0]
    got = make_image_encoder(f"hf:{tmp_path}").transform()(PICTURE)
    assert got.shape == want.shape and (got - want).abs().max() < 0.05  # a rounding of uint8 apart


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "deit_tiny_distilled_patch16_224"])
def test_timm_models_give_grids(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    encoder = make_image_encoder(f"timm:{name}", pretrained=False)
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=0).eval()
    x = torch.randn(1, 3, encoder.size, encoder.size)
    with torch.no_grad(): want, got = model.forward_features(x), encoder(x)
    want = want.flatten(1, 2) if name.startswith("swin") else to_tokens(want) if want.ndim == 4 else want[:, model.num_prefix_tokens:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    shown = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    from PIL import Image
    picture = Image.fromarray(PICTURE.permute(1, 2, 0).numpy())
    assert (shown(picture) - encoder.transform()(PICTURE)).abs().max() < 0.6 and (shown(picture) - encoder.transform()(PICTURE)).abs().mean() < 0.05


def test_a_hostile_pickle_in_a_folder_does_not_run(tmp_path):
    mark, folder = tmp_path / "it ran", tmp_path / "model"
    tower("vit").save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    hostile_file(folder / "pytorch_model.bin", mark)
    with pytest.raises(MmfuseError, match="pytorch_model.bin' is damaged or unsafe"): make_image_encoder(f"hf:{folder}")
    assert not mark.exists()


def test_code_in_a_folder_does_not_run(tmp_path):
    tower("vit").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModel": "mine.M"}}))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')\nclass C: pass\nclass M: pass")
    with pytest.raises(MmfuseError, match="cannot load"): make_image_encoder(f"hf:{tmp_path}")
    assert not (tmp_path / "it ran").exists()


def test_damaged_and_missing_files_are_named(tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(MmfuseError, match="no folder"): make_image_encoder(f"hf:{folder}/not/there")
    folder.mkdir()
    with pytest.raises(MmfuseError, match="config.json"): make_image_encoder(f"hf:{folder}")
    tower("clip_vision").save_pretrained(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1000])
    with pytest.raises(MmfuseError, match="model.safetensors' is damaged"): make_image_encoder(f"hf:{folder}")
    (folder / "model.safetensors").unlink()
    with pytest.raises(MmfuseError, match="holds no weights"): make_image_encoder(f"hf:{folder}")
    (folder / "config.json").write_text("{")
    with pytest.raises(MmfuseError, match="config.json' is damaged"): make_image_encoder(f"hf:{folder}", pretrained=False)


def test_a_text_model_is_refused(tmp_path):
    import transformers as t
    t.BertModel(t.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)).save_pretrained(tmp_path)
    with pytest.raises(MmfuseError, match="reads input_ids, not pictures"): make_image_encoder(f"hf:{tmp_path}")


def test_a_hub_is_asked_for_a_pinned_revision_and_only_once(hub, monkeypatch):
    model = tower("dinov2")
    folder = hub("facebook/dinov2-small", REVISIONS["facebook/dinov2-small"], model.save_pretrained)
    key = make_image_encoder("hf:facebook/dinov2-small").key
    shutil.rmtree(folder)
    assert make_image_encoder("hf:facebook/dinov2-small").key == key, "local files come first"
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert make_image_encoder("hf:facebook/dinov2-small").key == key
    with pytest.raises(MmfuseError, match="HF_HUB_OFFLINE is set"): make_image_encoder("hf:nobody/nothing")


def test_a_hub_without_the_model_is_one_line(hub):
    hub("some/text", "main", lambda folder: (folder / "config.json").write_text("{}"))
    for name in ("nobody/nothing", "some/text"):
        with pytest.raises(MmfuseError, match=name) as e: make_image_encoder(f"hf:{name}")
        assert "\n" not in str(e.value)


def test_a_changed_file_in_the_hubs_cache_is_named(hub, tmp_path):
    hub("some/tower", "main", tower("clip_vision").save_pretrained)
    make_image_encoder("hf:some/tower")
    blob = next(p for p in (tmp_path / "hf").rglob("model.safetensors")).resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(MmfuseError, match="model.safetensors' is damaged .its SHA-256 is not the hub's"): make_image_encoder("hf:some/tower")


def test_timm_weights_come_from_the_hub(hub):
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", pretrained=False)
    hub("timm/resnet10t.c3_in1k", "main", lambda folder: save_file(model.state_dict(), folder / "model.safetensors"))
    encoder = make_image_encoder("timm:resnet10t")
    torch.testing.assert_close(encoder.trunk.model.conv1[0].weight, model.conv1[0].weight, rtol=0, atol=0)


