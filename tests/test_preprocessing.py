"""Preprocessing: agreement with Pillow, captions that nobody expects, loaders that reproduce in every kind of worker."""

import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2
from transformers import BertTokenizerFast

from mmfuse.files import MmfuseError
from mmfuse.preprocessing import (IMAGENET_MEAN, IMAGENET_STD, Batch, EpochBatches, Standardize, collate, draw,
                                  image_transform, make_loader, tokenize)

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a man two kids ride ##s ##r bike on the beach red bus with".split()


def make_tokenizer(**kw):
    return BertTokenizerFast(vocab={w: i for i, w in enumerate(WORDS)}, **kw)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@dataclass
class Pair:
    image: torch.Tensor
    captions: list
    labels: torch.Tensor
    image_id: int


class Pairs(torch.utils.data.Dataset):
    "Pictures of different sizes, five captions of different lengths each."
    def __init__(self, n=23):
        self.image_ids = [7 * i + 1 for i in range(n)]
        self.captions = [[" ".join(["a", "man", "bike"][: 1 + (i + k) % 3] * (1 + i % 5)) for k in range(5)]
                         for i in range(n)]

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        image = torch.randint(0, 256, (3, 20 + i, 50 - i), dtype=torch.uint8, generator=g)
        return Pair(image, self.captions[i], (torch.arange(4) == i % 4).float(), self.image_ids[i])


def loader(tokenizer, n=23, **kw):
    kw = dict(batch_size=5, train=True, seed=3) | kw
    return make_loader(Pairs(n), transform=image_transform(16, train=kw["train"]), tokenizer=tokenizer, **kw)


def epochs(loader, n=2):
    return [list(loader) for _ in range(n)]


def same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        for name in ("image", "input_ids", "mask", "labels", "image_id"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


# pictures

def photo(h, w, seed=0):
    "Smooth shapes with some noise, as a camera would give them: uint8 (h, w, 3)."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:h, 0:w]
    waves = [np.sin(x / rng.uniform(3, 40) + y / rng.uniform(3, 40) + rng.uniform(0, 6)) for _ in range(3)]
    return (127 + 90 * np.stack(waves, -1) + rng.normal(0, 12, (h, w, 3))).clip(0, 255).astype(np.uint8)


PILLOW = {v2.InterpolationMode.BILINEAR: Image.Resampling.BILINEAR, v2.InterpolationMode.BICUBIC: Image.Resampling.BICUBIC}


def pillow(array, size, crop, mode):
    "The same steps with Pillow and numpy: float64 (3, size, size)."
    image = Image.fromarray(array)
    h, w = array.shape[:2]
    if not crop:
        image = image.resize((size, size), PILLOW[mode])
    else:
        short = min(h, w)
        w, h = (int(size * w / short), size) if h <= w else (size, int(size * h / short))
        left, top = round((w - size) / 2), round((h - size) / 2)
        image = image.resize((w, h), PILLOW[mode]).crop((left, top, left + size, top + size))
    x = np.asarray(image).transpose(2, 0, 1) / 255
    return (x - np.array(IMAGENET_MEAN)[:, None, None]) / np.array(IMAGENET_STD)[:, None, None]


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("mode", list(PILLOW), ids=lambda m: m.value)
@pytest.mark.parametrize("h, w", [(480, 640), (640, 427), (333, 500), (100, 130), (224, 224), (61, 400)])
def test_agrees_with_pillow_within_one_grey_level(h, w, mode, crop):
    array = photo(h, w)
    ours = image_transform(crop=crop, interpolation=mode)(torch.from_numpy(array).permute(2, 0, 1)).double().numpy()
    levels = np.abs(ours - pillow(array, 224, crop, mode)) * np.array(IMAGENET_STD)[:, None, None] * 255
    assert levels.max() <= 1.01
    assert levels.mean() < 0.2


def test_the_comparison_with_pillow_can_fail():
    array = photo(480, 640)
    x = torch.from_numpy(array).permute(2, 0, 1)
    blunt = v2.Compose([v2.Resize((224, 224), antialias=False), Standardize()])(x).double().numpy()
    levels = np.abs(blunt - pillow(array, 224, False, v2.InterpolationMode.BILINEAR)) * 255 * 0.22
    assert levels.max() > 20


def test_real_pictures_agree_with_pillow(real_coco):
    data = pytest.importorskip("mmfuse.data")
    transform = image_transform(crop=False)
    for path in sorted((real_coco / "val2017").glob("*.jpg"))[:12]:
        array = np.asarray(Image.open(path).convert("RGB"))
        reference = pillow(array, 224, False, v2.InterpolationMode.BICUBIC)
        ours = transform(data.decode_image(path)).double().numpy()
        levels = np.abs(ours - reference) * np.array(IMAGENET_STD)[:, None, None] * 255
        assert levels.mean() < 0.5 and levels.max() < 6, path.name  # two builds of libjpeg differ a little


@settings(max_examples=40, deadline=None)
@given(h=st.integers(1, 90), w=st.integers(1, 90), size=st.integers(2, 40), train=st.booleans(), crop=st.booleans())
def test_any_picture_becomes_the_square(h, w, size, train, crop):
    out = image_transform(size, train=train, crop=crop)(torch.zeros(3, h, w, dtype=torch.uint8))
    assert out.shape == (3, size, size) and out.dtype == torch.float32 and out.isfinite().all() and out.is_contiguous()


@pytest.mark.parametrize("shape", [(3, 1, 60000), (3, 60000, 2)])
def test_a_thread_of_a_picture_is_not_enlarged_to_gigabytes(shape):
    assert image_transform()(torch.zeros(shape, dtype=torch.uint8)).shape == (3, 224, 224)


def test_cutting_an_extreme_picture_first_changes_nothing_in_the_middle():
    x = torch.from_numpy(photo(12, 300)).permute(2, 0, 1)
    plain = v2.Compose([v2.Resize(24, interpolation=v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(24),
                        Standardize()])
    assert (image_transform(24)(x) - plain(x)).abs().mean() < 0.02


@pytest.mark.parametrize("mean, std", [(IMAGENET_MEAN, IMAGENET_STD), ((0.498,) * 3, (0.502,) * 3), ((0,) * 3, (1,) * 3)])
def test_standardize_is_what_torchvision_does(mean, std):
    x = torch.arange(256, dtype=torch.uint8).repeat(3, 4, 1)
    slow = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    torch.testing.assert_close(Standardize(mean, std)(x), slow(x), rtol=1e-5, atol=1e-6)


def test_standardize_takes_batches_any_memory_layout_and_a_device():
    x = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    one = Standardize()
    assert torch.equal(one(x), torch.stack([one(i) for i in x]))
    assert one.to("meta")(x.to("meta")).device.type == "meta"


@pytest.mark.parametrize("x", [torch.zeros(3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8),
                               torch.zeros(8, 8, dtype=torch.uint8), torch.zeros(4, 8, 8, dtype=torch.uint8)])
def test_not_a_uint8_rgb_picture_is_refused(x):
    with pytest.raises(MmfuseError, match="uint8 picture"):
        Standardize()(x)


def test_a_training_region_is_large_and_never_mirrored():
    ramp = torch.arange(200, dtype=torch.uint8).expand(3, 200, 200)
    torch.manual_seed(0)
    rows = [image_transform(50, train=True, mean=(0,) * 3, std=(1,) * 3)(ramp)[0, 25] * 255 for _ in range(40)]
    assert all((r[1:] >= r[:-1]).all() for r in rows)
    widths = torch.stack([r[-1] - r[0] for r in rows])
    assert widths.min() > 200 * 0.7 * (3 / 4) ** 0.5 - 10 and len(widths.unique()) > 30


# captions

def test_the_tokenizer_knows_its_words(tokenizer):
    ids, mask = tokenize(tokenizer, ["a man rides", "a bike on the beach"])
    assert tokenizer.convert_ids_to_tokens(ids[0]) == ["[CLS]", "a", "man", "ride", "##s", "[SEP]", "[PAD]"]
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == [6, 7] and ids.dtype == torch.long


ODD = {"empty": "", "blanks": " \t\n ", "nul": "a\x00man", "only nul": "\x00", "emoji": "a 🚌 👩‍👩‍👧 man", "right to left": "رجل على دراجة",
       "half an emoji": "a man \ud83d", "combining": "a" + "\u0301" * 500, "long": "a man " * 5000, "one word": "x" * 20000,
       "markup": "[SEP] [PAD] [MASK]", "bom": "\ufeffa man", "chinese": "一个人骑自行车"}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_any_caption_is_tokenized(tokenizer, text):
    ids, mask = tokenize(tokenizer, [text, "a man"], max_length=12)
    assert ids.shape == mask.shape and ids.shape[1] <= 12
    assert mask[:, :2].all() and (ids[:, 0] == tokenizer.cls_token_id).all()
    for row, real in zip(ids, mask):
        n = int(real.sum())
        assert real[:n].all() and row[n - 1] == tokenizer.sep_token_id
        assert (row[n:] == tokenizer.pad_token_id).all()
    alone = tokenize(tokenizer, ["a man"], max_length=12)[0][0]
    assert torch.equal(ids[1][mask[1]], alone)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=6), st.integers(3, 20))
def test_padding_never_changes_what_a_caption_says(texts, limit):
    tokenizer = make_tokenizer()
    ids, mask = tokenize(tokenizer, texts, max_length=limit)
    assert mask.sum(1).max() == ids.shape[1] <= limit
    for t, row, real in zip(texts, ids, mask):
        assert torch.equal(row[real], tokenize(tokenizer, [t], max_length=limit)[0][0])


@pytest.mark.parametrize("texts, message", [([], "no captions"), (["a", None], "None"), ([["a"]], "a list of captions")])
def test_what_is_no_caption_is_refused(tokenizer, texts, message):
    with pytest.raises(MmfuseError, match=message):
        tokenize(tokenizer, texts)


def test_a_tokenizer_that_cannot_pad_is_refused():
    with pytest.raises(MmfuseError, match="pad_token"):
        tokenize(make_tokenizer(pad_token=None), ["a man"])


def test_the_model_has_the_last_word_on_length():
    ids, _ = tokenize(make_tokenizer(model_max_length=8), ["a man " * 50], max_length=64)
    assert ids.shape == (1, 8)


# batches

def test_collate(tokenizer):
    pairs = [Pairs()[i] for i in (0, 4, 9)]
    batch = collate(pairs, transform=image_transform(16), tokenizer=tokenizer)
    assert len(batch) == 3 and batch.image.shape == (3, 3, 16, 16) and batch.image.dtype == torch.float32
    assert batch.labels.tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]] and batch.labels.dtype == torch.float32
    assert batch.image_id.tolist() == [1, 29, 64] and batch.image_id.dtype == torch.long
    assert torch.equal(batch.input_ids, tokenize(tokenizer, [p.captions[0] for p in pairs])[0])
    assert torch.equal(batch.image[1], image_transform(16)(pairs[1].image))


def test_batch_moves_as_one(tokenizer):
    batch = collate([Pairs()[0]], transform=image_transform(16), tokenizer=tokenizer).to("meta", non_blocking=True)
    assert isinstance(batch, Batch) and {v.device.type for v in vars(batch).values()} == {"meta"}


def test_random_captions_come_from_the_generator_and_reach_all(tokenizer):
    pairs = [Pair(torch.zeros(3, 4, 4, dtype=torch.uint8), ["a", "a a", "a a a"], torch.zeros(2), i) for i in range(60)]
    def lengths(seed):
        return collate(pairs, transform=image_transform(4), tokenizer=tokenizer, caption="random",
                       generator=torch.Generator().manual_seed(seed)).mask.sum(1)
    assert torch.equal(lengths(0), lengths(0)) and not torch.equal(lengths(0), lengths(1))
    assert set(lengths(0).tolist()) == {3, 4, 5}


def test_a_missing_caption_number_means_the_last(tokenizer):
    pair = Pair(torch.zeros(3, 4, 4, dtype=torch.uint8), ["a", "a man"], torch.zeros(2), 1)
    assert collate([pair], transform=image_transform(4), tokenizer=tokenizer, caption=4).mask.sum() == 4


@pytest.mark.parametrize("change, message", [
    (dict(samples=[]), "no samples"), (dict(transform=Standardize()), "one size"), (dict(caption="first"), "random"),
    (dict(samples=[Pair(torch.zeros(3, 4, 4, dtype=torch.uint8), [], torch.zeros(2), 1)]), "no caption"),
])
def test_what_cannot_be_collated_is_refused_in_one_line(tokenizer, change, message):
    given = dict(samples=[Pairs()[0], Pairs()[1]], transform=image_transform(8), tokenizer=tokenizer) | change
    with pytest.raises(MmfuseError, match=message) as e:
        collate(given.pop("samples"), **given)
    assert "\n" not in str(e.value)


# order, and what a seed fixes

def test_draw_is_even_and_depends_on_each_part():
    values = [draw(0, 0, i)[0] % 5 for i in range(5000)]
    assert np.bincount(values).min() > 900
    assert len({draw(*k) for k in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (2**40, 0, 581929)]}) == 6


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 200), size=st.integers(1, 40), shuffle=st.booleans(), by_length=st.booleans(), pool=st.integers(1, 9))
def test_each_item_comes_once_an_epoch(n, size, shuffle, by_length, pool):
    lengths = (lambda epoch: np.arange(n) * 7 % 11) if by_length else None
    batches = EpochBatches(n, size, shuffle=shuffle, lengths=lengths, pool=pool)
    for epoch in range(2):
        got = list(batches)
        assert len(got) == len(batches)
        assert sorted(k for b in got for k in b) == [(epoch, i) for i in range(n)]


def test_order_differs_by_epoch_and_seed_and_an_epoch_can_be_set():
    one, two = EpochBatches(50, 8, seed=1), EpochBatches(50, 8, seed=2)
    first, second = list(one), list(one)
    assert [i for b in first for _, i in b] != [i for b in second for _, i in b] != [i for b in two for _, i in b]
    again = EpochBatches(50, 8, seed=1)
    again.set_epoch(1)
    assert list(again) == second


def test_a_pass_that_was_asked_for_but_not_begun_is_no_epoch():
    batches = EpochBatches(10, 5)
    iter(batches)
    assert next(iter(batches))[0][0] == 0


@pytest.mark.parametrize("by_length", [False, True])
def test_workers_change_nothing(tokenizer, by_length):
    alone = epochs(loader(tokenizer, by_length=by_length))
    for workers in (1, 2):
        for a, b in zip(alone, epochs(loader(tokenizer, by_length=by_length, workers=workers))):
            same(a, b)
    assert not torch.equal(alone[0][0].image_id, alone[1][0].image_id)


def test_spawned_workers_change_nothing(tokenizer):
    for a, b in zip(epochs(loader(tokenizer)), epochs(loader(tokenizer, workers=1, context="spawn"))):
        same(a, b)


def test_the_loader_can_be_pickled(tokenizer):
    one = loader(tokenizer, by_length=True)
    for part in (one.dataset, one.collate_fn, one.batch_sampler):
        pickle.loads(pickle.dumps(part))


def test_loading_leaves_the_global_generator_alone(tokenizer):
    torch.manual_seed(0)
    expected = torch.rand(3)
    for workers in (0, 1):
        torch.manual_seed(0)
        list(loader(tokenizer, workers=workers))
        assert torch.equal(torch.rand(3), expected)


def test_another_seed_another_order_crop_and_caption(tokenizer):
    one, two = (torch.cat([b.image_id for b in loader(tokenizer, seed=s)]) for s in (0, 1))
    assert not torch.equal(one, two) and torch.equal(one.sort().values, two.sort().values)


def test_a_picture_gets_the_same_crop_and_caption_in_any_batch(tokenizer):
    def by_id(size):
        return {int(i): (x, t[m]) for b in loader(tokenizer, batch_size=size)
                for i, x, t, m in zip(b.image_id, b.image, b.input_ids, b.mask)}
    small, large = by_id(2), by_id(23)
    assert all(torch.equal(a, b) for k in small for a, b in zip(small[k], large[k]))


def test_evaluation_keeps_order_and_takes_the_first_caption(tokenizer):
    for batches in epochs(loader(tokenizer, train=False)):
        assert torch.cat([b.image_id for b in batches]).tolist() == Pairs().image_ids
        ids = [t[m] for b in batches for t, m in zip(b.input_ids, b.mask)]
        assert all(torch.equal(a, tokenize(tokenizer, [c[0]])[0][0]) for a, c in zip(ids, Pairs().captions))


def test_similar_lengths_need_less_padding(tokenizer):
    def padding(by_length):
        masks = [b.mask for b in loader(tokenizer, n=23, by_length=by_length)]
        return sum(int((~m).sum()) for m in masks) / sum(m.numel() for m in masks)
    assert padding(True) < 0.5 * padding(False)


def test_by_length_says_what_it_needs(tokenizer):
    with pytest.raises(MmfuseError, match="captions"):
        make_loader(torch.utils.data.Subset(Pairs(), [0]), transform=image_transform(8), tokenizer=tokenizer, by_length=True)


def test_accelerate_gives_the_same_batches(tokenizer):
    from accelerate import Accelerator
    prepared = Accelerator(cpu=True).prepare(loader(tokenizer))
    for a, b in zip(epochs(loader(tokenizer)), epochs(prepared)):
        same(a, b)
