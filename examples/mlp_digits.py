"""An MLP on scikit-learn's 8x8 digits, trained by every rule.

Run:    python examples/mlp_digits.py
Prints for each rule the test accuracy after 20 epochs, and the angle to backpropagation's signal at the first block.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from feedback import RULES, DirectFeedback, alignment


def train(rule: str, x: torch.Tensor, y: torch.Tensor) -> DirectFeedback:
    """Train 64-128-128-10 by `rule` on images x (N, 64) and labels y (N,)."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU()),
        nn.Sequential(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU()),
        nn.Linear(128, 10),
    )
    net = DirectFeedback(model, points=["0", "1"], rule=rule, example=x[:2])
    of_weights = net.parameters() if RULES[rule].as_weight else model.parameters()
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(of_weights, lr=0.02, momentum=0.9, weight_decay=1e-3)]
    if RULES[rule].learns:
        optimizers.append(torch.optim.Adam(net.feedback.parameters(), lr=1e-3))
    for _ in range(20):
        for batch in torch.randperm(len(x)).split(32):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = F.cross_entropy(net(x[batch], target=y[batch]), y[batch])
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    return net


def main() -> None:
    """Train by every rule and print the table."""
    digits = load_digits()
    split = train_test_split(digits.data / 8 - 1, digits.target, test_size=0.25, random_state=0)
    x, x_test = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
    y, y_test = (torch.tensor(part) for part in split[2:])
    print("| rule | test accuracy, % | angle at the first block |\n|---|---|---|")
    for rule in RULES:
        net = train(rule, x, y)
        degrees = alignment(net.train(), x[:256], y[:256])["0"]["alignment_deg"]
        accuracy = 100 * (net.eval()(x_test).argmax(1) == y_test).double().mean().item()
        print(f"| {rule} | {accuracy:.1f} | {degrees:.1f} |")


if __name__ == "__main__":
    main()
