"""Shards: what any reader of WebDataset's format finds in them, what damage does, and an epoch's order whoever asks for it."""

import json
import pickle
import random
import tarfile

import numpy as np
import pytest
import torch

from mmfuse.data import CocoError, CocoPairs
from mmfuse.files import MmfuseError
from mmfuse.shards import ShardPairs, make_shards, open_pairs, write_index


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    from mmfuse.toy import toy_coco
    return toy_coco(tmp_path_factory.mktemp("toy") / "coco", n_train=37, n_val=5)


@pytest.fixture(scope="module")
def data(coco):
    return CocoPairs(coco, "train2017")


@pytest.fixture
def sharded(data, tmp_path):
    make_shards(data, tmp_path / "train2017", per_shard=5, progress=False)
    return tmp_path


def test_the_same_samples(data, sharded):
    shards, place = ShardPairs(sharded, "train2017"), {n: i for i, n in enumerate(data.image_ids)}
    assert sorted(shards.image_ids) == sorted(data.image_ids) and shards.classes == data.classes
    for i, sample in enumerate(shards):
        mine = data[place[sample.image_id]]
        assert torch.equal(sample.image, mine.image) and torch.equal(sample.labels, mine.labels)
        assert sample.captions == mine.captions == shards.captions[i]
        assert torch.equal(shards.labels[i], mine.labels)


def test_tarfile_and_webdataset_read_them(data, sharded):
    webdataset = pytest.importorskip("webdataset")
    urls = sorted(map(str, (sharded / "train2017").glob("*.tar")))
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [int(s["__key__"]) for s in theirs] == ShardPairs(sharded, "train2017").image_ids
    place = {n: i for i, n in enumerate(data.image_ids)}
    for s in theirs:
        said = json.loads(s["json"])
        assert s["jpg"] == data.path(place[said["image_id"]]).read_bytes()
        assert said["captions"] == list(data.captions[place[said["image_id"]]])


@pytest.mark.parametrize("together", [1, 2, 8, 100])
def test_an_epoch_is_every_picture_once_from_few_shards_at_a_time(together, sharded):
    shards = ShardPairs(sharded, "train2017")
    order = shards.order(np.random.default_rng(3), together)
    assert sorted(order.tolist()) == list(range(37))
    assert np.array_equal(order, shards.order(np.random.default_rng(3), together))
    assert not np.array_equal(order, shards.order(np.random.default_rng(4), together))
    of = np.searchsorted(shards.tars.index["first"], order, "right") - 1
    runs = [of[i] for i in range(len(of)) if i == 0 or of[i] != of[i - 1]]
    opened = []  # shards, each when it is first needed; one that was left for a later group never comes back
    for shard in runs:
        if shard in opened:
            assert shard in opened[-together:] or len(opened) <= together
        else:
            opened.append(shard)
    assert len(opened) == 8


def test_pieces_written_elsewhere_are_the_same_bytes(data, sharded, tmp_path):
    place = tmp_path / "pieces" / "train2017"
    for k in (3, 1, 2):
        make_shards(data, place, per_shard=5, part=(k, 3), progress=False)
        assert not (place / "index.safetensors").exists()
    assert make_shards(data, place, per_shard=5, progress=False) == []
    for p in (sharded / "train2017").iterdir():
        assert p.read_bytes() == (place / p.name).read_bytes()


def test_killed_anywhere_it_goes_on(data, sharded, tmp_path, monkeypatch):
    from mmfuse import shards
    real, chance, place = shards._members, random.Random(0), tmp_path / "killed" / "train2017"
    class Killed(BaseException):
        pass
    def dying(*args):
        if chance.random() < 0.05:
            raise Killed
        return real(*args)
    monkeypatch.setattr(shards, "_members", dying)
    deaths = 0
    while True:
        try:
            make_shards(data, place, per_shard=5, progress=False)
            break
        except Killed:
            deaths += 1
    assert deaths > 0
    assert {p.name: p.read_bytes() for p in place.iterdir()} == {p.name: p.read_bytes() for p in (sharded / "train2017").iterdir()}


def test_a_changed_picture_is_written_again(coco, tmp_path):
    data = CocoPairs(coco, "val2017")
    make_shards(data, tmp_path / "val2017", per_shard=2, progress=False)
    path = tmp_path / "val2017" / "00000.tar"
    with tarfile.open(path) as tar:
        first = int(tar.getnames()[0].split(".")[0])
    i = data.image_ids.index(first)
    before = data.path(i).read_bytes()
    try:
        data.path(i).write_bytes(before + b"\0")
        assert make_shards(data, tmp_path / "val2017", per_shard=2, progress=False) == [path]
    finally:
        data.path(i).write_bytes(before)


@pytest.mark.parametrize("how", ["short", "gone", "no index", "index damaged", "grown"])
def test_damage_is_one_line_when_it_is_opened(how, sharded):
    tar, index = sharded / "train2017" / "00002.tar", sharded / "train2017" / "index.safetensors"
    if how == "short":
        tar.write_bytes(tar.read_bytes()[:-100])
    if how == "grown":
        tar.write_bytes(tar.read_bytes() + bytes(512))
    if how == "gone":
        tar.unlink()
    if how == "no index":
        index.unlink()
    if how == "index damaged":
        index.write_bytes(index.read_bytes()[:100])
    with pytest.raises(CocoError) as e:
        ShardPairs(sharded, "train2017")
    assert "\n" not in str(e.value) and ("00002.tar" in str(e.value) or "index" in str(e.value))


def test_a_tar_that_shrinks_later_is_an_error_that_names_the_picture(sharded):
    shards = ShardPairs(sharded, "train2017")
    tar = sharded / "train2017" / "00002.tar"
    with open(tar, "r+b") as f:
        f.truncate(600)
    with pytest.raises(CocoError, match=str(shards.image_ids[12])):
        shards[12]


def test_foreign_tars_are_refused(data, sharded):
    with tarfile.open(sharded / "train2017" / "00099.tar", "w"):
        pass
    with pytest.raises(MmfuseError, match="00099.tar"):
        make_shards(data, sharded / "train2017", per_shard=5, progress=False)
    with pytest.raises(CocoError, match="is no shard"):
        write_index(sharded / "train2017", data.classes, data.category_ids, progress=False)


def test_a_lost_index_is_made_again_from_the_tars(data, sharded):
    index = sharded / "train2017" / "index.safetensors"
    before = index.read_bytes()
    index.unlink()
    write_index(sharded / "train2017", data.classes, data.category_ids, progress=False)
    assert index.read_bytes() == before


def test_the_key_changes_with_a_caption_and_a_label(coco, tmp_path):
    keys = set()
    for change in (None, "caption", "label"):
        data = CocoPairs(coco, "val2017")
        if change == "caption":
            data.captions = [[*c[:-1], "something else"] for c in data.captions]
        if change == "label":
            data.labels[0, 0] = 1 - data.labels[0, 0]
        make_shards(data, tmp_path / str(change) / "val2017", progress=False)
        keys.add(ShardPairs(tmp_path / str(change), "val2017").key)
    assert len(keys) == 3


def test_it_travels_to_a_worker(sharded):
    shards = ShardPairs(sharded, "train2017")
    shards[0]
    again = pickle.loads(pickle.dumps(shards))
    assert torch.equal(again[7].image, shards[7].image) and again.captions[7] == shards.captions[7]
    loader = torch.utils.data.DataLoader(shards, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [s.image_id for s in loader] == shards.image_ids


def test_open_pairs_takes_what_is_there(coco, sharded):
    assert type(open_pairs(coco, "train2017")) is CocoPairs and type(open_pairs(sharded, "train2017")) is ShardPairs


def test_the_command(coco, tmp_path):
    import subprocess
    import sys
    def command(*args):
        return subprocess.run([sys.executable, "-c", "from mmfuse.cli import main; main()", *map(str, args)], capture_output=True, text=True)
    base = ["shard", "--data", coco, "--split", "val2017", "--out", tmp_path, "--per-shard", 2]
    done = command(*base)
    assert done.returncode == 0 and "5 pictures, 3 shards" in done.stdout, done.stderr
    assert len(ShardPairs(tmp_path, "val2017")) == 5
    assert "0 shards written now" in command(*base).stdout
    for args, says in [((*base, "--part", "3/2"), "--part is K/N"), (("shard", "--data", tmp_path, "--split", "val2017", "--out", tmp_path / "x"), "holds shards already"),
                       (("shard", "--data", coco, "--split", "test2017", "--out", tmp_path / "x"), "test2017")]:
        refused = command(*args)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and says in refused.stderr, refused.stderr
    assert not (tmp_path / "x").exists()
