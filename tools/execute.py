"""Execute notebooks in fresh kernels: save their outputs, or with --check compare them with the committed ones.

A chapter is named by its number or by any part of its file name; `all` means every notebook.
Running a page twice gives the same bytes; one that raises is left as it was. The exit code is 1 if one raises, or with --check if one differs.

What --check compares, cell by cell and in order:
  text     streams, results, tables, errors: equal but for white space and for decimal numbers, which may be off by
           0.01 + 2 % of what was committed; whole numbers are counts and shapes, and equal
  figures  that they are there, and their size in pixels to 2 %: another release of matplotlib, or of a font, moves
           every pixel, and the numbers that a figure shows are asserted or printed beside it
"""

import argparse
import base64
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import nbdev_clean
from PIL import Image, ImageChops, ImageStat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
ABSOLUTE, RELATIVE = 0.01, 0.02  # of a decimal number in a text
SIZE = 0.02  # of a figure's width and height
NUMBER = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")


def find(key: str) -> list[Path]:
    "The notebooks that `key` names."
    every = [p for p in sorted(NBS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
    if key == "all":
        return every
    found = [p for p in every if p.stem == key or p.stem.startswith(f"{key}_")]
    found = [p for p in found if p.parent == NBS] or found or [p for p in every if key in str(p.relative_to(NBS))]
    if not found:
        sys.exit(f"no notebook under nbs/ is named by '{key}'; try one of {[p.stem for p in every]}")
    return found


def lighter(png: str) -> str:
    "A figure (base64) with 256 colours where the eye cannot tell: a third of its size, and the same bytes each time."
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    few = image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    off = ImageStat.Stat(ImageChops.difference(image, few.convert("RGB")))
    out = io.BytesIO()
    (few if max(off.mean) < 2 else image).save(out, "PNG", optimize=True)
    small = base64.b64encode(out.getvalue()).decode()
    return small if len(small) < len(png) else png


def kernel_environment() -> dict[str, str]:
    "The same on every machine: no `IN_TEST`, under which pages are smaller; a bar without widgets is what we want."
    ours = {"PYTHONHASHSEED": "0", "PYTHONWARNINGS": "ignore:IProgress not found"}
    return ours | {k: v for k, v in os.environ.items() if k != "IN_TEST"}


def execute(path: Path, to: Path) -> CellExecutionError | None:
    "Run `path` from its own folder, save it with its outputs as `to`, clean it; what it raises, if it does."
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
    client = NotebookClient(nb, timeout=1800, kernel_name="python3", record_timing=False, coalesce_streams=True,
                            extra_arguments=["--log-level=40"], resources={"metadata": {"path": str(path.parent)}})
    try:
        client.execute(env=kernel_environment())
    except CellExecutionError as error:
        return error
    for output in (o for cell in nb.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})):
        output.data["image/png"] = lighter(output.data["image/png"].strip())
    nb.metadata.pop("language_info", None)
    nbformat.write(nb, to)
    nbdev_clean(str(to), clear_all=False)


def close(was: str, now: str) -> bool:
    "Whether two numbers, as they are written, are equal within the tolerance."
    if was == now:
        return True
    if was.lstrip("+-").isdigit() and now.lstrip("+-").isdigit():
        return int(was) == int(now)
    return abs(float(was) - float(now)) <= ABSOLUTE + RELATIVE * abs(float(was))


def same_line(was: str, now: str) -> bool:
    "Whether two lines have the same words, and numbers that are close."
    a, b = (NUMBER.split(" ".join(line.split())) for line in (was, now))
    words = [[w.strip(" ") for w in line[::2]] for line in (a, b)]  # columns move when a number grows a digit
    return words[0] == words[1] and all(map(close, a[1::2], b[1::2]))


def excerpt(was: str, now: str, before: int = 20, after: int = 60) -> str:
    "Where two lines part, with a little on either side."
    start = max(0, len(os.path.commonprefix([was, now])) - before)
    a, b = (("..." if start else "") + line[start : start + before + after] for line in (was, now))
    return f"was '{a}', is '{b}'"


def text_difference(was: str, now: str) -> str | None:
    "The first line that differs, and how many more do."
    pairs = list(zip_longest(was.strip().splitlines(), now.strip().splitlines(), fillvalue="(no line)"))
    wrong = [(a.strip(), b.strip()) for a, b in pairs if not same_line(a, b)]
    more = f" (and {len(wrong) - 1} more lines)" if len(wrong) > 1 else ""
    return excerpt(*wrong[0]) + more if wrong else None


def figure_difference(was: str, now: str) -> str | None:
    "What is wrong with the size of a picture, both in base64."
    a, b = (Image.open(io.BytesIO(base64.b64decode(data))).size for data in (was, now))
    if any(abs(x - y) > SIZE * x for x, y in zip(a, b)):
        return f"the figure was {a[0]} x {a[1]} pixels, is {b[0]} x {b[1]}"


def parts(output: dict) -> dict[str, str]:
    "What an output shows, by kind: a stream's name, 'error', or MIME types."
    if output.output_type == "stream":
        return {output.name: output.text}
    if output.output_type == "error":
        return {"error": f"{output.ename}: {output.evalue}"}
    return dict(output.data)


def output_differences(was: dict | None, now: dict | None) -> Iterator[str]:
    "One line for each kind in which two outputs differ; None is an output that is not there."
    a, b = ({} if o is None else parts(o) for o in (was, now))
    for kind in [*a, *(k for k in b if k not in a)]:
        if kind not in b or kind not in a:
            yield f"{kind}: {'is gone' if kind in a else 'is new'}: '{' '.join((a | b)[kind].split())[:80]}'"
            continue
        raster = kind.startswith("image/") and kind != "image/svg+xml"
        if fault := (figure_difference if raster else text_difference)(a[kind], b[kind]):
            yield f"{kind}: {fault}"


def differences(was, now) -> Iterator[str]:
    "One line for each difference between the outputs of two runs of one notebook."
    for i, (a, b) in enumerate(zip(was.cells, now.cells, strict=True)):
        for x, y in zip_longest(a.get("outputs", []), b.get("outputs", [])):
            yield from (f"cell {i} ({a.id}): {fault}" for fault in output_differences(x, y))


def check(path: Path) -> list[str]:
    "What a fresh run of a page shows otherwise than its committed outputs do."
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / path.name
        if error := execute(path, fresh):
            return [f"raises {error.ename}: {error.evalue}"]
        return list(differences(nbformat.read(path, as_version=4), nbformat.read(fresh, as_version=4)))


def work(path: Path, checking: bool) -> bool:
    "Check or execute one page, and say so; whether all is well."
    name = path.relative_to(ROOT)
    print(f"{'checking' if checking else 'executing'} {name}", flush=True)
    faults = check(path) if checking else [error] if (error := execute(path, path)) else []
    for fault in faults:
        print(f"{name} {fault}", file=sys.stdout if checking else sys.stderr, flush=True)
    return not faults


def main(argv: list[str] | None = None):
    "The command: exits with 0 if all is well."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="+", metavar="KEY", help="05, attention, appendix, all, ...")
    parser.add_argument("--check", action="store_true", help="compare with the committed outputs, write nothing")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    well = [work(path, args.check) for path in dict.fromkeys(p for key in args.keys for p in find(key))]
    if args.check:
        print(f"{sum(well)} of {len(well)} notebooks show what is committed")
    sys.exit(not all(well))


if __name__ == "__main__":
    main()
