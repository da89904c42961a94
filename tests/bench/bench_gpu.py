"""A GPU: pictures a second and share of its peak, end to end, against Hugging Face's Trainer with the same model.

    python tests/bench/bench_gpu.py [--batch 128] [--peak 989]      writes nbs/results/training_gpu.json

ResNet-50 and BERT-base in shape (random weights), the cross-attention head, pictures and captions made up and already on the GPU, so that
what is measured is the step and not the disk. Ours adds one thing at a time: float32, bf16, `torch.compile`. channels_last and the fused
optimizer are always on, on a GPU. The other side is `transformers.Trainer` with bf16, its fused AdamW and `torch_compile`, over the same
batches and the same network. `--peak` is the card's dense bf16 peak in TFLOP/s, from its data sheet; FLOPs are counted by PyTorch
(forward and backward). Arms take turns; medians.

Not run yet: no GPU was at hand when this was written.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, TrainerCallback, TrainingArguments
from transformers import Trainer as HuggingFaceTrainer

from mmfuse.feeds import EndToEnd, Piece, Work
from mmfuse.files import atomic, provenance
from mmfuse.fusion import make_head
from mmfuse.image_encoder import make_image_encoder
from mmfuse.losses import bce
from mmfuse.settings import Settings
from mmfuse.text_encoder import TextEncoder, make_text_encoder
from mmfuse.trainer import Trainer, make_accelerator, step

OUT = Path(__file__).resolve().parents[2] / "nbs" / "results" / "training_gpu.json"
CLASSES, TOKENS, STEPS, WARM = 80, 16, 30, 10


class Same:
    "A feed that gives one batch again and again."
    def __init__(self, work, n): self.work, self.n, self.labels = work, n, torch.zeros(1)
    def __len__(self): return self.n
    def epoch(self, epoch, start=0):
        while True: yield self.work


def new_model(device):
    torch.manual_seed(0)
    image = make_image_encoder("resnet50", pretrained=False)
    text = TextEncoder(BertModel(BertConfig(), add_pooling_layer=False), make_text_encoder("tiny").tokenizer, "bert-base")
    return EndToEnd(image, text, make_head("cross_attention", image.dim, text.dim, CLASSES)).to(device)


def inputs(batch, device):
    g = torch.Generator().manual_seed(0)
    image = torch.randn(batch, 3, 224, 224, generator=g).to(device, memory_format=torch.channels_last)
    ids, mask = torch.randint(5, 1000, (batch, TOKENS), generator=g).to(device), torch.ones(batch, TOKENS, dtype=torch.bool, device=device)
    return (image, ids, mask), (torch.rand(batch, CLASSES, generator=g) < 0.04).float().to(device)


def flops(batch, device):
    "Of one step, as PyTorch counts them."
    model, (x, y) = new_model(device).train(), inputs(batch, device)
    with FlopCounterMode(display=False) as counter: bce(model(*x), y).backward()
    return counter.get_total_flops()


def ours(batch, device, **more):
    "Seconds of each step after the warm-up."
    settings, accelerator = Settings(end_to_end=True, head_epochs=0, batch_size=batch, **more), make_accelerator(more["precision"])
    x, y = inputs(batch, device)
    trainer = Trainer(new_model(device), Same(Work(list(range(batch)), [Piece(y, x, 1.0)]), 1000 * batch), settings, accelerator)
    times = []
    for i in range(WARM + STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(trainer)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[WARM:]


class Wrapped(nn.Module):
    "The same network as Hugging Face's Trainer wants it."
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, image, ids, mask, labels): return {"loss": bce(self.model(image, ids, mask), labels)}


class Clock(TrainerCallback):
    def __init__(self): self.times = []
    def on_step_begin(self, *args, **kwargs):
        torch.cuda.synchronize()
        self.start = time.perf_counter()
    def on_step_end(self, *args, **kwargs):
        torch.cuda.synchronize()
        self.times.append(time.perf_counter() - self.start)


def theirs(batch, device, compile):
    "Seconds of each step of Hugging Face's Trainer."
    (image, ids, mask), y = inputs(batch, device)
    together = dict(image=image, ids=ids, mask=mask, labels=y)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        how = TrainingArguments(folder, per_device_train_batch_size=batch, max_steps=WARM + STEPS, bf16=True, optim="adamw_torch_fused", torch_compile=compile, report_to=[],
                                save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, max_grad_norm=0.0, remove_unused_columns=False)
        rows = [{"i": i} for i in range(batch * (WARM + STEPS))]
        HuggingFaceTrainer(Wrapped(new_model(device)), how, train_dataset=rows, data_collator=lambda _: together, callbacks=[clock]).train()
    return clock.times[WARM:]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--peak", type=float, default=989.0, help="dense bf16 TFLOP/s of the card")
    args = parser.parse_args()
    if not torch.cuda.is_available(): sys.exit("no GPU here: nothing is written")
    device, start, times = torch.device("cuda"), time.perf_counter(), {}
    work = flops(args.batch, device)
    arms = {"ours, float32": lambda: ours(args.batch, device, precision="fp32"), "ours, bf16": lambda: ours(args.batch, device, precision="bf16"),
            "ours, bf16, compiled": lambda: ours(args.batch, device, precision="bf16", compile=True),
            "Hugging Face Trainer, bf16": lambda: theirs(args.batch, device, False), "Hugging Face Trainer, bf16, compiled": lambda: theirs(args.batch, device, True)}
    for _ in range(3):
        for name, run in arms.items():
            times.setdefault(name, []).extend(run())
            torch.cuda.empty_cache()
    found = {name: dict(milliseconds=round(1e3 * (s := statistics.median(t)), 2), pictures_per_second=round(args.batch / s, 1),
                        share_of_peak=round(work / s / args.peak / 1e12, 3)) for name, t in times.items()}
    content = dict(batch=args.batch, gflop_a_step=round(work / 1e9, 1), arms=found,
                   provenance=provenance(gpu=torch.cuda.get_device_name(), peak_tflops=args.peak, minutes=round((time.perf_counter() - start) / 60, 1)))
    with atomic(OUT) as path: path.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
