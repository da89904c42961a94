"""The site builder's parts on small pages: its link check finds each fault, formulas become MathML, pictures get alt text."""

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))  # at the end: tools/site.py is not Python's own `site`
spec = importlib.util.spec_from_file_location("build_site", ROOT / "tools" / "site.py")
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)
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
    html, problems = site.finish(page)
    inline, display = BeautifulSoup(html, "html.parser").find_all("math")
    assert problems == [] and "katex" not in html and "aligned" not in display.get_text()
    assert inline["display"] == "inline" and inline["alttext"] == r"x_i < \frac12" and inline.find("mfrac")
    assert display["display"] == "block" and len(display.find_all("mtr")) == 2


def test_a_formula_that_cannot_be_read_is_a_fault():
    _, (problem,) = site.finish(r'<span class="math inline">\(\nosuchcommand x\)</span>')
    assert r"\nosuchcommand" in problem


def test_alt_text_is_its_own_or_the_caption_or_a_fault():
    page = ('<main><figure><img alt="mine" src="a"><figcaption>C</figcaption></figure>'
            '<figure><img src="b"><figcaption>The <b>caption</b>.</figcaption></figure>'
            '<div class="cell" id="cell-7"><img src="c"></div></main>')
    html, (problem,) = site.finish(page)
    assert [i.get("alt") for i in BeautifulSoup(html, "html.parser").find_all("img")] == ["mine", "The caption.", None]
    assert "cell-7" in problem and "fig-alt" in problem


def test_a_definition_can_be_linked_to_where_it_is_exported():
    exported = "def attend(q):\n    return q"
    cell = '<div class="cell"><pre class="cell-code"><code>{}</code></pre></div>'
    html, _ = site.finish("<main>" + cell.format("def attend(q): pass") + cell.format(exported) + "</main>", f"import torch\n\n{exported}\n")
    (anchor,) = BeautifulSoup(html, "html.parser").select("#attend")
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
