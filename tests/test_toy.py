"""The toy COCO: the posterior against brute force, the files against other readers, the same bytes from the same seed."""

import hashlib
import itertools
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from torchvision.datasets import CocoCaptions

from mmfuse import toy
from mmfuse.data import CocoError, CocoPairs
from mmfuse.files import MmfuseError
from mmfuse.metrics import mean_average_precision
from mmfuse.toy import ABSENT, World, p_said, posterior, sample_record, states, toy_ceilings, toy_coco

SMALL = World(classes=("cat", "dog", "car"), scenes=("room", "road"), pairs=(("cat", "dog"),),
              present=((0.5, 0.1), (0.3, 0.2), (0.05, 0.7)), shared=0.6, hidden=0.2, invented=0.05)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return toy_coco(tmp_path_factory.mktemp("toy") / "coco", n_train=12, n_val=8)


def view(objects, world):
    "What a viewer sees: own drawings with their class and size, shared ones with their pair and size."
    seen = []
    for c, (size, look) in objects.items():
        if look == "own":
            seen.append((world.classes[c], size))
        if look == "shared":
            seen.append((next(p for p in world.pairs if world.classes[c] in p), size))
    return sorted(map(str, seen))


def brute_force(world, record, image, text):
    "Bayes' rule over every hidden state of the whole picture, scene included, given that something is there."
    weight, total = np.zeros(len(world.classes)), 0.0
    n = len(world.classes)
    for s in range(len(world.scenes)):
        if (image or (text and record["placed"][0])) and s != record["scene"]:
            continue
        for combo in itertools.product(*(states(world, c, s).items() for c in range(n))):
            objects = {c: z for c, (z, _) in enumerate(combo) if z != ABSENT}
            if not objects or (image and view(objects, world) != view(record["objects"], world)):
                continue
            w = np.prod([p for _, p in combo]) / len(world.scenes)
            if text:
                w *= np.prod([p_said(world, z) if c in record["said"][0] else 1 - p_said(world, z) for c, (z, _) in enumerate(combo)])
            total += w
            weight += [w * (c in objects) for c in range(n)]
    return weight / total


@pytest.mark.parametrize("image, text", [(True, False), (False, True), (True, True)])
def test_posterior_is_bayes_rule(image, text):
    rng = np.random.default_rng(0)
    for _ in range(60):
        record = sample_record(SMALL, rng)
        np.testing.assert_allclose(posterior(SMALL, record, image=image, text=text), brute_force(SMALL, record, image, text), atol=1e-9)


def test_posterior_mean_is_the_frequency():
    "The law of total probability: averaged over pictures, the posterior is the share of pictures that show a class."
    rng = np.random.default_rng(1)
    records = [sample_record(SMALL, rng) for _ in range(3000)]
    there = np.array([[c in r["objects"] for c in range(3)] for r in records])
    for look in (dict(text=False), dict(image=False), {}):
        mean = np.mean([posterior(SMALL, r, **look) for r in records], axis=0)
        np.testing.assert_allclose(mean, there.mean(0), atol=0.025)


def test_no_ranking_beats_the_posterior_by_much():
    "A posterior that believes that nothing was said is worse on many pictures."
    world, rng = World(), np.random.default_rng(2)
    records = [sample_record(world, rng) for _ in range(600)]
    y = np.array([[c in r["objects"] for c in range(24)] for r in records])
    best = mean_average_precision(np.stack([posterior(world, r) for r in records]), y)
    mistaken = np.stack([posterior(world, {**r, "said": [[]] * 5}) for r in records])
    assert best > mean_average_precision(mistaken, y) + 0.01


def test_ceilings_are_the_posteriors_map(root):
    records = toy.read_records(root)
    world = World()
    y = CocoPairs(root, "val2017").labels
    by_hand = mean_average_precision(np.stack([posterior(world, r, text=False) for r in records]), y)
    assert toy_ceilings(root)["image"] == pytest.approx(by_hand)


def digest(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_seed_gives_the_same_bytes(root, tmp_path):
    assert digest(toy_coco(tmp_path / "again", n_train=12, n_val=8)) == digest(root)
    other = digest(toy_coco(tmp_path / "other", n_train=12, n_val=8, seed=1))
    assert not set(other.values()) & {v for k, v in digest(root).items() if k.endswith(".jpg")}


def test_splits_do_not_share_a_picture(root):
    train, val = CocoPairs(root, "train2017"), CocoPairs(root, "val2017")
    assert not set(train.image_ids) & set(val.image_ids)
    assert len(train) == 12 and len(val) == 8


def test_other_readers_read_it(root):
    ours = CocoPairs(root, "val2017")
    notes = root / "annotations" / "instances_val2017.json"
    theirs = COCO(str(notes))
    for n, i in enumerate(ours.image_ids):
        assert {a["category_id"] for a in theirs.loadAnns(theirs.getAnnIds(imgIds=i))} == {ours.category_ids[c] for c in ours.labels[n].nonzero().flatten()}
    pairs = CocoCaptions(str(root / "val2017"), str(root / "annotations" / "captions_val2017.json"))
    assert [captions for _, captions in pairs] == ours.captions
    with Image.open(ours.path(0)) as picture:
        assert picture.size == toy.SIZE and picture.format == "JPEG"


def test_boxes_lie_in_the_picture(root):
    for a in json.loads((root / "annotations" / "instances_train2017.json").read_text())["annotations"]:
        x, y, w, h = a["bbox"]
        assert x >= 0 and y >= 0 and x + w <= toy.SIZE[0] + 1 and y + h <= toy.SIZE[1] * 1.05 and a["area"] > 0


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(toy, "_write_split", stop)
    with pytest.raises(KeyboardInterrupt):
        toy_coco(tmp_path / "toy", n_train=2, n_val=2)
    assert not [p for p in tmp_path.iterdir() if not p.name.endswith(".lock")]
    monkeypatch.undo()
    assert len(CocoPairs(toy_coco(tmp_path / "toy", n_train=2, n_val=2), "train2017")) == 2


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(MmfuseError, match="holds something else"):
        toy_coco(tmp_path, n_train=2, n_val=2)
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    with pytest.raises(MmfuseError, match="at least one"):
        toy_coco(tmp_path / "new", n_train=0, n_val=2)
    with pytest.raises(CocoError, match="no toy COCO"):
        toy.read_records(tmp_path)
