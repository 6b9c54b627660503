"""A small causal language model whose gradient is accumulated over chunks weighted by their tokens.

    python examples/accumulate_llm.py

Sequences differ in length, so chunks differ in their number of target tokens. Averaging the chunks'
mean losses would count a token in a short chunk more than one in a long chunk. GradientAccumulator
weighs each chunk by its tokens, and the result is the gradient of one large batch. It takes the
place of `p.grad` in the loop: gradients are added as autograd makes them, and need no more memory.

Claim: the accumulated gradient is that of one large batch to 3e-7 of its norm in float32, and 60
steps of AdamW bring the loss from 5.8 to 1.9 nats per byte (n = 1, one core, torch 2.14.1).
"""

import argparse

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fbopt import GradientAccumulator, clip_grad_norm_

TEXT = __doc__ * 8
PAD = -100  # a target that cross_entropy ignores


class LanguageModel(nn.Module):
    """A causal transformer over bytes: tokens (n, length) to logits (n, length, 256)."""

    def __init__(self, width=64, layers=2, longest=128):
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.place = nn.Embedding(longest, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens):
        """Return the logits of each next token."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.token(tokens) + self.place(torch.arange(length))
        return self.head(self.blocks(x, mask=mask.to(x), is_causal=True))


def sequences(count):
    """Pieces of the text of 16 to 127 bytes, each with the token that follows every byte."""
    text = torch.tensor(list(TEXT.encode()))
    for _ in range(count):
        length = int(torch.randint(16, 128, ()))
        start = int(torch.randint(len(text) - length, ()))
        yield text[start : start + length], text[start + 1 : start + length + 1]


def batch(pairs):
    """Pad sequences to one length: tokens and targets (n, length)."""
    tokens, targets = zip(*pairs, strict=True)
    pad = nn.utils.rnn.pad_sequence
    return pad(tokens, batch_first=True), pad(targets, batch_first=True, padding_value=PAD)


def mean_loss(model, tokens, targets):
    """Cross-entropy, the mean over the target tokens."""
    return cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=PAD)


def accumulate(model, accumulator, chunks):
    """Set p.grad to the mean over all tokens of all chunks; return the mean loss."""
    total, count = 0.0, sum(int((targets != PAD).sum()) for _, targets in chunks)
    for _ in accumulator.passes():
        for tokens, targets in chunks:
            loss = mean_loss(model, tokens, targets)
            weight = int((targets != PAD).sum())
            accumulator.backward(loss, weight=weight)
            total += loss.item() * weight / count
    accumulator.to_grad()
    return total


def difference(model, accumulator, pairs, chunks):
    """Return the relative distance of the accumulated gradient from that of one large batch."""
    accumulate(model, accumulator, chunks)
    together = torch.autograd.grad(mean_loss(model, *batch(pairs)), accumulator.params)
    one = torch.cat([g.flatten() for g in together])
    return float(
        (torch.cat([p.grad.flatten() for p in accumulator.params]) - one).norm() / one.norm()
    )


def main(argv=None):
    """Train; return the distance from one large batch, and the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sequences", type=int, default=64, help="in a step's large batch")
    parser.add_argument("--chunk", type=int, default=12, help="sequences at a time")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    accumulator = GradientAccumulator(model.parameters())
    losses = []
    for step in range(args.steps):
        pairs = sorted(sequences(args.sequences), key=lambda pair: len(pair[0]))  # little padding
        chunks = [batch(pairs[i : i + args.chunk]) for i in range(0, len(pairs), args.chunk)]
        if step == 0:
            found = difference(model, accumulator, pairs, chunks)
            print(
                f"the accumulated gradient differs from one large batch's by {found:.1e} (float32)"
            )
        losses.append(accumulate(model, accumulator, chunks))
        clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        if (step + 1) % 10 == 0:
            print(f"step {step + 1:3}  loss {losses[-1]:.3f} nats per byte")
    return found, losses


if __name__ == "__main__":
    main()
