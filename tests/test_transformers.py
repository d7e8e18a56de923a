"""FA and KP on transformers and other layers: attention, 1-d and 3-d convolutions, loose parameters, tied weights."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from reference import attention_gradients
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from variants import assert_equals_bp_where_b_is_the_weight, feed_back_the_weights, weights_by_feedback_name

from feedback import DirectFeedback, alignment
from feedback.attention import attention

both = pytest.mark.parametrize("rule", ["FA", "KP"])


class ViT(nn.Module):
    """Patches, a cls token, positions, two encoder layers, a head."""

    def __init__(self, norm_first=True, batch_first=True, **options):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        self.pos = nn.Parameter(torch.randn(1, 5, 8))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=batch_first, norm_first=norm_first, **options)
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)
        self.batch_first = batch_first

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x) if self.batch_first else block(x.transpose(0, 1)).transpose(0, 1)
        return self.head(self.norm(x)[:, 0])


class Conv1D(nn.Module):
    """Stands for that of Hugging Face's transformers: the weight is (in, out)."""

    def __init__(self, out, into):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(into, out)), nn.Parameter(torch.randn(out))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


Conv1D.__module__ = "transformers.pytorch_utils"


class GPT(nn.Module):
    """Token and position embeddings, causal blocks, and logits of the next token by the embedding's own weight."""

    def __init__(self, tied=True):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(7, 8), nn.Embedding(4, 8)
        self.blocks = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", norm_first=True, batch_first=True),
            2,
            enable_nested_tensor=False,
        )
        self.fc, self.proj = Conv1D(16, 8), Conv1D(8, 16)
        self.lm_head = nn.Linear(8, 7, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, ids):
        length = ids.shape[1]
        x = self.wte(ids) + self.wpe(torch.arange(length))
        mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=x.dtype)
        x = self.blocks(x, mask=mask, is_causal=True)
        x = x + self.proj(F.gelu(self.fc(x)))
        return self.lm_head(x).flatten(0, 1)[: len(ids)]


class Cross(nn.Module):
    """Learned queries ask features of other widths."""

    def __init__(self, **options):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 7)
        self.queries = nn.Parameter(torch.randn(2, 8))
        self.attn = nn.MultiheadAttention(8, 2, kdim=5, vdim=7, batch_first=True, **options)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        queries = self.queries.expand(len(x), -1, -1)
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -1] = True
        out, weights = self.attn(queries, self.a(x), value=self.b(x), key_padding_mask=padding)
        return self.head(out.mean(1) + weights.mean())


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.layer = nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.first(x)
        return self.head(self.layer(h[:, :2], h).mean(1))


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.token = nn.Parameter(torch.randn(4, 1, 1), requires_grad=False)

    def forward(self, x):
        x = self.first(x)
        return self.head((x + self.scale * self.conv(x).tanh() + self.token).mean((2, 3)))


def images(*shape):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def convolutions(of, shape, **options):
    """Two convolutions, the second as given, and a head."""
    layers = [of(2, 4, 3), nn.Tanh(), of(4, 6, 3, **options), nn.Tanh(), nn.Flatten()]
    features = nn.Sequential(*layers)(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(*layers, nn.Linear(features, 3))


OPTIONS = {"stride": 2, "padding": 2, "dilation": 2, "groups": 2}
NETS = {  # a net, a point and an input
    "ViT": (ViT, "blocks.0", images(3, 8, 8)),
    "ViT, norm last": (lambda: ViT(norm_first=False), "blocks.0", images(3, 8, 8)),
    "ViT, sequence first": (lambda: ViT(batch_first=False), "patch", images(3, 8, 8)),
    "ViT, no bias": (lambda: ViT(bias=False), "blocks.0", images(3, 8, 8)),
    "GPT": (lambda: GPT(tied=False), "blocks.layers.0", torch.tensor([[1, 2, 3, 4], [6, 5, 0, 1], [3, 3, 2, 1]])),
    "Cross": (Cross, "a", images(4, 6)),
    "Decoder": (Decoder, "layer", images(4, 6)),
    "LayerScale": (LayerScale, "conv", images(3, 7, 7)),
    "Conv1d": (lambda: convolutions(nn.Conv1d, (2, 15)), "1", images(2, 15)),
    "Conv1d, all": (lambda: convolutions(nn.Conv1d, (2, 15), **OPTIONS), "1", images(2, 15)),
    "Conv1d, same": (lambda: convolutions(nn.Conv1d, (2, 15), padding="same", bias=False), "1", images(2, 15)),
    "Conv3d": (lambda: convolutions(nn.Conv3d, (2, 7, 8, 9)), "1", images(2, 7, 8, 9)),
    "Conv3d, all": (lambda: convolutions(nn.Conv3d, (2, 7, 8, 9), **OPTIONS), "1", images(2, 7, 8, 9)),
    "Conv3d, uneven": (
        lambda: convolutions(nn.Conv3d, (2, 7, 8, 9), stride=(1, 2, 3), padding=(2, 1, 0), dilation=(2, 1, 1)),
        "1",
        images(2, 7, 8, 9),
    ),
}
each_net = pytest.mark.parametrize(("make", "point", "x"), NETS.values(), ids=NETS)
Y = torch.tensor([2, 0, 1])


def built(make):
    torch.manual_seed(0)
    return make().double()


def wrap(rule, net, **options):
    make, point, x = NETS[net]
    return DirectFeedback(built(make), (point,), rule, x[:1], **options), x


@both
@each_net
def test_equals_bp_where_b_is_the_weight(rule, make, point, x):
    assert_equals_bp_where_b_is_the_weight(built(make), (point,), rule, x, Y)


def test_a_tied_embedding_is_taken_by_fa():
    _, point, x = NETS["GPT"]
    net = assert_equals_bp_where_b_is_the_weight(built(GPT), (point,), "FA", x, Y)
    assert "lm_head" in net.feedback.state_dict()


@both
@pytest.mark.parametrize("net", ["ViT", "GPT", "Cross", "Conv3d"])
def test_gradients_differ_from_bp_by_a_random_b_at_everything_below_one(rule, net):
    """All but what is above the last B, so that no path is left to backpropagation."""
    net, x = wrap(rule, net)
    plain = copy.deepcopy(net).unwrap()
    for module in (net, plain):
        F.cross_entropy(module(x), Y).backward()
    same = [
        name
        for (name, p), q in zip(net.model.named_parameters(), plain.parameters(), strict=True)
        if torch.allclose(p.grad, q.grad, atol=1e-14) and q.grad.abs().max() > 1e-12
    ]
    above = {"head.weight", "head.bias", "lm_head.weight", "5.weight", "5.bias"}
    assert set(same) <= above and same


def test_the_names_and_shapes_of_b():
    shapes = {name: tuple(B.shape) for name, B in wrap("FA", "ViT")[0].feedback.state_dict().items()}
    block = [("self_attn_in_proj_weight", (24, 8)), ("self_attn_out_proj_weight", (8, 8))]
    block += [("linear1", (16, 8)), ("linear2", (8, 16))]
    expected = [(f"blocks_{i}_{name}", shape) for i in (0, 1) for name, shape in block]
    assert shapes == dict([*expected, ("head", (3, 8))])
    names = list(wrap("FA", "Cross")[0].feedback.state_dict())
    assert names == [f"attn_{of}_weight" for of in ("q_proj", "k_proj", "v_proj", "out_proj")] + ["head"]


class Attending(nn.Module):
    def __init__(self, queries):
        super().__init__()
        self.first, self.attn = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head, self.queries = nn.Linear(8, 3), queries

    def forward(self, x):
        h = self.first(x)
        return self.head(self.attn(h if self.queries == 4 else h[:, : self.queries], h, h)[0].mean(1))


@both
@pytest.mark.parametrize("queries", [4, 3])
def test_attention_equals_that_worked_out_by_hand(rule, queries):
    x = images(4, 5)
    net = DirectFeedback(built(lambda: Attending(queries)), ("first",), rule, x)
    F.cross_entropy(net(x), Y).backward()
    parameters = {name: p.detach() for name, p in net.model.named_parameters()}
    expected = attention_gradients(parameters, net.feedback.state_dict(), x, Y, queries, heads=2)
    for name, parameter in net.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
    if rule == "KP":
        for name, B in net.feedback.named_parameters():
            weight = weights_by_feedback_name(net.model)[name]
            assert torch.equal(B.grad, weight.grad) and B.grad.data_ptr() != weight.grad.data_ptr()


def masks(N, L, S, H, batched):
    attn = torch.randn(L, S).double()
    many = torch.randn(N * H, L, S).double()
    padding = torch.zeros((N, S) if batched else (S,), dtype=torch.bool)
    padding[..., -1] = True
    return [
        {},
        {"attn_mask": attn},
        {"attn_mask": attn > 0.5},
        {"attn_mask": many},
        {"key_padding_mask": padding},
        {"attn_mask": many, "key_padding_mask": padding.double()},
        {"attn_mask": many.gt(2), "key_padding_mask": padding},
        {"attn_mask": torch.ones(L, S, dtype=torch.bool).triu(1), "is_causal": True},
        {"attn_mask": torch.ones(L, S, dtype=torch.bool).triu(1), "is_causal": True, "key_padding_mask": padding},
    ]


def plain_projection(layer):
    def project(x, of, third, bias):
        weight = layer.get_parameter(of)
        return F.linear(x, weight if third is None else weight.chunk(3)[third], bias)

    return project


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}, {"kdim": 5, "vdim": 7}], ids=str)
@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}], ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_attention_returns_what_the_module_does(options, weights, batched):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, **options).double()
    widths = (8, options.get("kdim", 8), options.get("vdim", 8))
    first = layer.batch_first or not batched
    query, key, value = (
        torch.randn(*((3, length) if first else (length, 3)), width).double()
        for length, width in zip((4, 5, 5), widths, strict=True)
    )
    arguments = [(query, key, value)] if batched else [(query[0], key[0], value[0])]
    if widths == (8, 8, 8):
        arguments += [(arguments[0][0],) * 3]

    project = plain_projection(layer)
    for inputs in arguments:
        S = len(inputs[1]) if not batched else inputs[1].shape[1 if first else 0]
        for mask in masks(3 if batched else 1, 4, S, 2, batched):
            got, expected = (
                f(*inputs, **mask, **weights) for f in (lambda *a, **k: attention(layer, project, *a, **k), layer)
            )
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_drops_out_in_training_alone(need_weights):
    torch.manual_seed(0)
    layer, h = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True), torch.randn(1, 4, 8)
    many = h.expand(20000, -1, -1)
    exact = layer.eval()(h, h, h)[0][0]
    drawn = attention(layer.train(), plain_projection(layer), many, many, many, need_weights=need_weights)[0]
    assert torch.allclose(drawn.mean(0), exact, atol=0.02)
    assert torch.allclose(drawn.std(0), layer(many, many, many)[0].std(0), rtol=0.05)
    assert drawn.std(0).min() > 0.02


@pytest.mark.parametrize("net", ["ViT", "GPT", "Cross", "Decoder", "Conv1d, all", "Conv3d, all"])
def test_kolen_pollack_gap_shrinks_by_one_minus_lr_times_decay(net):
    lr, decay = 0.1, 0.3
    net, x = wrap("KP", net)
    weights = weights_by_feedback_name(net.model)
    matrices = dict(net.feedback.named_parameters())
    gaps = {name: (weights[name] - B).detach() for name, B in matrices.items()}
    optimizer = torch.optim.SGD(net.parameters(), lr, weight_decay=decay)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(net(x), Y).backward()
        optimizer.step()
        for name, B in matrices.items():
            gaps[name] *= 1 - lr * decay
            torch.testing.assert_close((weights[name] - B).detach(), gaps[name])


@both
def test_bfloat16_autocast_is_as_exact_as_bp(rule):
    make, point, x = NETS["ViT"]
    exact = built(make)
    plain = copy.deepcopy(exact).float()
    net = DirectFeedback(copy.deepcopy(exact), (point,), rule, x).float()
    feed_back_the_weights(net)
    F.cross_entropy(exact(x), Y).backward()
    for module in (plain, net):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(module(x.float()), Y)
        loss.backward()
    for (name, parameter), bp in zip(exact.named_parameters(), plain.parameters(), strict=True):
        got = net.model.get_parameter(name).grad
        allowed = 2 * (bp.grad.double() - parameter.grad).norm() + 4e-3 * parameter.grad.norm()
        assert got.dtype == torch.float32 and (got.double() - parameter.grad).norm() <= allowed, name


@both
@pytest.mark.parametrize("net", ["ViT", "GPT", "Cross", "Decoder", "LayerScale", "Conv1d, all", "Conv3d, all"])
def test_compiled_gradients_are_the_same(rule, net):
    torch._dynamo.reset()
    net, x = wrap(rule, net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    F.cross_entropy(compiled(x), Y).backward()
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    F.cross_entropy(net(x), Y).backward()
    for got, p in zip(grads, (p for p in net.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(got, p.grad)


def test_the_wrapper_is_copied_pickled_and_taken_off_and_the_bare_model_in_eval_mode():
    net, x = wrap("KP", "ViT")
    others = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    F.cross_entropy(net(x), Y).backward()
    for other in others:
        assert all(p.grad is None for p in other.parameters())
        F.cross_entropy(other(x), Y).backward()
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert p is not q and torch.equal(p.grad, q.grad)
        assert not any(module in {*net.modules()} for module in other.modules())
    bare = built(ViT)
    for inside in (torch.no_grad(), torch.enable_grad()):
        with inside:
            torch.testing.assert_close(net.eval()(x), bare.eval()(x))
    before = {name: list(vars(module)) for name, module in bare.named_modules()}
    model = net.unwrap()
    assert not any(module._forward_hooks or module._forward_hooks_with_kwargs for module in model.modules())
    assert {name: list(vars(module)) for name, module in model.named_modules()} == before


@both
def test_a_checkpointed_block_learns_as_without_checkpointing_with_the_same_dropout(rule):
    net, x = wrap(rule, "ViT")
    blocks, grads = net.model.blocks, []
    blocks[1].self_attn.dropout = 0.5
    for around in (lambda block, h: block(h), lambda block, h: checkpoint(block, h, use_reentrant=False)):
        net.zero_grad()
        net.model.blocks = nn.ModuleList([blocks[0], Around(blocks[1], around)])
        torch.manual_seed(3)
        F.cross_entropy(net(x), Y).backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


class Around(nn.Module):
    def __init__(self, block, around):
        super().__init__()
        self.block, self.around = block, around

    def forward(self, h):
        return self.around(self.block, h)


class Loose(nn.Module):
    """A parameter between two linear layers, used as `use` says."""

    def __init__(self, shape, use, frozen=False):
        super().__init__()
        self.first, self.head, self.use = nn.Linear(4, 4), nn.Linear(4, 3), use
        self.emb = nn.Embedding(4, 4)
        self.p = nn.Parameter(torch.randn(shape), requires_grad=not frozen)

    def forward(self, x):
        return self.head(self.use(self, self.first(x)))


TAKEN = {
    "added": ((4,), lambda m, h: h + m.p),
    "added, in place": ((1, 4), lambda m, h: h.clone().add_(m.p)),
    "subtracted": ((1, 4), lambda m, h: m.p - h),
    "scaled": ((1, 4), lambda m, h: h * m.p.exp()),
    "scaled by one": ((), lambda m, h: h * m.p),
    "divided": ((4,), lambda m, h: h / m.p),
    "cat": ((2, 4), lambda m, h: torch.cat([m.p.to(h.dtype), h])[2:]),
    "power": ((1,), lambda m, h: h.abs() ** m.p),
    "put in": ((4,), lambda m, h: torch.where(h > 0, h, m.p)),
    "put in by index": ((4,), lambda m, h: h.clone().index_put((torch.tensor([0]),), m.p)),
    "sliced": ((5, 4, 2), lambda m, h: h + m.p[1:3, :, 0].sum(0, keepdim=True).expand_as(h)),
    "normalised": ((4,), lambda m, h: F.layer_norm(h, (4,), m.p)),
    "rms": ((4,), lambda m, h: F.rms_norm(h, (4,), m.p)),
    "product with the data": ((3, 4), lambda m, h: h + torch.ones(len(h), 3, dtype=h.dtype) @ m.p),
    "product of no parameter": ((1, 4), lambda m, h: (h @ h.T @ h) + m.p),
    "looked up": ((4, 4), lambda m, h: h + F.embedding(torch.zeros(len(h), dtype=torch.long), m.p)),
    "unused": ((4, 4), lambda m, h: h),
}
REFUSED = {
    "linear": ((4, 4), lambda m, h: F.linear(h, m.p), "'' is a Loose with weights .* Addmm|Mm multiplies 'p'"),
    "matmul": ((4, 4), lambda m, h: h @ m.p, "Mm multiplies 'p'"),
    "from the left": ((4, 4), lambda m, h: (m.p @ h.T).T, "Mm multiplies 'p'"),
    "einsum": ((4, 4), lambda m, h: torch.einsum("ni,oi->no", h, m.p), "Bmm multiplies 'p'"),
    "vector": ((4,), lambda m, h: (h @ m.p)[:, None].expand(-1, 4), "Mv multiplies 'p'"),
    "convolution": (
        (1, 1, 1), lambda m, h: F.conv1d(h[:, None], m.p)[:, 0], "Convolution multiplies 'p'"),
    "bilinear": ((4, 4, 4), lambda m, h: F.bilinear(h, h, m.p), "multiplies 'p'"),
    "scaled weight": ((4, 4), lambda m, h: h @ (2 * m.p.tanh() + 1).T[:, :4].to(h), "Mm multiplies 'p'"),
    "weight of data": ((4, 4), lambda m, h: h @ (torch.ones(4, 4).double() @ m.p), "Mm multiplies 'p'"),
    "broadcast": ((4, 4), lambda m, h: (h[:, :, None] * m.p).sum(1), "Mul multiplies 'p'"),
    "expanded": ((4, 4), lambda m, h: (h[:, :, None].expand(-1, 4, 4) * m.p).sum(1), "Mul multiplies 'p'"),
    "attended": (
        (1, 3, 4), lambda m, h: F.scaled_dot_product_attention(h[None], m.p, m.p)[0], "'p' with what needs a gradient"),
    "embedding": ((1,), lambda m, h: h @ m.emb(torch.arange(4)).T + h @ m.emb.weight,
                  "'emb' is a Embedding .* multiplies 'weight'"),
    "a layer's own": ((1,), lambda m, h: h @ m.first.weight, "'first' is a Linear .* 'weight'"),
    "distance": ((4, 4), lambda m, h: torch.cdist(h, m.p), "'p' with what needs a gradient"),
}  # fmt: skip


@both
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("shape", "use"), TAKEN.values(), ids=TAKEN)
def test_loose_parameters_without_a_matrix_stay_exact(rule, frozen, shape, use):
    torch.manual_seed(0)
    model = Loose(shape, use, frozen).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    assert_equals_bp_where_b_is_the_weight(model, ("first",), rule, x, Y)
    assert model.p.requires_grad != frozen


@both
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("shape", "use", "message"), REFUSED.values(), ids=REFUSED)
def test_loose_parameters_in_a_product_with_an_activation_are_refused(rule, frozen, shape, use, message):
    model = Loose(shape, use, frozen).double()
    with pytest.raises(ValueError, match=message):
        DirectFeedback(model, ("first",), rule, torch.zeros(3, 4, dtype=torch.float64))
    assert model.p.requires_grad != frozen and not any(module._forward_hooks for module in model.modules())


def test_a_weight_below_everything_that_learns_is_not_transported():
    model = Loose((4, 4), lambda m, h: h.tanh() @ m.p)
    model.first.requires_grad_(False)
    net = DirectFeedback(model, ("first",), "FA", torch.zeros(3, 4))
    assert list(net.feedback.state_dict()) == ["head"]


def test_a_tied_weight_is_refused_by_kp_which_names_both():
    with pytest.raises(
        ValueError, match=r"'lm_head' shares its weight with 'wte'.*Give the layer a copy of it, or take FA"
    ):
        DirectFeedback(GPT(), ("blocks.layers.0",), "KP", torch.tensor([[1, 2, 3, 4]]))
    model = Loose((1,), lambda m, h: m.head(h * m.head.weight[:1]) @ torch.ones(3, 4))
    with pytest.raises(ValueError, match="'head' shares its weight with the model, which has it in Mul"):
        DirectFeedback(model, ("first",), "KP", torch.zeros(3, 4))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_is_refused():
    net, x = wrap("FA", "ViT")
    model = net.unwrap()
    model.blocks[1] = Around(model.blocks[1], lambda block, h: checkpoint(block, h, use_reentrant=True))
    with pytest.raises(ValueError, match="checkpoint them with use_reentrant=False"):
        DirectFeedback(model, ("blocks.0",), "FA", x)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_attention_with_keys_of_its_own_is_refused(options):
    model = nn.Sequential(nn.Linear(6, 6), Cross(**options))
    with pytest.raises(ValueError, match=r"'1\.attn' has add_bias_kv or add_zero_attn, expected neither"):
        DirectFeedback(model, ("0",), "FA", torch.zeros(2, 4, 6))


@pytest.mark.parametrize("name", ["in_proj_weight", "out_proj.weight"])
def test_attention_with_a_weight_made_of_others_is_refused(name):
    model = built(ViT)
    owner, _, weight = f"blocks.0.self_attn.{name}".rpartition(".")
    prune.random_unstructured(model.get_submodule(owner), weight, 0.5)
    with pytest.raises(ValueError, match=r"'blocks\.0\.self_attn' is a MultiheadAttention with weights"):
        DirectFeedback(model, ("patch",), "FA", images(3, 8, 8))


@both
@pytest.mark.parametrize(("of_layer", "of_attention"), [(0.1, 0.1), (0.1, 0), (0, 0.1)])
def test_the_angle_is_zero_under_dropout_where_b_is_the_weight(rule, of_layer, of_attention):
    model = built(ViT)
    for block in model.blocks:
        block.self_attn.dropout = of_attention
        for module in block.modules():
            module.p = of_layer  # of the Dropouts
    x = images(3, 8, 8)
    net = DirectFeedback(model, ("blocks.0",), rule, x)
    assert alignment(net, x, torch.arange(len(x)) % 3)["blocks.0"]["alignment_deg"] > 10
    feed_back_the_weights(net)
    for name, values in alignment(net, x, torch.arange(len(x)) % 3).items():
        angle = values.get("alignment_deg", values.get("parameter_deg"))
        # a bias of keys has no gradient: softmax does not see what is added to all scores of a query
        assert angle < (60 if name.endswith("in_proj_bias") else 1e-4), name


@both
@pytest.mark.parametrize("name", ["patch.weight", "blocks.0.linear1.weight", "blocks.0.self_attn.in_proj_weight"])
def test_a_layer_that_is_pruned_after_wrapping_is_refused(rule, name):
    net, x = wrap(rule, "ViT")
    owner, _, weight = name.rpartition(".")
    prune.l1_unstructured(net.model.get_submodule(owner), weight, 0.5)
    with pytest.raises(ValueError, match=f"layer '{owner}' has other weights than when it was wrapped"):
        net(x)


@both
def test_a_layer_that_is_put_in_after_wrapping_is_refused(rule):
    net, x = wrap(rule, "ViT")
    net(x)
    net.model.blocks[1].linear1 = nn.Linear(8, 16).double()
    with pytest.raises(
        ValueError, match=r"'blocks.1.linear1', a Linear, was put in after wrapping.*wrap the model again"
    ):
        net(x)
    assert net.eval()(x).shape == (3, 3)
    model = net.unwrap()
    DirectFeedback(model, ("blocks.0",), rule, x)(x)
