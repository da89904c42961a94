"""Files of weights: fetched once, checked, never run; and one line within two seconds without a network."""

import functools
import hashlib
import http.server
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from mmfuse import hub as mh
from mmfuse.files import MmfuseError
from mmfuse.hub import check_file, hashed_file, hub_folder, read_weights, unreachable
from mmfuse.image_encoder import make_image_encoder

ROOT = Path(__file__).resolve().parent.parent


class Hub(http.server.SimpleHTTPRequestHandler):
    "Serves a folder, with the headers by which the hub tells a file's version."
    def log_message(self, *args): pass

    def end_headers(self):
        found = Path(self.translate_path(self.path))
        if "/resolve/" in self.path: self.send_header("X-Repo-Commit", self.path.split("/resolve/")[1].split("/")[0].replace("main", "0" * 40))
        if found.is_file(): self.send_header("ETag", f'"{hashlib.sha256(found.read_bytes()).hexdigest()}"')
        elif "/resolve/" in self.path: self.send_header("X-Error-Code", "EntryNotFound" if found.parent.is_dir() else "RepoNotFound")
        super().end_headers()


@pytest.fixture
def server(tmp_path):
    "A web server for a folder: the folder and its address."
    (tmp_path / "www").mkdir()
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, directory=str(tmp_path / "www")))
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield tmp_path / "www", f"http://127.0.0.1:{served.server_port}"
    served.shutdown()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    "As if HF_ENDPOINT and HF_HOME had been set before the import: a folder that is served as the hub."
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", server[1])
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server[1] + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def publish(repo, revision, save):
        folder = server[0] / repo / "resolve" / revision
        folder.mkdir(parents=True)
        save(folder)
        return folder
    return publish


class Hostile:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return (os.mkdir, (str(self.mark),))


def hostile_file(path, mark):
    torch.save({"conv1.weight": torch.zeros(1), "program": Hostile(mark)}, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
def test_a_pickle_that_is_a_program_does_not_run(suffix, tmp_path):
    mark = tmp_path / "it ran"
    path = hostile_file(tmp_path / "weights", mark)
    torch.load(path, weights_only=False)
    assert mark.exists(), "the program of this test would run"
    mark.rmdir()
    path = path.rename(path.with_suffix(suffix))
    with pytest.raises(MmfuseError, match=f"weights{suffix}' is damaged or unsafe") as e: read_weights(path)
    assert "\n" not in str(e.value) and not mark.exists()


def test_nor_does_one_that_has_the_right_hash_in_its_name(monkeypatch, tmp_path):
    path = hostile_file(tmp_path / "resnet18.pth", tmp_path / "it ran")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    path.rename(tmp_path / "hub" / "checkpoints" / f"resnet18-{digest}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = SimpleNamespace(name="MINE", url=f"https://example.org/resnet18-{digest}.pth", transforms=torchvision.models.ResNet18_Weights.DEFAULT.transforms)
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: type("Enum", (list,), {"DEFAULT": weights})([weights]))
    with pytest.raises(MmfuseError, match=f"resnet18-{digest}.pth' is damaged or unsafe"): make_image_encoder("resnet18")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 20, 0.5, 0.99])
def test_half_a_file_is_named(suffix, keep, tmp_path):
    path, state = tmp_path / f"weights{suffix}", {"a": torch.randn(100, 100)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes(content[:int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(MmfuseError, match=f"weights{suffix}' is damaged"): read_weights(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_noise_is_named_whatever_the_unpickler_makes_of_it(suffix, tmp_path):
    path, rng = tmp_path / f"weights{suffix}", random.Random(0)
    for begin in (b"", b"\x80\x02", b"PK\x03\x04"):
        for _ in range(200):
            path.write_bytes(begin + rng.randbytes(200))
            with pytest.raises(MmfuseError, match=f"weights{suffix}' is damaged"): read_weights(path)


def test_json_is_checked(tmp_path):
    path = tmp_path / "config.json"
    for content in ("{", "[1]", "3", "\0"):
        path.write_text(content)
        with pytest.raises(MmfuseError, match="config.json' is damaged"): check_file(path)
    path.write_text("{}")
    check_file(path)


def test_a_file_is_fetched_once_and_checked_by_its_hash(server, monkeypatch, tmp_path, capsys):
    folder, url = server
    content = b"weights"
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(content)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    path = hashed_file(f"{url}/{name}", "net")
    assert path.read_bytes() == content and path.is_relative_to(tmp_path / "torch")
    (folder / name).unlink()
    assert hashed_file(f"{url}/{name}", "net") == path, "the second time needs no network"
    path.write_bytes(b"changed")
    with pytest.raises(MmfuseError, match="is damaged .its SHA-256"): hashed_file(f"{url}/{name}", "net")
    (folder / "net-00000000.pth").write_bytes(content)
    with pytest.raises(MmfuseError, match="cannot get the weights"): hashed_file(f"{url}/net-00000000.pth", "net")
    assert not list(path.parent.glob("net-00000000*")), "nothing is left of a wrong file"
    with pytest.raises(MmfuseError, match="404"): hashed_file(f"{url}/net-11111111.pth", "net")


OFFLINE = """
import time, sys
from huggingface_hub import hf_hub_download
from mmfuse.files import MmfuseError
from mmfuse.image_encoder import make_image_encoder
for name in sys.argv[1:]:
    start = time.perf_counter()
    try: make_image_encoder(name)
    except MmfuseError as e: print(f"{time.perf_counter() - start:.2f} {e}")
"""


def test_without_a_network_it_is_one_line_and_the_hub_is_not_asked_again_and_again(tmp_path):
    nowhere = {k: "http://127.0.0.1:9" for k in ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy", "HF_ENDPOINT")}
    env = os.environ | nowhere | {"NO_PROXY": "", "no_proxy": "", "HF_HUB_OFFLINE": "0", "TORCH_HOME": str(tmp_path), "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", OFFLINE, "resnet50", "hf:openai/clip-vit-base-patch32"], env=env, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()  # the hub's own retries take 23 s and more, ours a moment, however busy the machine is
    assert len(lines) == 2 and all(float(line.split()[0]) < 15 for line in lines), done.stdout + done.stderr
    assert all("cannot be reached" in line and "choose" in line for line in lines) and "http://127.0.0.1:9" in lines[1]


def test_an_address_that_never_answers_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(mh, "urlopen", lambda *a, **k: time.sleep(30))
    start = time.perf_counter()
    assert "no answer" in unreachable("https://example.org", 0.2) and time.perf_counter() - start < 1




def test_weights_in_parts_come_with_their_index(hub):
    def save(folder):
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
        for name in ("one", "two"): save_file({name: torch.ones(1)}, folder / f"{name}.safetensors")
    served = hub("some/parts", "main", save)
    folder = hub_folder("some/parts", "some/parts", [("config.json",), mh.WEIGHTS], want=("readme.md",))
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors.index.json", "one.safetensors", "two.safetensors"}
    for p in served.iterdir(): p.unlink()
    assert hub_folder("some/parts", "some/parts", [("config.json",), mh.WEIGHTS]) == folder
    with pytest.raises(MmfuseError, match="has no preprocessor_config.json"): hub_folder("some/parts", "some/parts", [("preprocessor_config.json",)])
