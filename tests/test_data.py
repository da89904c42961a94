"""CocoPairs against other readers, and every way in which data can be wrong."""

import json
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from torch.utils.data import DataLoader
from torchvision.datasets import CocoCaptions

from mmfuse.data import CATEGORIES, SYNONYMS, CocoError, CocoPairs, decode_image, mask_mentions, mentions
from mmfuse.toy import toy_coco


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return toy_coco(tmp_path_factory.mktemp("data") / "coco", n_train=10, n_val=6)


@pytest.fixture
def make(tmp_path):
    "A function that writes a small data set, with changes, and returns its root."
    images = [dict(id=i, file_name=f"{i}.jpg") for i in (3, 7, 9)]
    instances = dict(images=images, categories=[dict(id=18, name="dog"), dict(id=1, name="person")],
                     annotations=[dict(image_id=3, category_id=18), dict(image_id=3, category_id=1), dict(image_id=7, category_id=1, iscrowd=1)])
    captions = dict(images=images, annotations=[dict(id=2, image_id=3, caption="second"), dict(id=1, image_id=3, caption="first"),
                                                dict(id=3, image_id=7, caption="a man"), dict(id=4, image_id=9, caption="nothing")])

    def write(instances_change=None, captions_change=None):
        (tmp_path / "val2017").mkdir(exist_ok=True)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        for kind, content, change in (("instances", instances, instances_change), ("captions", captions, captions_change)):
            content = change if isinstance(change, str) else json.dumps({**content, **(change or {})})
            (tmp_path / "annotations" / f"{kind}_val2017.json").write_text(content)
        for i in (3, 7, 9):
            Image.fromarray(np.full((4, 6, 3), i, np.uint8)).save(tmp_path / "val2017" / f"{i}.jpg")
        return tmp_path
    return write


def test_it_agrees_with_pycocotools_and_torchvision(root):
    ours = CocoPairs(root, "train2017")
    theirs = COCO(str(root / "annotations" / "instances_train2017.json"))
    assert ours.classes == [c["name"] for c in theirs.loadCats(sorted(theirs.getCatIds()))]
    pairs = CocoCaptions(str(root / "train2017"), str(root / "annotations" / "captions_train2017.json"))
    assert ours.image_ids == pairs.ids
    for n in range(len(ours)):
        picture, said = pairs[n]
        sample = ours[n]
        assert sample.captions == said
        found = {a["category_id"] for a in theirs.loadAnns(theirs.getAnnIds(imgIds=sample.image_id))}
        assert found == {ours.category_ids[c] for c in sample.labels.nonzero().flatten()}
        difference = np.asarray(picture, int) - sample.image.permute(1, 2, 0).numpy().astype(int)
        assert abs(difference).max() <= 3


def test_it_agrees_on_real_pictures(real_coco):
    ours = CocoPairs(real_coco, "val2017")
    theirs = COCO(str(real_coco / "annotations" / "instances_val2017.json"))
    assert ours.classes == list(CATEGORIES.values()) and ours.category_ids == list(CATEGORIES)
    assert len(ours) == 427
    for n in range(0, len(ours), 50):
        found = {a["category_id"] for a in theirs.loadAnns(theirs.getAnnIds(imgIds=ours.image_ids[n]))}
        assert found == {ours.category_ids[c] for c in ours.labels[n].nonzero().flatten()}


def test_mention_rates_on_real_captions(real_coco):
    ds = CocoPairs(real_coco, "val2017")
    there = ds.labels.bool()
    said = torch.stack([torch.stack([mentions(c, ds.classes) for c in five[:5]]) for five in ds.captions])
    single = (said & there[:, None]).sum() / (5 * there.sum())
    any_of_five = (said.any(1) & there).sum() / there.sum()
    absent = (said & ~there[:, None]).sum() / (5 * (~there).sum())
    assert 0.32 < single < 0.42 and 0.47 < any_of_five < 0.60 and absent < 0.003


def test_order_of_classes_captions_and_pictures(make):
    ds = CocoPairs(make(), "val2017")
    assert ds.classes == ["person", "dog"] and ds.image_ids == [3, 7]
    assert ds.captions[0] == ["first", "second"]
    assert ds.labels.tolist() == [[1, 1], [1, 0]]


def test_unlabelled_pictures_are_kept_on_request(make):
    ds = CocoPairs(make(), "val2017", keep_unlabelled=True)
    assert ds.image_ids == [3, 7, 9] and ds.labels[2].sum() == 0
    captions = [dict(id=1, image_id=3, caption="first")]
    assert CocoPairs(make(None, {"annotations": captions}), "val2017", keep_unlabelled=True).image_ids == [3]


IMAGE = dict(id=3, file_name="3.jpg")


@pytest.mark.parametrize("instances, captions, words", [
    ("{broken", None, ["instances_val2017.json", "not JSON"]),
    ("[]", None, ["not a JSON object"]),
    (None, "nonsense", ["captions_val2017.json", "not JSON"]),
    (dict(images={}), None, ["images is not a list"]),
    (dict(images=[dict(id=3)]), None, ["images[0] has no 'file_name'"]),
    (dict(images=[dict(id="3", file_name="3.jpg")]), None, ["'id' is '3', not int"]),
    (dict(images=[IMAGE, IMAGE]), None, ["id 3 more than once"]),
    (dict(categories=[dict(id=1, name="a"), dict(id=1, name="b")]), None, ["categories", "id 1 more than once"]),
    (dict(annotations=[dict(image_id=4, category_id=1)]), None, ["picture 4"]),
    (dict(annotations=[dict(image_id=3, category_id=2)]), None, ["category 2", "picture 3"]),
    (dict(annotations=[dict(image_id=3)]), None, ["annotations[0] has no 'category_id'"]),
    (None, dict(annotations=[dict(id=5, image_id=4, caption="a")]), ["caption 5", "picture 4"]),
    (None, dict(annotations=[dict(id=5, image_id=3, caption=None)]), ["'caption' is None"]),
])
def test_wrong_files_are_refused_in_one_line(make, instances, captions, words):
    with pytest.raises(CocoError) as error:
        CocoPairs(make(instances, captions), "val2017")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["../3.jpg", "/etc/hosts", "a/../../3.jpg", "..\\3.jpg", "C:\\3.jpg", "", "a\0b"])
def test_a_file_name_cannot_climb_out(make, name):
    images = [dict(id=3, file_name=name)]
    with pytest.raises(CocoError, match="picture 3.*leads out of"):
        CocoPairs(make(dict(images=images, annotations=[dict(image_id=3, category_id=1)]),
                       dict(images=images, annotations=[dict(id=1, image_id=3, caption="a")])), "val2017")


def break_it(path, how):
    data = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes({"empty": b"", "text": b"no picture", "half": data[: len(data) // 2], "end": data[:-2]}[how])


@pytest.mark.parametrize("how", ["missing", "empty", "text", "half", "end"])
def test_a_broken_picture_names_its_id_and_file(make, how):
    root = make()
    break_it(root / "val2017" / "3.jpg", how)
    ds = CocoPairs(root, "val2017")
    with pytest.raises(CocoError, match=r"picture 3: .*3\.jpg") as error:
        ds[0]
    assert "\n" not in str(error.value)
    assert ds[1].image_id == 7
    with pytest.warns(UserWarning, match="1 of 2 pictures"):
        kept = CocoPairs(root, "val2017", on_error="skip")
    assert kept.image_ids == [7] and kept.labels.shape == (1, 2) and kept.skipped[0][0] == 3


def test_nothing_is_skipped_where_nothing_is_broken(make, recwarn):
    assert CocoPairs(make(), "val2017", on_error="skip").skipped == []
    assert not [w for w in recwarn.list if w.category is UserWarning]
    with pytest.raises(ValueError, match="on_error"):
        CocoPairs(make(), "val2017", on_error="ignore")


def test_a_missing_folder_or_file_is_one_line(make, tmp_path):
    with pytest.raises(CocoError, match="no folder"):
        CocoPairs(tmp_path / "nowhere", "val2017")
    root = make()
    (root / "annotations" / "captions_val2017.json").unlink()
    with pytest.raises(CocoError, match="captions_val2017.json"):
        CocoPairs(root, "val2017")


def test_the_key_changes_with_the_data(make):
    key = CocoPairs(make(), "val2017").key
    assert key == CocoPairs(make(), "val2017").key
    assert key != CocoPairs(make(dict(annotations=[dict(image_id=3, category_id=1)])), "val2017").key
    root = make()
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(root / "val2017" / "3.jpg")
    assert key != CocoPairs(root, "val2017").key


@pytest.mark.parametrize("method", [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()])
def test_workers_can_have_it(root, method):
    ds = CocoPairs(root, "train2017")
    assert pickle.loads(pickle.dumps(ds)).key == ds.key
    loader = DataLoader(ds, batch_size=None, num_workers=1, multiprocessing_context=method)
    assert [s.image_id for s in loader] == ds.image_ids


@pytest.mark.parametrize("mode, name", [("L", "a.jpg"), ("CMYK", "a.jpg"), ("L", "a.png"), ("RGBA", "a.png"), ("LA", "a.png"), ("1", "a.png"), ("RGB", "a.webp"), ("RGB", "a.gif")])
def test_every_mode_becomes_three_channels(tmp_path, mode, name):
    picture = Image.fromarray(np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (48, 1))).convert("RGB")
    picture.convert(mode).save(tmp_path / name)
    image = decode_image(tmp_path / name)
    assert image.shape == (3, 48, 64) and image.dtype == torch.uint8
    if mode != "1":
        assert abs(image.float().mean(1) - torch.linspace(0, 255, 64)).mean() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_orientation_is_applied_alike(tmp_path, orientation, suffix):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (4, 6, 3), np.uint8)).resize((48, 32), Image.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / f"a.{suffix}", exif=exif, **({"quality": 95} if suffix == "jpg" else {}))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / f"a.{suffix}")).convert("RGB")).astype(int)
    image = decode_image(tmp_path / f"a.{suffix}").permute(1, 2, 0).numpy().astype(int)
    assert image.shape == expected.shape and abs(image - expected).max() <= 4


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 256 * 100, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert decode_image(tmp_path / "a.png")[0].tolist() == [[0, 100, 255]]


@pytest.mark.parametrize("caption, expected", [
    ("Two men ride horses.", {"person", "horse"}), ("A hot dog and a dog", {"hot dog", "dog"}), ("teddy bears", {"teddy bear"}),
    ("A cardboard box, a carpet", set()), ("A BLACK CAT", {"cat"}), ("several knives and a mouse", {"knife", "mouse"}),
    ("people's phones", {"person", "cell phone"}), ("an orange and an apple", {"orange", "apple"}), ("a man in an orange jacket", {"person"}),
    ("a baseball player", set()), ("buses, benches, couches, sandwiches", {"bus", "bench", "couch", "sandwich"}), ("", set()), ("\0 \u202e", set()),
])
def test_mentions(caption, expected):
    classes = list(CATEGORIES.values())
    assert {c for c, m in zip(classes, mentions(caption, classes)) if m} == expected


def test_every_name_is_found_and_hidden():
    classes = list(CATEGORIES.values())
    for name in classes:
        said = mentions(f"There is a {name} here", classes, exact=True)
        assert [c for c, m in zip(classes, said) if m] == [name]
        assert not mentions(mask_mentions(f"There is a {name} here", classes), classes).any()
    taken = [p for phrases in SYNONYMS.values() for p in phrases]
    assert len(taken) == len(set(taken)), "a phrase names two categories"
