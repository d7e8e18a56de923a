"""A small BERT of Hugging Face's transformers, on sentences made here, trained by several rules.

Run:    python examples/hf_bert.py    (pip install transformers; without it, the script says so and ends)
Prints for each rule the accuracy on other sentences, and the angles to backpropagation's signals.

A sentence's class is that of the word that it has most often. The points are the ends of the layers, where all that
flows on passes through one sum and its normalisation. The model is called by keywords and returns a record with
`.logits`. Its classes have no positions, so a sentence's error goes to all of its words (`positions="pooled"`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from feedback import RULES, DirectFeedback, alignment

WORDS, CLASSES = 20, 4


def sentences(count: int, length: int) -> tuple[dict[str, Tensor], Tensor]:
    """Padded word ids (N, T) and their mask, and the classes: the words 1 to 4 are counted, the others are noise."""
    ids = torch.randint(1, WORDS, (count, length))
    shown = torch.arange(length) < torch.randint(length // 2, length + 1, (count, 1))
    ids = ids * shown
    y = torch.randint(CLASSES, (count,))
    ids[:, 1 : length // 2 : 3] = 1 + y[:, None]
    return {"input_ids": ids, "attention_mask": shown.long()}, y


def main() -> None:
    """Train by each rule and print the table."""
    try:
        from transformers import BertConfig, BertForSequenceClassification
    except ImportError:
        print("transformers is not installed: pip install transformers")
        return
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_labels": CLASSES,
    }
    config = BertConfig(vocab_size=WORDS, max_position_embeddings=32, **shape)
    torch.manual_seed(0)
    x, y = sentences(512, 24)
    x_test, y_test = sentences(512, 18)
    points = ["bert.embeddings", *(f"bert.encoder.layer.{number}" for number in range(3))]
    print(f"| rule | accuracy, % | angles at {', '.join(points)} |\n|---|---|---|")
    for rule in ("BP", "FA", "KP", "DFA", "DKP", "LAS"):
        torch.manual_seed(1)
        model, example = BertForSequenceClassification(config), {key: value[:2] for key, value in x.items()}
        net = DirectFeedback(model, points, rule, example, logits="logits", positions="pooled")
        of_weights = net.parameters() if RULES[rule].as_weight else model.parameters()
        optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(of_weights, lr=2e-3)]
        if RULES[rule].learns:
            optimizers.append(torch.optim.Adam(net.feedback.parameters(), lr=1e-3))
        for _ in range(6):
            for batch in torch.randperm(len(y)).split(32):
                out = net(**{key: value[batch] for key, value in x.items()}, target=y[batch])
                F.cross_entropy(out.logits, y[batch]).backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        angles = alignment(net, {key: value[:64] for key, value in x.items()}, y[:64])
        with torch.no_grad():
            accuracy = 100 * (net.eval()(**x_test).logits.argmax(1) == y_test).double().mean().item()
        degrees = " ".join(f"{angles[point]['alignment_deg']:.0f}" for point in points)
        print(f"| {rule} | {accuracy:.1f} | {degrees} |")


if __name__ == "__main__":
    main()
