"""Every rule and update of B, and what several test files ask of a net."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from feedback import RULES, DirectFeedback

IN_PLACE = {"update": "inplace", "feedback_lr": 0.1, "feedback_weight_decay": 0.01}


def small_head(h, classes):
    """A head without batch norm, so that several ranks, or micro-batches, do as one does."""
    return nn.Sequential(nn.Flatten(), nn.Linear(h[0].numel(), 4), nn.Tanh(), nn.Linear(4, classes))


VARIANTS = {  # name: rule and options of DirectFeedback
    "BP": ("BP", {}),
    "FA": ("FA", {}),
    "KP": ("KP", {}),
    "DFA": ("DFA", {}),
    "DKP-optimizer": ("DKP", {}),
    "DKP-inplace": ("DKP", IN_PLACE),
    "LAS-optimizer": ("LAS", {}),
    "LAS-inplace": ("LAS", IN_PLACE),
    "DRTP": ("DRTP", {}),
    "HEAD": ("HEAD", {"head": small_head}),
    "LOCAL": ("LOCAL", {"head": small_head}),
}
BY_PRODUCTS = [name for name, rule in RULES.items() if rule.sent and not (rule.head or rule.perturbs)]  # of e and B, h


def each(*names):
    """Parametrize a test over `rule` and `options` of these variants, by default all."""
    names = names or VARIANTS
    return pytest.mark.parametrize(("rule", "options"), [VARIANTS[name] for name in names], ids=names)


def feed_back_the_weights(net):
    """Let each layer's B of FA or KP be its weight, so that the rule is backpropagation."""
    for name, B in net.feedback.state_dict(keep_vars=True).items():
        B.data.copy_(weights_by_feedback_name(net.model)[name].data)


def weights_by_feedback_name(model):
    """Every parameter by the names that its B may have: its own, and for a weight also its layer's."""
    named = {name.replace(".", "_"): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    return named | {name.removesuffix("_weight"): parameter for name, parameter in named.items()}


def assert_equals_bp_where_b_is_the_weight(model, points, rule, x, y):
    """By FA and KP every parameter gets backpropagation's gradient, where B is the weight."""
    net = DirectFeedback(copy.deepcopy(model), points, rule, x)
    feed_back_the_weights(net)
    for module in (net, model):
        torch.manual_seed(1)
        F.cross_entropy(module(x), y).backward()
    for got, expected in zip(net.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)
    return net
