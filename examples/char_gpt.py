"""A small GPT on the characters of Python's own documentation, trained by BP, DFA, DKP and LAS for the same time.

Run:    python examples/char_gpt.py --minutes 5 --threads 1
Result: docs/results-language.md

The text is that of `help("...")`, which comes with Python: its first eight tenths train, the ninth chose the learning
rates, the last tests. The points are the ends of the transformer's blocks. A block adds to what it gets, and all that
flows on passes through that sum; within a block the residual path would lead around a point. The error at a character
goes to its own position, through a B of (characters, features).
"""

import argparse
import csv
import math
import platform
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedback import RULES, DirectFeedback, alignment

LENGTH, BATCH, FEATURES, HEADS, BLOCKS = 128, 16, 128, 4, 4
LR = {"BP": 1e-2, "DFA": 3e-3, "DKP": 3e-3, "LAS": 5e-3}  # of 1 minute each, on the ninth tenth
B_LR = {"DKP": 1e-5, "LAS": 1e-3}


class Block(nn.Module):
    """Causal self-attention and an MLP, each added to its input (N, T, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(FEATURES), nn.LayerNorm(FEATURES)
        self.into, self.out = nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, FEATURES)
        self.mlp = nn.Sequential(nn.Linear(FEATURES, 4 * FEATURES), nn.GELU(), nn.Linear(4 * FEATURES, FEATURES))

    def forward(self, h: Tensor) -> Tensor:
        """Map (N, T, D) to (N, T, D)."""
        q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in self.into(self.norm1(h)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(attended.transpose(1, 2).flatten(2))
        return h + self.mlp(self.norm2(h))


class GPT(nn.Module):
    """Maps characters (N, T) to the logits of those that follow, (N, T, characters)."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(characters, FEATURES), nn.Embedding(LENGTH, FEATURES)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.head = nn.Sequential(nn.LayerNorm(FEATURES), nn.Linear(FEATURES, characters))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T) to (N, T, characters)."""
        return self.head(self.blocks(self.token(x) + self.position.weight[: x.shape[1]]))


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy, in nats a character."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


@torch.no_grad()
def test(net: nn.Module, text: Tensor) -> float:
    """The loss over all of a text, in pieces of `LENGTH`."""
    pieces = len(text[1:]) // LENGTH * LENGTH
    x, y = text[:pieces].view(-1, LENGTH), text[1 : pieces + 1].view(-1, LENGTH)
    net.eval()
    losses = [loss_of(net(a), b).item() * len(a) for a, b in zip(x.split(64), y.split(64), strict=True)]
    net.train()
    return sum(losses) / len(x)


def train(rule: str, text: dict[str, Tensor], args: argparse.Namespace) -> dict[str, object]:
    """Train by `rule` for `args.minutes`; return a row of the table."""
    torch.manual_seed(args.seed)
    characters = int(max(part.max() for part in text.values())) + 1
    model, lr, b_lr = GPT(characters), args.lr or LR[rule], args.b_lr or B_LR.get(rule, 0.0)
    points = [f"blocks.{number}" for number in range(BLOCKS)]
    net = DirectFeedback(model, points, rule, example=torch.zeros(1, LENGTH, dtype=torch.int64))
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(model.parameters(), lr, weight_decay=0.1)]
    if RULES[rule].learns:
        optimizers.append(torch.optim.Adam(net.feedback.parameters(), b_lr))
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    step, start, done = 0, time.process_time(), 0.0
    while done < 1:
        for optimizer, rate in zip(optimizers, rates, strict=True):  # a cosine over the time there is, after a rise
            optimizer.param_groups[0]["lr"] = rate * min(1, 50 * done + 0.01) * (1 + math.cos(math.pi * done)) / 2
        first = torch.randint(len(text["train"]) - LENGTH, (BATCH,))
        piece = text["train"][first[:, None] + torch.arange(LENGTH + 1)]
        x, y = piece[:, :-1], piece[:, 1:]
        loss_of(net(x, target=y), y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        done = (time.process_time() - start) / (60 * args.minutes)
    angles = alignment(net, x, y, loss_of)
    row: dict[str, object] = {"rule": rule, "lr": lr, "b_lr": b_lr or "", "seed": args.seed, "steps": step}
    row |= {part: round(test(net, text[part]), 4) for part in ("valid", "test")}
    row |= {point: round(angles[point]["alignment_deg"], 1) for point in points}
    return row | {"minutes": args.minutes, "python": platform.python_version(), "torch": torch.__version__}


def documentation() -> dict[str, Tensor]:
    """Python's documentation as numbers of characters, in its three parts."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    encoded = torch.tensor([numbers[character] for character in text])
    parts = encoded.tensor_split([8 * len(encoded) // 10, 9 * len(encoded) // 10])
    return dict(zip(("train", "valid", "test"), parts, strict=True))


def append_row(path: Path, row: dict[str, object]) -> None:
    """Add a row to a csv, with a first line of names if the file is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Train by each rule and print the table; add to a csv if one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", choices=LR, default=list(LR))
    parser.add_argument("--minutes", type=float, default=5, help="of the processor's time, for each rule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of torch; by default as many as it takes")
    parser.add_argument("--lr", type=float, help="of the weights, by AdamW")
    parser.add_argument("--b-lr", type=float, help="of B, by Adam")
    parser.add_argument("--csv", type=Path, help="file to which the rows are added")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    text = documentation()
    print(
        "| rule | steps | test loss, nats a character | angles at the ends of the blocks, degrees |\n|---|---|---|---|"
    )
    for rule in args.rules:
        row = train(rule, text, args)
        angles = " ".join(str(row[f"blocks.{number}"]) for number in range(BLOCKS))
        print(f"| {rule} | {row['steps']} | {row['test']} | {angles} |", flush=True)
        if args.csv:
            append_row(args.csv, row)


if __name__ == "__main__":
    main()
