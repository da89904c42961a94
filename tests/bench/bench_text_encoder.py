"""What [CLS] and the mean know: the same BERT trained to guess hidden words, and to bring captions of one picture together.

    python tests/bench/bench_text_encoder.py COCO_ROOT      writes nbs/results/text_encoder.json; 15 minutes on one core

Part one trains `tiny_bert` twice from the same start on the captions of the toy COCO's train2017 and looks at it on the way:
a linear probe on 1000 captions and name similarity, both judged on the 500 captions of val2017. Part two is `minilm` and
`tiny` on real pictures: COCO_ROOT holds val2017 and `folds.json` ({image_id: fold}); its probes are out-of-fold.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mmfuse.alignment import info_nce
from mmfuse.data import CocoPairs
from mmfuse.files import atomic, provenance
from mmfuse.metrics import mean_average_precision
from mmfuse.preprocessing import tokenize
from mmfuse.text_encoder import TextEncoder, make_text_encoder, masked_mean, tiny_bert
from mmfuse.toy import toy_coco

OUT = Path(__file__).resolve().parents[2] / "nbs" / "results" / "text_encoder.json"
STEPS, LOOK, SEEDS = 800, (0, 50, 100, 200, 400, 600, 800), (0, 1)


def masked_words(encoder: TextEncoder, ids: Tensor, mask: Tensor) -> Tensor:
    "BERT's loss: 15 % of the words are hidden (of these a tenth swapped, a tenth left), and guessed from the rest."
    chosen = (torch.rand(ids.shape) < 0.15) & (ids > 4)
    how = torch.rand(ids.shape)
    shown = ids.masked_fill(chosen & (how < 0.8), encoder.tokenizer.mask_token_id)
    swapped = torch.randint_like(ids, 5, len(encoder.tokenizer))
    shown = torch.where(chosen & (how > 0.9), swapped, shown)
    guess = encoder(shown, mask)[chosen] @ encoder.model.get_input_embeddings().weight.T
    return F.cross_entropy(guess, ids[chosen])


def same_picture(encoder: TextEncoder, ids: Tensor, mask: Tensor) -> Tensor:
    "The first half of the captions and the second are of the same pictures, in the same order."
    first, second = F.normalize(masked_mean(encoder(ids, mask), mask), dim=-1).chunk(2)
    return info_nce(first, second, logit_scale=20.0)


def probe(x: Tensor, y: Tensor, x_test: Tensor) -> Tensor:
    "Scores of a ridge regression on standardized features; its penalty is chosen without the test captions."
    model = make_pipeline(StandardScaler(), RidgeCV(alphas=(10, 100, 1000, 10000)))
    return torch.as_tensor(model.fit(x.numpy(), y.numpy()).predict(x_test.numpy()))


def pooled(encoder: TextEncoder, texts: list[str]) -> dict[str, Tensor]:
    tokens, mask = encoder.encode(texts)
    return {"[CLS]": tokens[:, 0], "mean": masked_mean(tokens, mask)}


def similarity(x: Tensor, names: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) @ F.normalize(names, dim=-1).T


def learn(loss_of, train: CocoPairs, test: CocoPairs, seed: int) -> list[dict]:
    "Train, and look on the way."
    torch.manual_seed(seed)
    tokenizer = make_text_encoder("tiny").tokenizer
    encoder = TextEncoder(tiny_bert(len(tokenizer)), tokenizer, "bench").train()
    ids, mask = tokenize(tokenizer, [c for five in train.captions for c in five])
    ids, mask = ids.unflatten(0, (-1, 5)), mask.unflatten(0, (-1, 5))  # (N, 5, T)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=STEPS, pct_start=0.2)
    found = []
    for step in range(STEPS + 1):
        if step in LOOK:
            x, x_test, names = (
                pooled(encoder, t)
                for t in ([c[0] for c in train.captions], [c[0] for c in test.captions], test.classes)
            )
            for pooling in x:
                found.append(
                    dict(
                        step=step,
                        pooling=pooling,
                        seed=seed,
                        probe=mean_average_precision(probe(x[pooling], train.labels, x_test[pooling]), test.labels),
                        zero_shot=mean_average_precision(similarity(x_test[pooling], names[pooling]), test.labels),
                    )
                )
                print(loss_of.__name__, found[-1], flush=True)
        if step == STEPS:
            return found
        rows = torch.randperm(len(ids))[:64]
        two = torch.rand(64, 5).argsort(1)[:, :2].T  # (2, 64): two captions of each picture
        i, m = ids[rows, two].flatten(0, 1), mask[rows, two].flatten(0, 1)  # (128, T)
        longest = int(m.sum(1).max())
        loss = loss_of(encoder, i[:, :longest], m[:, :longest])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def real(name: str, data: CocoPairs, folds: Tensor) -> list[dict]:
    "Poolings of one encoder on real captions."
    encoder = make_text_encoder(name).freeze()
    x, names = pooled(encoder, [c[0] for c in data.captions]), pooled(encoder, data.classes)
    found = []
    for pooling in x:
        scores = torch.zeros_like(data.labels)
        for fold in folds.unique():
            out = folds == fold
            scores[out] = probe(x[pooling][~out], data.labels[~out], x[pooling][out])
        zero_shot = mean_average_precision(similarity(x[pooling], names[pooling]), data.labels)
        found.append(dict(encoder=name, pooling=pooling, zero_shot=zero_shot, probe=mean_average_precision(scores, data.labels)))
        print(found[-1], flush=True)
    return found


def main(root: str):
    start = time.perf_counter()
    toy = toy_coco()
    train, test = CocoPairs(toy, "train2017"), CocoPairs(toy, "val2017")
    losses = {"hidden words": masked_words, "same picture": same_picture}
    objectives = {name: [r for s in SEEDS for r in learn(f, train, test, s)] for name, f in losses.items()}
    data = CocoPairs(root, "val2017")
    fold_of = json.loads((Path(root) / "folds.json").read_text())
    folds = torch.tensor([fold_of[str(i)] for i in data.image_ids])
    on_real = [row for name in ("minilm", "tiny") for row in real(name, data, folds)]
    about = "toy COCO of seed 0: 5000 captions to train on, 500 to test; real: 427 labelled pictures of COCO val2017, one caption each, five folds"
    minutes = round((time.perf_counter() - start) / 60, 1)
    content = dict(objectives=objectives, real=on_real, **provenance(data=about, seeds=SEEDS, minutes=minutes))
    with atomic(OUT) as path:
        path.write_text(json.dumps(content, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
