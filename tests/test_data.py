"""CocoPairs against other readers, and every way in which data can be wrong."""

import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest
import safetensors.numpy as safetensors_numpy
import torch
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from torch.utils.data import DataLoader
from torchvision.datasets import CocoCaptions

from mmfuse import annotations
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


def test_all_three_read_every_kind_of_picture(tmp_path):
    "Grey, CMYK, palette, PNG, WebP, GIF, by their file_name; no info, no licenses, no segmentation."
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (4, 6, 3), np.uint8)).resize((60, 40), Image.Resampling.BICUBIC)
    kinds = {"a.jpg": "RGB", "grey.jpg": "L", "cmyk.jpg": "CMYK", "p.png": "P", "b.png": "RGB", "c.webp": "RGB", "d.gif": "P", "sub/e.PNG": "L"}
    (tmp_path / "val2017" / "sub").mkdir(parents=True)
    (tmp_path / "annotations").mkdir()
    for name, mode in kinds.items():
        picture.convert(mode).save(tmp_path / "val2017" / name)
    images = [dict(id=10 - n, file_name=name, width=60, height=40) for n, name in enumerate(kinds)]
    boxes = [dict(id=n, image_id=10 - n, category_id=18, bbox=[1, 1, 9, 9], area=81, iscrowd=n % 2) for n in range(len(kinds))]
    said = [dict(id=n, image_id=10 - n // 2, caption=f"sentence {n}") for n in range(2 * len(kinds))]
    files = dict(instances=dict(images=images, annotations=boxes, categories=[dict(id=18, name="dog")]), captions=dict(images=images, annotations=said))
    for kind, content in files.items():
        (tmp_path / "annotations" / f"{kind}_val2017.json").write_text(json.dumps(content))
    ours = CocoPairs(tmp_path, "val2017")
    theirs = COCO(str(tmp_path / "annotations" / "instances_val2017.json"))
    pairs = CocoCaptions(str(tmp_path / "val2017"), str(tmp_path / "annotations" / "captions_val2017.json"))
    assert sorted(ours.image_ids) == pairs.ids == sorted(theirs.getImgIds(catIds=[18])) and len(ours) == len(kinds)
    for n, image_id in enumerate(ours.image_ids):
        shown, captions = pairs[pairs.ids.index(image_id)]
        assert ours[n].captions == captions and theirs.loadImgs(image_id)[0]["file_name"] == images[n]["file_name"]
        difference = np.asarray(shown, int) - ours[n].image.permute(1, 2, 0).numpy().astype(int)
        assert abs(difference).max() <= 4, images[n]


def test_it_agrees_on_real_pictures(real_coco):
    ours = CocoPairs(real_coco, "val2017")
    theirs = COCO(str(real_coco / "annotations" / "instances_val2017.json"))
    assert ours.classes == list(CATEGORIES.values()) and ours.category_ids == list(CATEGORIES)
    assert len(ours) == 427
    for n in range(0, len(ours), 50):
        found = {a["category_id"] for a in theirs.loadAnns(theirs.getAnnIds(imgIds=ours.image_ids[n]))}
        assert found == {ours.category_ids[c] for c in ours.labels[n].nonzero().flatten()}
    pairs = CocoCaptions(str(real_coco / "val2017"), str(real_coco / "annotations" / "captions_val2017.json"))
    said = {i: sorted(a["caption"] for a in pairs.coco.imgToAnns[i]) for i in pairs.ids}
    assert [sorted(five) for five in ours.captions] == [said[i] for i in ours.image_ids]
    assert ours.left_out == {"without a caption": 0, "without a label": 3, "cannot be decoded": 0}


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
    assert ds.image_ids == [3, 7, 9] and ds.labels[2].sum() == 0 and not any(ds.left_out.values())
    captions = [dict(id=1, image_id=3, caption="first")]
    assert CocoPairs(make(None, {"annotations": captions}), "val2017", keep_unlabelled=True).image_ids == [3]


def test_what_is_left_out_is_counted(make):
    root = make(None, dict(annotations=[dict(id=1, image_id=7, caption="a man"), dict(id=2, image_id=9, caption="nothing")]))
    ds = CocoPairs(root, "val2017")
    assert ds.image_ids == [7] and ds.left_out == {"without a caption": 1, "without a label": 1, "cannot be decoded": 0}
    assert repr(ds) == "CocoPairs(val2017: 1 pictures, 2 classes; left out: 1 without a caption, 1 without a label)"
    assert "left out: nothing" in repr(CocoPairs(make(), "val2017", keep_unlabelled=True))


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
    (dict(annotations=[dict(id=5, image_id=3, category_id=1), dict(id=5, image_id=7, category_id=1)]), None, ["instances_val2017.json", "annotations has the id 5 more than once"]),
    (None, dict(annotations=[dict(id=5, image_id=3, caption="a"), dict(id=5, image_id=7, caption="b")]), ["captions_val2017.json", "annotations has the id 5 more than once"]),
    (None, dict(images=[IMAGE, IMAGE]), ["captions_val2017.json", "images has the id 3 more than once"]),
    (None, dict(annotations=[dict(image_id=3, caption="a")]), ["captions_val2017.json", "annotations[0] has no 'id'"]),
    (dict(categories=[dict(id=1)]), None, ["categories[0] has no 'name'"]),
    ('{"images": [], "annotations": []}', None, ["no key 'categories'"]), ('{"images": [], "categories": []}', None, ["no key 'annotations'"]),
    (None, '{"annotations": []}', ["captions_val2017.json", "no key 'images'"]),
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
    if how == "folder":
        path.mkdir()
    elif how != "missing":
        path.write_bytes({"empty": b"", "text": b"no picture", "half": data[: len(data) // 2], "end": data[:-2]}[how])


@pytest.mark.parametrize("how", ["missing", "empty", "text", "half", "end", "folder"])
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
    assert kept.left_out == {"without a caption": 0, "without a label": 1, "cannot be decoded": 1} and "1 cannot be decoded" in repr(kept)


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


@pytest.mark.parametrize("mode, name", [("L", "a.jpg"), ("CMYK", "a.jpg"), ("P", "a.png"), ("L", "a.png"), ("RGBA", "a.png"), ("LA", "a.png"), ("1", "a.png"), ("RGB", "a.webp"), ("RGB", "a.gif")])
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


@pytest.fixture
def kept(make, tmp_path, monkeypatch):
    "The small data set, with an index kept for it however small it is; and the folder of indexes."
    monkeypatch.setenv("MMFUSE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(annotations, "_WORTH", 0)
    return make, tmp_path / "home" / "index"


def parsed(monkeypatch):
    "A list that grows by one with each JSON file that is parsed."
    calls, parse = [], annotations._parse
    monkeypatch.setattr(annotations, "_parse", lambda path, keys: calls.append(path.name) or parse(path, keys))
    return calls


def same(a, b):
    assert (a.image_ids, a.classes, a.category_ids, a.key) == (b.image_ids, b.classes, b.category_ids, b.key)
    assert list(a.captions) == list(b.captions) and torch.equal(a.labels, b.labels) and a.path(0) == b.path(0)
    return True


def test_a_kept_index_gives_the_same_and_parses_nothing(kept, monkeypatch):
    make, folder = kept
    first = CocoPairs(make(), "val2017")
    calls = parsed(monkeypatch)
    again = CocoPairs(first.root, "val2017")
    assert same(first, again) and not calls and len(list(folder.iterdir())) == 1
    assert CocoPairs(first.root, "val2017", keep_unlabelled=True).image_ids == [3, 7, 9] and not calls
    monkeypatch.setattr(annotations, "_WORTH", 1 << 60)
    assert same(again, CocoPairs(first.root, "val2017")) and len(calls) == 2


@pytest.mark.parametrize("kind", ["instances", "captions"])
def test_a_stale_index_is_noticed(kept, kind):
    make, folder = kept
    root = make()
    CocoPairs(root, "val2017")
    path = root / "annotations" / f"{kind}_val2017.json"
    before, text = path.stat(), path.read_text()
    changed = text.replace('"person"', '"PERSON"') if kind == "instances" else text.replace("first", "FIRST")
    assert len(changed) == len(text) and changed != text
    path.write_text(changed)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time: only the content tells
    ds = CocoPairs(root, "val2017")
    assert ds.classes[0] == ("PERSON" if kind == "instances" else "person")
    assert ds.captions[0][0] == ("FIRST" if kind == "captions" else "first")
    assert len(list(folder.iterdir())) == 1
    os.utime(path, ns=(0, 0))
    assert same(ds, CocoPairs(root, "val2017"))
    path.write_text("{broken")
    with pytest.raises(CocoError, match="not JSON"):
        CocoPairs(root, "val2017")
    path.unlink()
    with pytest.raises(CocoError, match="cannot read"):
        CocoPairs(root, "val2017")


@pytest.mark.parametrize("how", ["empty", "half", "end", "flip", "text", "folder", "other"])
def test_a_damaged_index_is_made_anew_silently(kept, monkeypatch, how, recwarn):
    make, folder = kept
    first = CocoPairs(make(), "val2017")
    file, = folder.iterdir()
    content = file.read_bytes()
    file.unlink()
    if how == "folder":
        (file / "x").mkdir(parents=True)
    elif how == "other":
        safetensors_numpy.save_file(dict(ids=np.zeros(3)), file, metadata={"mmfuse": "{}"})
    else:
        file.write_bytes({"empty": b"", "half": content[: len(content) // 2], "end": content[:-1], "text": b"no index at all",
                          "flip": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]}[how])
    calls = parsed(monkeypatch)
    assert same(first, CocoPairs(first.root, "val2017")) and len(calls) == 2
    assert same(first, CocoPairs(first.root, "val2017")) and len(calls) == 2
    assert [p.is_file() for p in folder.iterdir()] == [True] and not recwarn.list


def test_a_home_that_cannot_be_written_costs_only_time(kept, monkeypatch, tmp_path):
    make, _ = kept
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMFUSE_HOME", str(tmp_path / "file" / "home"))
    first, calls = CocoPairs(make(), "val2017"), parsed(monkeypatch)
    assert same(first, CocoPairs(first.root, "val2017")) and len(calls) == 2
    assert same(first, pickle.loads(pickle.dumps(first)))


def test_a_full_disk_leaves_no_half_index(kept, monkeypatch):
    make, folder = kept

    def full(arrays, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(annotations, "save_file", full)
    assert CocoPairs(make(), "val2017").image_ids == [3, 7] and not list(folder.iterdir())


def test_a_pickle_of_kept_data_is_small_and_checked(kept):
    make, folder = kept
    many = [dict(id=n, image_id=3, caption=f"sentence number {n}") for n in range(5000)]
    ds = CocoPairs(make(None, dict(annotations=many)), "val2017")
    packed = pickle.dumps(ds)
    assert len(packed) < 2000 and same(ds, pickle.loads(packed))
    for file in folder.iterdir():
        file.unlink()
    assert same(ds, pickle.loads(packed))  # the cache was cleared meanwhile
    make()
    with pytest.raises(CocoError, match="changed while"):
        pickle.loads(packed)


@pytest.mark.parametrize("method", [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()])
def test_workers_open_the_index(root, method, monkeypatch, tmp_path):
    monkeypatch.setenv("MMFUSE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(annotations, "_WORTH", 0)
    ds = CocoPairs(root, "train2017")
    assert ds._index.file.is_file()
    loader = DataLoader(ds, batch_size=None, num_workers=2, multiprocessing_context=method)
    samples = list(loader)
    assert [s.image_id for s in samples] == ds.image_ids and [s.captions for s in samples] == ds.captions


def test_what_somebody_changed_survives_the_pickle(root):
    ds = CocoPairs(root, "train2017")
    ds.labels[0] = 1 - ds.labels[0]
    ds.image_ids, ds.captions, ds.extra = ds.image_ids[:3], ds.captions[:3], "mine"
    again = pickle.loads(pickle.dumps(ds))
    assert torch.equal(again.labels, ds.labels) and again.captions == ds.captions and again.image_ids == ds.image_ids and again.extra == "mine"


def test_skipped_pictures_stay_out_of_the_pickle(kept):
    make, _ = kept
    root = make()
    break_it(root / "val2017" / "3.jpg", "half")
    with pytest.warns(UserWarning):
        ds = CocoPairs(root, "val2017", on_error="skip")
    again = pickle.loads(pickle.dumps(ds))
    assert same(ds, again) and again.skipped == ds.skipped and len(again) == 1


def test_captions_behave_like_a_list(root):
    ds = CocoPairs(root, "train2017")
    plain = [list(five) for five in ds.captions]
    assert ds.captions == plain and plain == ds.captions and ds.captions != plain[:-1] and not ds.captions == plain[::-1]
    assert ds.captions[-1] == plain[-1] and ds.captions[2:5] == plain[2:5] and ds.captions[np.int64(1)] == plain[1]
    assert repr(ds.captions).startswith("[[") and plain[3] in ds.captions
    with pytest.raises(IndexError):
        ds.captions[len(ds)]


def test_any_text_and_any_number_passes_the_index(kept):
    make, _ = kept
    odd = ["", "two\nlines", "\0", "\u202eright to left", "\ud800 alone", "Café 🐕", "a" * 10_000]
    big = 10**30
    images = [dict(id=big, file_name="sub/ä.jpg"), dict(id=-1, file_name="b.jpg")]
    root = make(dict(images=images, annotations=[dict(image_id=big, category_id=18)]),
                dict(annotations=[dict(id=n, image_id=big, caption=c) for n, c in enumerate(odd)]))
    for _ in range(2):
        ds = CocoPairs(root, "val2017")
        assert ds.image_ids == [big] and ds.captions == [odd] and ds.path(0).name == "ä.jpg"
    assert len(CocoPairs(make(dict(images=[], annotations=[]), dict(annotations=[])), "val2017")) == 0


@pytest.mark.parametrize("outline", ['[[1, 2.5, -3e-1]]', '[ [1,2] , [3,4] ]', '[]', '[[]]', '{"counts": [1, 2], "size": [3, 4]}', '"none"', 'null'])
def test_outlines_are_read_over(make, outline):
    text = '{"images": [{"id": 3, "file_name": "3.jpg"}], "categories": [{"id": 1, "name": "person"}], "annotations": [%s]}'
    rows = ('{"segmentation": %s, "image_id": 3, "category_id": 1}', '{"image_id": 3, "category_id": 1, "segmentation" : %s}')
    for row in rows:
        one = dict(annotations=[dict(id=1, image_id=3, caption='says "segmentation": [[1, 2]] twice')])
        ds = CocoPairs(make(text % (row % outline), one), "val2017")
        assert ds.labels.tolist() == [[1]] and ds.captions == [['says "segmentation": [[1, 2]] twice']]


@pytest.mark.parametrize("outline", ["[[1, 2]", "[1, 2]]", "[[1, 2]],]", "[[1, 2", "[[a]]"])
def test_a_broken_outline_is_broken_json(make, outline):
    text = '{"images": [], "categories": [],\n "annotations": [{"segmentation": %s, "image_id": 3, "category_id": 1}]}' % outline
    with pytest.raises(CocoError, match="not JSON.*line 2"):
        CocoPairs(make(text), "val2017")


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_of_an_animation_the_first_frame_is_read(tmp_path, name):
    frames = [Image.fromarray(np.full((8, 12, 3), value, np.uint8)) for value in (200, 20, 90)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=50)
    assert Image.open(tmp_path / name).n_frames == 3
    image = decode_image(tmp_path / name)
    assert image.shape == (3, 8, 12) and abs(image.float() - 200).max() < 4


def test_a_message_is_one_line_whatever_a_file_is_called(make):
    root = make(dict(images=[dict(id=3, file_name="two\nlines.jpg")], annotations=[dict(image_id=3, category_id=1)]), dict(annotations=[dict(id=1, image_id=3, caption="a")]))
    with pytest.raises(CocoError, match=r"picture 3: cannot read the picture '.*two\\nlines.jpg'") as error:
        CocoPairs(root, "val2017")[0]
    assert "\n" not in str(error.value)


def test_pictures_of_every_kind_are_read_by_their_file_name(make):
    root = make(dict(images=[dict(id=3, file_name="sub/a.webp"), dict(id=7, file_name="b.PNG")]), dict(annotations=[dict(id=i, image_id=i, caption="a") for i in (3, 7)]))
    (root / "val2017" / "sub").mkdir()
    Image.fromarray(np.full((4, 6, 3), 90, np.uint8)).save(root / "val2017" / "sub" / "a.webp")
    Image.fromarray(np.full((4, 6), 40, np.uint8)).save(root / "val2017" / "b.PNG")
    ds = CocoPairs(root, "val2017")
    assert [round(s.image.float().mean().item()) for s in (ds[0], ds[1])] == [90, 40]
