"""Arms: nothing is judged on what it was trained or tuned on, a budget is in steps, company changes no number, a damaged part is done again."""

import json

import numpy as np
import pytest
import torch

from mmfuse import arms as module
from mmfuse.arms import (LINEAR, Split, choose_settings, epochs_of, fold_splits, load_trial, pooled_image, read_folds, recall, remember,
                         score_arm, score_arms, settings_of, train_arm)
from mmfuse.files import MmfuseError
from mmfuse.fusion import HEADS
from mmfuse.metrics import mean_average_precision
from mmfuse.token_cache import Tokens
from mmfuse.toy import toy_coco
from mmfuse.training import predict

P, DI, K, T, DT, C = 4, 6, 3, 5, 8, 4


def make_tokens(n=80, seed=0, signal=1.0):
    "Tokens whose first features say the labels."
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, C)) < 0.4).astype(np.float32)
    img = rng.normal(size=(n, P, DI)) * 0.3
    img[..., :C] += signal * labels[:, None]
    txt = rng.normal(size=(n, K, T, DT)) * 0.3
    txt[..., :C] += signal * labels[:, None, None]
    return Tokens(img=img.astype(np.float16), txt=txt.astype(np.float16), mask=np.ones((n, K, T), bool), labels=labels,
                  image_id=np.arange(1000, 1000 + n), names=np.eye(C, DT, dtype=np.float32), classes=list("abcd"))


@pytest.mark.parametrize("arm", list(HEADS))
def test_every_arm_has_six_settings_that_work(arm):
    settings = settings_of(arm)
    assert len(settings) == 6 and len({str(s) for s in settings}) == 6
    for setting in (settings[0], settings[-1]):
        head = train_arm(arm, make_tokens(16), setting, epochs=1)
        assert torch.isfinite(predict(head, make_tokens(5, seed=1))).all()


@pytest.mark.parametrize("arm", [a for a in HEADS if HEADS[a].pools_image])
def test_pooling_first_changes_nothing(arm):
    tokens = make_tokens(32)
    a, b = (predict(train_arm(arm, t, settings_of(arm)[0], epochs=2), t) for t in (tokens, pooled_image(tokens)))
    torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("arm", [a for a in HEADS if not HEADS[a].pools_image])
def test_heads_that_look_at_places_are_not_pooled(arm):
    tokens = make_tokens(32)
    tokens.img[:, 0] += 5  # one place unlike the others
    head = train_arm(arm, tokens, settings_of(arm)[-1], epochs=3)
    assert (predict(head, tokens) - predict(head, pooled_image(tokens))).abs().max() > 1e-3


def test_folds_judge_each_picture_once_and_never_on_itself():
    tokens = make_tokens(23)
    splits, order = fold_splits(tokens, {i: i % 5 for i in range(1000, 1023)})
    assert sorted(order) == list(range(23)) and len(splits) == 5
    for s in splits:
        assert set(s.train.image_id).isdisjoint(s.test.image_id)
        assert len(s.train) + len(s.test) == 23
        assert len({i % 5 for i in s.test.image_id.tolist()}) == 1


def test_settings_are_chosen_without_the_test_pictures():
    "Whatever the test labels are, the choice and the trained scores stay the same."
    train, test = make_tokens(40), make_tokens(20, seed=1)
    other = make_tokens(20, seed=1)
    other.labels[:] = 1 - other.labels
    a, b = (score_arm("text", Split(train, t), seeds=1, epochs=2) for t in (test, other))
    assert a["setting"] == b["setting"] and np.array_equal(a["scores"], b["scores"])


def test_the_choice_sees_only_the_pictures_held_back(monkeypatch):
    tokens, trained_on = make_tokens(40), []
    monkeypatch.setattr(module, "fit", lambda head, t, **kw: trained_on.append(set(t.image_id.tolist())) or [0.0])
    choose_settings("text", tokens)
    held = set(tokens.image_id.tolist()) - trained_on[0]
    assert len(trained_on) == 6 and len(held) == 10 and all(t.isdisjoint(held) for t in trained_on)


def test_workers_do_not_change_a_number():
    splits = [Split(make_tokens(40, seed=s), make_tokens(20, seed=s + 9)) for s in (0, 1)]
    one, two = (score_arms(["text", "label_query"], splits, seeds=1, epochs=1, workers=w, progress=False) for w in (1, 2))
    for arm in one:
        for a, b in zip(one[arm], two[arm]):
            assert np.array_equal(a["scores"], b["scores"]) and a["setting"] == b["setting"]


def test_labels_that_nobody_can_know_score_at_chance():
    "The whole procedure on noise: tuning must not leak."
    train, test = make_tokens(120, signal=0.0), make_tokens(120, seed=1, signal=0.0)
    found = score_arm("joint", Split(train, test), seeds=2, epochs=5)
    assert np.mean([mean_average_precision(s, test.labels) for s in found["scores"]]) < test.labels.mean() + 0.08


@pytest.mark.parametrize("n", [1, 40, 340, 5000, 82081])
def test_budgets_are_in_steps_and_at_least_five_passes(n):
    per_pass = -(-n // 64)
    for arm, least in (("joint", 200), ("cross_attention", 600)):
        steps = epochs_of(arm, n) * per_pass
        assert steps >= max(least, 5 * per_pass) and steps - per_pass < max(least, 5 * per_pass)
    assert set(LINEAR) <= set(HEADS)


def test_a_damaged_part_is_done_again(tmp_path):
    result = dict(scores=np.ones((1, 2, 3)), setting={}, params=3)
    remember(tmp_path, "text", 0, result)
    back = recall(tmp_path, "text", 0)
    assert np.array_equal(back.pop("scores"), result["scores"]) and back == dict(setting={}, params=3)
    path = tmp_path / "text-0.npz"
    path.write_bytes(path.read_bytes()[:40])
    assert recall(tmp_path, "text", 0) is None and recall(tmp_path, "image", 0) is None and recall(None, "text", 0) is None


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"a": 1}', '{"1": 0, "2": 0}', "null"])
def test_folds_that_are_none(tmp_path, text):
    (tmp_path / "folds.json").write_text(text)
    with pytest.raises(MmfuseError, match="folds"):
        read_folds(tmp_path / "folds.json")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_coco(tmp_path_factory.mktemp("toy") / "coco", n_train=20, n_val=10)


def test_a_trial_of_folds_judges_every_picture_in_the_order_of_its_predictions(toy, tmp_path):
    ids = [i["id"] for i in json.loads((toy / "annotations" / "instances_train2017.json").read_text())["images"]]
    (tmp_path / "folds.json").write_text(json.dumps({i: n % 3 for n, i in enumerate(ids)}))
    names = dict(image_encoder="tiny", text_encoder="tiny", cache_dir=tmp_path / "tokens", progress=False)
    trial = load_trial(toy, "train2017", None, tmp_path / "folds.json", **names)
    assert trial.sizes == dict(train=20, test=20, classes=24)
    judged = np.concatenate([s.test.image_id for s in trial.splits])
    assert np.array_equal(judged, trial.judged.image_id) and sorted(judged) == sorted(ids)
    assert np.array_equal(np.array(trial.dataset.image_ids)[trial.order], judged)
    assert np.array_equal(trial.dataset.labels.numpy()[trial.order], trial.judged.labels)
    one = load_trial(toy, "train2017", "val2017", None, **names)
    assert one.sizes == dict(train=20, test=10, classes=24) and len(one.splits) == 1


def test_training_an_arm_leaves_the_global_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    train_arm("concat", make_tokens(16), settings_of("concat")[0], epochs=1)
    assert torch.equal(torch.rand(4), expected)
