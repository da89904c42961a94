"""Your own data: what is written in COCO's layout is what was given, and a bad table is one line."""

import csv
import json
from collections import Counter

import pytest
from PIL import Image

from mmfuse.data import CocoError, CocoPairs
from mmfuse.files import MmfuseError
from mmfuse.own_data import coco_from_csv, coco_from_folder

CLASSES = ["a dog", "cat", "lamp"]


def picture(path, colour=(200, 30, 30), size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "A table of 20 pictures with two captions each, and the COCO folder made of it."
    folder = tmp_path_factory.mktemp("shop")
    rows = []
    for i in range(20):
        picture(folder / "pictures" / f"{i}.png", colour=(12 * i, 255 - 12 * i, 90))
        labels = [CLASSES[i % 3]] + (["lamp"] if i % 5 == 0 else [])
        rows += [dict(image=f"pictures/{i}.png", caption=f"caption {k} of picture {i}", labels="; ".join(labels)) for k in (1, 2)]
    with open(folder / "shop.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows[::2] + rows[1::2])
    coco_from_csv(folder / "shop.csv", folder / "coco", seed=1)
    return folder


def test_rows_of_a_picture_stay_together_and_nothing_is_lost(shop):
    train, val = (CocoPairs(shop / "coco", s) for s in ("train", "val"))
    assert (len(train), len(val)) == (16, 4) and train.classes == val.classes == sorted(CLASSES)
    for ds in (train, val):
        for i in range(len(ds)):
            number = int(ds.captions[i][0].split()[-1])
            assert Counter(ds.captions[i]) == Counter([f"caption {k} of picture {number}" for k in (1, 2)])
            assert {c for c, y in zip(ds.classes, ds[i].labels) if y} == {CLASSES[number % 3]} | ({"lamp"} if number % 5 == 0 else set())
            assert ds[i].image[0, 0, 0] == 12 * number


def test_pycocotools_reads_it(shop):
    from pycocotools.coco import COCO
    theirs, ours = COCO(shop / "coco" / "annotations" / "instances_val.json"), CocoPairs(shop / "coco", "val")
    for i, labels in zip(ours.image_ids, ours.labels):
        names = {theirs.loadCats(a["category_id"])[0]["name"] for a in theirs.loadAnns(theirs.getAnnIds(imgIds=i))}
        assert names == {c for c, y in zip(ours.classes, labels) if y}


def test_the_split_is_the_seeds(shop, tmp_path):
    ids = [[c[0] for c in CocoPairs(coco_from_csv(shop / "shop.csv", tmp_path / str(n), seed=s), "val").captions] for n, s in enumerate((1, 1, 2))]
    assert ids[0] == ids[1] != ids[2]


def test_a_caption_of_two_lines_is_one_caption(tmp_path):
    for i in range(4):
        picture(tmp_path / f"{i}.png")
    with open(tmp_path / "t.csv", "w", newline="") as f:
        csv.writer(f).writerows([("image", "caption", "labels"), *((f"{i}.png", f"{i}, the first line\nand a second", "cat") for i in range(4))])
    coco_from_csv(tmp_path / "t.csv", tmp_path / "coco", val_share=0.25)
    said = [a["caption"] for s in ("train", "val") for a in json.loads((tmp_path / "coco" / "annotations" / f"captions_{s}.json").read_text())["annotations"]]
    assert sorted(said) == [f"{i}, the first line\nand a second" for i in range(4)]


def test_a_folder_of_classes(tmp_path):
    for k, name in enumerate(("lamp", "chair")):
        for i in range(6):
            picture(tmp_path / "in" / name / f"{i}.jpg")
            (tmp_path / "in" / name / f"{i}.txt").write_text(f"a {name}\nnumber {i}\n\n")
    root = coco_from_folder(tmp_path / "in", tmp_path / "out", val_share=.25)
    train = CocoPairs(root, "train")
    assert len(train) == 9 and train.classes == ["chair", "lamp"] and (train.labels.sum(1) == 1).all()
    assert all(c[0] == f"a {train.classes[int(y.argmax())]}" for c, y in zip(train.captions, train.labels))


def test_pictures_without_a_caption_are_counted(tmp_path):
    for i in range(5):
        picture(tmp_path / f"{i}.png")
    (tmp_path / "t.csv").write_text("image,caption,labels\n" + "".join(f"{i}.png,{'a lamp' if i else ''},lamp\n" for i in range(5)))
    with pytest.warns(UserWarning, match="1 of 5 pictures have no caption"):
        coco_from_csv(tmp_path / "t.csv", tmp_path / "out")


@pytest.mark.parametrize("text, says", [
    ("", "missing: image, labels"),
    ("image,caption\nred.png,x\n", "missing: labels"),
    ("image,caption,labels\n,x,lamp\n", "row 2: no image"),
    ("image,caption,labels\nred.png,x,lamp\ngone.png,x,lamp\n", "row 3: no picture"),
    ("image,caption,labels\nred.png,x,lamp\n", "too few"),
    ("image,caption,labels\nred.png,x,lamp\nblue.png,x,chair\n", "no training picture is left for"),
    ("image,caption,labels\nred.png,x,lamp\nnone.png,x,lamp\n", "cannot decode"),
    ("image,caption,labels\nred.png,\xff,lamp\n".encode("latin-1"), "cannot read"),
    ("image,caption,labels\nred.png,x,lamp\nblue.png,a lamp, blue,lamp\n", "row 3: more fields than the header"),
])
def test_a_bad_table_is_one_line_and_leaves_nothing(tmp_path, text, says):
    picture(tmp_path / "red.png"), picture(tmp_path / "blue.png")
    (tmp_path / "none.png").write_text("no picture")
    (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CocoError, match=says) as e:
        coco_from_csv(tmp_path / "t.csv", tmp_path / "out", val_share=.5)
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_folder_in_use_is_not_written_over(shop):
    with pytest.raises(CocoError, match="is not empty"):
        coco_from_csv(shop / "shop.csv", shop / "coco")


def test_a_place_that_cannot_be_written_is_one_line(shop):
    with pytest.raises(MmfuseError, match="cannot write"):
        coco_from_csv(shop / "shop.csv", shop / "shop.csv")


def test_captions_that_are_no_text_are_named(tmp_path):
    for i in range(4):
        picture(tmp_path / "in" / "lamp" / f"{i}.png")
    (tmp_path / "in" / "lamp" / "2.txt").write_bytes("l\xe4mp".encode("latin-1"))
    with pytest.raises(CocoError, match="cannot read .*2.txt"):
        coco_from_folder(tmp_path / "in", tmp_path / "out")


def test_the_classifiers_module_still_gives_them():
    from mmfuse import classifier
    assert (classifier.coco_from_csv, classifier.coco_from_folder) == (coco_from_csv, coco_from_folder)
