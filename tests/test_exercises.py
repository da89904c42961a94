"""Every check stands on its chapter's page with a starter that it refuses, and in the solutions with answers that it tells apart."""

import ast
import json
import re
from pathlib import Path

import pytest

from mmfuse.exercises.verdict import CHECKS, Verdict, checks, every_check, forget, progress, rejects

NBS = Path(__file__).resolve().parent.parent / "nbs"
EVERY = every_check()


def code_cells(path):
    "Source and outputs, as text, of each code cell that Python can read."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            outputs = "\n".join("".join(o.get("data", {}).get("text/plain", "")) for o in cell["outputs"])
            if not re.search(r"^[%!]", source, re.M):
                yield ast.parse(source), outputs


def calls(path, name):
    "Each call of `name` in a notebook that is a statement of its own: its arguments, and the cell's output."
    return [(node.value.args, outputs) for tree, outputs in code_cells(path) for node in tree.body
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and getattr(node.value.func, "id", None) == name]


def page_of(number, folder):
    found = list((NBS / folder).glob(f"{number.split('.')[0]}_*.ipynb"))
    assert len(found) == 1, f"exercise {number}: expected one page {folder}/{number.split('.')[0]}_*.ipynb, found {found}"
    return found[0]


@pytest.mark.parametrize("number", EVERY)
def test_the_chapter_shows_the_starter_and_its_verdict(number):
    found = calls(page_of(number, "."), EVERY[number].__name__)
    assert any(f"{number} {EVERY[number].title} · not yet" in outputs for _, outputs in found)


@pytest.mark.parametrize("number", EVERY)
def test_the_solutions_refuse_three_answers_and_accept_one(number):
    page, name = page_of(number, "solutions"), EVERY[number].__name__
    refused = [len(args) - 1 for args, outputs in calls(page, "rejects") if args[0].id == name and outputs]
    assert refused and max(refused) >= 3, f"rejects({name}, starter, wrong, wrong) is missing in {page.name}"
    accepted = [outputs for _, outputs in calls(page, name)]
    assert any(f"{number} {EVERY[number].title} · right" in outputs for outputs in accepted)


@pytest.mark.parametrize("page", sorted(p.stem for p in NBS.glob("[0-9]*_*.ipynb")))
def test_every_chapter_has_exercises(page):
    assert len([n for n in EVERY if n.split(".")[0] == page.split("_")[0]]) >= 3


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    "A reader who begins, outside `nbdev_test`."
    monkeypatch.setenv("MMFUSE_HOME", str(tmp_path))
    monkeypatch.delenv("IN_TEST", raising=False)
    yield tmp_path
    CHECKS.pop("98.1", None)


def doubled(twice): return None if twice(3) == 6 else f"twice 3 is 6, not {twice(3)}"


def test_solved_stays_solved_and_can_be_forgotten(fresh):
    check = checks("98.1", "Twice")(doubled)
    state = lambda: next(s for n, _, s in progress() if n == "98.1")
    assert state() == "open"
    check(lambda x: x + 2)
    assert state() == "tried"
    check(lambda x: x + x)
    check(None)
    assert state().startswith("right since ")
    forget()
    assert state() == "open"


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"98.1": 3}', b"\xff"])
def test_a_damaged_file_of_progress_stops_nobody(fresh, damage):
    (fresh / "exercises.json").write_bytes(damage)
    check = checks("98.1", "Twice")(doubled)
    assert check(lambda x: 2 * x) and next(s for n, _, s in progress() if n == "98.1").startswith("right")


def test_a_home_that_cannot_be_written_stops_nobody(fresh, monkeypatch):
    (fresh / "file").write_text("")
    monkeypatch.setenv("MMFUSE_HOME", str(fresh / "file" / "below"))
    assert checks("98.1", "Twice")(doubled)(lambda x: 2 * x)


def test_whatever_the_answer_does_is_a_verdict(fresh):
    check = checks("98.1", "Twice")(doubled)
    def recurses(x): return recurses(x)
    def empty_message(x): raise ValueError
    assert [check(a).text.split(":")[0] for a in (recurses, empty_message, 3, lambda: 6)] == [
        "RecursionError", "ValueError", "TypeError", "TypeError"]
    with pytest.raises(KeyboardInterrupt):
        check(lambda x: (_ for _ in ()).throw(KeyboardInterrupt))


def test_a_check_that_accepts_a_wrong_answer_is_found(fresh):
    check = checks("98.1", "Twice")(lambda twice: None)
    with pytest.raises(AssertionError, match="accepts"):
        rejects(check, lambda x: 7)


def test_a_verdict_is_text_for_a_terminal_and_escaped_for_a_page():
    verdict = Verdict("98.1", "Twice", "<script>")
    assert repr(verdict) == "98.1 Twice · not yet: <script>" and "<script>" not in verdict._repr_html_()
