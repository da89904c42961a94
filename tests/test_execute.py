"""`tools/execute.py --check` passes what may differ and names what may not, on small notebooks."""

import base64
import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("execute", ROOT / "tools" / "execute.py")
execute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(execute)


def png(width, height, colour):
    "A picture in base64."
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def text(value): return new_output("execute_result", {"text/plain": value})
def stream(value, name="stdout"): return new_output("stream", name=name, text=value)
def figure(*size, colour="white"): return new_output("display_data", {"image/png": png(*size, colour), "text/plain": "<Figure>"})
def error(name, value): return new_output("error", ename=name, evalue=value, traceback=["a path of this machine"])


def book(*outputs):
    "A notebook with one code cell, which has these outputs."
    return new_notebook(cells=[new_markdown_cell("# Page", id="a"), new_code_cell("1", id="b", outputs=list(outputs))])


def faults(was, now): return list(execute.differences(book(*was), book(*now)))


TABLE = "<table border=\"1\">\n<td>text</td>\n<td>0.634</td>\n</table>"
EQUAL = [
    ([], []),
    ([text("0.64")], [text("0.64")]),
    ([text("loss 100.0")], [text("loss 101.9")]),                          # 2 % of a large number
    ([text("2.4e-07")], [text("-1.2e-07")]),                               # an error of rounding
    ([text("     mAP\na  0.9995")], [text("    mAP\na  1.0005")]),         # white space, as pandas aligns
    ([new_output("execute_result", {"text/html": TABLE})], [new_output("execute_result", {"text/html": TABLE.replace("634", "641")})]),
    ([stream("epoch 1\n")], [stream("epoch 1\n")]),
    ([error("ValueError", "no row 3")], [error("ValueError", "no row 3")]),
    ([figure(600, 300)], [figure(606, 298, colour="black")]),
]
DIFFERENT = [
    ([text("mAP 0.64")], [text("mAP 0.67")], "text/plain: was 'mAP 0.64', is 'mAP 0.67'"),
    ([text("loss 100.0")], [text("loss 102.1")], "is 'loss 102.1'"),
    ([text("427 pictures")], [text("428 pictures")], "is '428 pictures'"),  # 0.2 %, but a count
    ([text("(2, 49, 96)")], [text("(2, 49, 95)")], "is '(2, 49, 95)'"),
    ([text("text wins by 0.1")], [text("image wins by 0.1")], "is 'image wins by 0.1'"),
    ([text("0.5")], [text("nan")], "is 'nan'"),
    ([text("a\nb\nc")], [text("a\nc")], "was 'b', is 'c' (and 1 more lines)"),
    ([text("1")], [], "text/plain: is gone: '1'"),
    ([], [stream("UserWarning: old", "stderr")], "stderr: is new: 'UserWarning: old'"),
    ([stream("1\n"), text("2")], [text("2"), stream("1\n")], "stdout: is gone"),
    ([error("ValueError", "no row 3")], [error("KeyError", "no row 3")], "is 'KeyError"),
    ([error("ValueError", "no row 3")], [text("3")], "error: is gone"),
    ([figure(600, 300)], [new_output("display_data", {"text/plain": "<Figure>"})], "image/png: is gone"),
    ([figure(600, 300)], [figure(600, 320)], "the figure was 600 x 300 pixels, is 600 x 320"),
    ([text("a" * 300 + "1.0" + "c" * 300)], [text("a" * 300 + "2.0" + "c" * 300)], f"was '...{'a' * 20}1.0"),  # where they part
]


@pytest.mark.parametrize("was, now", EQUAL)
def test_what_may_differ_passes(was, now): assert faults(was, now) == []


@pytest.mark.parametrize("was, now, says", DIFFERENT)
def test_what_may_not_differ_is_named_in_one_line(was, now, says):
    found = faults(was, now)
    assert found and found[0].startswith("cell 1 (b): ") and says in found[0], found
    assert all("\n" not in fault and len(fault) < 300 for fault in found)


@pytest.fixture
def page(tmp_path, monkeypatch):
    "Write a page that is executed, with some of its outputs changed, where the tool looks for pages."
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    monkeypatch.setattr(execute, "NBS", tmp_path)
    monkeypatch.chdir(ROOT)

    def write(*sources, **changed):
        cells = [new_code_cell(source, id=f"c{i}") for i, source in enumerate(sources)]
        path = tmp_path / "03_page.ipynb"
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), path)
        assert execute.work(path, checking=False)
        nb = nbformat.read(path, as_version=4)
        for i, outputs in changed.items():
            nb.cells[int(i[1:])].outputs = outputs
        nbformat.write(nb, path)
        return path
    return write


def run(capsys, *args):
    "The command's exit code, and what it printed."
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        execute.main(list(args))
    return int(left.value.code), capsys.readouterr().out.splitlines()


def test_a_fresh_kernel_is_compared_and_nothing_is_written(page, capsys):
    path = page("import sys", "print(1); print(2, file=sys.stderr); 3", "0.25", c2=[text("0.31")])
    before = path.read_bytes()
    assert run(capsys, "--check", "03") == (1, ["checking 03_page.ipynb", "03_page.ipynb cell 2 (c2): text/plain: was '0.31', is '0.25'",
                                                "0 of 1 notebooks show what is committed"])
    assert path.read_bytes() == before
    assert run(capsys, "03") == (0, ["executing 03_page.ipynb"])
    once = path.read_bytes()
    assert run(capsys, "--check", "all") == (0, ["checking 03_page.ipynb", "1 of 1 notebooks show what is committed"])
    assert once != before and path.read_bytes() == once


def test_a_page_that_raises_is_one_line_and_stays_as_it_was(page, capsys):
    path = page("1")
    nb = nbformat.read(path, as_version=4)
    nb.cells[0].source = "1 / 0"
    nbformat.write(nb, path)
    before = path.read_bytes()
    assert run(capsys, "--check", "03")[1][1] == "03_page.ipynb raises ZeroDivisionError: division by zero"
    assert run(capsys, "03")[0] == 1
    assert path.read_bytes() == before


def test_pages_run_at_their_full_size(page, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    path = page("import os", "os.environ.get('IN_TEST')")
    assert not nbformat.read(path, as_version=4).cells[1].outputs


def test_a_name_that_no_page_has_is_one_line():
    done = subprocess.run([sys.executable, ROOT / "tools" / "execute.py", "--check", "no_such_page"], capture_output=True, text=True)
    assert done.returncode == 1 and "no_such_page" in done.stderr and "Traceback" not in done.stderr
