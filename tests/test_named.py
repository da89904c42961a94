"""Names on both sides: scores that are what the classifier says, tokens that all heads can read, heads that use names and nothing else."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from mmfuse import named as module
from mmfuse.files import MmfuseError
from mmfuse.fusion import HEADS, make_head
from mmfuse.image_encoder import make_image_encoder
from mmfuse.named import (ImageNamedHead, LabelLinks, NamedEncoder, NamedHead, TextNamedHead, imagenet_classifier, imagenet_names,
                          make_encoders, mix_names, reading)

D, C, DT, B = 12, 4, 16, 40


def tokens(seed=0, p=9):
    g = torch.Generator().manual_seed(seed)
    scores = torch.softmax(3 * torch.randn(B, p, C, generator=g), -1)
    img = torch.cat([torch.randn(B, p, D, generator=g), scores], -1)
    return img, torch.randn(B, 6, DT, generator=g), torch.arange(6) < torch.randint(1, 7, (B, 1), generator=g)


def named(kind=NamedHead, **kwargs):
    torch.manual_seed(0)
    head = kind(D + C, DT, C, names=torch.randn(C, DT), scored=True, **kwargs)
    head.set_statistics(*tokens())
    return head.eval()


def test_shares_are_a_softmax_of_cosines():
    known, names = torch.randn(7, DT), torch.randn(C, DT)
    share = mix_names(known, 5 * names, temperature=0.3).numpy()
    cosine = np.array([[k @ n / np.linalg.norm(k) / np.linalg.norm(n) for n in names.numpy()] for k in known.numpy()])
    expected = np.exp(cosine / 0.3) / np.exp(cosine / 0.3).sum(1, keepdims=True)
    np.testing.assert_allclose(share, expected, rtol=1e-4)


def test_a_classifier_reads_the_encoder_that_it_was_trained_with(monkeypatch):
    "On the mean of a torchvision network's places, the layer that was found gives that network's own logits."
    torch.manual_seed(0)
    whole = torchvision.models.resnet18(weights=None).eval()
    monkeypatch.setattr(module, "hashed_file", lambda url, name: None)
    monkeypatch.setattr(module, "read_weights", lambda path: whole.state_dict())
    weight, bias = imagenet_classifier("resnet18@448")
    encoder = make_image_encoder("resnet18", pretrained=False)
    encoder.trunk.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("fc")})
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x).mean(1) @ weight.T + bias, whole(x), atol=1e-4, rtol=1e-4)


def test_lite_classifiers_say_what_the_package_says():
    library = pytest.importorskip("efficientnet_lite_pytorch")
    for name in ("efficientnet_lite0", "efficientnet_lite2"):
        model = library.EfficientNet.from_name(name.replace("_", "-")).eval()
        model.load_state_dict(module.read_weights(module.lite_weights(name)))
        encoder, (weight, bias) = make_image_encoder(name), imagenet_classifier(name)
        x = torch.randn(1, 3, encoder.size, encoder.size)
        with torch.no_grad():
            torch.testing.assert_close(encoder(x).mean(1) @ weight.T + bias, model(x), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", ["tiny", "timm:resnet18", "hf:openai/clip", "convnext_tiny", "vit_b_16", "resnet5000"])
def test_encoders_without_named_places_are_one_line(name):
    with pytest.raises(MmfuseError, match="has no classifier of places") as e:
        imagenet_classifier(name)
    assert "\n" not in str(e.value)


def test_there_are_a_thousand_names():
    names = imagenet_names()
    assert len(names) == 1000 and names[0] == "tench" and names[207] == "golden retriever"


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return NamedEncoder(make_image_encoder("tiny").freeze(), torch.randn(5, 256) * 0.1, torch.randn(5), torch.softmax(torch.randn(5, C), 1))


def test_tokens_are_features_and_the_mean_of_what_places_say(encoder):
    x = torch.rand(2, 3, 224, 224)  # a grid of 14 x 14, kept as 7 x 7
    with torch.no_grad():
        grid, out = encoder.encoder.grid(x), encoder(x)
    assert out.shape == (2, 49, 256 + C) and encoder.dim == 256 + C
    block = grid[1, :, 2:4, 6:8].flatten(1).T  # (4, D): row 1, column 3
    p = torch.softmax(block @ encoder.weight.T + encoder.bias, -1) @ encoder.mix  # (4, C)
    torch.testing.assert_close(out[1, 7 + 3], torch.cat([block.mean(0), p.mean(0)]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out[..., -C:].sum(-1), torch.ones(2, 49))
    torch.testing.assert_close(out.mean(1)[:, :-C], grid.mean((2, 3)), atol=1e-5, rtol=1e-4)


def test_no_grid_is_made_finer(encoder):
    with torch.no_grad():
        assert encoder(torch.rand(1, 3, 64, 64)).shape == (1, 16, 256 + C)


def test_the_key_changes_with_what_the_scores_are_made_from(encoder):
    parts = encoder.weight, encoder.bias, encoder.mix
    keys = {NamedEncoder(encoder.encoder, *parts, source=s, side=n).key for s in ("a", "b") for n in (7, 3)} | {encoder.encoder.key}
    assert len(keys) == 5
    assert NamedEncoder(encoder.encoder, *parts, source="a").key in keys


def test_a_frozen_encoder_stays_frozen(encoder):
    assert encoder.freeze() is encoder
    encoder.train()
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.encoder.training


def test_a_classifier_of_another_encoder_is_refused(encoder):
    with pytest.raises(MmfuseError, match="does not belong"):
        NamedEncoder(encoder.encoder, torch.randn(5, 9), torch.zeros(5), encoder.mix)


def test_how_the_commands_read_an_encoder():
    assert reading("efficientnet_lite0") == "efficientnet_lite0@448+names" and reading("efficientnet_lite2@260") == "efficientnet_lite2@260"
    assert reading("tiny") == "tiny" and reading("resnet50+names") == "resnet50+names"


def test_plain_encoders_go_through_unchanged():
    image, text = make_encoders("tiny", "tiny", ["cat", "dog"])
    assert image.key == make_image_encoder("tiny").key and text.frozen and image.frozen


def test_before_training_a_head_says_what_names_say():
    head = named(ImageNamedHead)
    img, *_ = tokens(seed=1)
    logs = [(x[..., -C:].mean(1) + 1e-4).log() for x in (img, tokens()[0])]
    expected = 0.7 * (logs[0] - logs[1].mean(0)) / (logs[1] - logs[1].mean(0)).std(correction=0) - 3
    torch.testing.assert_close(head(img), expected, atol=1e-4, rtol=1e-4)


def test_a_sum_of_two_sides_before_training():
    "Image and caption add up: with the labels' links at zero there is no interaction to begin with."
    img, txt, mask = tokens(seed=1)
    both, one, other = named(), named(ImageNamedHead), named(TextNamedHead)
    other.said.names.copy_(both.said.names)
    other.said.z.load_state_dict(both.said.z.state_dict())
    torch.testing.assert_close(both(img, txt, mask) + 3, one(img) + 3 + other(img, txt, mask) + 3, atol=1e-4, rtol=1e-4)


def test_names_compete():
    "Of two names that fit, the better one gains by the competition, though both cosines stay the same."
    head = named(TextNamedHead)
    with torch.no_grad():
        head.said.scale.copy_(torch.tensor([0.0, 0.0, 1.0]))
        head.said.names.copy_(torch.eye(C, DT))
    word = torch.zeros(2, 1, DT)
    word[0, 0, :2], word[1, 0, 0] = torch.tensor([1.0, 0.9]), 1.0
    out = head.said.scores(word, torch.ones(2, 1, dtype=torch.bool))[:, 2]
    assert out[1, 0] > out[0, 0] > out[0, 1] > out[0, 2]


def test_links_carry_what_one_label_says_of_another():
    links, z = LabelLinks(3), torch.tensor([[4.0, -4.0, 0.0], [-4.0, -4.0, 0.0]])
    torch.testing.assert_close(links(z), z)
    with torch.no_grad():
        links.weight[0, 2] = 0.1
    out = links(z)
    torch.testing.assert_close(out[:, 2], torch.sigmoid(z[:, 0]) * 0.1 * links.speed)
    torch.testing.assert_close(out[:, :2], z[:, :2])


@pytest.mark.parametrize("name", HEADS)
def test_every_head_reads_tokens_with_scores(name):
    head = make_head(name, D + C, DT, C, width=16, names=torch.randn(C, DT), scored=True).eval()
    img, txt, mask = tokens()
    if hasattr(head, "set_statistics"):
        head.set_statistics(img, txt, mask)
    for inputs in ((img, txt, mask), (img, None, None), (None, txt, mask)):
        assert head(*inputs).shape == (B, C) and head(*inputs).isfinite().all()


def test_scores_that_cannot_be_there():
    with pytest.raises(MmfuseError, match="carry no scores"):
        NamedHead(C, DT, C, scored=True)


def test_scores_of_nothing_are_finite():
    "Probabilities of exactly zero, and a little below by rounding."
    head = named(ImageNamedHead)
    img = tokens()[0]
    img[0, :, -C:], img[1, :, -C:] = 0.0, -1e-7
    assert head(img).isfinite().all() and torch.equal(head(img)[0].isfinite(), head(img)[1].isfinite())


def test_gradients_reach_every_parameter():
    head = named().train()
    img, txt, mask = tokens()
    loss = nn.functional.binary_cross_entropy_with_logits(head(img, txt, mask), torch.rand(B, C).round())
    loss.backward()
    lost = [n for n, p in head.named_parameters() if p.grad is None and n not in ("no_image", "no_text")]
    assert not lost
