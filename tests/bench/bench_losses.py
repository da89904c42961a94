"""Which loss wins where: one linear head over both pooled vectors, every loss, the same settings to choose from, three seeds.

    python tests/bench/bench_losses.py toy          the toy COCO with the tiny encoders
    python tests/bench/bench_losses.py COCO_ROOT    real pictures: val2017 and folds.json in it, EfficientNet-Lite0 and MiniLM

Minutes on two cores. Writes nbs/results/losses.json. The learning rate of each loss, its threshold and its recalibration are chosen by cross-validation inside the training pictures. A step trains on a random caption of each picture; the first is read at test.
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
from mmfuse.arms import read_folds
from mmfuse.data import CocoPairs
from mmfuse.files import provenance
from mmfuse.image_encoder import make_image_encoder
from mmfuse.metrics import bootstrap, cf1_of1, choose_threshold, ece, mean_average_precision, paired_bootstrap
from mmfuse.text_encoder import make_text_encoder
from mmfuse.token_cache import cache_tokens
from mmfuse.toy import toy_coco

OUT = Path(__file__).resolve().parents[2] / "nbs" / "results" / "losses.json"
RATES, SEEDS, INNER, EPOCHS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), 3, 3, 20


def softmax_loss(logits, y):
    "Cross-entropy against the labels shared out: what an article's CrossEntropyLoss does with several labels."
    return F.cross_entropy(logits, y / y.sum(1, keepdim=True).clamp(min=1))


def make_losses(y):
    "Every loss of chapter 07, by the name that its table shows; class weights come from the training labels."
    return {"cross-entropy": softmax_loss, "bce": losses.bce,
            "bce, weights": lambda x, t: losses.bce(x, t, pos_weight=losses.positive_weights(y)),
            "bce, root weights": lambda x, t: losses.bce(x, t, pos_weight=losses.positive_weights(y, power=0.5)),
            "focal, 2": losses.focal, "asymmetric, 4 1": losses.asymmetric}


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


def fit_predict(data, train, test, *, name, rate, seed, epochs=EPOCHS, batch_size=64):
    "Log-odds (n_test, C) of a linear head that was trained on `train`."
    img, txt, there, y = data
    img, txt, loss = standardized(img, train), standardized(txt, train), make_losses(y[train])[name]
    g = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(img.shape[1] + txt.shape[2], y.shape[1])
    torch.nn.init.normal_(head.weight, std=0.01, generator=g)
    torch.nn.init.zeros_(head.bias)
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
    "The best rate by cross-validation inside `train`, the inner mAP of each, and the best one's inner log-odds."
    part = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)) % INNER
    y, logits = data[3][train].numpy(), {rate: np.empty((len(train), data[3].shape[1]), np.float32) for rate in RATES}
    for rate, k in product(RATES, range(INNER)):
        logits[rate][part == k] = fit_predict(data, train[part != k], train[part == k], name=name, rate=rate, seed=0)
    inner = {rate: mean_average_precision(x, y) for rate, x in logits.items()}
    best = max(inner, key=inner.get)
    return best, inner, logits[best]


def judge(data, splits, name):
    "Everything that the table shows of one loss; `splits` holds (train, test) rows, each test row once."
    rows, runs, where = torch.cat([test for _, test in splits]).numpy(), [], []
    yes, honest = [], []
    for train, test in splits:
        rate, inner, logits = chosen(data, train, name)
        y = data[3][train].numpy()
        cut = choose_threshold(logits, y)
        platt = LogisticRegression(C=1e6).fit(logits.reshape(-1, 1), y.ravel()) # one slope and one shift for all classes
        found = np.stack([fit_predict(data, train, test, name=name, rate=rate, seed=s) for s in range(SEEDS)])
        runs.append(found), yes.append(found >= cut)
        honest.append(platt.predict_proba(found.reshape(-1, 1))[:, 1].reshape(found.shape))
        where.append(dict(rate=rate, inner={str(r): round(v, 4) for r, v in inner.items()}))
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
        print(name, {k: v for k, v in table[name].items() if k != "settings"}, [s["rate"] for s in table[name]["settings"]], flush=True)
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


def write(part, data, found):
    "Put one part into the results file, with where its numbers come from."
    start, table = time.perf_counter(), compare(*found)
    minutes = round((time.perf_counter() - start) / 60, 1)
    where = provenance(data=data, seeds=SEEDS, rates=RATES, inner_folds=INNER, epochs=EPOCHS, minutes=minutes)
    kept = (json.loads(OUT.read_text()) if OUT.exists() else {}) | {part: {**table, "provenance": where}}
    OUT.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["toy"]: write("toy", "toy COCO, 1000 pictures to train, 500 to test, tiny encoders", toy())
    elif len(sys.argv) == 2 and Path(sys.argv[1]).is_dir():
        write("real", "COCO val2017, 427 pictures in five folds, frozen EfficientNet-Lite0 and MiniLM", real(sys.argv[1]))
    else: sys.exit(__doc__)
