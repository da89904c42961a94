"""The command: one line and exit code 2 for what a user can put right, before any work starts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmfuse.cli import ARMS, STANDARD, app

COMMAND = [sys.executable, "-c", "from mmfuse.cli import main; main()"]


def mmfuse(*args, cwd=None, **env):
    "Exit code, stdout, stderr."
    done = subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, cwd=cwd,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent), **env})
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def coco(tmp_path):
    "A folder that looks like COCO's, with JSON that is not."
    root = tmp_path / "coco"
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    for kind in ("instances", "captions"):
        (root / "annotations" / f"{kind}_val2017.json").write_text('{"images": []}')
    return root


def test_arms_are_the_heads():
    from mmfuse.fusion import HEADS
    from mmfuse.ledger import STANDARD as STANDARD_OF_THE_LEDGER
    assert ARMS == tuple(HEADS) and STANDARD == STANDARD_OF_THE_LEDGER


def test_helps_tell_the_defaults_that_hold():
    from typer.main import get_command

    from mmfuse.settings import Settings
    commands = get_command(app).commands
    arms = next(p for p in commands["ledger"].params if p.name == "arms")
    assert arms.default is None and arms.help.endswith(", ".join(STANDARD))
    told = {p.name: m[1] for p in commands["train"].params if (m := re.search(r" \(([\w.]+)\)$", p.help or ""))}
    real = {name: getattr(Settings(), name) for name in told}
    assert len(told) > 15 and told == {name: f"{v:g}" if isinstance(v, float) else str(v) for name, v in real.items()}


def one_line(result, *words):
    code, out, err = result
    assert code == 2, err
    assert out == "" and err.count("\n") == 1 and err.startswith("mmfuse: "), err
    for word in words:
        assert word in err
    return True


@pytest.mark.parametrize("args, words", [
    (["ledger", "--arms", "text,txet"], ["txet", "label_query"]),
    (["ledger", "--arms", ","], ["--arms"]),
    (["ledger", "--data", "nowhere"], ["nowhere"]),
    (["ledger", "--seeds", "0"], ["--seeds"]),
    (["ledger", "--seeds", "three"], ["--seeds"]),
    (["ledger", "--no-such-option"], ["--no-such-option"]),
    (["ledgers"], ["ledgers"]),
    (["toy", "--n-train", "0"], ["--n-train"]),
    (["cache", "--data", "nowhere"], ["nowhere"]),
    (["diagnose", "--run", "."], ["no run in '.'", "mmfuse train"]),
])
def test_bad_input_is_one_line(args, words, tmp_path):
    assert one_line(mmfuse(*args, cwd=tmp_path), *words)
    assert not list(tmp_path.iterdir())


def test_where_to_judge_must_be_said_once(coco, tmp_path):
    base = ["ledger", "--data", coco, "--train-split", "val2017"]
    assert one_line(mmfuse(*base), "(--test-split) or folds (--folds)")
    (tmp_path / "f.json").write_text("{}")
    assert one_line(mmfuse(*base, "--test-split", "val2017", "--folds", tmp_path / "f.json"), "(--test-split) or folds (--folds)")
    assert one_line(mmfuse(*base, "--folds", tmp_path / "no.json"), "no file")
    assert one_line(mmfuse(*base, "--test-split", "test2017"), "'test2017' is missing")


def test_outputs_are_checked_before_any_work(coco, tmp_path):
    (tmp_path / "file").write_text("")
    base = ["ledger", "--data", coco, "--train-split", "val2017", "--test-split", "val2017"]
    assert one_line(mmfuse(*base, "--out", tmp_path / "file" / "x.json"), "cannot write")
    assert one_line(mmfuse(*base, "--out", tmp_path), "it is a folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["coco", "file"]


def test_a_cache_that_cannot_be_written_is_found_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    for command in (["cache"], ["ledger"], ["diagnose"], ["train", "--out", tmp_path / "run"]):
        assert one_line(mmfuse(*command, "--cache-dir", tmp_path / "file"), "cannot write in", "--cache-dir")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_alone_it_says_what_there_is():
    code, out, err = mmfuse()
    assert code == 0 and err == "" and all(f"\n  {c.callback.__name__} " in out for c in app.registered_commands)


def test_json_that_is_not_cocos_is_one_line(coco, tmp_path):
    out = tmp_path / "out" / "ledger.json"
    assert one_line(mmfuse("ledger", "--data", coco, "--train-split", "val2017", "--test-split", "val2017", "--out", out), "val2017")
    assert not out.parent.exists()


def test_an_unknown_encoder_is_one_line(coco, tmp_path):
    for flag in ("--image-encoder", "--text-encoder"):
        assert one_line(mmfuse("ledger", flag, "resnet5000", HF_HUB_OFFLINE="1", MMFUSE_HOME=str(tmp_path / "home")), "resnet5000")


def test_cheap_checks_do_not_wait_for_torch():
    "The command's module must not bring torch with it."
    code = "import sys, mmfuse.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_command_has_help():
    for command in app.registered_commands:
        code, out, err = mmfuse(command.callback.__name__, "--help")
        assert code == 0 and "Options:" in out and command.callback.__doc__.split(".")[0][:20] in out
