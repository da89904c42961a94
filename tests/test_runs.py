"""Training in a folder: killed anywhere, it goes on to the same weights; damage, a full disk and other settings are one line."""

import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmfuse.checkpoints import Folder, load_tensors
from mmfuse.files import MmfuseError
from mmfuse.settings import Settings, read_settings
from mmfuse.token_cache import Tokens

ROOT = Path(__file__).resolve().parent.parent
N, P, DI, K, T, DT, C = 60, 4, 6, 3, 5, 8, 4
SMALL = dict(arm="concat", width=16, epochs=4, batch_size=8, lr=3e-3, modality_dropout=0.3)


def make_tokens(seed=0, n=N):
    "Tokens in which both modalities say something about the labels."
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, C)) < 0.4).astype(np.float32)
    img, txt = rng.normal(size=(n, P, DI)), rng.normal(size=(n, K, T, DT))
    img[..., :C] += labels[:, None]
    txt[..., :C] += labels[:, None, None]
    mask = np.arange(T) < rng.integers(1, T + 1, (n, K))[..., None]
    return Tokens(img.astype(np.float16), txt.astype(np.float16), mask, labels, np.arange(100, 100 + n),
                  np.random.default_rng(9).normal(size=(C, DT)).astype(np.float32), [f"class {i}" for i in range(C)])


def go(out, resume=False, broken=None, limit=None, env=None, **settings):
    "Train in a process of its own; its exit code is the command's."
    os.environ.update(env or {})
    torch.set_num_threads(1)
    from mmfuse import runs
    train, val = make_tokens(), make_tokens(1, 24)
    if broken is not None:
        train.img[broken] = np.nan
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        runs.train_head(Settings(**SMALL | settings), train, val, out, resume=resume, progress=False)
    except MmfuseError as e:
        print(e, file=sys.stderr)
        os._exit(2)
    except KeyboardInterrupt:
        os._exit(130)


@pytest.fixture(scope="module")
def server():
    "Processes that begin with torch in memory, forked from one that has never run anything."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mmfuse.runs"])
    return context


def start(server, *args, **kwargs):
    process = server.Process(target=go, args=args, kwargs=kwargs)
    process.start()
    return process


def here(out, resume=False, tokens=None, **settings):
    from mmfuse.runs import train_head
    return train_head(Settings(**SMALL | settings), tokens or make_tokens(), make_tokens(1, 24), out, resume=resume, progress=False)


def weights(out, which="last"):
    return load_file(Path(out) / which / "model.safetensors")


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


def lines(out):
    return [{k: v for k, v in json.loads(x).items() if k not in ("seconds", "pictures_per_second")} for x in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("more", [dict(), dict(arm="cross_attention", ema=0.9, clip=0.5, accumulate=2)], ids=["plain", "all"])
def test_killed_at_random_moments_it_ends_in_the_same_weights(more, server, tmp_path):
    whole = start(server, tmp_path / "whole", save_seconds=0.0, **more)
    whole.join()
    assert whole.exitcode == 0
    chance, kills, code = random.Random(0), 0, None
    checkpoint = tmp_path / "killed" / "last" / "checkpoint.safetensors"
    while code != 0:
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = start(server, tmp_path / "killed", resume=True, save_seconds=0.0, **more)
        while kills < 8 and process.is_alive() and (checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0) == before:
            time.sleep(0.001)
        process.join(chance.uniform(0, 0.02) if kills < 8 else None)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        code = process.exitcode
        assert code in (0, -signal.SIGKILL)
    assert kills >= 2
    for which in ("last", "best"):
        assert same(weights(tmp_path / "whole", which), weights(tmp_path / "killed", which))
    assert lines(tmp_path / "whole") == lines(tmp_path / "killed")
    assert not list((tmp_path / "killed").rglob("*.part"))


class Killed(BaseException):
    "What stands for a kill where the place matters more than the signal."


@pytest.mark.parametrize("arm", ["joint", "concat", "late", "label_query"])
def test_killed_at_any_step_and_any_write(arm, tmp_path, monkeypatch):
    from mmfuse import checkpoints
    here(tmp_path / "whole", arm=arm, save_seconds=0.0)
    real, calls, chance = checkpoints.save_tensors, [0], random.Random(1)
    def dying(*args, **kwargs):
        calls[0] -= 1
        if calls[0] < 0:
            raise Killed
        real(*args, **kwargs)
    monkeypatch.setattr(checkpoints, "save_tensors", dying)
    for _ in range(100):
        calls[0] = chance.randrange(1, 12)
        try:
            here(tmp_path / "killed", resume=True, arm=arm, save_seconds=0.0)
        except Killed:
            continue
        break
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert same(weights(tmp_path / "whole", "best"), weights(tmp_path / "killed", "best"))
    assert lines(tmp_path / "whole") == lines(tmp_path / "killed")


@pytest.mark.parametrize("arm", ["joint", "concat", "late", "bottleneck"])
def test_in_one_go_it_is_fit(arm, tmp_path):
    from mmfuse.fusion import make_head
    from mmfuse.training import fit
    done = here(tmp_path, arm=arm)
    torch.manual_seed(0)
    head = make_head(arm, DI, DT, C, width=16, names=torch.tensor(make_tokens().names))
    history = fit(head, make_tokens(), epochs=4, batch_size=8, lr=3e-3, modality_dropout=0.3)
    assert same(weights(tmp_path), head.state_dict())
    assert [line["train_loss"] for line in done.history] == pytest.approx(history, rel=1e-12)  # one divides before it adds


def test_a_finished_run_is_left_alone(tmp_path):
    here(tmp_path)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*.*") if p.name != ".lock"}
    here(tmp_path, resume=True)
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*.*") if p.name != ".lock"}


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    here(tmp_path, epochs=1)
    with pytest.raises(MmfuseError, match="holds a run already"):
        here(tmp_path, epochs=1)


@pytest.mark.parametrize("name, value", [("lr", 0.1), ("epochs", 5), ("seed", 1), ("arm", "joint"), ("ema", 0.5), ("batch_size", 9)])
def test_another_setting_is_named(name, value, tmp_path):
    here(tmp_path, epochs=1)
    with pytest.raises(MmfuseError, match=f"was begun with {name} = "):
        here(tmp_path, resume=True, **{"epochs": 1, name: value})


def test_other_pictures_are_refused(tmp_path):
    here(tmp_path, epochs=1)
    with pytest.raises(MmfuseError, match="other pictures or encoders"):
        here(tmp_path, resume=True, epochs=1, tokens=make_tokens(5))


@pytest.mark.parametrize("how", ["short", "empty", "flipped", "foreign"])
def test_a_damaged_checkpoint_is_one_line_and_stays(how, tmp_path):
    here(tmp_path, epochs=1)
    path = tmp_path / "last" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes())  # a file of its own, not the one that is kept beside it
    data = bytearray(path.read_bytes())
    if how == "foreign":
        save_file({"a": torch.zeros(3)}, path)
    else:
        data[-5] ^= 16
        path.write_bytes({"short": data[:-9], "empty": b"", "flipped": data}[how])
    left = path.read_bytes()
    with pytest.raises(MmfuseError, match="is damaged|no checkpoint of mmfuse") as e:
        here(tmp_path, resume=True, epochs=1)
    assert "\n" not in str(e.value) and path.read_bytes() == left


def test_the_message_names_an_older_checkpoint_and_it_leads_to_the_same_end(tmp_path):
    here(tmp_path / "whole")
    class Dead(BaseException):
        pass
    from mmfuse import runs
    real = runs.step
    def dying(trainer):
        if trainer.progress.epoch == 3:
            raise Dead
        return real(trainer)
    runs.step = dying
    try:
        with pytest.raises(Dead):
            here(tmp_path / "a", resume=True)
    finally:
        runs.step = real
    path = tmp_path / "a" / "last" / "checkpoint.safetensors"
    path.unlink()
    path.write_bytes(b"broken")
    with pytest.raises(MmfuseError, match="epoch-000003.safetensors', copied over it") as e:
        here(tmp_path / "a", resume=True)
    kept = sorted((tmp_path / "a" / "checkpoints").iterdir())
    assert [p.name for p in kept] == ["epoch-000002.safetensors", "epoch-000003.safetensors"]
    path.write_bytes(kept[0].read_bytes())
    here(tmp_path / "a", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "a")) and lines(tmp_path / "whole") == lines(tmp_path / "a")
    assert same(weights(tmp_path / "whole", "best"), weights(tmp_path / "a", "best"))


@pytest.mark.parametrize("n", [0, 1, 3, 9])
def test_the_last_checkpoints_are_kept(n, tmp_path):
    here(tmp_path, keep=n)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").glob("*"))
    assert kept == [f"epoch-{e:06}.safetensors" for e in (1, 2, 3, 4)][4 - min(n, 4):]


def test_the_best_weights_are_those_of_the_best_epoch(tmp_path):
    from mmfuse.metrics import mean_average_precision
    from mmfuse.runs import load_head
    from mmfuse.training import predict
    done, val = here(tmp_path, lr=0.05, epochs=12), make_tokens(1, 24)
    scores = {w: mean_average_precision(predict(load_head(tmp_path, w), val), val.labels) for w in ("best", "last")}
    assert scores["best"] == pytest.approx(max(line["val_map"] for line in done.history), abs=1e-6)
    assert scores["last"] == pytest.approx(done.history[-1]["val_map"], abs=1e-6)
    assert not same(weights(tmp_path, "best"), weights(tmp_path, "last"))


def events(out):
    "What TensorBoard reads: a record is a length, its checksum, a message, its checksum."
    from tensorboardX.proto.event_pb2 import Event
    for path in sorted((out / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            n = int.from_bytes(data[:8], "little")
            yield Event.FromString(data[12:12 + n])
            data = data[16 + n:]


def test_tensorboard_says_what_the_lines_say_also_after_a_restart(tmp_path, monkeypatch):
    class Dead(BaseException):
        pass
    from mmfuse import runs
    real = runs.step
    def dying(trainer):
        if trainer.progress.step == 20:
            raise Dead
        return real(trainer)
    with monkeypatch.context() as m, pytest.raises(Dead):
        m.setattr(runs, "step", dying)
        here(tmp_path, save_seconds=0.0)
    done = here(tmp_path, save_seconds=0.0, resume=True)
    starts = [e.step for e in events(tmp_path) if e.HasField("session_log")]
    assert starts == [1, 21]
    logged = {e.step: v.simple_value for e in events(tmp_path) for v in e.summary.value if v.tag == "epoch/val_map"}
    assert logged == {line["step"]: pytest.approx(line["val_map"]) for line in done.history}
    tags = {v.tag for e in events(tmp_path) for v in e.summary.value}
    assert {"loss", "rate", "gradient_norm", "epoch/train_loss", "epoch/pictures_per_second"} <= tags


def test_a_figure_at_the_end(tmp_path):
    from PIL import Image
    here(tmp_path)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (600, 300) and len(picture.getcolors(10000)) > 5


def test_the_figure_leaves_pyplot_alone(tmp_path, monkeypatch):
    "Pyplot's first figure sets up a notebook's display; inside `rc_context` that was undone, and later figures were not shown."
    import matplotlib.pyplot as plt
    from mmfuse.checkpoints import draw_curves
    monkeypatch.setattr(plt, "figure", None)
    draw_curves([dict(epoch=1, train_loss=0.5, val_map=0.5)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_an_exploding_loss_stops_before_it_is_infinite(tmp_path):
    with pytest.raises(MmfuseError, match=r"the loss is [1-9]\d{3,}.* on the pictures \[1\d\d, ") as e:
        here(tmp_path, arm="cross_attention", lr=100.0, epochs=50, weight_decay=0.0, save_seconds=0.0)
    assert "\n" not in str(e.value)
    state = load_file(tmp_path / "last" / "checkpoint.safetensors")
    assert all(x.isfinite().all() for k, x in state.items() if k.startswith("model."))


def test_a_run_from_before_a_setting_existed_goes_on(tmp_path):
    here(tmp_path, epochs=1)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["head_epochs"], config["end_to_end"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    here(tmp_path, epochs=1, resume=True)
    with pytest.raises(MmfuseError, match="head_epochs = 1, not 3"):
        here(tmp_path, epochs=1, resume=True, head_epochs=3)


def test_half_precision_goes_on_with_its_scaler(tmp_path, monkeypatch):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from mmfuse import runs
    def on_a_cpu(precision):
        AcceleratorState._reset_state()
        accelerator = Accelerator(mixed_precision=precision)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return accelerator
    monkeypatch.setattr(runs, "make_accelerator", on_a_cpu)
    class Dead(BaseException):
        pass
    half = dict(precision="fp16", arm="joint", save_seconds=0.0)
    here(tmp_path / "whole", **half)
    real = runs.step
    def dying(trainer):
        if trainer.progress.step == 11:
            raise Dead
        if trainer.progress.step == 5:
            trainer.accelerator.scaler._scale.fill_(256.0)  # another scale than a new scaler's
        return real(trainer)
    with monkeypatch.context() as m, pytest.raises(Dead):
        m.setattr(runs, "step", dying)
        here(tmp_path / "killed", **half)
    _, numbers = load_tensors(tmp_path / "killed" / "last" / "checkpoint.safetensors")
    assert numbers["scaler"]["scale"] == 256.0
    seen = []
    monkeypatch.setattr(runs, "step", lambda trainer: (seen.append(trainer.accelerator.scaler.get_scale()), real(trainer))[1])
    here(tmp_path / "killed", resume=True, **half)
    assert seen[0] == 256.0
    a, b = (torch.cat([x.flatten().float() for x in weights(tmp_path / d).values()]) for d in ("whole", "killed"))
    torch.testing.assert_close(a, b, atol=2e-3, rtol=0)  # the scale is a power of two: only what under- or overflows differs


def test_bf16_stays_near_and_keeps_full_weights(tmp_path):
    for precision in ("fp32", "bf16"):
        done = here(tmp_path / precision, precision=precision, epochs=8)
        assert all(x.dtype == torch.float32 for x in weights(tmp_path / precision).values() if x.is_floating_point())
    a, b = ([line["train_loss"] for line in lines(tmp_path / p)] for p in ("fp32", "bf16"))
    assert a != b and a == pytest.approx(b, rel=0.02)
    assert done.finished


# End to end: the toy's pictures and tiny encoders, dropout off, since every process would draw masks of its own

END = dict(arm="joint", epochs=3, batch_size=5, lr=1e-3, end_to_end=True, head_epochs=1, workers=0, modality_dropout=0.3)


@pytest.fixture(scope="module")
def shards(coco, tmp_path_factory):
    from mmfuse.data import CocoPairs
    from mmfuse.shards import make_shards
    root = tmp_path_factory.mktemp("shards")
    for split in ("train2017", "val2017"):
        make_shards(CocoPairs(coco, split), root / split, per_shard=3, progress=False)
    return root


def tune(out, root, resume=False, env=None, **settings):
    os.environ.update(env or {})
    torch.set_num_threads(1)
    from mmfuse import runs
    from mmfuse.shards import open_pairs
    real = runs.make_text_encoder
    def without_dropout(*args, **kwargs):
        encoder = real(*args, **kwargs)
        for m in encoder.modules():
            if isinstance(m, torch.nn.Dropout):
                m.p = 0.0
        return encoder
    runs.make_text_encoder = without_dropout
    try:
        return runs.train_end_to_end(Settings(**END | settings), *(open_pairs(root, s) for s in ("train2017", "val2017")), out, resume=resume, progress=False)
    except KeyboardInterrupt:
        os._exit(130)
    finally:
        runs.make_text_encoder = real


def test_the_head_learns_alone_then_all_of_it(shards, tmp_path):
    from mmfuse.runs import load_head
    tune(tmp_path, shards, epochs=2, keep=2, ema=0.5)
    kept = [load_file(p) for p in sorted((tmp_path / "checkpoints").iterdir())]
    def moved(part):
        return sum(not torch.equal(kept[0][k], kept[1][k]) for k in kept[0] if k.startswith(f"model.{part}.") and kept[0][k].is_floating_point() and "running" not in k)
    assert moved("image") and moved("text") and moved("head")
    from mmfuse.image_encoder import make_image_encoder
    fresh = make_image_encoder("tiny").state_dict()
    assert all(torch.equal(kept[0][f"model.image.{k}"], x) for k, x in fresh.items())
    assert all(torch.equal(kept[1][f"model.image.{k}"], x) for k, x in fresh.items() if "running" in k)  # BatchNorm keeps its statistics
    model = load_head(tmp_path)
    assert type(model).__name__ == "EndToEnd" and same(model.state_dict(), weights(tmp_path, "best"))


@pytest.mark.parametrize("more", [dict(), dict(ema=0.9, clip=0.5, accumulate=2, workers=1)], ids=["plain", "all"])
def test_end_to_end_it_goes_on_to_the_same_bits(more, coco, tmp_path, monkeypatch):
    from mmfuse import runs
    class Dead(BaseException):
        pass
    tune(tmp_path / "whole", coco, **more)
    real, at = runs.step, [3, 7, 12]
    def dying(trainer):
        if at and trainer.progress.step == at[0]:
            at.pop(0)
            raise Dead
        return real(trainer)
    monkeypatch.setattr(runs, "step", dying)
    for _ in range(4):
        try:
            tune(tmp_path / "killed", coco, resume=True, save_seconds=0.0, **more)
        except Dead:
            continue
    assert at == []
    for which in ("last", "best"):
        assert same(weights(tmp_path / "whole", which), weights(tmp_path / "killed", which))
    assert lines(tmp_path / "whole") == lines(tmp_path / "killed")


def pair_of(server, target, *args, **kwargs):
    "Two processes that know of each other."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true", LOCAL_WORLD_SIZE="2")
    both = [server.Process(target=target, args=args, kwargs=kwargs | dict(env={**common, "RANK": str(r), "LOCAL_RANK": str(r)})) for r in (0, 1)]
    for p in both:
        p.start()
    for p in both:
        p.join(120)
    return [p.exitcode for p in both]


def test_end_to_end_two_processes_are_one(server, shards, tmp_path):
    tune(tmp_path / "one", shards, batch_size=23)  # 24 pictures: the last batch holds one, and one of the two has nothing
    assert pair_of(server, tune, tmp_path / "two", shards, batch_size=23) == [0, 0]
    for a, b in zip(weights(tmp_path / "one").values(), weights(tmp_path / "two").values()):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two")):
        assert a == pytest.approx(b, abs=1e-3)


@pytest.mark.parametrize("kind", ["coco", "shards"])
def test_in_the_middle_of_an_epoch_any_number_of_processes_goes_on(kind, request):
    "Three processes begin an epoch, two go on, one ends it: every picture once, in the batches of a run in one go."
    from types import SimpleNamespace
    from mmfuse.feeds import PictureFeed
    from mmfuse.image_encoder import make_image_encoder
    from mmfuse.shards import open_pairs
    from mmfuse.text_encoder import make_text_encoder
    data, pair, s = open_pairs(request.getfixturevalue(kind), "train2017"), (make_image_encoder("tiny"), make_text_encoder("tiny")), Settings(batch_size=5, workers=0)
    def feeds(n):
        return [PictureFeed(data, *pair, s, SimpleNamespace(num_processes=n, process_index=r, device="cpu")) for r in range(n)]
    whole, seen = list(feeds(1)[0].epoch(4)), []
    for n, start, stop in [(3, 0, 2), (2, 2, 3), (1, 3, 5)]:
        for works in list(zip(*(f.epoch(4, start) for f in feeds(n))))[:stop - start]:
            assert len({tuple(w.ids) for w in works}) == 1
            images = torch.cat([p.inputs[0] for w in works for p in w.pieces if p.share])
            assert torch.equal(images, whole[len(seen)].pieces[0].inputs[0]) and works[0].ids == whole[len(seen)].ids
            seen.append(works[0].ids)
    assert sorted(i for ids in seen for i in ids) == sorted(data.image_ids)


def test_a_single_process_goes_on_with_what_two_began(server, shards, tmp_path):
    tune(tmp_path / "one", shards)
    done = pair_of(server, tune_until, tmp_path / "two", shards, 8)
    assert done == [9, 9]
    tune(tmp_path / "two", shards, resume=True)
    for a, b in zip(weights(tmp_path / "one").values(), weights(tmp_path / "two").values()):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def tune_until(out, root, stop, env=None):
    from mmfuse import runs
    real = runs.step
    def dying(trainer):
        if trainer.progress.step == stop:
            os._exit(9)
        return real(trainer)
    runs.step = dying
    tune(out, root, env=env, save_seconds=0.0)


def test_a_full_disk_keeps_the_old_checkpoint(server, tmp_path):
    stopped = start(server, tmp_path, save_seconds=0.0, limit=3000)
    stopped.join()
    assert stopped.exitcode == 2
    assert not list(tmp_path.rglob("*.part"))
    from mmfuse import checkpoints
    path = tmp_path / "x.safetensors"
    checkpoints.save_tensors(path, {"a": torch.zeros(4)})
    child = server.Process(target=write_too_much, args=(path,))
    child.start()
    child.join()
    assert child.exitcode == 2
    assert checkpoints.load_tensors(path)[0]["a"].shape == (4,)


def write_too_much(path):
    from mmfuse import checkpoints
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    try:
        checkpoints.save_tensors(path, {"a": torch.zeros(4000)})
    except MmfuseError as e:
        os._exit(2 if "untouched" in str(e) and "\n" not in str(e) else 3)


def test_nan_names_the_pictures_and_keeps_the_last_good_checkpoint(tmp_path):
    broken = make_tokens()
    broken.img[7] = np.nan
    with pytest.raises(MmfuseError, match=r"on the pictures \[.*\]"):
        here(tmp_path / "image", tokens=broken, save_seconds=0.0, arm="image")
    with pytest.raises(MmfuseError, match="no numbers|on the pictures"):
        here(tmp_path / "exploding", lr=1e9, epochs=300, save_seconds=0.0, arm="cross_attention", weight_decay=1e9)
    state = load_file(tmp_path / "exploding" / "last" / "checkpoint.safetensors")
    assert all(x.isfinite().all() for k, x in state.items() if k.startswith("model."))


def test_ctrl_c_saves(server, tmp_path):
    process = start(server, tmp_path / "a", epochs=10000)
    while not (tmp_path / "a" / "metrics.jsonl").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 130
    assert load_tensors(tmp_path / "a" / "last" / "checkpoint.safetensors")[1]["progress"]["step"] > 0


def test_one_process_at_a_time(tmp_path):
    with Folder(tmp_path, "").alone(), pytest.raises(MmfuseError, match="another process"):
        here(tmp_path)


def test_patience_ends_it(tmp_path):
    done = here(tmp_path, lr=0.0, epochs=50, patience=2)
    assert done.finished and done.epoch == 3 and done.best["epoch"] == 1
    assert here(tmp_path, resume=True, lr=0.0, epochs=50, patience=2).epoch == 3


def test_accumulating_changes_nothing_but_rounding(tmp_path):
    for parts in (1, 3):
        here(tmp_path / str(parts), arm="joint", accumulate=parts, batch_size=7)
    for a, b in zip(weights(tmp_path / "1").values(), weights(tmp_path / "3").values()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_two_processes_are_one(server, tmp_path):
    here(tmp_path / "one", arm="joint", batch_size=59)  # the last batch holds one picture: one of the two has nothing
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true", LOCAL_WORLD_SIZE="2")
    pair = [start(server, tmp_path / "two", arm="joint", batch_size=59, env={**common, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in (0, 1)]
    for p in pair:
        p.join(60)
    assert [p.exitcode for p in pair] == [0, 0]
    for a, b in zip(weights(tmp_path / "one").values(), weights(tmp_path / "two").values()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two")):
        assert a == pytest.approx(b, abs=1e-4)


def test_a_file_of_settings_and_flags(tmp_path):
    (tmp_path / "x.toml").write_text("lr = 1\narm = 'text'\n")
    s = read_settings(tmp_path / "x.toml", arm="image", width=None)
    assert (s.lr, s.arm, s.width) == (1.0, "image", 256) and type(s.lr) is float
    for text, says in [("lr = 'x'", "'lr' must be float"), ("learning_rate = 1", "unknown setting"), ("lr = ", "not TOML"), ("lr = inf", "between")]:
        (tmp_path / "x.toml").write_text(text)
        with pytest.raises(MmfuseError, match=says):
            read_settings(tmp_path / "x.toml")


def test_the_commands_flags_are_the_settings():
    from mmfuse.cli import train
    assert set(signature(train).parameters) - {"out", "resume", "config", "cache_dir"} == {f.name for f in fields(Settings)}


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    from mmfuse.toy import toy_coco
    return toy_coco(tmp_path_factory.mktemp("toy") / "coco", n_train=24, n_val=12)


def command(*args):
    return subprocess.Popen([sys.executable, "-c", "from mmfuse.cli import main; main()", *map(str, args)], text=True, cwd="/",
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_accelerate_launches_the_command_end_to_end_on_shards(shards, tmp_path):
    "Killed with all its processes and gone on with; what it leaves is complete."
    args = ["train", "--data", shards, "--end-to-end", "--epochs", 2, "--batch-size", 7, "--out", tmp_path / "run", "--resume", "--save-seconds", 0, "--workers", 1]
    def launch():
        line = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no",
                "--main_process_port", 0, "-m", "mmfuse.cli", *args]
        return subprocess.Popen(list(map(str, line)), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, cwd=tmp_path,
                                env={**os.environ, "PYTHONPATH": str(ROOT)})
    killed = launch()
    while killed.poll() is None and not (tmp_path / "run" / "last" / "checkpoint.safetensors").exists():
        time.sleep(0.05)
    assert killed.poll() is None, killed.communicate()
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    again = launch()
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0 and out.count("2 epochs; best validation mAP") == 1, err
    assert [line["epoch"] for line in lines(tmp_path / "run")] == [1, 2] and (tmp_path / "run" / "curves.png").exists()


def test_the_command(coco, tmp_path):
    "Begun, killed, gone on with: the same weights as in one go; and what is refused."
    base = ["train", "--data", coco, "--train-split", "train2017", "--val-split", "val2017", "--arm", "joint", "--seed", 3,
            "--cache-dir", tmp_path / "tokens", "--batch-size", 4, "--save-seconds", 0, "--epochs", 60]
    whole = command(*base, "--out", tmp_path / "whole")
    out, err = whole.communicate()
    assert whole.returncode == 0 and "60 epochs" in out, err
    killed = command(*base, "--out", tmp_path / "killed", "--resume")
    while killed.poll() is None and not (tmp_path / "killed" / "metrics.jsonl").exists():
        time.sleep(0.005)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    again = command(*base, "--out", tmp_path / "killed", "--resume")
    again.communicate()
    assert again.returncode == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed")) and lines(tmp_path / "whole") == lines(tmp_path / "killed")
    for args, says in [((*base, "--out", tmp_path / "whole"), "--resume"), ((*base, "--lr", 1, "--out", tmp_path / "whole", "--resume"), "lr = 0.001, not 1.0"),
                       (("train", "--arm", "joynt", "--out", tmp_path / "x"), "joynt"), (("train", "--epochs", 0, "--out", tmp_path / "x"), "epochs")]:
        refused = command(*args)
        out, err = refused.communicate()
        assert refused.returncode == 2 and out == "" and err.count("\n") == 1 and says in err, err
    assert not (tmp_path / "x").exists()
