"""Draw nbs/images/card.png, the picture that a link to the course shows: python tools/card.py, whenever the ledger was run anew.

It shows nbs/results/ledger_real.json, and carries the hash of what it shows: a test sees whether it is current.
"""

import hashlib
import io
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Circle, FancyBboxPatch
from PIL import Image, PngImagePlugin

from mmfuse import viz

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "nbs" / "results" / "ledger_real.json"
CARD = ROOT / "nbs" / "images" / "card.png"
QUESTION = "When does fusing a picture with its caption\nmake a classifier better, by how much,\nand how do you know?"


def shown() -> dict:
    "The bars, the best on top: the picture, the best single modality, and three ways to fuse them."
    ledger = json.loads(RESULTS.read_text(encoding="utf-8"))
    names = {"image", ledger["best_unimodal"], "late", "joint", ledger["recommended"]} & set(ledger["arms"])
    arms = sorted(names, key=lambda name: -ledger["arms"][name]["mAP"])
    return {"best": ledger["best_unimodal"], "bars": {a: [round(v, 3) for v in (ledger["arms"][a]["mAP"], *ledger["arms"][a]["ci95"])] for a in arms}}


def stamp() -> str:
    "The hash of what the card shows."
    return hashlib.sha256(json.dumps(shown()).encode()).hexdigest()


def logo(ax) -> None:
    "The course's sign: a picture (square) and a caption (circle) that overlap."
    square = FancyBboxPatch((3, 13), 16, 16, boxstyle="round,pad=2,rounding_size=4", fc=viz.IMAGE, lw=0)
    circle = ax.add_patch(Circle((20, 12), 11, fc=viz.TEXT, lw=0))
    ax.add_patch(square)
    circle.set_zorder(3)
    ax.add_patch(Circle((20, 12), 11, fc=viz.FUSED, lw=0, zorder=4)).set_clip_path(square)
    ax.set(xlim=(0, 32), ylim=(0, 32), aspect="equal")
    ax.set_axis_off()


def draw() -> plt.Figure:
    "The card: name, question, bars."
    viz.style()
    fig = plt.figure(figsize=(12, 6.3), layout="none")
    logo(fig.add_axes((.05, .67, .14, .25)))
    fig.text(.2, .8, "mmfuse", size=38, weight="bold", color=viz.INK, va="center")
    fig.text(.455, .8, QUESTION, size=19, color=viz.INK, va="center", linespacing=1.3)
    bars, best = shown()["bars"], shown()["best"]
    ax = fig.add_axes((.2, .13, .74, .47))
    viz.bars(ax, list(bars), *(list(column) for column in zip(*bars.values())))
    ax.axvline(bars[best][0], color=viz.INK, ls="--", lw=1.5)
    for text in [*ax.texts, *ax.get_yticklabels()]:
        text.set_fontsize(17)
    ax.tick_params(axis="x", labelsize=13)
    ax.set_xlabel("mAP on real COCO pictures, 95 % intervals; dashed: the best single modality", size=15)
    return fig


def main() -> None:
    "Write the card: 1200 x 630, a palette of 64 colours, no date in it."
    sheet = io.BytesIO()
    draw().savefig(sheet, dpi=100)
    note = PngImagePlugin.PngInfo()
    note.add_text("Source", stamp())
    Image.open(sheet).convert("RGB").quantize(64).save(CARD, pnginfo=note, optimize=True)
    print(f"{CARD.relative_to(ROOT)}: {CARD.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
