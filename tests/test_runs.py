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
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in (Path(out) / "metrics.jsonl").read_text().splitlines()]


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
    from mmfuse import runs
    here(tmp_path / "whole", arm=arm, save_seconds=0.0)
    real, calls, chance = runs.save_tensors, [0], random.Random(1)
    def dying(*args, **kwargs):
        calls[0] -= 1
        if calls[0] < 0:
            raise Killed
        real(*args, **kwargs)
    monkeypatch.setattr(runs, "save_tensors", dying)
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
    assert [line["train_loss"] for line in done.history] == history


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


def test_a_full_disk_keeps_the_old_checkpoint(server, tmp_path):
    stopped = start(server, tmp_path, save_seconds=0.0, limit=3000)
    stopped.join()
    assert stopped.exitcode == 2
    assert not list(tmp_path.rglob("*.part"))
    from mmfuse import runs
    path = tmp_path / "x.safetensors"
    runs.save_tensors(path, {"a": torch.zeros(4)})
    child = server.Process(target=write_too_much, args=(path,))
    child.start()
    child.join()
    assert child.exitcode == 2
    assert runs.load_tensors(path)[0]["a"].shape == (4,)


def write_too_much(path):
    from mmfuse import runs
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    try:
        runs.save_tensors(path, {"a": torch.zeros(4000)})
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
    assert all(x.isfinite().all() for k, x in state.items() if k.startswith("head."))


def test_ctrl_c_saves(server, tmp_path):
    process = start(server, tmp_path / "a", epochs=10000)
    while not (tmp_path / "a" / "metrics.jsonl").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 130
    from mmfuse.runs import load_tensors
    assert load_tensors(tmp_path / "a" / "last" / "checkpoint.safetensors")[1]["progress"]["step"] > 0


def test_one_process_at_a_time(tmp_path):
    from mmfuse.runs import Folder
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
