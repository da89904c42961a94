"""Execute notebooks in fresh kernels, save their outputs, and clean them: python tools/execute.py 05 [07 ...].

A chapter is named by its number or by any part of its file name; `all` means every notebook.
Running it twice gives the same bytes. A notebook that raises is left as it was, and the exit code is 1.
"""

import base64
import io
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import nbdev_clean
from PIL import Image, ImageChops, ImageStat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"


def find(key: str) -> list[Path]:
    "The notebooks that `key` names."
    every = [p for p in sorted(NBS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
    if key == "all":
        return every
    found = [p for p in every if p.stem == key or p.stem.startswith(f"{key}_")]
    found = [p for p in found if p.parent == NBS] or found or [p for p in every if key in str(p)]
    if not found:
        sys.exit(f"no notebook under nbs/ is named by '{key}'; try one of {[p.stem for p in every]}")
    return found


def lighter(png: str) -> str:
    "A figure (base64) with 256 colours where the eye cannot tell: a third of its size, and the same bytes each time."
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    few = image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    off = ImageStat.Stat(ImageChops.difference(image, few.convert("RGB")))
    out = io.BytesIO()
    (few if max(off.mean) < 1 else image).save(out, "PNG", optimize=True)
    small = base64.b64encode(out.getvalue()).decode()
    return small if len(small) < len(png) else png


def execute(path: Path) -> bool:
    "Run `path` from its own folder, save it with its outputs, clean it."
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
    client = NotebookClient(nb, timeout=1800, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(path.parent)}})
    try:
        client.execute()
    except CellExecutionError as error:
        print(f"{path.relative_to(ROOT)}: {error}", file=sys.stderr)
        return False
    for output in (o for cell in nb.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})):
        output.data["image/png"] = lighter(output.data["image/png"].strip())
    nb.metadata.pop("language_info", None)
    nbformat.write(nb, path)
    nbdev_clean(str(path), clear_all=False)
    return True


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    os.environ.setdefault("PYTHONHASHSEED", "0")
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # a bar without widgets is what we want
    os.chdir(ROOT)
    paths = [p for key in sys.argv[1:] for p in find(key)]
    failed = [p for p in paths if not (print(f"executing {p.relative_to(ROOT)}", flush=True) or execute(p))]
    sys.exit(1 if failed else 0)
