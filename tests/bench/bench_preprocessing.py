"""What preprocessing costs: the article's picture pipeline and ours, padding to 128 or to the longest, one worker and two.

    python tests/bench/bench_preprocessing.py     writes nbs/results/preprocessing_cost.json; about two minutes on two cores

Pictures are the real ones of $MMFUSE_COCO (or ../shared/coco) where they are, else drawn ones of the same size. The arms of
a comparison take turns within one run, so that what else the machine does hits all of them; a time is that of the fastest call.
"""

import io
import json
import multiprocessing as mp
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import v2
from transformers import AutoTokenizer, BertConfig, BertModel

from mmfuse.data import CocoPairs, Sample, decode_image
from mmfuse.files import atomic, provenance
from mmfuse.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Standardize, image_transform, make_loader, tokenize
from mmfuse.text_encoder import locate
from mmfuse.toy import toy_coco

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "nbs" / "results" / "preprocessing_cost.json"
REAL = Path(os.environ.get("MMFUSE_COCO", ROOT.parent / "shared" / "coco"))


class Enlarged(Dataset):
    "Toy pictures at the size of COCO's, as files: where there are no real ones."
    def __init__(self, folder: str, n: int = 128):
        toy, self.samples = CocoPairs(toy_coco(), "val2017"), []
        for i in range(n):
            path, s = Path(folder) / f"{i}.jpg", toy[i]
            picture = Image.fromarray(s.image.permute(1, 2, 0).numpy()).resize((640, 480), Image.Resampling.BICUBIC)
            noise = np.random.default_rng(i).normal(0, 8, (480, 640, 3))  # a camera's, without which JPEG is too small
            Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)
            self.samples.append((path, s))
        self.captions, self.image_ids = [s.captions for _, s in self.samples], [s.image_id for _, s in self.samples]

    def __len__(self): return len(self.samples)
    def path(self, i): return self.samples[i][0]

    def __getitem__(self, i):
        path, s = self.samples[i]
        return Sample(decode_image(path), s.captions, s.labels, s.image_id)


def in_turn(arms: dict, repeats: int) -> dict[str, float]:
    "Seconds of the fastest call of each arm; arms take turns."
    times = {name: [] for name in arms}
    for _ in range(repeats):
        for name, run in arms.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: min(t) for name, t in times.items()}


def pictures(data: Dataset, n: int = 48, repeats: int = 7) -> dict:
    "Milliseconds a picture, the article's pipeline and ours, whole and in parts."
    paths = [data.path(i) for i in range(n)]
    files = [p.read_bytes() for p in paths]
    pil = [Image.open(io.BytesIO(f)).convert("RGB") for f in files]
    uint8 = [decode_image(p) for p in paths]
    small_pil, small = [p.resize((224, 224), Image.Resampling.BICUBIC) for p in pil], [v2.functional.resize(x, [224, 224]) for x in uint8]
    size = transforms.Resize((224, 224), interpolation=3)
    normalize = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    article, ours = transforms.Compose([size, normalize]), image_transform(224, crop=False)
    steps = [ours.transforms[0], Standardize()]
    arms = {
        ("article", "decode"): lambda: [Image.open(p).convert("RGB") for p in paths],
        ("ours", "decode"): lambda: [decode_image(p) for p in paths],
        ("article", "resize"): lambda: [size(p) for p in pil],
        ("ours", "resize"): lambda: [steps[0](x) for x in uint8],
        ("article", "normalize"): lambda: [normalize(p) for p in small_pil],
        ("ours", "normalize"): lambda: [steps[1](x) for x in small],
        ("article", "all"): lambda: [article(Image.open(p).convert("RGB")) for p in paths],
        ("ours", "all"): lambda: [ours(decode_image(p)) for p in paths],
    }
    for run in arms.values(): run()
    found = {k: 1e3 * t / n for k, t in in_turn(arms, repeats).items()}
    ms = {who: {step: round(found[who, step], 3) for step in ("decode", "resize", "normalize", "all")} for who in ("article", "ours")}
    return dict(milliseconds=ms, ratio=round(ms["article"]["all"] / ms["ours"]["all"], 2), pictures=n)


@torch.no_grad()
def captions(data: Dataset, n: int = 16, repeats: int = 5) -> dict:
    "Seconds of BERT-base for a batch of captions, padded to 128 and to the longest."
    tokenizer, model = AutoTokenizer.from_pretrained(locate("minilm")), BertModel(BertConfig(), add_pooling_layer=False).eval()
    texts = [c[0] for c in data.captions[:n]]
    to_128 = tokenizer(texts, padding="max_length", truncation=True, max_length=128, return_tensors="pt")
    ids, mask = tokenize(tokenizer, texts)
    arms = {"128": lambda: model(to_128["input_ids"], to_128["attention_mask"]), "longest": lambda: model(ids, mask.long())}
    for run in arms.values(): run()
    seconds = {k: round(t, 3) for k, t in in_turn(arms, repeats).items()}
    return dict(seconds=seconds, ratio=round(seconds["128"] / seconds["longest"], 2), captions=n, tokens={"128": 128, "longest": ids.shape[1]})


def busy(n: int = 10_000_000) -> int: return sum(i * i for i in range(n))


def free_cores() -> float:
    "How many processes of two can really run at once just now: 2 on a quiet machine of two cores."
    seconds = {}
    for k in (1, 2):
        processes, start = [mp.Process(target=busy) for _ in range(k)], time.perf_counter()
        for p in processes: p.start()
        for p in processes: p.join()
        seconds[k] = time.perf_counter() - start
    return round(2 * seconds[1] / seconds[2], 2)


def loaders(data: Dataset, repeats: int = 6) -> dict:
    "Pictures a second from a loader with one worker and with two, after the workers have started."
    cores = free_cores()
    tokenizer = AutoTokenizer.from_pretrained(locate("minilm"))
    def epochs(workers): return make_loader(data, transform=image_transform(224), tokenizer=tokenizer, train=True, workers=workers)
    of = {w: epochs(w) for w in (1, 2)}
    for loader in of.values(): list(loader)
    seconds = in_turn({w: (lambda loader=loader: sum(len(b) for b in loader)) for w, loader in of.items()}, repeats)
    rate = {str(w): round(len(data) / t, 1) for w, t in seconds.items()}
    return dict(pictures_per_second=rate, ratio=round(rate["2"] / rate["1"], 2), free_cores=cores)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        real = (REAL / "annotations").is_dir()
        data = CocoPairs(REAL, "val2017") if real else Enlarged(folder)
        result = dict(data="real COCO pictures" if real else "drawn pictures, 640 x 480", pictures=pictures(data), captions=captions(data), loader=loaders(data))
    result["provenance"] = provenance(threads=1, seed=0, minutes=round((time.perf_counter() - start) / 60, 1))
    print(json.dumps(result, indent=1))
    assert result["pictures"]["ratio"] >= 1.7 and result["captions"]["ratio"] >= 5, "too slow: not written"
    free = result["loader"]["free_cores"]
    assert result["loader"]["ratio"] >= 1.7, f"not written: two workers had {free} cores to themselves; try on a quiet machine"
    with atomic(OUT) as p: p.write_text(json.dumps(result, indent=1) + "\n")
