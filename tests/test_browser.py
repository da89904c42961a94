"""The built site and JupyterLab in a real Chromium: no error, no other host, search, alt texts, small screens, accessibility; a chapter worked through.

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
CHAPTERS = [p.stem.split("_", 1)[1] for p in sorted((ROOT / "nbs").glob("[0-9][0-9]*_*.ipynb"))]
TERMS = {"data": "crowd", "preprocessing": "WordPiece", "image_encoder": "BatchNorm", "text_encoder": "UNK", "attention": "softmax", "pooled_fusion": "ModDrop",
         "multiplicative_fusion": "FiLM", "token_fusion": "bottleneck", "losses": "focal", "alignment": "InfoNCE", "metrics": "bootstrap", "training": "schedule", "longer": "clipping", "balance": "OGM-GE", "arms": "hold-out",
         "coco": "ledger", "is_it_fusion": "EMAP", "your_own": "from_pretrained"}
# What decides a colour is the chain of classes: of equal pieces of code and of formulas, one of each chain is enough for the contrast.
# axe does not count a formula as the text of a header.
ONE_OF_EACH = """() => {
    const seen = new Set();
    for (const e of document.querySelectorAll('pre span, main math')) {
        let chain = '';
        for (let up = e; up && up.tagName !== 'MAIN'; up = up.parentElement) chain += `${up.tagName}.${up.className} `;
        if (!seen.has(chain) && !e.closest('th')) seen.add(chain);
        else e.replaceWith(...(e.tagName === 'SPAN' ? e.childNodes : [e.getAttribute('alttext')]));
    }
    document.querySelectorAll('pre').forEach(p => p.normalize());
}"""
AXE = """async rules => (await axe.run(document, { resultTypes: ['violations'], preload: false, iframes: false, ...(rules.length ? { runOnly: rules } : {}) }))
    .violations.flatMap(v => v.nodes.map(n => `${v.id}: ${n.html.slice(0, 120)} ${n.any.concat(n.all).map(c => c.message).join('; ')}`))"""
PICTURES = "[...document.images].map(i => [i.getAttribute('src').slice(0, 60), i.alt, i.complete && i.naturalWidth])"


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


def watched(browser):
    "A tab that keeps what goes wrong in `faults`."
    tab = browser.new_page(viewport=dict(width=1280, height=900), color_scheme="light")
    tab.set_default_timeout(120_000)
    tab.faults = []
    tab.on("console", lambda m: tab.faults.append(f"console: {m.text}") if m.type == "error" else None)
    tab.on("pageerror", lambda e: tab.faults.append(f"error: {e}"))
    tab.on("request", lambda r: tab.faults.append(f"another host: {r.url}") if not re.match(r"(http|ws)://127\.0\.0\.1:|data:|blob:", r.url) else None)
    tab.on("response", lambda r: tab.faults.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    return tab


@pytest.fixture(scope="module")
def tab(chromium):
    "One tab for the whole site."
    tab = watched(chromium)
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def axe():
    "axe-core, as JavaScript."
    package = pytest.importorskip("axe_playwright_python", reason="the browser tests need two packages: pip install playwright axe-playwright-python")
    return (Path(package.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", pages())
def test_a_page(site, tab, axe, name):
    "It opens without a fault, its pictures load and are described, it fits a phone, and axe finds nothing, in the light and in the dark."
    tab.faults.clear()
    tab.set_viewport_size(dict(width=1280, height=900))
    tab.goto(f"{site}/{name}", wait_until="load")
    assert not [p for p in tab.evaluate(PICTURES) if not p[1].strip() or not p[2]], "a picture without alt text, or that does not load"
    assert tab.title() and tab.locator("main h1").count() == 1
    tab.set_viewport_size(dict(width=390, height=844))
    wide = tab.evaluate("document.documentElement.scrollWidth")
    assert wide <= 391, f"at 390 px the page is {wide} px wide"
    tab.set_viewport_size(dict(width=1280, height=900))
    tab.evaluate(ONE_OF_EACH)
    tab.evaluate(axe)
    faults = tab.evaluate(AXE, [])
    to_scheme(tab, "dark")
    faults += [f"dark: {fault}" for fault in tab.evaluate(AXE, ["color-contrast"])]
    tab.evaluate("localStorage.clear()")  # the next page opens in the light again
    assert not faults, "\n".join(faults[:10])
    assert not tab.faults


def to_scheme(tab, scheme):
    "Turn the page light or dark by its own switch."
    tab.evaluate("window.smalldocsToggleScheme()")
    tab.wait_for_function("dark => document.documentElement.classList.contains('quarto-dark') === dark", arg=scheme == "dark")
    tab.evaluate("document.getAnimations().forEach(a => a.finish())")  # colours that fade


def test_the_reader_s_own_scheme_is_the_first(site, chromium):
    "A page opens dark where the system is dark, before anything is clicked."
    dark = chromium.new_page(color_scheme="dark")
    dark.goto(f"{site}/index.html")
    assert dark.evaluate("document.documentElement.classList.contains('quarto-dark') && getComputedStyle(document.body).backgroundColor") == "rgb(34, 34, 34)"
    dark.close()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_search_finds_a_term_of_each_chapter(site, tab, chapter):
    if not tab.url.endswith("/index.html"):
        tab.goto(f"{site}/index.html")
    tab.locator("input[type=search]").first.fill(TERMS[chapter])
    tab.wait_for_function("page => [...document.querySelectorAll('[class*=search] a[href]')].some(a => a.pathname === page)", arg=f"/{chapter}.html", timeout=60_000)


def test_next_leads_through_the_course(site, tab):
    "From the first page by `next` alone: the chapters in their order, and no solution among them."
    tab.goto(f"{site}/index.html")
    seen = []
    while CHAPTERS[-1] not in seen:
        tab.click(".nav-page-next a")
        seen.append(tab.url.rsplit("/", 1)[-1].removesuffix(".html"))
        assert "/solutions/" not in tab.url
    assert [name for name in seen if name in CHAPTERS] == CHAPTERS
    tab.click(".nav-page-previous a")
    assert tab.url.endswith(f"/{CHAPTERS[-2]}.html")


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
    server = subprocess.Popen([sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=",
                               "--LabApp.news_url=None", f"--ServerApp.root_dir={home}"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/api", timeout=2)
                break
            except OSError:
                time.sleep(.25)
        else:
            pytest.fail("JupyterLab did not start within a minute")
        yield url, home
    finally:
        server.terminate()
        server.wait(30)


ANSWER = """def fuse(mha, img, txt):
    out, _ = mha(img[:, None], txt[:, None], txt[:, None])
    return out[:, 0]

check_whose_neighbours(fuse)"""
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.textContent.trim()).filter(t => t)"


def test_a_chapter_is_run_and_an_exercise_solved_in_jupyterlab(lab, chromium):
    url, home = lab
    tab = watched(chromium)
    tab.set_default_timeout(300_000)  # a busy machine may take minutes; nothing waits longer than it must
    tab.goto(f"{url}/lab/tree/nbs/04_attention.ipynb?reset")
    tab.get_by_text(re.compile(r"Python 3 .*\| Idle")).wait_for()  # in the status bar: the kernel is there
    tab.get_by_role("menuitem", name="Run", exact=True).click()
    tab.get_by_text("Run All Cells", exact=True).click()
    tab.wait_for_function(f"(p => p.length > 30 && p.every(t => /^\\[\\d+\\]:$/.test(t)))({PROMPTS})")
    cell = tab.locator(".jp-CodeCell", has_text="check_whose_neighbours(fuse)").first
    cell.scroll_into_view_if_needed()
    cell.locator(".jp-OutputArea-output", has_text="not yet").wait_for()  # outputs are drawn when they come into view

    cell.locator(".cm-content").click()
    tab.keyboard.press("Control+a")
    tab.keyboard.insert_text(ANSWER)
    tab.keyboard.press("Control+Enter")
    cell.locator(".jp-OutputArea-output", has_text="· right").wait_for()
    assert "right since" in json.loads((home / "mmfuse" / "exercises.json").read_text())["04.1"]

    tab.keyboard.press("Control+s")
    saved = read_when(home / "nbs" / "04_attention.ipynb", lambda cells: any(ANSWER == "".join(c["source"]) for c in cells))
    errors = [o for c in saved for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert not errors, errors[:1]
    assert not [fault for fault in tab.faults if "another host" in fault]
    assert ANSWER not in (ROOT / "nbs" / "04_attention.ipynb").read_text(encoding="utf-8")
    tab.close()


def read_when(path, ready, seconds=120):
    "The cells of a notebook, once they are as they shall be."
    for _ in range(seconds * 4):
        try:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        except json.JSONDecodeError:  # read while it is being written
            cells = []
        if ready(cells):
            return cells
        time.sleep(.25)
    pytest.fail(f"{path.name} was not saved")
