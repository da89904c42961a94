"""Build the docs site into _docs/ from _quarto.yml, offline and without Quarto, and check it: python tools/site.py.

nbdev turns the notebooks into pages (_proc/), smalldocs lays them out, and what is left is done here: formulas become
MathML, every picture gets its alt text, what scrolls can be reached by keyboard, nothing is loaded from another host, and
llms.txt lists the pages as Markdown. Then every link, fragment and page of the built site is checked; each fault is one
line, and the exit code is 1. Only a site without a fault replaces _docs/.
"""

import posixpath
import re
import shutil
import sys
import time
from pathlib import Path

import yaml
from bs4 import BeautifulSoup
from latex2mathml.converter import convert
from links import check_site
from smalldocs.config import load
from smalldocs.site import Site

ROOT = Path(__file__).resolve().parent.parent
FONT_IMPORT = re.compile(r"@import url\(https?://[^)]*\);?")
LINK = re.compile(r"\[([^]]*)\]\([^)]*\)")
LANDMARKS = {"#quarto-sidebar": "Pages", "#TOC": "On this page", ".toc-actions": "Source", ".page-navigation": "Previous and next",
             ".quarto-secondary-nav": "Where this page is", ".quarto-title-breadcrumbs": "The part of this page"}
NARROW = 45  # characters of code that a phone shows in a line
ALIGNED = re.compile(r"\\(begin|end)\{aligned\}")  # latex2mathml knows it as align*


# ---------------------------------------------------------------- the sidebar

def sidebar_parts(contents: list, part: str = "") -> list[tuple[str, str, str]]:
    "The notebooks that a sidebar's `contents` name, in order: (innermost section, the sidebar's own title or nothing, path)."
    found = []
    for item in contents:
        item = {"href": item} if isinstance(item, str) else item
        if item.get("href", "").endswith(".ipynb"):
            found.append((part, item.get("text", ""), item["href"]))
        found += sidebar_parts(item.get("contents", []), item.get("section", part))
    return found


def check_sidebar(config: dict, nbs: Path) -> list[str]:
    "A line for each notebook that the sidebar lacks, for each entry without a notebook, for each repeated entry."
    entries = [path for _, _, path in sidebar_parts(config["website"]["sidebar"]["contents"])]
    files = {p.relative_to(nbs).as_posix() for p in nbs.rglob("*.ipynb")
             if not any(part[0] in "._" for part in p.relative_to(nbs).parts)}
    return ([f"_quarto.yml: the sidebar lacks nbs/{p}: add it" for p in sorted(files - set(entries))]
            + [f"_quarto.yml: the sidebar names {p}, and nbs/ has no such notebook" for p in sorted(set(entries) - files)]
            + [f"_quarto.yml: the sidebar names {p} twice" for p in sorted({p for p in entries if entries.count(p) > 1})])


# ---------------------------------------------------------------- building

def symbols() -> dict[str, tuple[str, str]]:
    "What the package exports: full name -> (page with fragment, source file)."
    index = {}
    exec((ROOT / "mmfuse" / "_modidx.py").read_text(encoding="utf-8"), index)
    return {name: where for names in index["d"]["syms"].values() for name, where in names.items()}


class Course(Site):
    "smalldocs' site with nbdev's file names (`04_attention.ipynb` -> `attention.html`) and linked names in backticks."

    def read(self, src):
        "Read a page; its `output-file` is where it goes."
        page = super().read(src)
        page.out = src.with_name(page.front.pop("output-file", page.out.name))
        return page

    def load_symbols(self):
        "Link `name()`, `a_name`, `a.name` and `Name` in backticks to the cell that exports it, unless two modules do."
        short: dict[str, set] = {}
        for name, (target, source) in symbols().items():
            module = source.removesuffix(".py").replace("/", ".")
            local = name.removeprefix(f"{module}.")
            page, fragment = target.split("#")
            link = f"/{page}#{fragment.split('.')[0]}"  # a method is found in the cell of its class
            if not local.startswith("_"):
                for key in (local, name):
                    short.setdefault(key, set()).add(link)
            short.setdefault(module, set()).add(f"/{page}")
        self.symbols = {name: links.pop() for name, links in short.items() if len(links) == 1}

    def listed(self) -> list:
        "The pages in the sidebar's order: (part, title, page)."
        pages = {page.src.as_posix(): page for page in self.pages.values()}
        parts = sidebar_parts(self.project.website["sidebar"]["contents"])
        return [(part, text or pages[path].title, pages[path]) for part, text, path in parts]

    def write_llms_txt(self):
        "Write llms.txt as llmstxt.org has it: name, summary, and a line for each page under the sidebar's parts."
        web = self.project.website
        lines = [(part, title, f"{web['site-url']}/{page.out.with_suffix('.llms.md')}", page.meta.get("description", ""))
                 for part, title, page in self.listed()]
        (self.out / "llms.txt").write_text(llms_txt(web["title"], web["description"], lines), encoding="utf-8")


def llms_txt(title: str, summary: str, pages: list[tuple[str, str, str, str]]) -> str:
    "The text of llms.txt; each of `pages` is (part, title, address, description)."
    parts: dict[str, list[str]] = {}
    for part, name, address, description in pages:
        plain = " ".join(LINK.sub(r"\1", description).split())
        parts.setdefault(part or "Start", []).append(f"- [{name}]({address}): {plain}")
    sections = [f"## {part}\n\n" + "\n".join(lines) for part, lines in parts.items()]
    return "\n\n".join([f"# {title}", f"> {summary}", *sections]) + "\n"


def mathml(soup: BeautifulSoup) -> list[str]:
    "Replace TeX by MathML; gives what could not be read."
    problems = []
    for span in soup.find_all("span", class_="math"):
        tex = span.get_text().strip()[2:-2].strip()
        try:
            display = "block" if "display" in span["class"] else "inline"
            html = convert(ALIGNED.sub(r"\\\1{align*}", tex), display=display)
        except Exception as error:
            problems.append(f"formula {tex!r}: {type(error).__name__}: {error}")
            continue
        if unknown := re.search(r">\s*(\\[A-Za-z]+|&)(?=<)", html):
            problems.append(f"formula {tex!r}: latex2mathml leaves {unknown.group(1)}")
        html = html.replace("<mo>&#x0221E;</mo>", "<mi>&#x0221E;</mi>")  # infinity is a number, not an operator
        span.string = ""
        span.append(BeautifulSoup(html, "html.parser"))
        span.math["alttext"] = tex
    for tag in soup.find_all(src=re.compile("katex")) + soup.find_all("link", href=re.compile("katex")):
        tag.decompose()
    return problems


def alt_texts(soup: BeautifulSoup) -> list[str]:
    "Give a picture without alt text its figure's caption; gives what has neither."
    problems = []
    for logo in soup.select("a.sidebar-logo-link img"):
        logo["alt"] = "mmfuse: the first page"
    for picture in (soup.main or soup).find_all("img"):
        if picture.get("alt"):
            continue
        figure = picture.find_parent("figure")
        caption = figure and figure.find("figcaption")
        cell = picture.find_parent(class_="cell")
        if caption:
            picture["alt"] = " ".join(caption.get_text().split())
        else:
            problems.append(f"a picture without alt text ({cell['id'] if cell else picture.get('src', '')[:60]}): "
                            "write `#| fig-alt: \"...\"` on top of its cell")
    return problems


def anchors(soup: BeautifulSoup, source: str) -> None:
    "Give each definition of the exported `source` an id where its cell stands, for links to it."
    taken = {tag["id"] for tag in soup.find_all(id=True)}
    for block in soup.find_all("pre", class_="cell-code"):
        code = block.get_text().strip()
        cell = block.find_parent(class_="cell")
        for name in re.findall(r"^(?:class|def) (\w+)", code, re.M) if cell and code in source else []:
            if (fragment := name.lower()) not in taken:
                taken.add(fragment)
                cell.insert(0, soup.new_tag("a", id=fragment))


def accessible(soup: BeautifulSoup) -> None:
    "Name the page's landmarks, let the keyboard reach what scrolls, and leave no table header empty."
    for landmark, name in LANDMARKS.items():
        for tag in soup.select(landmark):
            tag.name, tag["aria-label"] = "nav", name
    for fold in soup.select("#quarto-sidebar [data-bs-toggle]"):
        fold.name, fold["type"] = "button", "button"
        del fold["role"]
    for code in soup.find_all("pre"):
        if max(map(len, code.get_text().splitlines()), default=0) > NARROW:
            code["tabindex"] = "0"
    for box in soup.select(".sd-table, .cell-output-display:has(table), span.math.display"):
        box["tabindex"] = "0"
    for header in soup.find_all("th"):
        if not header.get_text(strip=True):
            header.name = "td"


def links_out(soup: BeautifulSoup, name: str, titles: dict[str, str], module: str) -> None:
    "Previous and next of the page `name` as the sidebar calls them (`titles`), and under its source the `module` that it exports."
    for link in soup.select("a.pagination-link"):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), link["href"]))
        link.find(class_="nav-page-text").string = titles[target]
    source = soup.find("a", class_="toc-action", href=re.compile("/blob/"))
    if source and module:
        exported = soup.new_tag("a", attrs={"class": "toc-action", "href": f"{source['href'].split('/nbs/')[0]}/{module}"})
        exported.extend([soup.new_tag("i", attrs={"class": "bi bi-braces"}), f" {module.removeprefix('mmfuse/')}"])
        source.insert_after(soup.new_tag("br"), exported)


def finish(html: str, source: str = "") -> tuple[BeautifulSoup, list[str]]:
    "A page as the site shows it, and what is wrong with it; `source` is the text of the module that it exports."
    soup = BeautifulSoup(html, "html.parser")
    problems = mathml(soup) + alt_texts(soup)
    anchors(soup, source)
    accessible(soup)
    return soup, problems


def build(out: Path) -> list[str]:
    "Lay out `_proc/` into `out` and finish each page; gives what went wrong."
    site = Course(load(ROOT / "_proc"), quiet=True)
    site.out = out
    site.build()
    # links are checked later, all of them, and Course reads output-file
    problems = [w for w in site.warnings if "output-file" not in w and "broken link" not in w]
    modules = {target.split("#")[0]: path for target, path in symbols().values()}
    titles = {page.out.as_posix(): title for _, title, page in site.listed()}
    for page in sorted(out.rglob("*.html")):
        name = page.relative_to(out).as_posix()
        module = modules.get(name, "")
        source = (ROOT / module).read_text(encoding="utf-8") if module else ""
        soup, faults = finish(page.read_text(encoding="utf-8"), source)
        links_out(soup, name, titles, module)
        page.write_text(str(soup), encoding="utf-8")
        problems += [f"{name}: {fault}" for fault in faults]
    for css in out.rglob("*.css"):
        css.write_text(FONT_IMPORT.sub("", css.read_text(encoding="utf-8")), encoding="utf-8")
    return problems


def main() -> int:
    "Build, check, and put the new site in place of the old one."
    start, config = time.time(), yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    problems = check_sidebar(config, ROOT / "nbs")
    if not problems:
        print("    reading the notebooks", flush=True)
        from nbdev.serve import proc_nbs
        proc_nbs(n_workers=0, force=True)
        print("    laying out the pages", flush=True)
        new, docs = ROOT / "_proc" / "_site", ROOT / "_docs"
        problems = build(new)
        print("    checking the links", flush=True)
        faults, pages, links = check_site(new)
        problems += faults
    if problems:
        print("\n".join(problems), f"{len(problems)} fault(s); _docs/ is left as it was", sep="\n", file=sys.stderr)
        return 1
    shutil.rmtree(docs, ignore_errors=True)
    new.rename(docs)
    print(f"    _docs/: {pages} pages, {links} links checked, no fault, {time.time() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
