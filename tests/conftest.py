"""Shared by all tests: where real COCO pictures lie, when they are there; what was left out for want of a browser."""

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


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    "Say how many browser tests were left out, and why: a run without them looks as green as one with them."
    result = yield  # pytest's own summary comes first
    left_out = [r for r in terminalreporter.stats.get("skipped", []) if r.nodeid.startswith("tests/test_browser.py")]
    if left_out:
        reasons = sorted({str(r.longrepr[2]).removeprefix("Skipped: ") for r in left_out})
        terminalreporter.write_line(f"{len(left_out)} browser tests skipped: {'; '.join(reasons)}", yellow=True)
    return result
