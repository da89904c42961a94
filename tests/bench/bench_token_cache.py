"""What the token cache saves, and what half precision costs.

    python tests/bench/bench_token_cache.py        writes nbs/results/token_cache.json; five minutes on one core

Part one: one epoch of a fusion head over toy pictures, ResNet-50 and BERT-base in shape (random weights: the cost is the
same), once with both frozen encoders in the loop and once from the cache. Processor seconds of this process, so that a busy
machine does not count. Part two: mAP of a linear probe and of name similarity on tokens in float32 and as the cache keeps
them, `tiny` encoders, 1000 pictures to train on and 500 to test.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import BertConfig, BertModel

from mmfuse.data import CocoPairs
from mmfuse.files import atomic, provenance
from mmfuse.fusion import make_head
from mmfuse.image_encoder import make_image_encoder
from mmfuse.losses import bce
from mmfuse.metrics import mean_average_precision
from mmfuse.text_encoder import TextEncoder, make_text_encoder, masked_mean, name_similarity
from mmfuse.token_cache import cache_tokens
from mmfuse.toy import toy_coco

OUT = Path(__file__).resolve().parents[2] / "nbs" / "results" / "token_cache.json"
BATCH = 16


def seconds(run) -> float:
    "Processor time of one call."
    start = time.process_time()
    run()
    return time.process_time() - start


def epoch_times(n: int = 64) -> dict:
    "Processor seconds of an epoch of n pairs: encoders in the loop, making the cache, and from the cache."
    with tempfile.TemporaryDirectory() as folder:
        data = CocoPairs(toy_coco(Path(folder) / "toy", n_train=n, n_val=1), "train2017")
        images = make_image_encoder("resnet50", pretrained=False).freeze()
        texts = TextEncoder(BertModel(BertConfig()), make_text_encoder("minilm").tokenizer, "bert-base").freeze()
        head = make_head("cross_attention", images.dim, texts.dim, len(data.classes))
        optimizer = torch.optim.AdamW(head.parameters())
        prepare = images.transform(train=False)

        def step(img, txt, mask, y):
            optimizer.zero_grad()
            bce(head(img, txt, mask), y).backward()
            optimizer.step()

        def end_to_end():
            for s in range(0, n, BATCH):
                rows = [data[i] for i in range(s, min(s + BATCH, n))]
                with torch.no_grad():
                    img = images(torch.stack([prepare(r.image) for r in rows]))
                    txt, mask = texts.encode([r.captions[0] for r in rows])
                step(img, txt, mask, torch.stack([r.labels for r in rows]))

        made = []
        fill = seconds(lambda: made.append(cache_tokens(data, images, texts, cache_dir=folder, n_captions=1, progress=False)))
        tokens = made[0]

        def from_cache():
            for s in range(0, n, BATCH):
                rows = tokens.subset(slice(s, s + BATCH))
                img, txt = (torch.from_numpy(x.astype(np.float32)) for x in (rows.img, rows.txt[:, 0]))
                step(img, txt, torch.from_numpy(np.array(rows.mask[:, 0])), torch.from_numpy(rows.labels))

        from_cache()  # the first epoch pays for allocations
        return dict(pictures=n, head="cross_attention", image_encoder="ResNet-50", text_encoder="BERT-base",
                    end_to_end=seconds(end_to_end), fill=fill, from_cache=min(seconds(from_cache) for _ in range(3)))


def half_precision() -> dict:
    "mAP from the same tokens in float32 and in float16."
    images, texts = make_image_encoder("tiny").freeze(), make_text_encoder("tiny").freeze()
    prepare, features, y, scores = images.transform(train=False), {"float32": [], "float16": []}, [], {}
    for split in ("train2017", "val2017"):
        data = CocoPairs(toy_coco(), split)
        with torch.no_grad():
            img = torch.cat([images(prepare(s.image)[None]) for s in data])
        txt, mask = texts.encode([c[0] for c in data.captions])
        y.append(data.labels)
        for kind, cast in {"float32": lambda x: x, "float16": lambda x: x.half().float()}.items():
            features[kind].append(torch.cat([cast(img).mean(1), masked_mean(cast(txt), mask)], 1).numpy())
            names = masked_mean(*texts.encode(data.classes))
            scores[kind] = name_similarity(cast(txt), mask, names, best=True)
    found = {}
    for kind, (x, x_test) in features.items():
        model = make_pipeline(StandardScaler(), RidgeCV(alphas=(10, 100, 1000, 10000))).fit(x, y[0].numpy())
        found[kind] = dict(probe=mean_average_precision(model.predict(x_test), y[1]), name_similarity=mean_average_precision(scores[kind], y[1]))
    return found


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    content = dict(epoch=epoch_times(), precision=half_precision())
    content |= provenance(data="toy COCO, seed 0", seed=0)
    print(json.dumps(content, indent=1))
    with atomic(OUT) as path:
        path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
