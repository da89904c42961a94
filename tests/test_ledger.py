"""The ledger: gains are what they say, a stopped run goes on, files are whole, bad input is one line."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from mmfuse import arms, ledger as module
from mmfuse.arms import UNIMODAL
from mmfuse.data import CocoError, CocoPairs
from mmfuse.files import MmfuseError
from mmfuse.fusion import HEADS
from mmfuse.ledger import (RECOMMENDED, STANDARD, as_frame, check_arms, draw, gain, largest_boxes, run, save, sliced_map, slices_of, tabulate,
                           text_table)
from mmfuse.metrics import average_precision, mean_average_precision, paired_bootstrap
from mmfuse.toy import toy_ceilings, toy_coco

C = 4


def fake_scores(n=60, seed=0):
    rng = np.random.default_rng(seed)
    y = (rng.random((n, C)) < 0.4).astype(np.float32)
    return y, {arm: y + s * rng.normal(size=(2, n, C)) for arm, s in
               dict(image=2.0, text=1.5, late=1.2, joint=0.8, article=3.0).items()}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_coco(tmp_path_factory.mktemp("toy") / "coco", n_train=40, n_val=30)


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    "One small run with all that the JSON must have."
    out = tmp_path_factory.mktemp("ledger") / "ledger.json"
    frame = run(toy, test_split="val2017", arms=["image", "text", "late", "joint", "article"], seeds=2, epochs=1,
                out=out, cache_dir=out.parent / "tokens", workers=1, progress=False)
    return frame, json.loads(out.read_text()), out


def test_gains_are_differences_of_the_table():
    y, scores = fake_scores()
    t = tabulate(scores, y, resamples=50)
    assert t["best_unimodal"] == "text"
    for arm, gains in t["gains"].items():
        for key, reference in dict(vs_best_unimodal="text", vs_late="late", vs_joint="joint", vs_article="article").items():
            assert (key in gains) == (arm != reference)
            if arm != reference:
                a, b = t["arms"][arm]["mAP"], t["arms"][reference]["mAP"]
                assert gains[key]["absolute"] == pytest.approx(a - b) and gains[key]["relative"] == pytest.approx((a - b) / b)
                assert gains[key]["ci95"][0] <= gains[key]["absolute"] <= gains[key]["ci95"][1]
        assert t["arms"][arm]["mAP"] == pytest.approx(np.mean(t["arms"][arm]["seeds"]))


def test_gain_is_antisymmetric_and_invariant_to_monotone_scores():
    y, s = fake_scores()
    ab, ba = gain(s["joint"], s["text"], y, n=50), gain(s["text"], s["joint"], y, n=50)
    assert ab["absolute"] == pytest.approx(-ba["absolute"]) and ab["ci95"] == pytest.approx([-ba["ci95"][1], -ba["ci95"][0]])
    again = gain(np.exp(s["joint"]), 3 * s["text"] + 1, y, n=50)
    assert again["absolute"] == pytest.approx(ab["absolute"]) and again["ci95"] == pytest.approx(ab["ci95"])


def test_gains_in_the_table_are_those_of_the_paired_bootstrap():
    "All arms share one set of resamples; each pair alone gives the same interval."
    y, scores = fake_scores()
    t = tabulate(scores, y, resamples=64)
    for arm, reference, key in (("joint", "text", "vs_best_unimodal"), ("late", "joint", "vs_joint")):
        expected = paired_bootstrap(scores[arm], scores[reference], y, n=64)
        got = t["gains"][arm][key]
        assert [got["absolute"], *got["ci95"]] == pytest.approx(expected)


def test_every_arm_that_reads_one_modality_counts_as_a_baseline():
    assert set(UNIMODAL) == {a for a in HEADS if len(getattr(HEADS[a], "reads", "12")) == 1}
    y, scores = fake_scores()
    assert tabulate(scores | {"image_named": scores["joint"]}, y, resamples=8)["best_unimodal"] == "image_named"


def test_the_recommended_arm_is_one_that_reads_both():
    assert RECOMMENDED in STANDARD and HEADS[RECOMMENDED].reads == ("image", "text")


def test_a_stopped_run_goes_on_where_it_was(toy, tmp_path, monkeypatch):
    common = dict(test_split="val2017", arms=["image", "text", "joint"], seeds=1, epochs=1, cache_dir=tmp_path / "tokens", workers=1, progress=False)
    whole = run(toy, **common).attrs["ledger"]
    real, calls = arms.score_arm, []

    def stopping(arm, split, **kwargs):
        calls.append(arm)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(arm, split, **kwargs)

    monkeypatch.setattr(arms, "score_arm", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(toy, out=tmp_path / "x.json", **common)
    assert not (tmp_path / "x.json").exists() and len(list((tmp_path / "x.parts").rglob("*.npz"))) == 2
    again = run(toy, out=tmp_path / "x.json", **common).attrs["ledger"]
    assert calls[3:] == calls[2:3], "only what was not done is done again"
    assert not (tmp_path / "x.parts").exists()
    for arm in whole["arms"]:
        assert again["arms"][arm]["seeds"] == whole["arms"][arm]["seeds"]


def test_parts_of_another_run_are_not_taken(toy, tmp_path, monkeypatch):
    common = dict(test_split="val2017", arms=["text"], epochs=1, cache_dir=tmp_path / "tokens", workers=1, progress=False, out=tmp_path / "x.json")
    monkeypatch.setattr(module, "save", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(toy, seeds=1, **common)
    monkeypatch.undo()
    assert len(run(toy, seeds=2, **common).attrs["ledger"]["arms"]["text"]["seeds"]) == 2


def test_a_slice_leaves_out_other_positives_and_no_negative():
    y, scores = fake_scores()
    keep = np.random.default_rng(1).random(y.shape) < 0.5
    expected = []
    for c in range(C):
        rows = [i for i in range(len(y)) if not y[i, c] or keep[i, c]]
        expected.append(average_precision(scores["text"][0][rows, c], y[rows, c]))
    assert sliced_map(scores["text"][0], y, keep) == pytest.approx(np.mean(expected))
    assert sliced_map(scores["text"][0], y, keep | True) == pytest.approx(mean_average_precision(scores["text"][0], y))


def test_slices_are_what_annotations_say(toy):
    data = CocoPairs(toy, "val2017")
    slices, boxes = slices_of(data), largest_boxes(data)
    content = json.loads((toy / "annotations" / "instances_val2017.json").read_text())
    some = content["annotations"][0]
    at = data.image_ids.index(some["image_id"]), data.category_ids.index(some["category_id"])
    same = [a for a in content["annotations"] if (a["image_id"], a["category_id"]) == (some["image_id"], some["category_id"])]
    assert boxes[at] == max(a["bbox"][2] * a["bbox"][3] for a in same)
    assert ((boxes > 0) == (data.labels.numpy() > 0)).all()
    i, c = 3, int(data.labels[3].argmax())
    assert slices["mentioned"][i, c] == bool(module.mentions(data.captions[i][0], data.classes)[c])
    assert slices_of(data, 5)["mentioned"].sum() > slices["mentioned"].sum()
    counts = data.labels.numpy().sum(0)
    assert counts[slices["rare"][0]].max() < counts[slices["common"][0]].min()


def test_the_ledger_has_its_slices_and_classes(finished):
    _, ledger, out = finished
    for name, s in ledger["slices"].items():
        assert {"positives", "image", "text", "joint"} <= set(s), name
    assert ledger["slices"]["mentioned"]["positives"] + ledger["slices"]["not mentioned"]["positives"] == sum(ledger["per_class"]["positives"])
    there = [v for v in ledger["per_class"]["text"] if v is not None]
    assert np.mean(there) == pytest.approx(ledger["arms"]["text"]["mAP"], abs=1e-3)
    assert len(out.read_text().splitlines()) < 400


def test_the_json_holds_what_tools_read(finished):
    frame, ledger, _ = finished
    assert ledger["data"] == dict(train=40, test=30, classes=24) and ledger["encoders"] == dict(image="tiny", text="tiny")
    assert ledger["recommended"] == RECOMMENDED
    for arm, r in ledger["arms"].items():
        assert {"mAP", "ci95", "seeds", "cf1", "of1", "params", "train_seconds"} <= set(r)
        assert len(r["seeds"]) == 2 and r["ci95"][0] <= r["mAP"] <= r["ci95"][1] and r["params"] > 0 and r["train_seconds"] > 0
    assert set(ledger["gains"]["joint"]) == {"vs_best_unimodal", "vs_late", "vs_article"}
    assert list(frame.index) == sorted(ledger["arms"], key=lambda a: -ledger["arms"][a]["mAP"])
    assert frame.attrs["ledger"]["arms"].keys() == ledger["arms"].keys()


def test_table_and_figure_show_every_arm(finished):
    frame, ledger, out = finished
    table = text_table(frame)
    assert all(arm in table for arm in ledger["arms"]) and table.count("\n") == len(ledger["arms"])
    labels = [t.get_text() for t in draw(ledger).axes[0].get_yticklabels()]
    assert sorted(x.removesuffix(" *") for x in labels) == sorted(ledger["arms"])
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_a_second_run_gives_the_same_numbers(finished, toy):
    _, ledger, out = finished
    again = run(toy, test_split="val2017", arms=["text"], seeds=2, epochs=1, cache_dir=out.parent / "tokens", workers=1, progress=False)
    assert again.attrs["ledger"]["arms"]["text"]["seeds"] == ledger["arms"]["text"]["seeds"]


def test_the_toy_has_its_ceilings(monkeypatch, toy, tmp_path):
    monkeypatch.setattr(module, "toy_coco", lambda: toy)
    frame = run(arms=["text"], seeds=1, epochs=1, cache_dir=tmp_path, workers=1, progress=False)
    assert frame.attrs["ledger"]["ceilings"] == toy_ceilings(toy)


def test_folds_and_a_test_root(toy, tmp_path):
    ids = [i["id"] for i in json.loads((toy / "annotations" / "instances_train2017.json").read_text())["images"]]
    (tmp_path / "folds.json").write_text(json.dumps({i: i % 2 for i in ids}))
    common = dict(arms=["text"], seeds=1, epochs=1, cache_dir=tmp_path / "tokens", workers=1, progress=False)
    assert run(toy, folds=tmp_path / "folds.json", **common).attrs["ledger"]["data"] == dict(train=40, test=40, classes=24)
    shutil.copytree(toy, tmp_path / "elsewhere")
    assert run(toy, test_data=tmp_path / "elsewhere", test_split="val2017", **common).attrs["ledger"]["data"]["test"] == 30


def test_more_test_captions_change_the_score_of_words_alone(toy, tmp_path):
    common = dict(test_split="val2017", seeds=1, epochs=1, cache_dir=tmp_path, workers=1, progress=False, arms=["image", "text"])
    one, five = run(toy, **common), run(toy, captions=5, **common)
    assert one.mAP["image"] == five.mAP["image"] and one.mAP["text"] != five.mAP["text"]


@pytest.mark.parametrize("change, words", [
    (dict(arms=["txet"]), "no arm is called 'txet'"),
    (dict(test_split="train2017"), "has pictures of 'train2017' in it"),
    (dict(test_split=None), "either a test split (--test-split) or folds"),
    (dict(test_split="test2017"), "test2017"),
    (dict(image_encoder="resnet5000"), "no image encoder 'resnet5000'"),
    (dict(text_encoder="./nowhere"), "nowhere"),
])
def test_bad_input_is_one_line_and_writes_nothing(toy, tmp_path, change, words):
    with pytest.raises(MmfuseError) as e:
        run(toy, **{**dict(test_split="val2017", out=tmp_path / "new" / "x.json", progress=False), **change})
    assert words in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_categories_must_agree(toy, tmp_path):
    other = shutil.copytree(toy, tmp_path / "other")
    path = other / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "someone"
    path.write_text(json.dumps(content))
    with pytest.raises(CocoError, match="different categories"):
        run(toy, test_data=other, test_split="val2017", progress=False)


def test_check_arms():
    assert check_arms(None) == list(STANDARD) and set(STANDARD) <= set(HEADS) and check_arms(["text", "text"]) == ["text"]
    with pytest.raises(MmfuseError):
        check_arms([])


def test_a_failed_figure_leaves_the_old_files(tmp_path, finished, monkeypatch):
    _, ledger, _ = finished
    save(ledger, tmp_path / "x.json")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(module.json, "dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(ledger, tmp_path / "x.json")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_real_pictures_go_through(real_coco, tmp_path):
    "The cheapest arm on real pictures with the shipped encoders; real COCO has all 80 categories."
    frame = run(real_coco, train_split="val2017", folds=real_coco / "folds.json", arms=["text"], seeds=1, epochs=1,
                cache_dir=tmp_path, workers=1, progress=False)
    assert frame.attrs["ledger"]["data"] == dict(train=427, test=427, classes=80)
    assert isinstance(frame, pd.DataFrame) and as_frame(frame.attrs["ledger"]).equals(frame)
