"""The wheel and the sdist, built from a copy of the tree, hold what they should; installed beside nothing but what the package requires, they work."""

import ast
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_string
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LEFT = ignore_patterns(".*", "_docs", "_proc", "build", "dist", "*.egg-info", "__pycache__", "results", "shared")
NOTHING_OF = ("nbdev", "fastcore", "execnb", "IPython", "ipykernel", "jupyterlab", "jupyter_core", "nbformat", "pytest", "timm", "torchmetrics")


def build(kind, source, to):
    "The one file that `python -m build` makes of a tree."
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", to, source], capture_output=True, text=True, cwd=to.parent)
    assert done.returncode == 0, done.stderr
    (path,) = to.iterdir()
    return path


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "A copy of the checkout, with what a build must not take along."
    return copytree(ROOT, tmp_path_factory.mktemp("tree") / "mmfuse", ignore=LEFT, symlinks=True)


@pytest.fixture(scope="module")
def sdist(tree): return build("sdist", tree, tree.parent / "sdist")


@pytest.fixture(scope="module")
def wheel(tree, sdist): return build("wheel", tree, tree.parent / "wheel")


def contents(wheel):
    "Every file of a wheel with its bytes, without the list of their hashes."
    with zipfile.ZipFile(wheel) as z:
        return {n: z.read(n) for n in z.namelist() if not n.endswith("/RECORD")}


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(contents(wheel))
    info = "mmfuse-{}.dist-info".format(wheel.name.split("-")[1])
    ours = {str(p.relative_to(ROOT)) for p in (ROOT / "mmfuse").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {n for n in names if not n.startswith(info)} == ours
    assert {"mmfuse/py.typed", "mmfuse/weights/tiny_image.safetensors", "mmfuse/weights/tiny_text.safetensors", "mmfuse/weights/tiny_text_tokenizer.json"} <= ours
    assert {f"{info}/{n}" for n in ("METADATA", "WHEEL", "entry_points.txt", "licenses/LICENSE")} <= names
    assert wheel.stat().st_size < 8e6


def test_the_sdist_holds_no_notebook_and_no_test(sdist):
    with tarfile.open(sdist) as t:
        names = {n.partition("/")[2] for n in t.getnames()}
    assert {"setup.py", "settings.ini", "README.md", "CHANGELOG.md", "LICENSE", "mmfuse/py.typed", "mmfuse/weights/tiny_text_tokenizer.json"} <= names
    assert not [n for n in names if n.endswith((".ipynb", ".pyc")) or n.split("/")[0] in ("nbs", "tests", "tools")]


def test_the_sdists_wheel_is_the_trees(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as t:
        t.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # 3.11.4 and later know it
    again = build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "out")
    assert contents(again) == contents(wheel)


def requirements(text):
    "What METADATA asks for when no extra is named."
    found = [Requirement(r) for r in message_from_string(text).get_all("Requires-Dist")]
    return [r for r in found if not r.marker or r.marker.evaluate({"extra": ""})]


@pytest.fixture(scope="module")
def metadata(wheel): return next(data.decode() for name, data in contents(wheel).items() if name.endswith("METADATA"))


def test_the_readme_on_an_index_leads_to_the_project(metadata):
    text = message_from_string(metadata).get_payload()
    assert "](https://github.com/mmfuse/mmfuse/raw/main/nbs/images/ledger.svg)" in text and "](https://github.com/mmfuse/mmfuse/blob/main/CONTRIBUTING.md)" in text
    assert "](nbs/" not in text and "](LICENSE" not in text


def imports(path):
    "Modules of other distributions that a file imports, and whether it does so at once."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        yield from ((n.split(".")[0], node.col_offset == 0) for n in names)


def canonical(name): return name.lower().replace("_", "-")


def test_what_is_imported_is_required_and_the_other_way_round(metadata):
    extra = {canonical(Requirement(r).name) for r in message_from_string(metadata).get_all("Requires-Dist")}
    required, of = {canonical(r.name) for r in requirements(metadata)}, packages_distributions()
    assert not required & {canonical(n) for n in NOTHING_OF}
    at_once, later = set(), set()
    for path in (ROOT / "mmfuse").rglob("*.py"):
        for name, first in imports(path):
            if name not in sys.stdlib_module_names and name != "mmfuse":
                (at_once if first else later).update(map(canonical, of.get(name, [name])))
    assert at_once <= required, f"imported, not required: {at_once - required}"
    assert later <= extra, f"imported in a function, and in no extra: {later - extra}"
    assert required <= at_once | later, f"required, never imported: {required - at_once - later}"


def closure(wanted):
    "The distributions that requirements bring with them, at the versions that are installed here."
    found, queue = {}, [(r, "") for r in wanted]
    while queue:
        r, extra = queue.pop()
        if r.marker and not r.marker.evaluate({"extra": extra}):
            continue
        try:
            d = distribution(r.name)
        except PackageNotFoundError:
            pytest.fail(f"{r} is required and not installed")
        for e in ["", *r.extras]:
            if (key := (canonical(r.name), e)) not in found:
                found[key] = d
                queue += [(Requirement(x), e) for x in d.requires or []]
    return list({canonical(d.name): d for d in found.values()}.values())


@pytest.fixture(scope="module")
def clean(wheel, metadata, tmp_path_factory):
    "A virtual environment with the wheel and what it requires (as links to what is installed here), and nothing else: a function that runs a program of it."
    home = tmp_path_factory.mktemp("clean")
    venv.create(home / "venv", with_pip=False, symlinks=os.name != "nt")
    programs = home / "venv" / ("Scripts" if os.name == "nt" else "bin")
    site = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(home / "venv")}))
    for d in closure(requirements(metadata)):
        for top in {Path(f).parts[0] for f in d.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(d.locate_file(top)))
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "MMFUSE_COCO", "IN_TEST")} | {"MMFUSE_HOME": str(home / "kept"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "pip", "--python", programs / "python", "install", "--no-deps", "--no-index", "--quiet", wheel], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    (home / "elsewhere").mkdir()

    def run(program, *args):
        done = subprocess.run([programs / program, *map(str, args)], capture_output=True, text=True, cwd=home / "elsewhere", env=env, timeout=1800)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout
    return run


IMPORT_ALL = """
import importlib, pkgutil, sys
from importlib.util import find_spec
import mmfuse
assert "elsewhere" not in mmfuse.__file__ and "site-packages" in mmfuse.__file__, mmfuse.__file__
for module in pkgutil.walk_packages(mmfuse.__path__, "mmfuse."): print(importlib.import_module(module.name).__name__)
print("found:", [n for n in sys.argv[1:] if find_spec(n)])
"""
USE = """
from mmfuse.classifier import MultimodalClassifier
from mmfuse.data import CocoPairs
train = CocoPairs("toy", "train2017")
model = MultimodalClassifier(train.classes, arm="joint").fit(train, epochs=2, lr=1e-2)
sample = CocoPairs("toy", "val2017")[0]
model.save_pretrained("model")
print(*model.predict([sample.image], sample.captions[:1], top=1)[0])
"""


def test_every_module_is_imported_without_what_only_the_course_needs(clean):
    *modules, found = clean("python", "-c", IMPORT_ALL, *NOTHING_OF).splitlines()
    assert found == "found: []"
    files = {p.relative_to(ROOT).with_suffix("") for p in (ROOT / "mmfuse").rglob("*.py")}
    assert set(modules) == {".".join(f.parts).removesuffix(".__init__") for f in files} - {"mmfuse"}


def test_a_head_is_trained_asked_and_judged(clean):
    assert "ledger" in clean("mmfuse", "--help") and clean("mmfuse", "toy", "--root", "toy", "--n-train", 40, "--n-val", 24).strip() == "toy"
    name = clean("python", "-c", USE).strip()
    answers = clean("mmfuse", "predict", "model", "--caption", "a dog on a bench", "--top", 3).splitlines()
    assert name and len(answers) == 3 and all(0 <= float(a.split()[0]) <= 1 for a in answers)
    table = clean("mmfuse", "ledger", "--data", "toy", "--test-split", "val2017", "--arms", "text", "--seeds", 1, "--out", "ledger.json")
    assert "text" in table and "written: ledger.json" in table
