"""Which loss wins where: one linear head over both pooled vectors, every loss, the same settings to choose from, three seeds.

    python tests/bench/bench_losses.py              the toy COCO with the tiny encoders
    python tests/bench/bench_losses.py COCO_ROOT    real pictures too: val2017 and folds.json in it, EfficientNet-Lite0 and MiniLM

Writes nbs/results/losses.json. The settings (learning rate, start of the bias) of each loss, its threshold and its recalibration are
chosen by cross-validation inside the training pictures. A step trains on a random caption of each picture; the first is read at test.
"""

import json
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from mmfuse import losses
from mmfuse.data import CocoPairs
from mmfuse.files import provenance
from mmfuse.image_encoder import make_image_encoder
from mmfuse.ledger import read_folds
from mmfuse.metrics import bootstrap, cf1_of1, choose_threshold, ece, mean_average_precision, paired_bootstrap
from mmfuse.text_encoder import make_text_encoder
from mmfuse.token_cache import cache_tokens
from mmfuse.toy import toy_coco

OUT = Path(__file__).resolve().parents[2] / "nbs" / "results" / "losses.json"
RATES, STARTS, SEEDS, INNER = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), ("zero", "shares"), 3, 4


def softmax_loss(logits, y):
    "Cross-entropy against the labels shared out: what an article's CrossEntropyLoss does with several labels."
    return F.cross_entropy(logits, y / y.sum(1, keepdim=True).clamp(min=1))


def make_losses(y):
    "Every loss of chapter 07, by the name that its table shows; class weights come from the training labels."
    return {"cross-entropy": softmax_loss, "bce": losses.bce,
            "bce, weights": lambda x, t: losses.bce(x, t, pos_weight=losses.positive_weights(y)),
            "bce, root weights": lambda x, t: losses.bce(x, t, pos_weight=losses.positive_weights(y, power=0.5)),
            "focal, 2": losses.focal, "asymmetric, 4 1": losses.asymmetric,
            "asymmetric, 4 0": lambda x, t: losses.asymmetric(x, t, gamma_pos=0)}


def pooled(tokens):
    "Mean image token (N, Di), masked mean of each caption (N, K, Dt), which captions exist (N, K), labels (N, C)."
    img = torch.tensor(np.array(tokens.img, np.float32)).mean(1)
    txt, mask = torch.from_numpy(np.array(tokens.txt, np.float32)), torch.from_numpy(np.array(tokens.mask))
    n = mask.sum(-1)
    return img, (txt * mask.unsqueeze(-1)).sum(2) / n.clamp(min=1).unsqueeze(-1), n > 0, torch.from_numpy(np.array(tokens.labels))


def standardized(x, train):
    "Mean 0 and deviation 1 over the training rows, over the root of the width."
    flat = x[train].reshape(-1, x.shape[-1])
    return (x - flat.mean(0)) / flat.std(0).clamp(min=1e-6) / x.shape[-1] ** 0.5


def scores(logits, name):
    "Log-odds: the logits themselves, or those of softmax's probabilities."
    if name != "cross-entropy": return logits
    log_p = logits.log_softmax(1)
    return log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))


def fit_predict(data, train, test, *, name, rate, start, seed, epochs=30, batch_size=64):
    "Log-odds (n_test, C) of a linear head that was trained on `train`."
    img, txt, there, y = data
    img, txt, loss = standardized(img, train), standardized(txt, train), make_losses(y[train])[name]
    g, share = torch.Generator().manual_seed(seed), (y[train].sum(0) + 0.5) / (len(train) + 1)
    head = torch.nn.Linear(img.shape[1] + txt.shape[2], y.shape[1])
    torch.nn.init.normal_(head.weight, std=0.01, generator=g)
    head.bias.data = torch.logit(share) if start == "shares" else torch.zeros(len(share))
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * -(-len(train) // batch_size))
    for rows in (r for _ in range(epochs) for r in train[torch.randperm(len(train), generator=g)].split(batch_size)):
        k = torch.multinomial(there[rows].float(), 1, generator=g).squeeze(1)
        optimizer.zero_grad()
        loss(head(torch.cat([img[rows], txt[rows, k]], 1)), y[rows]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad(): return scores(head(torch.cat([img[test], txt[test, 0]], 1)), name).numpy()


def chosen(data, train, name):
    "The best (rate, start) by cross-validation inside `train`, the inner mAP of each, and the best one's inner log-odds."
    part = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)) % INNER
    y, inner, logits = data[3][train].numpy(), {}, {}
    for rate, start in product(RATES, STARTS):
        out = np.empty(y.shape, np.float32)
        for k in range(INNER):
            out[part == k] = fit_predict(data, train[part != k], train[part == k], name=name, rate=rate, start=start, seed=0)
        inner[rate, start], logits[rate, start] = mean_average_precision(out, y), out
    best = max(inner, key=inner.get)
    return best, inner, logits[best]


def judge(data, splits, name):
    "Everything that the table shows of one loss; `splits` holds (train, test) rows, each test row once."
    rows, runs, where = torch.cat([test for _, test in splits]).numpy(), [], []
    yes, honest = [], []
    for train, test in splits:
        (rate, start), inner, logits = chosen(data, train, name)
        y = data[3][train].numpy()
        cut = choose_threshold(logits, y)
        platt = LogisticRegression(C=1e6).fit(logits.reshape(-1, 1), y.ravel()) # one slope and one shift for all classes
        found = np.stack([fit_predict(data, train, test, name=name, rate=rate, start=start, seed=s) for s in range(SEEDS)])
        runs.append(found), yes.append(found >= cut)
        honest.append(platt.predict_proba(found.reshape(-1, 1))[:, 1].reshape(found.shape))
        where.append(dict(rate=rate, start=start, inner={f"{r} {s}": round(v, 4) for (r, s), v in inner.items()}))
    runs, yes, honest = (np.concatenate(v, axis=1) for v in (runs, yes, honest))
    y = data[3].numpy()[rows]
    mean = lambda values: np.round(np.mean(values, axis=0), 4).tolist()
    row = dict(mAP=np.round(bootstrap(runs, y), 4).tolist(), seeds=[round(mean_average_precision(r, y), 4) for r in runs],
               f1_at_half=mean([cf1_of1(r, y, 0.0) for r in runs]), f1_at_chosen=mean([cf1_of1(d.astype(float), y) for d in yes]),
               ece=mean([ece(expit(r), y) for r in runs]), ece_recalibrated=mean([ece(h, y) for h in honest]), settings=where)
    return row, runs, y


def compare(data, splits):
    "{loss: its row, with paired differences to bce over all, the rarer and the commoner half of the classes}."
    table, runs = {}, {}
    for name in make_losses(data[3]):
        table[name], runs[name], y = judge(data, splits, name)
        print(name, {k: v for k, v in table[name].items() if k != "settings"}, [(s["rate"], s["start"]) for s in table[name]["settings"]], flush=True)
    order = np.argsort(y.sum(0), kind="stable")
    halves = {"all": order, "rare": order[:len(order) // 2], "common": order[len(order) // 2:]}
    for name, half in product(table, halves):
        c = halves[half]
        table[name][f"vs_bce_{half}"] = np.round(paired_bootstrap(runs[name][:, :, c], runs["bce"][:, :, c], y[:, c]), 4).tolist()
    positives = {k: [int(y[:, c].sum(0).min()), int(y[:, c].sum(0).max())] for k, c in halves.items()}
    return dict(train=len(splits[0][0]), test=len(y), classes=y.shape[1], positives=positives, losses=table)


def toy():
    "Train and test split of the toy COCO."
    root, encoders = toy_coco(), (make_image_encoder("tiny").freeze(), make_text_encoder("tiny").freeze())
    train, test = (cache_tokens(CocoPairs(root, s), *encoders, progress=False) for s in ("train2017", "val2017"))
    data = tuple(torch.cat(parts) for parts in zip(pooled(train), pooled(test)))
    return data, [(torch.arange(len(train)), torch.arange(len(train), len(train) + len(test)))]


def real(root):
    "Five folds of a folder of real pictures."
    encoders = make_image_encoder("efficientnet_lite0").freeze(), make_text_encoder("minilm").freeze()
    tokens, folds = cache_tokens(CocoPairs(root, "val2017"), *encoders, progress=False), read_folds(Path(root) / "folds.json")
    fold = torch.tensor([folds[i] for i in tokens.image_id.tolist()])
    return pooled(tokens), [((fold != k).nonzero().squeeze(1), (fold == k).nonzero().squeeze(1)) for k in fold.unique()]


if __name__ == "__main__":
    if len(sys.argv) > 2: sys.exit(__doc__)
    start, found = time.perf_counter(), dict(toy=compare(*toy()))
    if sys.argv[1:]: found["real"] = compare(*real(sys.argv[1]))
    where = provenance(data="toy COCO, tiny encoders; 427 pictures of COCO val2017, five folds, frozen EfficientNet-Lite0 and MiniLM",
                       seeds=SEEDS, rates=RATES, starts=STARTS, inner_folds=INNER, epochs=30, minutes=round((time.perf_counter() - start) / 60, 1))
    OUT.write_text(json.dumps({**found, "provenance": where}, indent=1) + "\n")
