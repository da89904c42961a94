"""Shared by all tests: where real COCO pictures lie, when they are there."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_coco() -> Path:
    "A folder with real COCO pictures in COCO's layout: $MMFUSE_COCO, else ../shared/coco."
    root = Path(os.environ.get("MMFUSE_COCO", ROOT.parent / "shared" / "coco"))
    if not (root / "annotations").is_dir():
        pytest.skip(f"no real COCO pictures at {root}: set MMFUSE_COCO")
    return root
