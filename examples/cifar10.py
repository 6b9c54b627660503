"""The ladder of "Stochastic Training is Not Necessary for Generalization" on CIFAR-10, in one file.

    python examples/cifar10.py FOLDER --row fb-strong

FOLDER holds cifar-10-batches-py (torchvision unpacks it), or {train,test}/CLASS/IMAGE files.
ResNet-18, crops and flips drawn anew in every pass, as in Geiping et al. (ICLR 2022).
Claim (CIFAR-10 (JPEG), --width 8 --samples 2048 --share 0.1, n = 1, a core of an AMD EPYC,
torch 2.14.1): sgd 54.4 %, fb-penalty 58.2 %. At full size, or on a GPU, it has not been run.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad
from torchvision.datasets import CIFAR10, ImageFolder

from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty

FB = {"lr": 0.1, "schedule": (300, 5, 300), "chunk": 128}  # passes, warm-up, cosine
LONG = FB | {"lr": 0.4, "schedule": (3000, 400, 4000)}
CLIP = LONG | {"max_norm": 0.25}
PENALTY = CLIP | {"lr": 0.8, "penalty": 0.5}
LADDER = {  # each row with the paper's test accuracy (%); a pass is an epoch or a full-batch step
    "sgd": FB | {"stochastic": True, "paper": 95.70},
    "fb": FB | {"paper": 75.42},
    "fb-long": LONG | {"paper": 87.36},
    "fb-clip": CLIP | {"paper": 93.85},
    "fb-penalty": PENALTY | {"paper": 95.36},
    "fb-strong": PENALTY | {"chunk": 32, "paper": 95.67},
}


class Block(nn.Module):
    """relu(f(x) + shortcut(x)); f is two 3x3 convolutions, its last BatchNorm begins at zero."""

    def __init__(self, inner, outer, stride):
        super().__init__()
        first = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()
        last = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        short = nn.AvgPool2d(stride), nn.Conv2d(inner, outer, 1, bias=False), nn.BatchNorm2d(outer)
        self.f = nn.Sequential(*first, *last)
        self.shortcut = nn.Identity() if inner == outer else nn.Sequential(*short)
        nn.init.zeros_(last[1].weight)

    def forward(self, x):
        """Map (n, inner, h, w) to (n, outer, h / stride, w / stride)."""
        return (self.f(x) + self.shortcut(x)).relu()


def resnet18(width):
    """The paper's ResNet-18: four stages of two blocks; 11,173,962 parameters at width 64."""
    layers = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for a, b, stride in ((1, 1, 1), (1, 2, 2), (2, 4, 2), (4, 8, 2)):
        layers += [Block(a * width, b * width, stride), Block(b * width, b * width, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def load(folder, train, device):
    """Images (N, 3, 32, 32), uint8, and labels, in an order that is shuffled once and for all."""
    unpacked, part = (folder / "cifar-10-batches-py").is_dir(), "train" if train else "test"
    found = CIFAR10(folder, train) if unpacked else ImageFolder(folder / part)
    images = np.stack([np.asarray(image) for image, _ in found])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(images).permute(0, 3, 1, 2)[order].to(device)
    y = torch.tensor(found.targets)[order].to(device)
    return x.contiguous(memory_format=torch.channels_last), y


def normalize(x):
    """Scale pixels by the mean and standard deviation of CIFAR-10's channels."""
    mean, std = torch.tensor([[125.3, 123.0, 113.9], [63.0, 62.1, 66.7]], device=x.device)
    return (x.float() - mean[:, None, None]) / std[:, None, None]


def crop_and_flip(x):
    """Random crops after padding by 4 black pixels, and horizontal flips, of (n, 3, 32, 32)."""
    n, pixel = len(x), torch.arange(32, device=x.device)
    rows, columns = (pixel + torch.randint(9, (n, 1), device=x.device) for _ in range(2))
    columns = torch.where(torch.rand(n, 1, device=x.device) < 0.5, columns, columns.flip(1))
    image = torch.arange(n, device=x.device)[:, None, None]
    return pad(x, (4, 4, 4, 4))[image, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


class Chunks:
    """The training set, `size` images at a time, with new crops and flips at every iteration."""

    def __init__(self, x, y, size, shuffle):
        self.x, self.y, self.size, self.shuffle = x, y, size, shuffle

    def __iter__(self):
        order = torch.randperm(len(self.y)) if self.shuffle else torch.arange(len(self.y))
        for index in order.to(self.y.device).split(self.size):
            yield normalize(crop_and_flip(self.x[index])), self.y[index]


def sgd_epoch(model, optimizer, chunks):
    """Take a step on each mini-batch; return the mean loss."""
    total = 0.0
    for inputs, target in chunks:
        optimizer.zero_grad()
        (loss := cross_entropy(model(inputs), target)).backward()
        optimizer.step()
        total += loss.item() * len(target)
    return total / len(chunks.y)


@torch.no_grad()
def accuracy(model, x, y):
    """Return the share of images that the model classifies right."""
    model.eval()
    output = torch.cat([model(normalize(part)) for part in x.split(500)])
    model.train()
    return (output.argmax(1) == y).float().mean().item()


def main(argv=None):
    """Train one row; return the mean training loss of every pass and the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--row", choices=LADDER, default="fb-penalty")
    parser.add_argument("--width", type=int, default=64, help="channels of the first layer")
    parser.add_argument("--samples", type=int, help="train on so many images only")
    parser.add_argument("--share", type=float, default=1.0, help="of the row's passes")
    args = parser.parse_args(argv)
    row, device = LADDER[args.row], "cuda" if torch.cuda.is_available() else "cpu"
    passes, warmup, cosine = (max(1, round(args.share * n)) for n in row["schedule"])
    x, y = (t[: args.samples] for t in load(args.folder, True, device))
    test = load(args.folder, False, device)
    torch.manual_seed(0)
    model = resnet18(args.width).to(device, memory_format=torch.channels_last)
    sgd = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    optimizer = FullBatchGD(model.parameters(), row["lr"], **sgd, max_norm=row.get("max_norm"))
    chunks = Chunks(x, y, row["chunk"], "stochastic" in row)
    penalty = GradientPenalty(strength=row["penalty"]) if "penalty" in row else None
    closure = FullBatchClosure(model, cross_entropy, chunks, penalty=penalty, optimizer=optimizer)
    losses = []
    for done in range(passes):
        falling = 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup) / cosine)))
        factor = (done + 1) / warmup if done < warmup else falling
        optimizer.param_groups[0]["lr"] = row["lr"] * factor
        full = "stochastic" not in row
        loss = optimizer.step(closure) if full else sgd_epoch(model, optimizer, chunks)
        losses.append(float(loss))
        if (done + 1) % max(1, passes // 20) == 0 or done + 1 == passes:
            found = accuracy(model, *test)
            print(f"pass {done + 1:4}  loss {losses[-1]:.4f}  test {found:.2%}", flush=True)
    print(f"{args.row}: {found:.2%} (paper, all images, width 64: {row['paper']} %)")
    return losses, found


if __name__ == "__main__":
    main()
