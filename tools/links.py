"""Check a built site, without a network: python tools/links.py _docs.

Every link and fragment leads somewhere, every page is reached from index.html, nothing is loaded from another host, and no
markup is left that a reader would see. Each fault is one line; the exit code is 1 if there is one.
"""

import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup

FROM_OTHER_HOSTS = re.compile(r"(?:url\(|@import|\bfrom\b|\bimport\b)\s*\(?\s*['\"]?((?:https?:)?//[^'\")\s]+)")
MARKUP = re.compile(r":::|\$\$|\\\(|\\begin\{|^#\|", re.M)
LOADS = {"script", "img", "iframe", "video", "audio", "source", "embed", "object", "track", "image", "use"}


def is_elsewhere(ref: str) -> bool:
    "Whether a link leads to another host."
    return ref.startswith("//") or urlsplit(ref).scheme in ("http", "https")


def references(soup: BeautifulSoup):
    "Each link of a page: (whether the browser loads it with the page, the link)."
    for tag in soup.find_all(True):
        only_named = {"canonical", "license", "alternate"} & set(tag.get("rel", []))
        loaded = tag.name in LOADS or (tag.name == "link" and not only_named)
        refs = [tag[a] for a in ("href", "src", "poster", "data", "xlink:href") if tag.has_attr(a)]
        refs += [part.split()[0] for part in re.split(r",\s+", tag.get("srcset", "")) if part.strip()]
        yield from ((loaded, ref.strip()) for ref in refs)


def check_link(ref: str, page: Path, root: Path, ids: dict[Path, set]) -> tuple[Path | None, str]:
    "Where an internal link leads, and what is wrong with it (empty: nothing)."
    parts = urlsplit(ref)
    if parts.path.startswith("/"):
        return None, f"{ref} begins at the host's root: write it relative to the page"
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    target = target / "index.html" if target.is_dir() else target
    if not target.is_relative_to(root) or not target.is_file():
        return None, f"broken link: {ref}"
    if parts.fragment and target in ids and unquote(parts.fragment) not in ids[target]:
        return target, f"broken fragment: {ref}"
    return target, ""


def leftovers(soup: BeautifulSoup) -> list[str]:
    "Markup that a reader would see: fenced divs, TeX, cell directives."
    cells = "\n".join(code.get_text() for code in soup.find_all("pre", class_="cell-code"))
    found = [line for line in cells.splitlines() if line.startswith("#|")]
    for tag in soup.find_all(["pre", "code", "script", "style", "math"]):
        tag.decompose()
    return [f"raw markup on the page: {text.strip()[:60]!r}" for text in
            found + [t for t in (soup.main or soup).find_all(string=MARKUP)]]


def check_site(root: Path) -> tuple[list[str], int, int]:
    "Check a built site: what is wrong (one line each), the number of pages, the number of links."
    root = root.resolve()
    soups = {p: BeautifulSoup(p.read_text(encoding="utf-8"), "html.parser") for p in sorted(root.rglob("*.html"))}
    ids = {p: {t[a] for a in ("id", "name") for t in s.find_all(attrs={a: True})} for p, s in soups.items()}
    problems, leads_to, count = [], {p: set() for p in soups}, 0
    for page, soup in soups.items():
        faults = []
        for loaded, ref in references(soup):
            count += 1
            if is_elsewhere(ref):
                faults += [f"loads from another host: {ref}"] if loaded else []
            elif not urlsplit(ref).scheme and ref not in ("", "#"):
                target, fault = check_link(ref, page, root, ids)
                leads_to[page].add(target)
                faults += [fault] if fault else []
        inline = "\n".join(tag.get_text() for tag in soup(["script", "style"]))
        faults += [f"loads from another host: {url}" for url in FROM_OTHER_HOSTS.findall(inline)]
        faults += leftovers(soup)
        problems += [f"{page.relative_to(root)}: {fault}" for fault in dict.fromkeys(faults)]
    return problems + orphans(root, leads_to) + check_css(root), len(soups), count


def orphans(root: Path, leads_to: dict[Path, set]) -> list[str]:
    "Pages that nobody reaches from index.html by following links."
    reached, todo = set(), [root / "index.html"]
    while todo:
        if (page := todo.pop()) in leads_to and page not in reached:
            reached.add(page)
            todo += leads_to[page]
    return [f"{p.relative_to(root)}: orphan: no link leads to it" for p in sorted(set(leads_to) - reached)]


def check_css(root: Path) -> list[str]:
    "Style sheets that load from another host, or a file that is not there."
    problems = []
    for css in sorted(root.rglob("*.css")):
        text = css.read_text(encoding="utf-8")
        refs = {ref.strip() for ref in re.findall(r"url\(\s*['\"]?([^'\")]+)", text)}
        refs |= set(FROM_OTHER_HOSTS.findall(text))
        for ref in sorted(r for r in refs if not r.startswith(("data:", "#"))):
            if is_elsewhere(ref):
                problems.append(f"{css.relative_to(root)}: loads from another host: {ref}")
            elif not (css.parent / urlsplit(ref).path).is_file():
                problems.append(f"{css.relative_to(root)}: broken link: {ref}")
    return problems


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "index.html").is_file():
        sys.exit("usage: python tools/links.py FOLDER, a built site with an index.html")
    problems, pages, links = check_site(Path(sys.argv[1]))
    print("\n".join([*problems, f"{pages} pages, {links} links, {len(problems)} fault(s)"]))
    sys.exit(bool(problems))
