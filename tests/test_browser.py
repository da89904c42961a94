"""The built site and JupyterLab in a real Chromium: no error, no other host, search, alt texts, small screens, contrast; a chapter that is worked through.

Needs Chromium ($CHROMIUM, chromium, google-chrome) and, for the site, `make docs` before; without, the skip says so.
"""

import functools
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "_docs"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
CHAPTERS = sorted(p.stem.split("_", 1)[1] for p in (ROOT / "nbs").glob("[0-9][0-9]*_*.ipynb"))
TERMS = {"data": "crowd", "preprocessing": "WordPiece", "image_encoder": "BatchNorm", "text_encoder": "UNK", "attention": "softmax", "pooled_fusion": "FiLM",
         "token_fusion": "bottleneck", "losses": "focal", "alignment": "InfoNCE", "metrics": "bootstrap", "training": "schedule", "longer": "clipping", "balance": "OGM-GE", "coco": "ledger",
         "is_it_fusion": "EMAP", "your_own": "from_pretrained"}


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need two packages: pip install playwright axe-playwright-python")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not path:
        pytest.skip("the browser tests need Chromium: apt-get install chromium, or set CHROMIUM")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def site():
    "The address of the built site."
    if not (DOCS / "index.html").is_file():
        pytest.skip("the site is not built: make docs")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(DOCS)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def pages(): return sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.html")) if DOCS.is_dir() else []


@pytest.fixture(scope="module")
def tab(chromium):
    "A tab that keeps what went wrong in `faults`."
    page = chromium.new_page(viewport=dict(width=1280, height=900))
    page.faults = []
    page.on("console", lambda m: page.faults.append(f"console: {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda e: page.faults.append(f"error: {e}"))
    page.on("request", lambda r: page.faults.append(f"another host: {r.url}") if not re.match(r"http://127\.0\.0\.1:|data:|blob:", r.url) else None)
    page.on("response", lambda r: page.faults.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    yield page
    page.close()


@pytest.mark.parametrize("name", pages())
def test_a_page_opens_without_a_fault(site, tab, name):
    tab.faults.clear()
    tab.set_viewport_size(dict(width=1280, height=900))
    tab.goto(f"{site}/{name}", wait_until="load")
    pictures = tab.evaluate("[...document.images].map(i => [i.getAttribute('src').slice(0, 60), i.alt, i.complete && i.naturalWidth])")
    assert not [p for p in pictures if not p[1].strip() or not p[2]], "a picture without alt text, or that does not load"
    assert tab.title() and tab.locator("main h1").count() == 1
    tab.set_viewport_size(dict(width=390, height=844))
    wide = tab.evaluate("document.documentElement.scrollWidth")
    assert wide <= 391, f"at 390 px the page is {wide} px wide"
    assert not tab.faults


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_search_finds_a_term_of_each_chapter(site, tab, chapter):
    tab.set_viewport_size(dict(width=1280, height=900))
    tab.goto(f"{site}/index.html")
    box = tab.locator("input[type=search], .sidebar-search input").first
    box.fill(TERMS.get(chapter, chapter))
    tab.wait_for_function("name => [...document.querySelectorAll('a[href]')].some(a => a.href.includes(name) && a.closest('[class*=search]'))", arg=f"{chapter}.html", timeout=8000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index", *CHAPTERS])
def test_contrast_and_headings_pass_axe(site, chromium, name, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = chromium.new_page(color_scheme=scheme)
    page.goto(f"{site}/{name}.html")
    page.evaluate("s => { document.documentElement.classList.toggle('quarto-dark', s === 'dark') }", scheme)
    found = axe.run(page, options=dict(runOnly=dict(type="rule", values=["color-contrast", "heading-order", "image-alt", "page-has-heading-one", "link-name", "button-name", "html-has-lang", "duplicate-id"])))
    faults = [f"{v['id']}: {n['target']} {n['html'][:120]}" for v in found.response["violations"] for n in v["nodes"]]
    page.close()
    assert not faults, "\n".join(faults[:10])


# ---------------------------------------------------------------- JupyterLab

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on a copy of the course: its address and the copy."
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs", home / "nbs", symlinks=True, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "_quarto.yml"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | dict(JUPYTER_CONFIG_DIR=str(home / "c"), JUPYTER_DATA_DIR=str(home / "d"), JUPYTER_RUNTIME_DIR=str(home / "r"), MMFUSE_HOME=str(home / "mmfuse"),
                            PYTHONPATH=f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    env.pop("IN_TEST", None)
    server = subprocess.Popen([sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=", "--ServerApp.password=",
                               "--ServerApp.disable_check_xsrf=True", "--LabApp.news_url=None", f"--ServerApp.root_dir={home}"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{url}/api", timeout=2)
            break
        except OSError:
            time.sleep(.5)
    yield url, home
    server.terminate()
    server.wait(20)


def test_a_chapter_is_run_and_an_exercise_solved_in_jupyterlab(lab, chromium):
    url, home = lab
    page = chromium.new_page(viewport=dict(width=1400, height=1000))
    page.goto(f"{url}/lab/tree/nbs/04_attention.ipynb?reset")
    page.wait_for_selector(".jp-Notebook", timeout=90_000)
    page.wait_for_selector(".jp-NotebookPanel-toolbar", timeout=30_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    status = "[data-status='idle'], .jp-Notebook-ExecutionIndicator[data-status='idle']"
    page.wait_for_timeout(3000)
    page.wait_for_selector(f".jp-Notebook-ExecutionIndicator[data-status='idle'], {status}", timeout=180_000, state="attached")
    page.get_by_role("menuitem", name="File", exact=True).click()
    page.get_by_text("Save Notebook", exact=True).click()
    page.wait_for_timeout(2000)
    path = home / "nbs" / "04_attention.ipynb"
    deadline = time.time() + 60
    while time.time() < deadline and not ran(path):
        page.wait_for_timeout(1000)
    errors = [o for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert ran(path) and not errors, errors[:1]

    cell = page.locator(".jp-CodeCell", has_text="check_whose_neighbours(fuse)").first
    cell.scroll_into_view_if_needed()
    assert "not yet" in cell.locator(".jp-OutputArea").inner_text()
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text("def fuse(mha, img, txt):\n    out, _ = mha(img[:, None], txt[:, None], txt[:, None])\n    return out[:, 0]\n\ncheck_whose_neighbours(fuse)")
    page.keyboard.press("Control+Enter")
    page.wait_for_function("""() => [...document.querySelectorAll('.jp-CodeCell')].some(c => c.innerText.includes('check_whose_neighbours(fuse)') && /· right/.test(c.innerText))""", timeout=60_000)
    assert "right since" in json.loads((home / "mmfuse" / "exercises.json").read_text())["04.1"]
    page.close()


def ran(path):
    "Whether the last code cell of a saved notebook was executed."
    code = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    return bool(code[-1].get("execution_count"))
