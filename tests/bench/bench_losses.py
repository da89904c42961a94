"""Which loss wins where: one linear head, every loss, the same grid of learning rates, three seeds.

    python tests/bench/bench_losses.py TOKENS.npz nbs/results/losses_real.json "frozen EfficientNet-Lite0 and MiniLM, ..."

TOKENS.npz holds cached tokens: img (N, P, Di), txt (N, K, T, Dt), mask (N, K, T), labels (N, C), fold (N,). All scores
are out of fold. Each step trains on a random caption of each picture; the first caption is read at test time.
The threshold of a fold is chosen on the scores of the other folds.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mmfuse import losses
from mmfuse.files import provenance
from mmfuse.metrics import bootstrap, cf1_of1, choose_threshold, ece, mean_average_precision, paired_bootstrap

RATES = (3e-3, 1e-2, 3e-2, 1e-1)


def softmax_loss(logits, y):
    "Cross-entropy against the labels shared out: what an article's CrossEntropyLoss does with several labels."
    return F.cross_entropy(logits, y / y.sum(1, keepdim=True).clamp(min=1))


def make_losses(y):
    "Every loss of chapter 07, by the name that its table shows."
    return {"cross-entropy": softmax_loss, "bce": losses.bce,
            "bce, weights": lambda x, t: losses.bce(x, t, pos_weight=losses.positive_weights(y)),
            "bce, root weights": lambda x, t: losses.bce(x, t, pos_weight=losses.positive_weights(y, power=0.5)),
            "focal, 2": lambda x, t: losses.focal(x, t, gamma=2),
            "asymmetric, 4 1": losses.asymmetric,
            "asymmetric, 4 0": lambda x, t: losses.asymmetric(x, t, gamma_pos=0)}


def pooled(tokens):
    "Mean image token (N, Di), masked mean of each caption (N, K, Dt), which captions exist (N, K)."
    img = torch.from_numpy(tokens["img"].astype(np.float32)).mean(1)
    mask = torch.from_numpy(tokens["mask"])
    txt = torch.from_numpy(tokens["txt"].astype(np.float32))
    n = mask.sum(-1)
    return img, (txt * mask.unsqueeze(-1)).sum(2) / n.clamp(min=1).unsqueeze(-1), n > 0


def standardized(x, train):
    "Mean 0 and deviation 1 over the training rows."
    flat = x[train].reshape(-1, x.shape[-1])
    return (x - flat.mean(0)) / flat.std(0).clamp(min=1e-6) / x.shape[-1] ** 0.5


def fit_predict(img, txt, there, y, train, test, *, loss, rate, seed, epochs=30, batch_size=64):
    "Logits (n_test, C) of a linear head that was trained on `train`."
    img, txt = standardized(img, train), standardized(txt, train)
    g = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(img.shape[1] + txt.shape[2], y.shape[1])
    torch.nn.init.normal_(head.weight, std=0.01, generator=g)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * -(-len(train) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train), generator=g)].split(batch_size):
            k = torch.multinomial(there[rows].float(), 1, generator=g).squeeze(1)
            value = loss(head(torch.cat([img[rows], txt[rows, k]], 1)), y[rows])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad(): return head(torch.cat([img[test], txt[test, 0]], 1))


def out_of_fold(features, y, fold, **kw):
    "Logits (N, C), each from a head that has not seen its picture's fold."
    img, txt, there = features
    y, fold = torch.from_numpy(y), torch.from_numpy(np.asarray(fold))
    logits = torch.empty_like(y)
    for k in fold.unique():
        rows = torch.arange(len(fold))
        train, test = rows[fold != k], rows[fold == k]
        loss = make_losses(y[train])[kw["name"]]
        logits[test] = fit_predict(img, txt, there, y, train, test, loss=loss, rate=kw["rate"], seed=kw["seed"])
    return logits


def probabilities(logits, name):
    "What the loss's own link makes of the logits."
    return logits.softmax(1) if name == "cross-entropy" else logits.sigmoid()


def decisions(probs, y, fold):
    "CF1 and OF1 at .5, and at the threshold that the other folds choose."
    chosen = np.zeros(y.shape)
    for k in np.unique(fold):
        here = fold == k
        chosen[here] = probs[here] >= choose_threshold(probs[~here], y[~here])
    return cf1_of1(probs, y), cf1_of1(chosen, y)


def run(tokens, fold, seeds=3):
    "{loss: mAP at each learning rate; at the best one mAP, its interval and difference to bce, F1s, ECE}."
    y, features, table, scores = tokens["labels"], pooled(tokens), {}, {}
    for name in make_losses(torch.from_numpy(y)):
        by_rate = {}
        for rate in RATES:
            by_rate[rate] = torch.stack([out_of_fold(features, y, fold, name=name, rate=rate, seed=s) for s in range(seeds)])
        maps = {rate: [mean_average_precision(probabilities(s, name), y) for s in x] for rate, x in by_rate.items()}
        best = max(maps, key=lambda rate: np.mean(maps[rate]))
        probs = probabilities(by_rate[best].flatten(0, 1), name).reshape(by_rate[best].shape).numpy()
        scores[name] = probs
        f1s = np.array([decisions(p, y, fold) for p in probs]).mean(0)
        table[name] = dict(rates={str(r): np.round(v, 4).tolist() for r, v in maps.items()}, best_rate=best,
                           mAP=np.round(bootstrap(probs, y), 4).tolist(), f1_at_half=np.round(f1s[0], 4).tolist(),
                           f1_at_chosen=np.round(f1s[1], 4).tolist(), ece=round(float(np.mean([ece(p, y) for p in probs])), 4))
        print(name, table[name], flush=True)
    for name in table: table[name]["vs_bce"] = np.round(paired_bootstrap(scores[name], scores["bce"], y), 4).tolist()
    return table


if __name__ == "__main__":
    if len(sys.argv) != 4: sys.exit(__doc__)
    start, tokens = time.perf_counter(), dict(np.load(sys.argv[1]))
    table = run(tokens, tokens["fold"])
    minutes = round((time.perf_counter() - start) / 60, 1)
    where = provenance(data=sys.argv[3], pictures=len(tokens["labels"]), seeds=3, minutes=minutes)
    Path(sys.argv[2]).write_text(json.dumps(dict(losses=table, provenance=where), indent=1) + "\n")
