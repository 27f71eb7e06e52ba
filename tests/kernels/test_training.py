from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from burnish.kernels import training
from burnish.kernels.cross_entropy import linear_cross_entropy, reference_cross_entropy
from burnish.kernels.training import fused, scaled_dot_product_attention
from burnish.model.cache import Prefix
from burnish.model.families import read_spec
from burnish.model.positions import rotary_angles, rotate
from burnish.model.transformer import Transformer

pytestmark = pytest.mark.skipif(training.library() is None, reason="this processor or machine cannot build the kernels")

BF16 = torch.bfloat16


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def plain_attention(q, k, v, rotary, mask, causal, dtype):
    q, k, v = (x.to(dtype) for x in (q, k, v))
    if rotary:
        rotary = tuple(table.to(dtype) for table in rotary)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


@pytest.mark.parametrize("visible", ["causal", "all", "mask", "causal mask"])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "kv_heads", "size"),
    [(2, 64, 4, 4, 64), (3, 77, 4, 2, 32), (1, 1, 2, 1, 64), (1, 130, 2, 2, 128), (2, 5, 3, 1, 96)],
)
def test_attention_is_as_exact_as_torchs_own(batch, length, heads, kv_heads, size, rotated, visible):
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(batch, length, n, size).to(BF16) for n in (heads, kv_heads, kv_heads, heads))
    mask, causal = None, visible == "causal"
    if "mask" in visible:
        mask = (torch.rand(batch, 1, length, length) < 0.6) | torch.eye(length, dtype=torch.bool)
        mask = mask.tril() if visible == "causal mask" else mask
    rotary = None
    if rotated:
        positions = torch.arange(length).expand(batch, length) + 3
        rotary = rotary_angles(positions, 1.0 / 10000.0 ** (torch.arange(0, size, 2) / size), BF16)

    def run(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    tables = rotary or (None, None)
    ours = run(lambda q, k, v: scaled_dot_product_attention(q, k, v, *tables, mask, causal)[0], BF16)
    torchs = run(lambda q, k, v: plain_attention(q, k, v, rotary, mask, causal, BF16), BF16)
    exact = run(lambda q, k, v: plain_attention(q, k, v, rotary, mask, causal, torch.float64), torch.float64)
    for found, other, truth in zip(ours, torchs, exact, strict=True):
        if truth.norm() > 0.1:  # over a single key the gradients of q and k are 0
            assert error(found, truth) < 1.2 * error(other, truth) + 1e-4
        else:
            assert found.abs().max() < 0.05


def test_attention_takes_heads_at_any_strides():
    fused_rows = torch.randn(2, 20, 3, 4, 32).to(BF16)
    q, k, v = fused_rows.unbind(2)
    apart = scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous(), None, None, None, True)
    together = scaled_dot_product_attention(q, k, v, None, None, None, True)
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


def test_threads_share_the_work_and_change_nothing():
    q = torch.randn(2, 40, 3, 32).to(BF16).requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            out = scaled_dot_product_attention(q, q, q, None, None, None, True)[0]
            found.append((out, *torch.autograd.grad(out.float().square().sum(), q)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 72,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
}


def network(seed=0):
    torch.manual_seed(seed)
    net = Transformer(read_spec(CONFIG)).initialize(0.2).requires_grad_(False).to(BF16)
    net.layers[0].mlp.up_proj.weight.requires_grad_(True)
    net.layers[0].self_attn.k_proj.weight.requires_grad_(True)
    net.layers[1].input_layernorm.weight.requires_grad_(True)
    return net


def gradients(net, dtype, kernels, **inputs):
    net = net.to(dtype)
    ids = torch.arange(3 * 19).view(3, 19) % 61
    if kernels:
        with fused(net):
            hidden = net(ids, **inputs)
    else:
        hidden = net(ids, **inputs)
    trained = [p for p in net.parameters() if p.requires_grad]
    slopes = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    return [hidden.detach(), *torch.autograd.grad((hidden * slopes.to(dtype)).sum(), trained)]


@pytest.mark.parametrize("dtype", training.DTYPES)
@pytest.mark.parametrize("padded", [True, False])
def test_a_fused_network_gives_the_plain_ones_results(padded, dtype):
    inputs = {"attention_mask": torch.arange(19) < torch.tensor([[19], [7], [11]])} if padded else {}
    errors = torch.zeros(2)  # by the kernels, and the plain way
    for seed in range(4):
        found = gradients(network(seed), dtype, True, **inputs)
        plain = gradients(network(seed), dtype, False, **inputs)
        exact = gradients(network(seed), torch.float64, False, **inputs)
        for ours, other, truth in zip(found, plain, exact, strict=True):
            errors += torch.tensor([error(ours, truth), error(other, truth)])
    assert errors[0] < (1.15 if dtype == BF16 else 2) * errors[1]


@pytest.mark.parametrize("lengths", [None, [5, 2, 0]])
def test_a_fused_network_takes_a_prefix(lengths):
    ids = torch.arange(3 * 19).view(3, 19) % 61
    seen = None if lengths is None else torch.tensor(lengths)[:, None].expand(3, 19)

    def run(seed, dtype, kernels):
        net, draw = network(seed).to(dtype), torch.Generator().manual_seed(seed)
        pairs = torch.randn(2, 2, 1, 1, 5, 32, generator=draw).to(dtype).requires_grad_()  # keys and values
        slopes = torch.randn(3, 19, 72, generator=draw).to(dtype)
        with fused(net) if kernels else nullcontext():
            hidden = net(ids, prefix=Prefix(pairs[0], pairs[1], seen))
        return [hidden.detach(), *torch.autograd.grad((hidden * slopes).sum(), pairs)]

    errors = torch.zeros(2)  # by the kernels, and the plain way
    for seed in range(4):
        found, plain, exact = run(seed, BF16, True), run(seed, BF16, False), run(seed, torch.float64, False)
        for ours, other, truth in zip(found, plain, exact, strict=True):
            errors += torch.tensor([error(ours, truth), error(other, truth)])
    assert 0 < errors[0] < 1.15 * errors[1]


def test_fusing_is_undone_and_leaves_other_dtypes_alone():
    net = network()
    kinds = [type(module) for module in net.modules()]
    plain, inside = gradients(net, torch.float64, False), gradients(net, torch.float64, True)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    assert [type(module) for module in net.modules()] == kinds


def test_compiling_meets_one_graph_for_all_layers_and_the_same_results():
    net = network()
    plain = gradients(net, BF16, True)
    compiled = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    try:
        for layer in net.layers:
            layer.compile(backend=compiled)
        found = gradients(net, BF16, True)
    finally:
        torch._dynamo.reset()
    assert compiled.frame_count <= 2  # one more where the first layer's input needs no gradient
    for ours, other in zip(found, plain, strict=True):
        assert error(ours, other.double()) < 0.02


def test_cross_entropy_of_bfloat16_logits_is_as_exact_as_the_plain_one():
    torch.manual_seed(0)
    hidden, weight = torch.randn(33, 40).to(BF16).requires_grad_(), torch.randn(70, 40).to(BF16)
    labels = torch.randint(70, (33,))

    def run(function, dtype):
        leaf = hidden.detach().to(dtype).requires_grad_()
        loss, _ = function(leaf, weight.to(dtype), None, labels)
        return [loss.detach(), *torch.autograd.grad(loss, leaf)]

    ours, plain = run(linear_cross_entropy, BF16), run(reference_cross_entropy, BF16)
    exact = run(reference_cross_entropy, torch.float64)
    for found, other, truth in zip(ours, plain, exact, strict=True):
        assert error(found, truth) < 1.2 * error(other, truth) + 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value):
    hidden = torch.ones(2, 32, dtype=BF16)
    hidden[0, 0] = value
    loss, _ = linear_cross_entropy(hidden, torch.ones(50, 32, dtype=BF16), None, torch.tensor([1, 2]))
    assert not loss.isfinite()
    q = hidden.view(1, 2, 1, 32)
    assert not scaled_dot_product_attention(q, q, q, None, None, None, True)[0][:, 0].isfinite().all()
