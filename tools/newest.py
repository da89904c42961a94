"""Lift the upper bounds of the requirements in settings.ini, for CI on the newest releases: python tools/newest.py FILE.

Lower bounds and exclusions stay. nbdev, execnb and fastcore stay as they are: nbdev 3 is another tool, with other commands
and no settings.ini, and no user of the package inherits it.
"""

import re
import sys
from pathlib import Path

KEPT = ("nbdev", "execnb", "fastcore")
LINE = re.compile(r"^((?:\w+_)?requirements *= *)(.*)$", re.M)


def lifted(requirement: str) -> str:
    "A requirement without what holds it back."
    name, bounds = re.fullmatch(r"([\w.-]+(?:\[[\w,]+\])?)(.*)", requirement).groups()
    if name in KEPT:
        return requirement
    return name + ",".join(b for b in bounds.split(",") if b.startswith((">", "!=")))


def lift(settings: str) -> str:
    "The text of a settings.ini with all of its requirements lifted."
    return LINE.sub(lambda m: m[1] + " ".join(map(lifted, m[2].split())), settings)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(lift(path.read_text(encoding="utf-8")), encoding="utf-8")
