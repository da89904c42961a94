"""Downloads from a server on this machine that misbehaves: afterwards every file is whole or absent."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mmfuse import download as module
from mmfuse.download import PARTS, DownloadError, Part, download, download_pictures, fetch, is_there, mini, read_ids, unzip

BODY = os.urandom(300_000)
MD5 = hashlib.md5(BODY).hexdigest()
QUICK = dict(wait=0, timeout=0.5, progress=False)


class Server(ThreadingHTTPServer):
    "Serves `content`; `ranges`: whether it knows Range; `faults`: what it does to the next requests, one each."
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.faults, self.log, self.etag = {"/f": BODY}, True, [], [], '"1"'
        self.delay = 0.0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address): pass


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def do_GET(self):
        s, asked = self.server, self.headers.get("Range")
        s.log.append((self.path, asked))
        threading.Event().wait(s.delay)
        fault, body = s.faults.pop(0) if s.faults else None, s.content.get(self.path)
        if isinstance(fault, int) or body is None:
            return self.send_error(fault or 404)
        begin = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked and s.ranges and self.headers.get("If-Range") in (None, s.etag) else 0
        if begin and begin >= len(body):
            return self.send_error(416)
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin + (fault == 'shifted')}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", s.etag)
        self.send_header("Content-Length", len(body) - begin - (1000 if fault == "short" else 0))
        self.end_headers()
        piece = body[begin:]
        if fault == "cut":
            piece = piece[: len(piece) // 2]
        if fault == "short":
            piece = piece[:-1000]
        if fault == "stall":
            self.wfile.write(piece[:50_000])
            self.wfile.flush()
            return time.sleep(1.5)
        self.wfile.write(piece)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    s = Server()
    threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()


def get(server, folder, path="/f", **how):
    return fetch(server.url + path, folder / "file", **{**QUICK, **how})


def visible(folder): return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("faults", [[], ["cut"], ["cut", "cut", "cut"], [500], [503, 429, "cut"], ["stall"], ["cut", 500, "stall"], ["cut", "shifted"]])
def test_a_bad_line_is_survived(server, tmp_path, faults, ranges):
    server.faults, server.ranges = list(faults), ranges
    assert get(server, tmp_path, size=len(BODY), md5=MD5).read_bytes() == BODY
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and len(server.log) == 1 + len(faults) - (not ranges and faults == ["cut", "shifted"])
    if "cut" in faults:
        assert any(asked for _, asked in server.log)


def test_without_any_knowledge_a_cut_is_noticed_too(server, tmp_path):
    server.faults = ["cut"]
    assert get(server, tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("code", [400, 403, 404, 410])
def test_what_no_repetition_cures_is_said_at_once(server, tmp_path, code):
    server.faults = [code]
    with pytest.raises(DownloadError, match=f"{code} "):
        get(server, tmp_path)
    assert len(server.log) == 1 and not visible(tmp_path)


def test_it_gives_up_and_goes_on_in_the_next_call(server, tmp_path):
    server.faults = ["cut"] + [500] * 2
    with pytest.raises(DownloadError, match="gave up after 3 attempts"):
        get(server, tmp_path, size=len(BODY), tries=3)
    assert not visible(tmp_path)
    server.log.clear()
    assert get(server, tmp_path, size=len(BODY), md5=MD5).read_bytes() == BODY
    assert server.log == [("/f", f"bytes={len(BODY) // 2}-")]


def test_cuts_at_random_places_without_ranges_end(server, tmp_path):
    server.ranges, server.faults = False, ["cut", "stall"] * 10
    with pytest.raises(DownloadError, match="gave up"):
        get(server, tmp_path, tries=3)


def test_another_file_under_the_same_name_is_not_glued_on(server, tmp_path):
    server.faults = ["cut", 500]
    with pytest.raises(DownloadError):
        get(server, tmp_path, tries=1)
    server.faults, server.etag = [], '"2"'
    server.content["/f"] = other = os.urandom(len(BODY))
    assert get(server, tmp_path).read_bytes() == other


def test_a_partial_file_that_is_too_long_begins_anew(server, tmp_path):
    (tmp_path / ".file.part").write_bytes(BODY + b"more")
    assert get(server, tmp_path).read_bytes() == BODY
    (tmp_path / ".file.part").write_bytes(BODY)
    server.log.clear()
    assert get(server, tmp_path, size=len(BODY), md5=MD5).read_bytes() == BODY and not server.log


@pytest.mark.parametrize("how, words", [(dict(size=7), "should have 7"), (dict(md5="0" * 32), "should have 000"), (dict(size=len(BODY), md5="0" * 32), "MD5")])
def test_wrong_content_is_refused_and_deleted(server, tmp_path, how, words):
    with pytest.raises(DownloadError, match=words) as error:
        get(server, tmp_path, **how)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_a_length_that_lies_is_refused(server, tmp_path):
    server.faults = ["short"]
    with pytest.raises(DownloadError, match="should have 300000"):
        get(server, tmp_path, size=len(BODY))
    assert not visible(tmp_path)


def test_nobody_listens(tmp_path):
    with pytest.raises(DownloadError, match="gave up after 2"):
        fetch("http://127.0.0.1:9/f", tmp_path / "file", tries=2, **QUICK)
    with pytest.raises(DownloadError, match="cannot fetch"):
        fetch("no address", tmp_path / "file", tries=2, **QUICK)


def test_a_full_disk_is_one_line_and_the_rest_is_kept(server, tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, block): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(module, "open", lambda path, mode="r": Full(path, mode) if "b" in mode else open(path, mode), raising=False)
    with pytest.raises(DownloadError, match="No space left on device; make room"):
        get(server, tmp_path)
    assert not visible(tmp_path)
    monkeypatch.undo()
    assert get(server, tmp_path).read_bytes() == BODY


def test_it_waits_twice_as_long_each_time_and_a_minute_at_most(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    server.faults = [500] * 9
    with pytest.raises(DownloadError, match="gave up after 9"):
        get(server, tmp_path, tries=9, wait=1.0)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    waits.clear()
    server.faults = [500, "cut", 500, "cut"]  # new bytes begin the count anew
    assert get(server, tmp_path, wait=1.0).read_bytes() == BODY and waits == [1, 1, 2, 1]


def test_a_folder_that_cannot_be_made_is_one_line(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="cannot write"):
        fetch(server.url + "/f", tmp_path / "file" / "sub" / "f", **QUICK)


def test_an_interrupt_leaves_no_file_and_the_next_call_goes_on(server, tmp_path, monkeypatch):
    def stop(*args): raise KeyboardInterrupt
    server.faults = ["cut"]
    monkeypatch.setattr(module.time, "sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        get(server, tmp_path)
    assert not visible(tmp_path)
    monkeypatch.undo()
    assert get(server, tmp_path, size=len(BODY), md5=MD5).read_bytes() == BODY and server.log[-1][1]


def make_zip(path, files):
    with zipfile.ZipFile(path, "w") as z:
        for name, content in files.items():
            z.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["../x", "val2017/../../x", "/etc/x", "val2017/../x", "other/x", "val2017\\..\\..\\x", "C:\\x", "val2017//x", "val2017/./x", "x"])
def test_no_name_climbs_out(tmp_path, name):
    path = make_zip(tmp_path / "a.zip", {"val2017/good": b"1", name: b"bad"})
    with pytest.raises(DownloadError, match="leads out of"):
        unzip(path, tmp_path / "in" / "root", "val2017", False)
    assert [p for p in tmp_path.rglob("*")] == [path]


def test_no_link_is_unpacked(tmp_path):
    link = zipfile.ZipInfo("val2017/link")
    link.external_attr = 0o120777 << 16
    path = make_zip(tmp_path / "a.zip", {})
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(link, "/etc")
    with pytest.raises(DownloadError, match="no plain file"):
        unzip(path, tmp_path / "root", "val2017", False)


@pytest.mark.parametrize("how", ["half", "flip", "empty", "text"])
def test_a_damaged_zip_is_refused(tmp_path, how):
    path = make_zip(tmp_path / "a.zip", {"val2017/a": b"a" * 1000, "val2017/b": b"b" * 1000})
    data = path.read_bytes()
    path.write_bytes({"half": data[: len(data) // 2], "flip": data[:500] + b"?" + data[501:], "empty": b"", "text": b"no zip"}[how])
    with pytest.raises(DownloadError, match="no whole zip"):
        unzip(path, tmp_path / "root", "val2017", False)
    assert not (tmp_path / "root" / "val2017").exists()


def test_unpacking_goes_on_and_joins_a_folder_that_is_there(tmp_path, monkeypatch):
    path, root = make_zip(tmp_path / "a.zip", {"val2017/a": b"one", "val2017/b": b"two"}), tmp_path / "root"
    (root / "val2017").mkdir(parents=True)
    (root / "val2017" / "mine").write_bytes(b"mine")
    copy, calls = shutil.copyfileobj, []

    def broken(source, target):
        calls.append(source.name)
        copy(source, target)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(module.shutil, "copyfileobj", broken)
    with pytest.raises(DownloadError, match="No space left"):
        unzip(path, root, "val2017", False)
    assert visible(root / "val2017") == ["mine"]
    assert unzip(path, root, "val2017", False) == (2, 6) and calls == ["val2017/a", "val2017/b", "val2017/b"]
    assert {p.name: p.read_bytes() for p in (root / "val2017").iterdir()} == dict(mine=b"mine", a=b"one", b=b"two")
    assert visible(root) == ["val2017"] and len(list(root.iterdir())) == 1


@pytest.fixture
def coco(server, tmp_path, monkeypatch):
    "A server with small official zips and three single pictures; the table of parts describes them."
    images = [dict(id=i, file_name=f"{i:012d}.jpg") for i in (139, 285, 632)]
    notes = [dict(id=i, image_id=i, category_id=1, caption=f"picture {i}") for i in (139, 285, 632)]
    text = json.dumps(dict(info={}, images=images, annotations=notes, categories=[dict(id=1, name="person")]))
    pictures = {f"val2017/{i:012d}.jpg": b"\xff\xd8" + os.urandom(50) for i in (139, 285, 632)}
    files = dict(annotations={f"annotations/{k}_val2017.json": text for k in ("instances", "captions")}, val2017=pictures)
    for name, content in files.items():
        body = make_zip(tmp_path / "made.zip", content).read_bytes()
        server.content["/" + PARTS[name].where] = body
        monkeypatch.setitem(PARTS, name, Part(PARTS[name].where, len(body), hashlib.md5(body).hexdigest(), 9999, name))
    server.content |= {"/" + name: body for name, body in pictures.items()}
    return tmp_path / "coco"


def test_the_parts_are_fetched_once(server, coco):
    how = dict(base_url=server.url + "/", **QUICK)
    server.faults = ["cut", None, 500]
    assert download(coco, "annotations,val2017", **how) == ["annotations", "val2017"]
    assert visible(coco) == ["annotations", "val2017"] and len(visible(coco / "val2017")) == 3 and is_there(coco, "val2017")
    server.log.clear()
    assert download(coco, "annotations,val2017", **how) == [] and not server.log
    (coco / "val2017" / "000000000139.jpg").unlink()
    assert not is_there(coco, "val2017")
    assert download(coco, "annotations,val2017", **how) == ["val2017"] and is_there(coco, "val2017")
    with pytest.raises(DownloadError, match="no part is called 'test2017'"):
        download(coco, "test2017", **how)


def test_room_is_checked_before_the_first_byte(server, coco, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda p: namedtuple("usage", "total used free")(10, 10, 10))
    with pytest.raises(DownloadError, match="GB are needed for val2017"):
        download(coco, "val2017", base_url=server.url, **QUICK)
    assert not server.log and not coco.exists()


def test_a_mirror_with_another_file_is_refused(server, coco):
    path = "/" + PARTS["val2017"].where
    server.content[path] = bytes(len(server.content[path]))
    with pytest.raises(DownloadError, match="MD5"):
        download(coco, "val2017", base_url=server.url, **QUICK)
    assert not visible(coco)


def test_single_pictures_come_with_annotations_cut_to_them(server, coco):
    pytest.importorskip("torch")
    from mmfuse.data import CocoPairs
    how = dict(base_url=server.url, **QUICK)
    server.faults = [None, 500, "cut"]
    assert download_pictures(coco, "val2017", [285, 632], **how) == 2
    ds = CocoPairs(coco, "val2017")
    assert ds.image_ids == [285, 632] and ds.captions == [["picture 285"], ["picture 632"]] and all(ds.path(i).exists() for i in (0, 1))
    server.log.clear()
    assert download_pictures(coco, "val2017", [285, 632], **how) == 2 and not server.log
    with pytest.raises(DownloadError, match="has other pictures"):
        download_pictures(coco, "val2017", 1, **how)


AGAIN = """
import sys
from mmfuse import download as d
root, url, size, md5 = sys.argv[1:]
d.PARTS["annotations"] = d.Part(d.PARTS["annotations"].where, int(size), md5, 9999, "annotations")
try: d.download_pictures(root, "val2017", 40, base_url=url, progress=False)
except KeyboardInterrupt: sys.exit(130)
"""


@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_a_process_that_is_stopped_leaves_whole_files_and_the_next_one_goes_on(server, tmp_path, how):
    pictures = {f"/val2017/{i:012d}.jpg": b"\xff\xd8" + os.urandom(20_000) for i in range(1, 41)}
    images = [dict(id=i, file_name=f"{i:012d}.jpg") for i in range(1, 41)]
    text = json.dumps(dict(images=images, annotations=[], categories=[]))
    body = make_zip(tmp_path / "made.zip", {f"annotations/{k}_val2017.json": text for k in ("instances", "captions")}).read_bytes()
    server.content = {**pictures, "/" + PARTS["annotations"].where: body}
    args = [sys.executable, "-c", AGAIN, str(tmp_path / "coco"), server.url, str(len(body)), hashlib.md5(body).hexdigest()]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    server.delay = 0.2
    heeds = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs inherit that it is ignored
    process = subprocess.Popen(args, env=env, preexec_fn=heeds)
    while len(server.log) < 12:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(getattr(signal, how))
    assert process.wait(timeout=30) == {"SIGINT": 130, "SIGKILL": -9}[how]
    assert len(server.log) < 40, "those that had not begun are not fetched"
    there = [p for p in (tmp_path / "coco" / "val2017").iterdir() if not p.name.startswith(".")]
    assert all(p.read_bytes() == pictures[f"/val2017/{p.name}"] for p in there) and not (tmp_path / "coco" / "annotations").exists()
    server.delay = 0
    assert subprocess.run(args, env=env).returncode == 0
    assert {f"/val2017/{p.name}": p.read_bytes() for p in (tmp_path / "coco" / "val2017").iterdir()} == pictures
    assert visible(tmp_path / "coco" / "annotations") == ["captions_val2017.json", "instances_val2017.json"]


def test_a_missing_or_wrong_picture_leaves_no_annotations(server, coco):
    how = dict(base_url=server.url, **QUICK)
    server.content["/val2017/000000000285.jpg"] = b"<html>"
    with pytest.raises(DownloadError, match="1 of 3 pictures are missing.*no JPEG"):
        download_pictures(coco, "val2017", 3, **how)
    del server.content["/val2017/000000000285.jpg"]
    with pytest.raises(DownloadError, match="1 of 3 pictures are missing.*404"):
        download_pictures(coco, "val2017", 3, **how)
    assert len(visible(coco / "val2017")) == 2 and not (coco / "annotations").exists()


def test_mini_is_the_development_set(real_coco):
    ids, folds = mini()
    assert ids == sorted(i["id"] for i in json.loads((real_coco / "annotations" / "instances_val2017.json").read_text())["images"])
    assert folds == {int(k): v for k, v in json.loads((real_coco / "folds.json").read_text()).items()}


@pytest.mark.parametrize("text, words", [("", "empty"), ("1 two", "'two' is no number"), ("1.5", "no number"), ("-3", "no number")])
def test_a_file_of_ids_is_checked(tmp_path, text, words):
    (tmp_path / "ids").write_text(text)
    with pytest.raises(DownloadError, match=words):
        read_ids(tmp_path / "ids")
    with pytest.raises(DownloadError, match="cannot read"):
        read_ids(tmp_path / "nowhere")


@pytest.mark.parametrize("args, words", [
    (["--only", "test2017"], "no part is called 'test2017'"), (["--only", ","], "no part"), (["--ids", "nowhere.txt"], "cannot read 'nowhere.txt'"),
    (["--n", "0"], "--n"), (["--n", "3", "--only", "val2017"], "give one of"), (["--subset", "maxi"], "there is: mini"),
    (["--mirror", "ftp://x"], "http://"), (["--n", "3", "--split", "test2017"], "--split"), (["--root", "file"], "file"),
    (["--only", "val2017", "--base-url", "http://127.0.0.1:{port}/nothing"], "404"),
])
def test_the_command_says_it_in_one_line(server, tmp_path, args, words):
    (tmp_path / "file").write_text("")
    args = [a.format(port=server.server_port) for a in args] + (["--root", "new"] if "file" not in args else [])
    done = subprocess.run([sys.executable, "-c", "from mmfuse.cli import main; main()", "download", *args], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)})
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and words in done.stderr, done.stderr
    assert not [p for p in (tmp_path / "new").rglob("*") if p.is_file()]
