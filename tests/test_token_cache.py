"""The token cache: right, atomic, resumed, shared, and refused with a reason."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import mmfuse.token_cache as tc
from mmfuse.data import Sample
from mmfuse.files import MmfuseError
from mmfuse.token_cache import (CaptionTokens, cache_info, cache_size, cache_tokens, checksum, clear_cache, text_rows,
                                to_half)

WORDS = "a the red green dog cat sits runs on under big table".split()


class Data:
    "Pictures of noise with captions of random words."
    classes = ["dog", "cat"]

    def __init__(self, n=23, seed=0):
        rng = np.random.default_rng(seed)
        self.pictures = torch.from_numpy(rng.integers(0, 256, (n, 3, 8, 8), dtype=np.uint8))
        self.captions = [[" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(rng.integers(1, 7))] for _ in range(n)]
        self.captions[1] = list(self.captions[0])  # the same words twice
        self.labels = torch.from_numpy(rng.integers(0, 2, (n, 2)).astype(np.float32))
        self.image_ids, self.key = [100 + i for i in range(n)], f"data-{n}-{seed}"

    def __len__(self): return len(self.image_ids)
    def __getitem__(self, i): return Sample(self.pictures[i], self.captions[i], self.labels[i], self.image_ids[i])


class Images(nn.Module):
    "(B, 3, 8, 8) to (B, 4, 6): the mean of each quarter and its square."
    key, calls, stop_at = "images-0", 0, None

    def transform(self, train): return lambda x: x.float() / 255

    def forward(self, x):
        self.calls += 1
        if self.calls == self.stop_at: raise KeyboardInterrupt
        tokens = torch.nn.functional.avg_pool2d(x, 4).flatten(2).transpose(1, 2)
        return torch.cat([tokens, tokens ** 2], -1) * self.scale

    scale = 1.0


class Tokenizer:
    "One number a word."
    pad_token, model_max_length = "[PAD]", 64

    def __call__(self, texts, max_length=64, **kwargs):
        rows = [[1 + WORDS.index(w) for w in t.split()][:max_length] for t in texts]
        T = max(map(len, rows))
        return {"input_ids": torch.tensor([r + [0] * (T - len(r)) for r in rows]), "attention_mask": torch.tensor([[1] * len(r) + [0] * (T - len(r)) for r in rows])}


class Texts(nn.Module):
    "A word's vector, plus the mean over its caption: wrong padding would show."
    key, seen = "texts-0", 0

    def __init__(self):
        super().__init__()
        self.tokenizer, self.table = Tokenizer(), nn.Embedding.from_pretrained(torch.randn(20, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids, mask):
        self.seen += len(input_ids)
        x, m = self.table(input_ids), mask.unsqueeze(-1)
        return x + (x * m).sum(1, keepdim=True) / m.sum(1, keepdim=True)  # padding is not zero: the cache must see to that

    def encode(self, texts):
        out = self.tokenizer(texts)
        mask = out["attention_mask"].bool()
        return self(out["input_ids"], mask), mask


@pytest.fixture
def make(tmp_path):
    "`make(**changes)` caches the small data in a fresh folder, a few pictures at a time."
    parts = dict(dataset=Data(), image_encoder=Images(), text_encoder=Texts())
    def call(**changes):
        options = dict(cache_dir=tmp_path / "cache", n_captions=3, batch_size=4, progress=False) | parts | changes
        return cache_tokens(options.pop("dataset"), options.pop("image_encoder"), options.pop("text_encoder"), **options)
    call.__dict__.update(parts, dir=tmp_path / "cache")
    return call


def entry(make, kind): return next(p for p in make.dir.iterdir() if p.is_dir() and p.name.startswith(kind))


def test_tokens_are_what_the_encoders_give_one_by_one(make):
    tokens, data, images, texts = make(), make.dataset, make.image_encoder, make.text_encoder
    T = max(len(c.split()) for captions in data.captions for c in captions[:3])
    assert tokens.img.shape == (23, 4, 6) and tokens.txt.shape == (23, 3, T, 5) and tokens.mask.shape == (23, 3, T)
    assert (tokens.img.dtype, tokens.txt.dtype, tokens.mask.dtype) == (np.float16, np.float16, np.bool_)
    for i in range(len(data)):
        want = images(images.transform(False)(data.pictures[i])[None])[0]
        np.testing.assert_allclose(tokens.img[i], want, atol=1e-3)
        for k in range(3):
            n = len(data.captions[i][k].split()) if k < len(data.captions[i]) else 0
            assert tokens.mask[i, k].tolist() == [True] * n + [False] * (T - n)
            assert not tokens.txt[i, k, n:].any(), "zeros where there is no token"
            if n: np.testing.assert_allclose(tokens.txt[i, k, :n], texts.encode([data.captions[i][k]])[0][0], atol=4e-3)
    np.testing.assert_array_equal(tokens.labels, data.labels)
    assert tokens.image_id.tolist() == data.image_ids and tokens.image_id.dtype == np.int64
    assert tokens.names.shape == (2, 5) and tokens.names.dtype == np.float32 and tokens.classes == ["dog", "cat"]
    assert isinstance(tokens.img, np.memmap) and isinstance(tokens.txt, np.memmap)


def test_a_caption_is_encoded_once_and_the_second_call_encodes_one_picture(make):
    make()
    different = {c for captions in make.dataset.captions for c in captions[:3]}
    names = len(make.dataset.classes)
    assert make.text_encoder.seen <= len(different) + 1 + names  # one for its shape
    images, texts = make.image_encoder.calls, make.text_encoder.seen
    again = make()
    assert make.image_encoder.calls == images + 1 and make.text_encoder.seen <= texts + 1 + 3 + names  # one for its shape
    assert len(again) == 23


def test_subsets(make):
    tokens = make()
    part = tokens.subset(np.array([3, 1]))
    assert len(part) == 2 and part.image_id.tolist() == [103, 101] and part.classes == tokens.classes
    np.testing.assert_array_equal(part.txt[0], tokens.txt[3])
    assert len(tokens.subset(tokens.labels[:, 0] > 0)) == int(tokens.labels[:, 0].sum())
    view = tokens.subset(slice(5, 9))
    assert np.shares_memory(view.img, tokens.img) and view.image_id.tolist() == [105, 106, 107, 108]
    assert len(tokens.subset([])) == 0 and len(tokens.subset([-1])) == 1


def test_each_half_is_made_again_only_for_its_own_encoder(make):
    make()
    images, texts = Images(), Texts()
    images.key = "images-1"
    make(image_encoder=images)
    assert images.calls > 2 and len(cache_info(make.dir)) == 3
    texts.key = "texts-1"
    make(text_encoder=texts)
    assert len(cache_info(make.dir)) == 4
    make(n_captions=2), make(max_length=3)
    assert len(cache_info(make.dir)) == 6
    make(dataset=Data(seed=1))
    assert len(cache_info(make.dir)) == 8


@pytest.mark.parametrize("stop_at", [2, 3, 6])
def test_an_interrupted_run_goes_on_where_it_was(make, stop_at, monkeypatch):
    monkeypatch.setattr(tc.fill, "__kwdefaults__", tc.fill.__kwdefaults__ | {"every": 0.0})
    images = Images()
    images.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt): make(image_encoder=images)
    info = {e["name"].split("-")[0]: e["complete"] for e in cache_info(make.dir)}
    assert info == {"text": True, "image": False}
    after = Images()
    tokens = make(image_encoder=after)
    assert after.calls <= 1 + 6 - (stop_at - 2), "batches that were written are not encoded again"
    fresh = make(cache_dir=make.dir.parent / "other")
    np.testing.assert_array_equal(tokens.img, fresh.img)
    assert all(e["complete"] for e in cache_info(make.dir))


def test_a_broken_state_of_an_interrupted_run_begins_anew(make, monkeypatch):
    monkeypatch.setattr(tc.fill, "__kwdefaults__", tc.fill.__kwdefaults__ | {"every": 0.0})
    images = Images()
    images.stop_at = 4
    with pytest.raises(KeyboardInterrupt): make(image_encoder=images)
    part = next(make.dir.glob("image*.part"))
    (part / "img.npy").write_bytes(b"short")
    np.testing.assert_array_equal(make().img, make(cache_dir=make.dir.parent / "other").img)


def worker(folder, log):
    images, texts = Images(), Texts()
    slow = images.forward
    images.forward = lambda x: (time.sleep(0.02), slow(x))[1]
    tokens = cache_tokens(Data(), images, texts, cache_dir=folder, n_captions=3, batch_size=4, progress=False)
    Path(log).write_text(json.dumps([images.calls, float(np.asarray(tokens.img, np.float32).sum())]))


def test_processes_that_ask_at_once_share_one_run(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=worker, args=(tmp_path / "cache", tmp_path / f"{i}.json")) for i in range(3)]
    for p in processes: p.start()
    for p in processes: p.join(60)
    calls, sums = zip(*(json.loads((tmp_path / f"{i}.json").read_text()) for i in range(3)))
    assert sum(c > 2 for c in calls) == 1, f"one of them encodes, the others wait: {calls}"
    assert len(set(sums)) == 1 and len(cache_info(tmp_path / "cache")) == 2


def test_a_killed_process_leaves_no_lock_and_nothing_that_looks_finished(tmp_path):
    context = multiprocessing.get_context("fork")
    def die():
        images = Images()
        images.forward = lambda x: os._exit(9)
        cache_tokens(Data(), images, Texts(), cache_dir=tmp_path / "cache", n_captions=3, progress=False)
    p = context.Process(target=die)
    p.start(), p.join(60)
    assert p.exitcode == 9
    worker(tmp_path / "cache", tmp_path / "log")
    assert all(e["complete"] for e in cache_info(tmp_path / "cache"))


def test_pictures_without_a_caption_get_zeros_even_in_a_row(tmp_path):
    data = Data()
    data.captions[4:20] = [[] for _ in range(16)]
    rows = list(text_rows(CaptionTokens(data, Texts(), 2), pool=4))
    txt, mask = (np.concatenate([r[k] for r in rows]) for k in ("txt", "mask"))
    assert not mask[4:20].any() and not txt[4:20].any() and mask.dtype == np.bool_
    assert mask[[*range(4), *range(20, 23)], 0].any(1).all()
    for _ in range(4): assert len(cache_tokens(data, Images(), Texts(), cache_dir=tmp_path, progress=False)) == 23


def test_a_caption_that_overflows_is_blamed_on_a_picture_that_has_it(make):
    make.dataset.captions[7] = ["big big big"]
    make.text_encoder.table.weight.data[1 + WORDS.index("big")] = 1e6
    owners = [i for i, c in zip(make.dataset.image_ids, make.dataset.captions) if any("big" in x.split() for x in c[:3])]
    with pytest.raises(MmfuseError, match="its text tokens reach") as e: make()
    assert int(str(e.value).split()[1].rstrip(":")) in owners


# -- refused, with a reason -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind,file", [("image", "img.npy"), ("text", "txt.npy"), ("text", "mask.npy"), ("text", "meta.json")])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "empty"])
def test_damage_is_named(make, kind, file, damage):
    make()
    path = entry(make, kind) / file
    content = path.read_bytes()
    if damage == "remove": path.unlink()
    else: path.write_bytes({"cut": content[:-7], "empty": b"", "flip": content[:-9] + bytes([content[-9] ^ 64]) + content[-8:]}[damage])
    if file == "meta.json" and damage == "flip": path.write_bytes(content.replace(b'"request"', b'"bequest"'))
    with pytest.raises(MmfuseError, match="damaged.*clear_cache") as e: make()
    assert path.parent.name in str(e.value) and "\n" not in str(e.value)
    assert clear_cache(make.dir, path.parent.name) > 0
    assert len(make()) == 23


def test_an_entry_of_other_data_is_stale(make):
    make()
    path = entry(make, "image") / "meta.json"
    meta = json.loads(path.read_text())
    meta["request"]["data"] = "other"
    path.write_text(json.dumps(meta))
    with pytest.raises(MmfuseError, match="stale: its data"): make()


def test_pictures_or_preprocessing_that_changed_under_the_same_key_are_noticed(make):
    make()
    make.dataset.pictures = 255 - make.dataset.pictures
    with pytest.raises(MmfuseError, match="stale: picture 1.. now gives other tokens"): make()
    make.dataset.pictures = 255 - make.dataset.pictures
    make.text_encoder.table.weight.data *= -1
    with pytest.raises(MmfuseError, match="stale"): make()


@pytest.mark.parametrize("value,reason", [(float("nan"), "NaN"), (float("inf"), "NaN or infinity"), (1e6, "more than float16 holds")])
def test_tokens_that_are_not_finite_are_refused_by_picture(make, value, reason):
    class Broken(Images):
        def forward(self, x):
            tokens = super().forward(x)
            tokens[(x == 1).all((1, 2, 3)), 0] = value
            return tokens
    make.dataset.pictures[9] = 255
    with pytest.raises(MmfuseError, match=f"picture 109: its image tokens.*{reason}"): make(image_encoder=Broken())
    assert not list(make.dir.glob("image*[0-9a-f]")), "nothing looks finished"
    make.text_encoder.table.weight.data[1 + WORDS.index("table")] = value
    with pytest.raises(MmfuseError, match="picture 1.*its text tokens"): make(cache_dir=make.dir / "2")


def test_a_disk_that_is_too_small_is_refused_before_any_work(make, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=(64 << 20) + 100))
    with pytest.raises(MmfuseError, match="needs 0.00 GB in .* free: choose another --cache-dir"): make()
    assert not list(make.dir.glob("*.part")) and make.image_encoder.calls <= 1, "one picture, for the shape"


def test_the_size_is_known_and_said_before_the_work(make, capsys, tmp_path):
    data, images, texts = make.dataset, make.image_encoder, make.text_encoder
    said = cache_size(data, images, texts, n_captions=3)
    make(progress=True)
    told = capsys.readouterr().err
    assert told.index("token cache: 0.00 GB (text 0.00, image 0.00) go to") < told.index("text tokens (0 MB)")
    arrays = {kind: sum(p.stat().st_size - 128 for p in entry(make, kind).glob("*.npy")) for kind in said}
    assert arrays == said, "each file is a header of 128 bytes and its rows"
    make(progress=True)
    assert "go to" not in capsys.readouterr().err, "nothing is going to be written"


def test_a_half_that_is_there_needs_no_room_and_an_interrupted_one_has_its_own(make, monkeypatch):
    images = Images()
    images.stop_at = 3
    with pytest.raises(KeyboardInterrupt): make(image_encoder=images)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=64 << 20))
    assert len(make()) == 23


def test_a_place_that_cannot_be_written_is_one_line(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MmfuseError, match="cannot write the token cache"): make(cache_dir=tmp_path / "file")


def test_data_without_pictures_or_captions(make):
    with pytest.raises(MmfuseError, match="no pictures"): make(dataset=[])
    silent = Data()
    silent.captions = [[] for _ in silent.captions]
    with pytest.raises(MmfuseError, match="no caption"): make(dataset=silent)


def test_a_picture_that_cannot_be_decoded_stops_the_run_with_its_own_error(make):
    class Torn(Data):
        def __getitem__(self, i):
            if i == 13: raise MmfuseError("picture 113: cannot decode")
            return super().__getitem__(i)
    with pytest.raises(MmfuseError, match="picture 113: cannot decode"): make(dataset=Torn())
    assert len(make()) == 23


# -- the rest -------------------------------------------------------------------------------------------------------------

def test_info_and_clearing_touch_only_the_caches_own_entries(make):
    make()
    (make.dir / "mine").mkdir()
    (make.dir / "mine" / "notes.txt").write_text("keep")
    (make.dir / "image-notes").mkdir()
    info = cache_info(make.dir)
    assert [e["bytes"] for e in info] == sorted((e["bytes"] for e in info), reverse=True) and {e["pictures"] for e in info} == {23}
    assert clear_cache(make.dir) == sum(e["bytes"] for e in info) > 0
    assert cache_info(make.dir) == [] and {p.name for p in make.dir.iterdir()} == {"mine", "image-notes"}
    assert cache_info(make.dir / "nowhere") == [] and clear_cache(make.dir / "nowhere") == 0


def test_the_default_place_is_mmfuse_home(monkeypatch, tmp_path, make):
    monkeypatch.setenv("MMFUSE_HOME", str(tmp_path / "home"))
    make(cache_dir=None)
    assert len(cache_info()) == 2 and (tmp_path / "home" / "tokens").is_dir()


def test_encoders_are_left_as_they_were(make):
    make.image_encoder.train(), make.text_encoder.train()
    make()
    assert make.image_encoder.training and make.text_encoder.training


def test_tokens_do_not_depend_on_batch_size_or_caption_neighbours(make, tmp_path):
    small, large = make(batch_size=1, cache_dir=tmp_path / "1"), make(batch_size=64, cache_dir=tmp_path / "64")
    np.testing.assert_allclose(small.img, large.img, atol=1e-3)
    np.testing.assert_allclose(small.txt, large.txt, atol=4e-3)
    np.testing.assert_array_equal(small.mask, large.mask)


def test_a_cache_opens_where_nothing_can_be_written(make):
    make()
    for p in [*make.dir.rglob("*"), make.dir]: p.chmod(0o555 if p.is_dir() else 0o444)
    try: assert len(make()) == 23
    finally:
        for p in [make.dir, *make.dir.rglob("*")]: p.chmod(0o755)


def test_half_precision_names_whose_tokens_are_wrong():
    assert to_half(torch.ones(2, 3), [1, 2]).dtype == np.float16
    with pytest.raises(MmfuseError, match="picture 8: its tokens reach 70000"): to_half(torch.tensor([[1.0], [70000.0]]), [7, 8])


def test_the_checksum_sees_the_ends_and_the_size_of_a_large_file(tmp_path):
    path = tmp_path / "large"
    with open(path, "wb") as f: f.truncate(50 << 20)
    before = checksum(path)
    for at in (0, (50 << 20) - 1):
        with open(path, "r+b") as f:
            f.seek(at), f.write(b"x")
        assert checksum(path) != before
        with open(path, "r+b") as f:
            f.seek(at), f.write(b"\0")
    assert checksum(path) == before


def test_longest_caption_sets_the_width():
    captions = CaptionTokens(Data(), Texts(), 6, max_length=4)
    assert captions.mask.shape[1] == 4 and captions.which.shape == (23, 6)


def test_real_encoders_on_real_pictures(real_coco, tmp_path):
    from mmfuse.data import CocoPairs
    from mmfuse.image_encoder import make_image_encoder
    data = CocoPairs(real_coco, "val2017")
    data.image_ids, data.captions, data.labels, data._paths = data.image_ids[:6], data.captions[:6], data.labels[:6], data._paths[:6]
    encoder = make_image_encoder("tiny", pretrained=False)
    texts = Texts()
    texts.tokenizer = lambda texts, **k: Tokenizer()(["a dog"] * len(texts))
    texts.tokenizer.pad_token, texts.tokenizer.model_max_length = "[PAD]", 64
    tokens = cache_tokens(data, encoder, texts, cache_dir=tmp_path, progress=False)
    with torch.no_grad(): want = encoder(encoder.transform()(data[4].image)[None])[0]
    np.testing.assert_allclose(np.asarray(tokens.img[4], np.float32), want, atol=2e-3 * want.abs().max().item())
    assert dataclasses.asdict(tokens)["labels"].shape == (6, 80)
