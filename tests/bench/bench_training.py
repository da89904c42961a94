"""What training costs: a step end to end, the time to a given mAP with frozen encoders, and what the loop adds to a bare step.

    python tests/bench/bench_training.py [step] [time] [overhead]     writes nbs/results/training_speed.json; five minutes on one core

Seconds are processor time of this process on one thread, loading included, so that what else the machine does does not count.
`step`: ResNet-50 and BERT-base in shape (random weights: the cost is the same), 8 pairs; the article's loop, repaired, and ours,
in turns. `time`: frozen EfficientNet-Lite0 and MiniLM on the real pictures of $MMFUSE_COCO, those of folds 1 to 4 to train on and
fold 0 to judge on. The article's loop runs both encoders in each epoch; since they are frozen, its mAP after each epoch follows from
tokens that are encoded once, and its time is that of one measured epoch times their number. `overhead`: bare forward, backward and
step against `mmfuse.trainer.step`, in turns, on the same batch.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.models import resnet50
from transformers import BertConfig, BertModel

from mmfuse.data import CocoPairs
from mmfuse.feeds import EndToEnd, PictureFeed, TokenFeed, Work
from mmfuse.files import atomic, provenance
from mmfuse.fusion import make_head
from mmfuse.image_encoder import make_image_encoder
from mmfuse.losses import bce
from mmfuse.metrics import mean_average_precision
from mmfuse.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from mmfuse.settings import Settings
from mmfuse.text_encoder import TextEncoder, make_text_encoder
from mmfuse.token_cache import cache_tokens
from mmfuse.toy import toy_coco
from mmfuse.trainer import Objective, Trainer, make_accelerator, step
from mmfuse.training import fit, predict, take

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "nbs" / "results" / "training_speed.json"
REAL = Path(os.environ.get("MMFUSE_COCO", ROOT.parent / "shared" / "coco"))


def seconds(run):
    start = time.process_time()
    out = run()
    return time.process_time() - start, out


def real():
    if not (REAL / "annotations").is_dir():
        sys.exit(f"no real COCO pictures at {REAL}: set MMFUSE_COCO")
    return CocoPairs(REAL, "val2017")


class Pictures(torch.utils.data.Dataset):
    "The article's side: PIL, and floats as early as possible."
    def __init__(self, data, rows):
        self.data, self.rows = data, rows
        self.transform = transforms.Compose([transforms.Resize((224, 224), interpolation=3), transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def __len__(self): return len(self.rows)

    def __getitem__(self, i):
        r = self.rows[i]
        return self.transform(Image.open(self.data.path(r)).convert("RGB")), self.data.captions[r][0], self.data.labels[r]


class Article(nn.Module):
    "The article's model, with the three lines that it needs in order to run."
    def __init__(self, classes):
        super().__init__()
        self.image_encoder, self.text_encoder = resnet50(), BertModel(BertConfig(), add_pooling_layer=False)
        self.image_encoder.fc = nn.Linear(2048, 768)
        self.attention, self.classifier = nn.MultiheadAttention(768, 8, batch_first=True), nn.Linear(768, classes)

    def forward(self, image, text):
        cls = self.text_encoder(**text).last_hidden_state[:, 0]
        both = torch.stack([self.image_encoder(image), cls], 1)
        return self.classifier(self.attention(both, both, both)[0][:, 0])


def batches_of(loader, tokenizer):
    "The article's: tokenized in the loop, padded to 128."
    for image, said, y in loader:
        yield image, tokenizer(list(said), padding="max_length", truncation=True, max_length=128, return_tensors="pt"), y


def end_to_end(repeats=3, size=8):
    data, tokenizer = real(), make_text_encoder("minilm").tokenizer
    model = Article(len(data.classes)).train()
    optimizer, loss = torch.optim.Adam(model.parameters()), nn.BCEWithLogitsLoss()
    theirs = batches_of(DataLoader(Pictures(data, range(size * (repeats + 1))), batch_size=size), tokenizer)

    def article():
        image, text, y = next(theirs)
        outputs = model(image, {k: text[k] for k in ("input_ids", "attention_mask")})
        value = loss(outputs, y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    settings = Settings(end_to_end=True, head_epochs=0, batch_size=size, workers=0, arm="article")
    image, text = make_image_encoder("resnet50", pretrained=False), TextEncoder(BertModel(BertConfig(), add_pooling_layer=False), tokenizer, "bert-base")
    accelerator = make_accelerator()
    trainer = Trainer(EndToEnd(image, text, make_head("article", image.dim, text.dim, len(data.classes))), PictureFeed(data, image, text, settings, accelerator), settings, accelerator)
    arms, times = {"article": article, "ours": lambda: step(trainer)}, {"article": [], "ours": []}
    for r in range(repeats + 1):
        for name, run in arms.items():
            times[name].append(seconds(run)[0])
    middle = {k: round(statistics.median(t[1:]), 3) for k, t in times.items()}
    return dict(pairs=size, seconds=middle, ratio=round(middle["article"] / middle["ours"], 2), all={k: [round(x, 3) for x in t] for k, t in times.items()})


def time_to(epochs=30):
    data = real()
    folds = json.loads((REAL / "folds.json").read_text())
    fold = np.array([folds[str(i)] for i in data.image_ids])
    rows, held = np.flatnonzero(fold != 0), np.flatnonzero(fold == 0)
    image, text = make_image_encoder("efficientnet_lite0").freeze(), make_text_encoder("minilm").freeze()

    def epoch():  # the article's: encoders in the loop, then a validation
        for part in (rows, held):
            for pictures, tokens, y in batches_of(DataLoader(Pictures(data, part), batch_size=64), text.tokenizer):
                with torch.no_grad(): image(pictures), text.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    each = seconds(epoch)[0]

    with tempfile.TemporaryDirectory() as folder:
        caching, tokens = seconds(lambda: cache_tokens(data, image, text, cache_dir=folder, progress=False))
        train = tokens.subset(rows)
        mean = replace(tokens, img=tokens.img.astype("f4").mean(1, keepdims=True))  # all that these two heads see of a picture
        quick, val = (mean.subset(r) for r in (rows, held))
        names = torch.tensor(tokens.names)
        of = lambda arm: make_head(arm, image.dim, text.dim, len(data.classes), names=names)
        judged = lambda head: mean_average_precision(predict(head, val), val.labels)
        plain = {}
        for lr in (3e-4, 1e-3, 3e-3):  # the article's rate, tuned for it
            torch.manual_seed(0)
            head, plain[lr] = of("article"), []
            optimizer = torch.optim.Adam(head.parameters(), lr=lr)
            head.set_statistics(*take(quick, torch.arange(len(quick)), torch.zeros(len(quick)).long())[:3])
            for _ in range(epochs):
                head.train()
                for b in torch.arange(len(quick)).split(64):
                    *x, y = take(quick, b, torch.zeros(len(b)).long())
                    optimizer.zero_grad()
                    bce(head(*x), y).backward()
                    optimizer.step()
                plain[lr].append(judged(head))
        top = max(max(curve) for curve in plain.values())
        levels = {name: level_of(share * top, plain, each, caching, of, judged, quick, train) for name, share in (("its best", 1.0), ("98 % of its best", 0.98))}
    return dict(levels=levels, seconds_an_epoch=round(each, 2), caching=round(caching, 2), curves={str(lr): [round(m, 3) for m in c] for lr, c in plain.items()}, train=len(rows), val=len(held))


def level_of(target, plain, each, caching, of, judged, quick, train):
    "Seconds until an mAP is reached: the article's loop at the rate that gets there first, and ours with two heads."
    lr, epochs = min(((lr, next(i for i, m in enumerate(c, 1) if m >= target)) for lr, c in plain.items() if max(c) >= target), key=lambda x: x[1])
    found = dict(target=round(target, 3), article=dict(lr=lr, epochs=epochs, total=round(epochs * each, 1)), ours={})
    for arm, lr in (("article", 1e-3), ("joint", 1e-2)):
        for n in (1, 2, 3, 5, 8, 12, 16, 20, 30):
            torch.manual_seed(0)
            fit(head := of(arm), quick, epochs=n, lr=lr)
            if (reached := judged(head)) >= target: break
        torch.manual_seed(0)
        spent, _ = seconds(lambda: fit(of(arm), train, epochs=n, lr=lr))  # the same, from all tokens
        found["ours"][arm] = dict(epochs=n, mAP=round(reached, 3), reached=reached >= target, total=round(caching + spent, 2), ratio=round(epochs * each / (caching + spent), 1))
    return found


class Same:
    "A feed that gives one batch again and again."
    def __init__(self, work, n): self.work, self.n, self.labels = work, n, torch.zeros(1)
    def __len__(self): return self.n
    def epoch(self, epoch, start=0):
        while True: yield self.work


def overhead_of(trainer, work, repeats):
    "Milliseconds of a bare step, and what ours adds, medians of turns."
    bare_model = trainer.model
    optimizer = torch.optim.AdamW(bare_model.parameters())
    piece = work.pieces[0]

    def bare():
        bare_model.train()
        optimizer.zero_grad()
        bce(bare_model(*piece.inputs), piece.y).backward()
        optimizer.step()

    trainer.progress.batch = 0
    times = {"bare": [], "ours": []}
    for _ in range(repeats):
        for name, run in (("bare", bare), ("ours", lambda: step(trainer))): times[name].append(seconds(run)[0])
    middle = {k: 1e3 * statistics.median(t[3:]) for k, t in times.items()}
    added = 1e3 * statistics.median(b - a for a, b in zip(times["bare"][3:], times["ours"][3:]))
    return dict(bare_ms=round(middle["bare"], 3), ours_ms=round(middle["ours"], 3), added_us=round(1e3 * added, 1), added_percent=round(100 * added / middle["bare"], 2))


def overhead():
    accelerator, data = make_accelerator(), CocoPairs(toy_coco(), "train2017")
    pair, found = (make_image_encoder("tiny"), make_text_encoder("tiny")), {}
    tokens = cache_tokens(data, *pair, progress=False)
    names = torch.tensor(tokens.names)
    of = lambda arm: make_head(arm, pair[0].dim, pair[1].dim, len(data.classes), names=names)
    for arm in ("joint", "concat", "cross_attention"):
        s = Settings(arm=arm)
        work = next(TokenFeed(tokens, s, accelerator).epoch(0))
        found[f"{arm}, cached tokens"] = overhead_of(Trainer(of(arm), Same(work, 1000), s, accelerator), work, 300)
    s = Settings(end_to_end=True, head_epochs=0, batch_size=32, workers=0)
    work = next(PictureFeed(data, *pair, s, accelerator).epoch(0))
    found["end to end, tiny encoders, 32 pairs"] = overhead_of(Trainer(EndToEnd(*pair, of("joint")), Same(work, 1000), s, accelerator), work, 43)
    return found


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    content = json.loads(OUT.read_text()) if OUT.exists() else {}
    start, done = time.perf_counter(), []
    for name, run in dict(step=end_to_end, time=time_to, overhead=overhead).items():
        if name in sys.argv[1:] or len(sys.argv) == 1:
            content[name] = run()
            done.append(name)
            print(name, json.dumps(content[name], indent=1), flush=True)
    content = {k: v for k, v in (json.loads(OUT.read_text()) if OUT.exists() else {}).items() if k not in done} | {k: content[k] for k in done}
    content["provenance"] = provenance(data="real COCO pictures (427) and the toy COCO", seed=0, threads=1, minutes=round((time.perf_counter() - start) / 60, 1))
    with atomic(OUT) as path: path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
