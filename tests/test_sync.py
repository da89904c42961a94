"""The notebooks are clean, and mmfuse/ is what they export."""

import ast
import filecmp
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = """files hub viz metrics losses annotations data toy download shards preprocessing towers image_encoder text_encoder token_cache attention
pooled_fusion multiplicative_fusion token_fusion named fusion alignment training balance settings feeds checkpoints trainer runs arms ledger diagnostics verdict own_data classifier exercises cli""".split()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the project in which the notebooks were cleaned and exported anew."
    copy = tmp_path_factory.mktemp("sync")
    for name in ("nbs", "mmfuse"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True,
                        ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "setup.py", "_quarto.yml"):
        shutil.copy(ROOT / name, copy / name)
    for module in (copy / "mmfuse").rglob("*.py"):
        if module.name != "__init__.py":
            module.unlink()
    for command in ("nbdev_clean", "nbdev_export"):
        done = subprocess.run([Path(sys.executable).parent / command], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return copy


def test_notebooks_are_clean(exported):
    changed = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "nbs").rglob("*.ipynb"))
               if ".ipynb_checkpoints" not in p.parts
               and p.read_bytes() != (exported / p.relative_to(ROOT)).read_bytes()]
    assert not changed, f"run `make export`: not clean: {changed}"


def test_package_is_what_the_notebooks_export(exported):
    ours, theirs = ({str(p.relative_to(root / "mmfuse")) for p in (root / "mmfuse").rglob("*.py")} for root in (ROOT, exported))
    assert ours == theirs, f"run `make export`: {sorted(ours ^ theirs)}"
    _, mismatch, errors = filecmp.cmpfiles(ROOT / "mmfuse", exported / "mmfuse", sorted(ours), shallow=False)
    assert not mismatch + errors, f"run `make export`: out of step: {mismatch + errors}"


PACKAGE = ROOT / "mmfuse"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if not p.name.startswith("_"))


def imports_of(path):
    "The modules of mmfuse that a module imports, inside functions too; a package counts as one."
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level and node.level < depth:
                continue  # a neighbour in the same package
            elif node.level and not node.module:
                yield from (a.name for a in node.names)
            elif node.level or (node.module or "").startswith("mmfuse."):
                yield (node.module or "").removeprefix("mmfuse.").split(".")[0]
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("mmfuse."))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: ".".join(p.relative_to(PACKAGE).with_suffix("").parts))
def test_imports_run_one_way(path):
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert name in ORDER, f"name '{name}' in ORDER, after everything it imports"
    wrong = [m for m in imports_of(path) if m in ORDER and ORDER.index(m) >= ORDER.index(name)]
    assert not wrong, f"{name} imports {wrong}, which come after it"


@pytest.mark.parametrize("script", sorted((ROOT / "tests" / "bench").glob("*.py")), ids=lambda p: p.stem)
def test_benchmarks_import_what_exists(script):
    imports = [n for n in ast.walk(ast.parse(script.read_text())) if isinstance(n, ast.ImportFrom) and n.module.startswith("mmfuse")]
    lost = [f"{n.module}.{a.name}" for n in imports for a in n.names if not hasattr(importlib.import_module(n.module), a.name)]
    assert not lost, f"{script.name} imports what is gone: {lost}"
