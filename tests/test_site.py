"""The site builder's parts on small pages: its link check finds each fault, formulas become MathML, pictures get alt text; the built site's cards and lists."""

import configparser
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import yaml
from bs4 import BeautifulSoup
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))  # at the end: tools/site.py is not Python's own `site`


def tool(name):
    "A module of tools/ under a name of its own."
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


site = tool("site")
check_site = site.check_site

INDEX = '<main><h2 id="top">Welcome</h2><a href="sub/page.html#part">on</a> <a href="https://example.org/x">out</a>%s</main>'
PAGE = '<head><link rel="stylesheet" href="../style.css"></head><main><h2 id="part">A part</h2><a href="../#top">back</a></main>'


def write(root, index="", page=PAGE, css="body { background: url(dot.svg); }"):
    "A site of two pages, a style sheet and a picture; `index` is added to the first page."
    (root / "sub").mkdir(exist_ok=True)
    (root / "index.html").write_text(INDEX % index)
    (root / "sub" / "page.html").write_text(page)
    (root / "style.css").write_text(css)
    (root / "dot.svg").write_text("<svg/>")
    return root


def faults(root): return check_site(root)[0]


def test_a_good_site_has_no_fault_and_is_counted(tmp_path):
    assert check_site(write(tmp_path)) == ([], 2, 4)


@pytest.mark.parametrize("html, fault", [
    ('<a href="gone.html">x</a>', "index.html: broken link: gone.html"),
    ('<a href="../outside.html">x</a>', "index.html: broken link: ../outside.html"),
    ('<img alt="x" src="gone.png">', "index.html: broken link: gone.png"),
    ('<img alt="x" src="dot.svg" srcset="dot.svg 1x, gone.png 2x">', "index.html: broken link: gone.png"),
    ('<a href="sub/">x</a>', "index.html: broken link: sub/"),
    ('<a href="sub/page.html#nowhere">x</a>', "index.html: broken fragment: sub/page.html#nowhere"),
    ('<a href="#nowhere">x</a>', "index.html: broken fragment: #nowhere"),
    ('<a href="/sub/page.html">x</a>', "index.html: /sub/page.html begins at the host's root: write it relative to the page"),
    ('<script src="https://cdn.example.org/x.js"></script>', "index.html: loads from another host: https://cdn.example.org/x.js"),
    ('<img alt="x" src="//example.org/x.png">', "index.html: loads from another host: //example.org/x.png"),
    ('<link rel="stylesheet" href="http://example.org/x.css">', "index.html: loads from another host: http://example.org/x.css"),
    ("<script type='module'>import m from 'https://example.org/m.mjs';</script>", "index.html: loads from another host: https://example.org/m.mjs"),
    ("<style>@import url(https://example.org/font.css);</style>", "index.html: loads from another host: https://example.org/font.css"),
    ("<p>::: {.callout-note}</p>", "index.html: raw markup on the page: '::: {.callout-note}'"),
    ("<p>$$ a = b $$</p>", "index.html: raw markup on the page: '$$ a = b $$'"),
    ('<pre class="cell-code"><code>import torch\n#| hide\n</code></pre>', "index.html: raw markup on the page: '#| hide'"),
])
def test_each_fault_is_one_line(tmp_path, html, fault):
    assert faults(write(tmp_path, html)) == [fault]


@pytest.mark.parametrize("html", [
    '<a href="#top">x</a>', '<a href="#">x</a>', '<a href="mailto:a@example.org">x</a>', '<img alt="x" src="data:image/png;base64,AA==">',
    '<a href="sub/page.html?x=1#part">x</a>', '<a name="here"></a><a href="#here">x</a>', "<pre><code>echo ::: '$$'</code></pre>",
    '<link rel="canonical" href="https://example.org/">',
])
def test_what_is_not_a_fault(tmp_path, html):
    assert faults(write(tmp_path, html)) == []


def test_an_orphan_is_found_even_if_orphans_link_to_each_other(tmp_path):
    write(tmp_path)
    (tmp_path / "one.html").write_text('<a href="two.html">two</a>')
    (tmp_path / "two.html").write_text('<a href="one.html">one</a> <a href="index.html">home</a>')
    assert faults(tmp_path) == ["one.html: orphan: no link leads to it", "two.html: orphan: no link leads to it"]


@pytest.mark.parametrize("css, fault", [
    ("@import url(https://example.org/font.css);", "style.css: loads from another host: https://example.org/font.css"),
    ("@import '//example.org/x.css';", "style.css: loads from another host: //example.org/x.css"),
    ("body { background: url('gone.svg'); }", "style.css: broken link: gone.svg"),
])
def test_style_sheets_are_checked(tmp_path, css, fault):
    assert faults(write(tmp_path, css=css)) == [fault]


def test_fonts_of_a_theme_are_left_out():
    css = "/*!*/@import url(https://fonts.example.org/css2?family=A:wght@300;400&display=swap);:root{--x:1}"
    assert site.FONT_IMPORT.sub("", css) == "/*!*/:root{--x:1}"


def test_formulas_become_mathml_and_katex_goes():
    page = ('<head><script src="https://cdn.jsdelivr.net/npm/katex/katex.min.js"></script></head>'
            r'<main><span class="math inline">\(x_i &lt; \frac12\)</span>'
            r'<span class="math display">\[\begin{aligned} a &amp;= b \\ c &amp;= d \end{aligned}\]</span></main>')
    soup, problems = site.finish(page)
    inline, display = soup.find_all("math")
    assert problems == [] and "katex" not in str(soup) and "aligned" not in display.get_text()
    assert inline["display"] == "inline" and inline["alttext"] == r"x_i < \frac12" and inline.find("mfrac")
    assert display["display"] == "block" and len(display.find_all("mtr")) == 2


def test_a_formula_that_cannot_be_read_is_a_fault():
    _, (problem,) = site.finish(r'<span class="math inline">\(\nosuchcommand x\)</span>')
    assert r"\nosuchcommand" in problem


def test_alt_text_is_its_own_or_the_caption_or_a_fault():
    page = ('<main><figure><img alt="mine" src="a"><figcaption>C</figcaption></figure>'
            '<figure><img src="b"><figcaption>The <b>caption</b>.</figcaption></figure>'
            '<div class="cell" id="cell-7"><img src="c"></div></main>')
    soup, (problem,) = site.finish(page)
    assert [i.get("alt") for i in soup.find_all("img")] == ["mine", "The caption.", None]
    assert "cell-7" in problem and "fig-alt" in problem


def test_a_definition_can_be_linked_to_where_it_is_exported():
    exported = "def attend(q):\n    return q"
    cell = '<div class="cell"><pre class="cell-code"><code>{}</code></pre></div>'
    soup, _ = site.finish("<main>" + cell.format("def attend(q): pass") + cell.format(exported) + "</main>", f"import torch\n\n{exported}\n")
    (anchor,) = soup.select("#attend")
    assert exported in anchor.parent.get_text()


def test_the_sidebar_names_every_notebook_once(tmp_path):
    (tmp_path / "appendix").mkdir()
    for name in ("index", "00_data", "appendix/viz"):
        (tmp_path / f"{name}.ipynb").touch()
    def check(*contents): return site.check_sidebar({"website": {"sidebar": {"contents": list(contents)}}}, tmp_path)
    course = {"section": "Course", "contents": [{"text": "00 Data", "href": "00_data.ipynb"}, "appendix/viz.ipynb"]}
    assert check("index.ipynb", course) == []
    assert check(course) == ["_quarto.yml: the sidebar lacks nbs/index.ipynb: add it"]
    assert check("index.ipynb", course, "01_x.ipynb") == ["_quarto.yml: the sidebar names 01_x.ipynb, and nbs/ has no such notebook"]
    assert check("index.ipynb", course, "index.ipynb") == ["_quarto.yml: the sidebar names index.ipynb twice"]


def test_this_project_s_sidebar_is_whole():
    assert site.check_sidebar(yaml.safe_load((ROOT / "_quarto.yml").read_text()), ROOT / "nbs") == []


def test_what_scrolls_can_be_reached_and_no_header_is_empty():
    page = ("<main><pre>short</pre><pre>" + "x" * 60 + "</pre><table><tr><th></th><th>a</th></tr></table></main>"
            '<nav id="quarto-sidebar"><a data-bs-toggle="collapse" role="navigation">Data</a></nav><div class="toc-actions"></div>')
    soup, _ = site.finish(page)
    assert [pre.get("tabindex") for pre in soup.find_all("pre")] == [None, "0"]
    assert [header.get_text() for header in soup.find_all("th")] == ["a"] and len(soup.find_all("td")) == 1
    assert soup.button["type"] == "button" and not soup.button.get("role")
    assert [nav["aria-label"] for nav in soup.find_all("nav")] == ["Pages", "Source"]


def test_previous_and_next_are_called_as_in_the_sidebar_and_the_module_is_linked():
    soup = BeautifulSoup('<a class="toc-action" href="https://x.org/r/blob/main/nbs/appendix/b.ipynb">View source</a>'
                         '<a class="pagination-link" href="../a.html"><span class="nav-page-text">A</span></a>', "html.parser")
    site.links_out(soup, "appendix/b.html", {"a.html": "00 A", "appendix/a.html": "another"}, "mmfuse/b.py")
    assert soup.select_one(".nav-page-text").string == "00 A"
    assert [a["href"] for a in soup.select(".toc-action")] == ["https://x.org/r/blob/main/nbs/appendix/b.ipynb", "https://x.org/r/blob/main/mmfuse/b.py"]


def test_llms_txt_has_the_form_of_llmstxt_org():
    text = site.llms_txt("name", "what it is", [("", "Welcome", "https://x.org/index.llms.md", "first"), ("Data", "00 Data", "https://x.org/data.llms.md", "a [link](x.ipynb)\nin it")])
    assert text == ("# name\n\n> what it is\n\n## Start\n\n- [Welcome](https://x.org/index.llms.md): first\n\n"
                    "## Data\n\n- [00 Data](https://x.org/data.llms.md): a link in it\n")


# ---------------------------------------------------------------- what was built, and what it is built from

CONFIG = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]
DOCS = ROOT / "_docs"


@pytest.fixture
def built():
    "The built site's folder."
    if not (DOCS / "index.html").is_file():
        pytest.skip("the site is not built: make docs")
    return DOCS


def test_addresses_are_those_of_the_settings():
    settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    ini = settings["DEFAULT"]
    assert CONFIG["site-url"] == ini["doc_host"] + ini["doc_baseurl"]
    assert (CONFIG["repo-url"], CONFIG["repo-branch"], CONFIG["title"]) == (ini["git_url"], ini["branch"], ini["title"])


def test_chapters_stand_in_their_order_and_solutions_last():
    parts = site.sidebar_parts(CONFIG["sidebar"]["contents"])
    chapters = [path for _, _, path in parts if re.match(r"\d", path)]
    assert chapters == sorted(chapters) and len(chapters) >= 16
    assert [text.split()[0] for _, text, path in parts if re.match(r"\d", path)] == [path.split("_")[0] for path in chapters]
    solutions = [place for place, (part, _, _) in enumerate(parts) if part == "Solutions"]
    assert solutions == list(range(len(parts) - len(solutions), len(parts)))
    assert [parts[place][2].removeprefix("solutions/") for place in solutions] == chapters


def test_the_card_shows_the_ledger_as_it_is():
    card = tool("card")
    picture = Image.open(card.CARD)
    assert picture.size == (1200, 630) and card.CARD.stat().st_size < 100_000
    assert picture.text == {"Source": card.stamp()}, "the ledger has changed: python tools/card.py"


def test_each_page_has_a_card(built):
    for page in sorted(built.rglob("*.html")):
        head = BeautifulSoup(page.read_text(encoding="utf-8").split("</head>")[0], "html.parser")
        named = {tag.get("property") or tag.get("name"): tag.get("content") for tag in head.find_all("meta")}
        assert named["og:title"] and len(named["og:description"]) > 20 and named["twitter:card"] == "summary_large_image", page
        assert named["og:image"] == named["twitter:image"] == f"{CONFIG['site-url']}/images/card.png", page
        assert head.find("link", rel="icon"), page
    assert (built / "images" / "card.png").is_file()


def test_llms_txt_lists_every_page_and_each_copy_is_there(built):
    listed = re.findall(r"^- \[(.+?)\]\((\S+)\): (.+)$", (built / "llms.txt").read_text(encoding="utf-8"), re.M)
    copies = [built / address.removeprefix(f"{CONFIG['site-url']}/") for _, address, _ in listed]
    assert sorted(copies) == sorted(p.with_suffix(".llms.md") for p in built.rglob("*.html"))
    assert all(copy.read_text(encoding="utf-8").startswith("# ") for copy in copies)
    assert min(len(text) for _, _, text in listed) > 20


def test_each_page_links_to_its_notebook(built):
    shown = {path for _, _, path in site.sidebar_parts(CONFIG["sidebar"]["contents"])}
    source = f"{CONFIG['repo-url']}/blob/{CONFIG['repo-branch']}/nbs/"
    found = [path for page in built.rglob("*.html")
             for path in re.findall(f'class="toc-action" href="{re.escape(source)}([^"]+)"', page.read_text(encoding="utf-8"))]
    assert sorted(found) == sorted(shown)
