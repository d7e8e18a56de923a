"""Logits with positions, and activations with others: every gradient against blocks that are run one by one.

The reference takes e to a point's positions as the adjoint of PyTorch's own adaptive average pooling.
"""

import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from variants import BY_PRODUCTS, IN_PLACE, VARIANTS, each

from feedback import RULES, DirectFeedback, alignment, direct_feedback
from feedback.labels import labels_of
from feedback.positions import features_last, from_positions, to_positions

N, K, T = 3, 4, 6
POOL = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


class FeaturesLast(nn.Module):
    def forward(self, x):
        return x.movedim(1, -1)


def tokens():
    """(N, T) to (N, T, K)."""
    return nn.Sequential(
        nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 5), nn.Tanh()),
        nn.Sequential(nn.Linear(5, 7), nn.Tanh()),
        nn.Linear(7, K),
    )


def pixels():
    """Feature maps of half the size of the logits, of a quarter and of their own: (N, 2, H, W) to (N, K, H, W)."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 5, 3, 2, padding=1), nn.Tanh()),
        nn.Sequential(nn.Conv2d(5, 6, 3, 2, padding=1), nn.Tanh()),
        nn.Sequential(nn.Upsample(scale_factor=4), nn.Conv2d(6, 5, 3, padding=1), nn.Tanh()),
        nn.Conv2d(5, K, 1),
    )


def coarse():
    """Logits at a third of the positions of the feature maps: (N, 2, 12, 9) to (N, K, 4, 3)."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.Tanh()),
        nn.Sequential(nn.AvgPool2d((2, 1)), nn.Conv2d(5, 5, 3, padding=1), nn.Tanh()),
        nn.Sequential(nn.AdaptiveAvgPool2d((4, 3)), nn.Conv2d(5, K, 1)),
    )


def classifier():
    """(N, 2, H, W) to (N, K), through feature maps of any size."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.Tanh()),
        nn.Sequential(nn.Conv2d(5, 6, 3, 2), nn.Tanh()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, K)),
    )


def decoder():
    """(N, 4) to (N, 6, K): the first point has no positions."""
    return nn.Sequential(
        nn.Sequential(nn.Linear(4, 12), nn.Tanh()),
        nn.Sequential(nn.Unflatten(1, (T, 2)), nn.Linear(2, 5), nn.Tanh()),
        nn.Linear(5, K),
    )


def volumes():
    """(N, 1, 4, 5, 6) to (N, 4, 5, 6, K): the classes last, the features of the points, too."""
    return nn.Sequential(
        nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.Tanh(), FeaturesLast()),
        nn.Linear(3, K),
    )


IMAGES = {"x": (N, 2, 8, 12), "class_dim": 1}
NETS = {  # model, and its input's shape and options
    "tokens": (tokens, {"x": (N, T)}),
    "tokens, one error for each sample": (tokens, {"x": (N, T), "positions": "pooled"}),
    "finer logits": (pixels, IMAGES),
    "finer logits that are no multiple": (pixels, {"x": (N, 2, 4, 4), "class_dim": 1}),
    "pixels, one error for each sample": (pixels, IMAGES | {"positions": "pooled"}),
    "coarser logits": (coarse, {"x": (N, 2, 12, 9), "class_dim": 1}),
    "logits without positions": (classifier, IMAGES | {"positions": "pooled"}),
    "an activation without positions": (decoder, {"x": (N, 4)}),
    "volumes": (volumes, {"x": (N, 1, 4, 5, 6), "class_dim": -1}),
}
nets = pytest.mark.parametrize(("make", "case"), NETS.values(), ids=NETS)


def inputs(shape):
    generator = torch.Generator().manual_seed(1)
    if shape == (N, T):
        return torch.randint(9, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def wrap(make, case, rule, **options):
    torch.manual_seed(0)
    model, x = make().double(), inputs(case["x"])
    options |= {key: value for key, value in case.items() if key != "x"}
    return DirectFeedback(model, [str(i) for i in range(len(model) - 1)], rule, x[:2], **options), x


def bare(net, x):
    with torch.no_grad():
        return net.model(x)


def labels_for(logits, class_dim, kind):
    generator = torch.Generator().manual_seed(2)
    shape = logits.movedim(class_dim, -1).shape
    if kind == "ids":
        target = torch.randint(K, shape[:-1], generator=generator)
        target[0] = -100
        return target
    return torch.rand(shape, generator=generator, dtype=torch.float64).softmax(-1).movedim(-1, class_dim)


def cross_entropy(logits, target, class_dim):
    return F.cross_entropy(
        logits.movedim(class_dim, 1), target if target.dtype == torch.int64 else target.movedim(class_dim, 1)
    )


def readout(h, B, shape, class_dim, pooled):
    """Logits of `shape` that B reads off h, with PyTorch's own pooling."""
    grid = [size for dim, size in enumerate(shape) if dim not in (0, class_dim % len(shape))]
    z = h.movedim(class_dim, -1) @ B.T
    if pooled and z.dim() > 2:
        z = z.flatten(1, -2).mean(1)
    if z.dim() > 2:
        z = POOL[len(grid)](z.movedim(-1, 1), grid).movedim(1, -1)
    elif grid:
        z = z.view(len(z), *[1] * len(grid), K).expand(-1, *grid, -1)
    return z.movedim(-1, class_dim)


def reference(net, x, target, loss_fn):
    """Each block run by itself: gradients of all parameters, and of B."""
    class_dim, pooled, model = net.class_dim, net.positions == "pooled", copy.deepcopy(net).unwrap()
    logits = bare(net, x).requires_grad_()
    (error,) = torch.autograd.grad(loss_fn(logits, target), logits)
    grads, grads_of_B, flow = [], [], x
    for block, B in zip(model[:-1], net.matrices(), strict=True):
        B = B.detach().clone().requires_grad_()
        h = block(flow)
        leaf = h.detach().requires_grad_()
        seen = readout(leaf, B, logits.shape, class_dim, pooled)
        if net.rule == "DRTP":
            if target.dtype == torch.int64:
                hot = F.one_hot(target.clamp(min=0), K).movedim(-1, class_dim) * (target != -100).unsqueeze(class_dim)
            else:
                hot = target
            target_error = -hot / hot.sum()
            signal, _ = torch.autograd.grad(seen, (leaf, B), target_error.to(seen.dtype))
            grad_B = None
        else:
            signal, grad_B = torch.autograd.grad(seen, (leaf, B), error, retain_graph=True)
            if net.rule == "LAS":
                (grad_B,) = torch.autograd.grad(loss_fn(seen, target), B)
        grads += torch.autograd.grad(h, [*block.parameters()], signal)
        grads_of_B.append(grad_B)
        flow = h.detach()
    loss = loss_fn(model[-1](flow), target)
    return [*grads, *torch.autograd.grad(loss, [*model[-1].parameters()])], grads_of_B


@nets
@pytest.mark.parametrize("kind", ["ids", "probabilities"])
@pytest.mark.parametrize("rule", BY_PRODUCTS)
def test_every_gradient_equals_that_of_blocks_run_by_themselves(make, case, rule, kind):
    net, x = wrap(make, case, rule)
    assert all(B.shape[0] == K and B.dim() == 2 for B in net.matrices())
    target = labels_for(bare(net, x), net.class_dim, kind)

    def loss_fn(logits, target):
        return cross_entropy(logits, target, net.class_dim)

    expected, of_B = reference(net, x, target, loss_fn)
    loss_fn(net(x, target=target), target).backward()
    for (name, parameter), gradient in zip(net.model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, msg=lambda text, name=name: f"{name}: {text}")
    for B, gradient in zip(net.matrices(), of_B, strict=True):
        assert B.requires_grad == RULES[rule].learns
        if B.requires_grad:
            torch.testing.assert_close(B.grad, gradient)


@nets
@pytest.mark.parametrize("rule", ["DKP", "LAS"])
def test_in_place_b_takes_the_step_of_sgd(make, case, rule):
    net, x = wrap(make, case, rule)
    inplace, _ = wrap(make, case, rule, **IN_PLACE)
    optimizer = torch.optim.SGD(net.feedback.parameters(), 0.1, weight_decay=0.01)
    for _ in range(2):
        for wrapper in (net, inplace):
            out = wrapper(x, target=labels_for(bare(wrapper, x), wrapper.class_dim, "ids"))
            cross_entropy(out, labels_for(out, wrapper.class_dim, "ids"), wrapper.class_dim).backward()
        optimizer.step()
        optimizer.zero_grad()
    for B, expected in zip(inplace.matrices(), net.matrices(), strict=True):
        torch.testing.assert_close(B, expected.detach())


def test_another_loss_for_the_readouts_of_las():
    for make, case in NETS.values():
        for loss_fn, target_of in (
            (F.mse_loss, lambda logits: torch.ones_like(logits)),
            (F.binary_cross_entropy_with_logits, lambda logits: (logits.detach() > 0).double()),
        ):
            net, x = wrap(make, case, "LAS", loss=loss_fn)
            target = target_of(bare(net, x))
            expected, of_B = reference(net, x, target, loss_fn)
            loss_fn(net(x, target=target), target).backward()
            for parameter, gradient in zip(net.model.parameters(), expected, strict=True):
                torch.testing.assert_close(parameter.grad, gradient)
            for B, gradient in zip(net.matrices(), of_B, strict=True):
                torch.testing.assert_close(B.grad, gradient)


@pytest.mark.parametrize("loss", [None, lambda logits, target: F.cross_entropy(logits.movedim(-1, 1), target)])
def test_a_scaled_loss_scales_what_comes_from_the_labels(loss):
    grads = []
    for factor in (1, 0.25):
        net, x = wrap(tokens, {"x": (N, T)}, "LAS", loss=loss)
        target = labels_for(bare(net, x), -1, "ids")
        (factor * cross_entropy(net(x, target=target), target, -1)).backward()
        grads.append([parameter.grad / factor for parameter in net.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:the error at the logits is no multiple")
@pytest.mark.parametrize("rule", ["LAS", "DRTP"])
def test_a_loss_that_is_no_multiple_of_cross_entropy_does_not_scale_what_comes_from_the_labels(rule):
    for margin in (0, 3, 8, 16, 60):
        grads = []
        for smoothing in (0, 0.1):
            net, x = wrap(classifier, IMAGES | {"positions": "pooled"}, rule)
            net.model[2][2].weight.data.zero_()
            net.model[2][2].bias.data = margin * torch.eye(K, dtype=torch.float64)[0]
            y = torch.zeros(len(x), dtype=torch.int64)
            F.cross_entropy(net(x, target=y), y, label_smoothing=smoothing).backward()
            parameters = net.model[0] if rule == "DRTP" else net.feedback
            grads.append([parameter.grad for parameter in parameters.parameters()])
        for plain, smooth in zip(*grads, strict=True):
            assert (plain * smooth).sum() > 0 and 0.2 < smooth.norm() / plain.norm() < 1.5


@pytest.mark.parametrize("rule", ["LAS", "DRTP", "LOCAL"])
def test_nothing_is_learned_from_the_labels_by_a_loss_times_zero(rule):
    net, x = wrap(classifier, IMAGES, rule)
    y = torch.arange(len(x)) % K
    (0 * F.cross_entropy(net(x, target=y), y)).backward()
    assert not any(parameter.grad.any() for parameter in net.parameters())


def warnings_of(steps, net, x, y, loss):
    """The numbers of the backward passes that warn of a loss that is no multiple of what the labels are read by."""
    warned = []
    optimizer = torch.optim.SGD(net.parameters(), 5)
    for step in range(1, steps + 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss(net(x, target=y), y).backward()
        warned += [step for warning in caught if "is no multiple of the gradient" in str(warning.message)]
        optimizer.step()
        optimizer.zero_grad()
    return warned


WEIGHTED = functools.partial(F.cross_entropy, weight=torch.tensor([100.0, 1, 1, 1], dtype=torch.float64))
SMOOTHED = functools.partial(F.cross_entropy, label_smoothing=0.1)  # near the start a multiple, by 0.9


@pytest.mark.parametrize("rule", ["LAS", "DRTP", "HEAD", "LOCAL"])
def test_a_loss_that_is_no_multiple_of_cross_entropy_is_warned_of_once_it_is_none(rule):
    for options, loss, warned in (
        ({}, F.cross_entropy, []),
        ({}, lambda z, y: F.cross_entropy(z, y) / 8, []),
        ({}, WEIGHTED, [1, 10]),
        ({}, SMOOTHED, [100]),
        ({"loss": WEIGHTED}, WEIGHTED, []),
        ({"loss": WEIGHTED}, F.cross_entropy, [1, 10]),
    ):
        if options and rule == "DRTP":
            continue
        net, x = wrap(classifier, IMAGES, rule, **options)
        net.model[2][2].weight.data.zero_()
        net.model[2][2].bias.data.zero_()
        y = torch.arange(len(x)) % K
        assert warnings_of(100 if loss is SMOOTHED else 12, net, x, y, loss) == warned


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_not_taken_for_another_loss(dtype):
    torch.manual_seed(0)
    y = torch.arange(20) % K
    for margin in (0, 2, 5, 8, 11, 14, 17, 20, 40, float("nan")):
        labels = labels_of(y, K, torch.float32, -1, None)._replace(shape=(20,))
        logits = (margin * F.one_hot(y, K) + torch.randn(20, K)).to(dtype).requires_grad_()
        for loss, factor in ((F.cross_entropy, 1), (lambda z, y: F.cross_entropy(z, y) / 8, 0.125)):
            (error,) = torch.autograd.grad(loss(logits, y), logits)
            assert not labels.is_other_loss(error, logits.detach())
            if margin < 8:
                assert labels.scale_of(error, logits.detach()).item() == pytest.approx(factor, rel=0.02)


@pytest.mark.parametrize("margin", [0, 20, 49, 80])
def test_the_factor_of_a_scaled_loss_is_exact_however_small_the_error(margin):
    labels = labels_of(torch.zeros(5, dtype=torch.int64), K, torch.float32, -1, None)._replace(shape=(5,))
    logits = margin * torch.eye(K)[:1].expand(5, -1)
    error = 0.125 * labels.error_of(logits)
    expected = 0.125 if margin < 100 and error.any() else 1
    assert labels.scale_of(error, logits).item() == pytest.approx(expected, rel=1e-3)


@each(*(name for name, (rule, _) in VARIANTS.items() if RULES[rule].sent and "inplace" not in name))
def test_accumulated_halves_equal_the_whole(rule, options):
    options = options or {"positions": "pooled"}
    whole, x = wrap(classifier, IMAGES | options, rule)
    halves, _ = wrap(classifier, IMAGES | options, rule)
    halves.load_state_dict(whole.state_dict())
    x, y = torch.cat([x, -x]), torch.tensor([0, 1, 2, 3, 0, 1])
    F.cross_entropy(whole(x, target=y), y).backward()
    for part, labels in zip(x.split(3), y.split(3), strict=True):
        (F.cross_entropy(halves(part, target=labels), labels) / 2).backward()
    for one, other in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_lengths_and_sizes_may_change_where_b_has_no_positions():
    for make, case, sizes in (
        (tokens, {"x": (N, T)}, [(2, 9), (5, 1)]),
        (pixels, IMAGES, [(1, 2, 8, 8), (2, 2, 4, 16)]),
    ):
        net, _ = wrap(make, case, "DKP")
        for size in sizes:
            x = torch.randint(9, size) if make is tokens else torch.randn(size, dtype=torch.float64)
            target = labels_for(bare(net, x), net.class_dim, "ids")
            target[0] = 1
            net.zero_grad()
            cross_entropy(net(x), target, net.class_dim).backward()
            expected, of_B = reference(net, x, target, lambda z, y, dim=net.class_dim: cross_entropy(z, y, dim))
            for parameter, gradient in zip(net.parameters(), [*expected, *of_B], strict=True):
                torch.testing.assert_close(parameter.grad, gradient)


def test_one_way_is_the_adjoint_of_the_other_and_the_sum_of_the_error_stays():
    torch.manual_seed(0)
    for here, there in (((), (5,)), ((4, 6), (2, 3)), ((2, 3), (5, 7)), ((5, 7), (5, 3)), ((2, 3, 4), (4, 3, 1))):
        z, e = (torch.randn(N, *grid, K, dtype=torch.float64) for grid in (here, there))
        there_z, here_e = to_positions(z, there), from_positions(e, here)
        assert there_z.shape == e.shape and here_e.shape == z.shape
        torch.testing.assert_close((there_z * e).sum(), (z * here_e).sum())
        torch.testing.assert_close(here_e.flatten(1, -2).sum(1) if here else here_e, e.flatten(1, -2).sum(1))
    h = torch.randn(N, 5, 4, 6)
    assert features_last(h, 1, None) is h
    torch.testing.assert_close(features_last(h, 1, "pooled"), h.mean((2, 3)))


def test_b_without_positions_is_small():
    sizes = {}
    for positions in (None, "pooled"):
        net, _ = wrap(classifier, IMAGES | {"positions": positions}, "DFA")
        sizes[positions] = [B.numel() for B in net.matrices()]
    assert sizes == {None: [K * 5 * 8 * 12, K * 6 * 3 * 5], "pooled": [K * 5, K * 6]}


@nets
def test_angles_and_cosines_are_numbers(make, case):
    net, x = wrap(make, case, "DKP")
    target = labels_for(bare(net, x), net.class_dim, "ids")
    target[0] = 0
    angles = alignment(net, x, target, lambda logits, y: cross_entropy(logits, y, net.class_dim))
    assert all(
        0 < angles[point]["alignment_deg"] < 180 and abs(angles[point]["logit_cosine"]) < 1 for point in net.points
    )


def test_a_linear_head_at_each_position_fed_back_is_bp():
    net, x = wrap(tokens, {"x": (N, T)}, "DFA")
    net.feedback.get_buffer("1").copy_(net.model[2].weight.detach())
    net.model[2].bias.data.zero_()
    target = labels_for(bare(net, x), -1, "ids")
    angles = alignment(net, x, target, lambda logits, y: cross_entropy(logits, y, -1))
    assert angles["1"]["alignment_deg"] < 1e-6 and angles["1"]["logit_cosine"] == pytest.approx(1)


def test_function_and_wrapper_agree():
    net, x = wrap(pixels, IMAGES, "LAS")
    target = labels_for(bare(net, x), 1, "ids")
    F.cross_entropy(net(x, target=target), target).backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    logits, activations = net.tapped_forward(x, cut=True)
    options = {"rule": "LAS", "target": target, "class_dim": 1, "positions": "own"}
    F.cross_entropy(direct_feedback(logits, list(activations.values()), net.matrices(), **options), target).backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("rule", ["DKP", "LAS"])
@pytest.mark.parametrize("options", [{}, IN_PLACE], ids=["optimizer", "in place"])
def test_compiled(rule, options):
    for make, case in ((tokens, {"x": (N, T)}), (pixels, IMAGES), (classifier, IMAGES | {"positions": "pooled"})):
        torch._dynamo.reset()
        grads = []
        for compiled in (False, True):
            net, x = wrap(make, case, rule, **options)
            target = labels_for(bare(net, x), net.class_dim, "ids")
            run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
            cross_entropy(run(x, target=target), target, net.class_dim).backward()
            grads.append([p.grad for p in net.model.parameters()] + [B.detach() for B in net.matrices()])
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("make", "case", "message"),
    [
        (classifier, IMAGES | {"positions": "own"}, 'expected "pooled" or None'),
        (classifier, IMAGES | {"positions": "all"}, "positions is 'all', expected one of"),
        (tokens, {"x": (N, T), "class_dim": 0}, "class_dim is 0, expected a dimension of the logits"),
        (tokens, {"x": (N, T), "class_dim": 3}, "class_dim is 3, expected a dimension of the logits"),
    ],
)
def test_misuse_is_refused(make, case, message):
    with pytest.raises(ValueError, match=message):
        wrap(make, case, "DFA")


def test_positions_of_another_kind_are_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), nn.Unflatten(1, (2, 3, 2)), nn.Flatten(1, 2), nn.Linear(2, K))
    with pytest.raises(ValueError, match=r"'1' returns \(2, 2, 3, 2\), and the logits are \(2, 6, 4\).*pooled"):
        DirectFeedback(model, ["1"], "DFA", torch.zeros(2, 4), feature_dim=-1)
    assert DirectFeedback(model, ["1"], "DFA", torch.zeros(2, 4), feature_dim=-1, positions="pooled")


def test_where_the_features_are_is_not_guessed():
    image = torch.zeros(2, 2, 8, 9).double()
    with pytest.raises(ValueError, match=r"'0' returns \(2, 5, 8, 9\), and in which dimension the features are is not"):
        DirectFeedback(classifier().double(), ["0"], "DKP", image, positions="pooled")
    with pytest.raises(ValueError, match=r"class_dim is not given, expected .* classes in the logits \(2, 4"):
        DirectFeedback(pixels().double(), ["0"], "DKP", image)
    for feature_dim in (1, {"0": 1}):
        net = DirectFeedback(classifier().double(), ["0"], "DKP", image, positions="pooled", feature_dim=feature_dim)
        assert net.matrices()[0].shape == (K, 5)
    with pytest.raises(ValueError, match=r"'0' returns \(2, 5, 8, 9\), expected features in dimension 4"):
        DirectFeedback(classifier().double(), ["0"], "DKP", image, positions="pooled", feature_dim=4)


def test_features_and_classes_in_other_dimensions():
    """Channels first below, tokens above."""
    model = nn.Sequential(
        nn.Sequential(nn.Conv1d(2, 5, 3, padding=1), nn.Tanh()),
        nn.Sequential(FeaturesLast(), nn.Linear(5, 6), nn.Tanh()),
        nn.Linear(6, K),
    ).double()
    x, y = torch.randn(N, 2, T, dtype=torch.float64), torch.arange(N * T).view(N, T) % K
    net = DirectFeedback(model, ["0", "1"], "DKP", x, feature_dim={"0": 1})
    assert [B.shape for B in net.matrices()] == [(K, 5), (K, 6)]
    logits = net(x)
    cross_entropy(logits, y, -1).backward()
    error = (logits.softmax(-1) - F.one_hot(y, K)) / y.numel()
    h = model[0](x).detach() if net.eval() else None
    torch.testing.assert_close(net.matrices()[0].grad, torch.einsum("ntk,ndt->kd", error, h).detach())
