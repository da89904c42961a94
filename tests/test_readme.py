"""What the READMEs and CONTRIBUTING tell a newcomer is true, and the two READMEs say the same."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md", "CONTRIBUTING.md")}
READMES = ("README.md", "README.zh.md")


def blocks(text, language): return re.findall(rf"```{language}\n(.*?)```", text, re.S)


@pytest.mark.parametrize("name", READMES)
def test_python_in_the_readme_runs(name):
    from mmfuse.fusion import HEADS
    (code,) = blocks(TEXTS[name], "python")
    names = {}
    exec(code, names)
    assert names["logits"].shape == names["without_caption"].shape == (2, 80)
    assert set(re.findall(r"(\d+) (?:heads|种融合头|种之一)|one of (\d+):", TEXTS[name])) <= {(str(len(HEADS)), ""), ("", str(len(HEADS)))}


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


def commands(text):
    "Each `mmfuse` command of the text's code, in words."
    return [line.split() for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines() if line.startswith("mmfuse ")]


@pytest.mark.parametrize("name", READMES)
def test_commands_and_their_options_exist(name):
    from typer.main import get_command

    from mmfuse.cli import app
    known = {c: {o for p in command.params for o in p.opts} for c, command in get_command(app).commands.items()}
    found = commands(TEXTS[name])
    assert {words[1] for words in found} == {"ledger", "download"}
    for words in found:
        assert {w for w in words if w.startswith("--")} <= known[words[1]], words


def ledger_rows(ledger):
    "The table's rows, best first: every arm, with what it gains over the best single modality."
    for arm, r in sorted(ledger["arms"].items(), key=lambda item: -item[1]["mAP"]):
        gain = ledger["gains"].get(arm, {}).get("vs_best_unimodal")
        name = f"**{arm}**" if arm == ledger["recommended"] else arm
        over = f"{gain['absolute']:+.3f} [{gain['ci95'][0]:+.3f}, {gain['ci95'][1]:+.3f}]" if gain else ""
        yield f"| {name} | {r['mAP']:.3f} [{r['ci95'][0]:.3f}, {r['ci95'][1]:.3f}] | {over} |"


@pytest.mark.parametrize("name", READMES)
def test_the_ledger_is_the_one_that_was_run(name):
    ledger = json.loads((ROOT / "nbs" / "results" / "ledger_real.json").read_text())
    rows, text = list(ledger_rows(ledger)), TEXTS[name]
    start = re.search(r"^\| (?:arm|方案) \|.*\n\|---\|---\|---\|\n", text, re.M).end()
    assert text[start:].split("\n\n")[0].splitlines() == rows, "the table should be\n" + "\n".join(rows)
    assert len(re.findall(rf"\b{ledger['data']['test']}\b", text)) == 2
    told = next(words for words in commands(text) if "--image-encoder" in words)
    assert {kind: told[told.index(f"--{kind}-encoder") + 1] for kind in ("image", "text")} == ledger["encoders"]


def numbers(text): return sorted(re.findall(r"\d[\d.,]*\d|\d", text))
def links(text): return sorted(re.findall(r"\]\(([^)]+)\)", text))
def code(text): return [re.sub(r"[ \t]*#.*", "", b) for b in re.findall(r"```.*?```", text, re.S)]
def headings(text): return [len(h) for h in re.findall(r"^(#+) ", re.sub(r"```.*?```", "", text, flags=re.S), re.M)]
def tables(text): return [line.count("|") for line in text.splitlines() if line.startswith("|")]
def names(text): return sorted(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text))
def paragraphs(text): return [p[:1] if p.startswith(("#", "|", "-", "!", "```")) else "" for p in re.split(r"\n{2,}", text.strip())]


@pytest.mark.parametrize("part", [headings, code, numbers, links, tables, names, paragraphs], ids=lambda f: f.__name__)
def test_the_readmes_say_the_same(part):
    english, chinese = (TEXTS[name].replace("English | [中文](README.zh.md)", "").replace("[English](README.md) | 中文", "") for name in READMES)
    assert part(english) and part(english) == part(chinese)


def test_each_readme_leads_to_the_other():
    assert "[中文](README.zh.md)" in TEXTS["README.md"][:80] and "[English](README.md)" in TEXTS["README.zh.md"][:80]


@pytest.mark.parametrize("name", READMES)
def test_every_encoder_has_its_licence(name):
    from mmfuse.cli import EXTRA
    rows = {n: line for line in TEXTS[name].splitlines() if line.startswith("| `") for n in re.findall(r"`([^`]+)`", line.split("|")[1])}
    assert {"tiny", "resnet50", "timm:NAME", "hf:ID", *EXTRA} <= set(rows)
    packages = {n: re.search(r"PyPI[,,] ?`([^`]+)`", rows[n])[1] for n in EXTRA}
    for package in packages.values():
        about = distribution(package)
        texts = " ".join(f.locate().read_text(encoding="utf-8") for f in about.files if f.name.startswith("LICENSE"))
        texts += " ".join(f.locate().read_text(encoding="utf-8")[:200] for f in about.files if f.name == "README.md")
        assert re.search("apache", texts, re.I), package
    assert "MIT" in rows["minilm"]


def test_the_changelog_begins_with_this_version():
    version = re.search(r"^version = (.*)$", (ROOT / "settings.ini").read_text(), re.M)[1]
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (.*)$", text, re.M)[1].split(" - ")[0] in (version, "Unreleased")
    from mmfuse.cli import app
    assert all(f"`{c.callback.__name__}`" in text for c in app.registered_commands)


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
