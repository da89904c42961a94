"""What the README and CONTRIBUTING tell a newcomer is true: code runs, targets, commands' options and linked files exist."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}


def blocks(text, language): return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def test_python_in_the_readme_runs():
    (code,) = blocks(TEXTS["README.md"], "python")
    names = {}
    exec(code, names)
    assert names["logits"].shape == names["without_caption"].shape == (2, 80)


def test_the_operator_of_contributing_keeps_the_contract():
    import torch

    import test_fusion as contract
    from mmfuse.fusion import HEADS
    (code,) = blocks(TEXTS["CONTRIBUTING.md"], "python")
    try:
        exec(code, {})
        def build(seed=0): return contract.make("product", seed)
        for clause in (contract.registers_and_trains_every_parameter, contract.answers_each_sample_alone, contract.ignores_padding,
                       contract.reads_what_it_claims_and_nothing_else, contract.welcomes_a_missing_modality, contract.has_the_right_gradients,
                       contract.travels_as_a_state_dict_and_repeats_itself, contract.can_be_exported):
            torch.manual_seed(0)
            clause(build)
    finally:
        HEADS.pop("product", None)


@pytest.mark.parametrize("name", TEXTS)
def test_make_targets_exist(name):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"\bmake (?:[A-Z]+=\S+ )?([a-z]+)\b", " ".join(re.findall(r"`[^`\n]+`", TEXTS[name]) + blocks(TEXTS[name], "sh"))))
    assert named and named <= targets, named - targets


@pytest.mark.parametrize("name", TEXTS)
def test_linked_and_named_files_exist(name):
    files = set(re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXTS[name])) | set(re.findall(r"\b(?:nbs|tools|tests)/[\w/]+\.\w+", TEXTS[name]))
    gone = [f for f in files if not (ROOT / f).exists()]
    assert files and not gone, gone


def test_options_of_the_ledger_exist():
    from typer.main import get_command

    from mmfuse.cli import app
    options = {o for p in get_command(app).commands["ledger"].params for o in p.opts}
    named = set(re.findall(r"(?<![\w-])--(?:data|train|test|folds|image|text|out|arms|seeds)[\w-]*", TEXTS["README.md"]))
    assert {"--data", "--folds", "--image-encoder"} <= named <= options, named - options


def test_workflows_run_what_the_readme_says():
    steps = {p.stem: [s.get("run") for s in next(iter(yaml.safe_load(p.read_text())["jobs"].values()))["steps"]]
             for p in (ROOT / ".github" / "workflows").glob("*.yml")}
    assert ".ci/run" in steps["test"] and "make docs" in steps["docs"] and ".ci/newest" in steps["newest"]
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    newest = (ROOT / ".ci" / "newest").read_text()
    assert newest.index("tools/newest.py settings.ini") < newest.index("make test") < newest.index("make check NB=all")
    assert all(os.access(ROOT / ".ci" / name, os.X_OK) for name in ("run", "newest"))


def test_the_newest_job_lifts_every_upper_bound(tmp_path):
    (tmp_path / "settings.ini").write_text("version = 0<1\nrequirements = a>=2,<3 b==1.0 c[x]~=2 d\n"
                                           "dev_requirements = nbdev>=2.4,<3 e!=1.5,>1,<=2\n")
    subprocess.run([sys.executable, ROOT / "tools" / "newest.py", tmp_path / "settings.ini"], check=True)
    assert (tmp_path / "settings.ini").read_text() == ("version = 0<1\nrequirements = a>=2 b c[x] d\n"
                                                       "dev_requirements = nbdev>=2.4,<3 e!=1.5,>1\n")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    subprocess.run([sys.executable, ROOT / "tools" / "newest.py", tmp_path / "settings.ini"], check=True)
    before, after = ([Requirement(r) for line in re.findall(r"^(?:\w+_)?requirements = (.*)$", (folder / "settings.ini").read_text(), re.M)
                      for r in line.split()] for folder in (ROOT, tmp_path))
    assert [r.name for r in before] == [r.name for r in after] and len(after) > 20
    assert {r.name for r in after if any(s.operator in ("<", "<=", "==", "~=") for s in r.specifier)} == {"nbdev", "execnb", "fastcore"}
    lower = [[{str(s) for s in r.specifier if s.operator in (">", ">=", "!=")} for r in rs] for rs in (before, after)]
    assert lower[0] == lower[1]
