"""A rule of one's own: sign feedback, which sends only the signs of the output error through a fixed B.

Run:    python examples/own_rule.py
Prints the training accuracy of DFA and of the new rule on a toy problem.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedback import RULES, DirectFeedback, Labels, Rule


def sign_of_error(error_NK: Tensor, h_ND: Tensor | None, feedback_KD: Tensor, labels: Labels | None) -> Tensor:
    """sign(e) / N (N, K)."""
    return error_NK.sign() / len(error_NK)


RULES["SIGN"] = Rule("SIGN", sent=sign_of_error)


def accuracy(rule: str) -> float:
    """Train a small MLP by `rule`; return its training accuracy in percent."""
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    y = (x[:, :4] ** 2).argmax(1)  # no linear function of x
    model = nn.Sequential(nn.Sequential(nn.Linear(20, 128), nn.Tanh()), nn.Linear(128, 4))
    net = DirectFeedback(model, points=["0"], rule=rule, example=x[:2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(20):
        for batch in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
    return 100 * (net.eval()(x).argmax(1) == y).double().mean().item()


if __name__ == "__main__":
    for name in ("DFA", "SIGN"):
        print(f"{name}: {accuracy(name):.1f} %")
