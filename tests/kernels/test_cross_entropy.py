import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from burnish.kernels.cross_entropy import linear_cross_entropy, reference_cross_entropy

ROWS, WIDTH, VOCABULARY = 37, 16, 50


def inputs(hidden_dtype, weight_dtype, bias=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(hidden_dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(weight_dtype).requires_grad_()
    shift = torch.randn(VOCABULARY, generator=generator).to(weight_dtype).requires_grad_() if bias else None
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    labels[::3] = -100
    return hidden, weight, shift, labels


def loss_and_gradients(function, tensors, scale=1.0, **options):
    hidden, weight, bias, labels = tensors
    wanted = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    loss, count = function(hidden, weight, bias, labels, **options)
    return loss.detach(), count, torch.autograd.grad(loss * scale, wanted)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_bytes", [1, VOCABULARY * 4 * 5, 1 << 20])
@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 2e-2),
        (torch.bfloat16, torch.bfloat16, 2e-2),
    ],
)
def test_equals_the_plain_loss(hidden_dtype, weight_dtype, tolerance, chunk_bytes, bias):
    tensors = inputs(hidden_dtype, weight_dtype, bias)
    loss, count, gradients = loss_and_gradients(linear_cross_entropy, tensors, 0.5, chunk_bytes=chunk_bytes)
    expected, expected_count, expected_gradients = loss_and_gradients(reference_cross_entropy, tensors, 0.5)
    assert count == expected_count == int((tensors[3] != -100).sum())
    assert loss.dtype == torch.promote_types(hidden_dtype, torch.float32)
    torch.testing.assert_close(loss, expected, rtol=2e-3 if hidden_dtype == torch.bfloat16 else tolerance, atol=0)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == reference.dtype
        torch.testing.assert_close(gradient, reference, rtol=tolerance, atol=tolerance)


def test_a_frozen_head_gets_no_gradient_and_a_frozen_input_none():
    hidden, weight, _, labels = inputs(torch.float32, torch.float32, bias=False)
    expected = loss_and_gradients(reference_cross_entropy, (hidden, weight, None, labels))[2]
    alone = loss_and_gradients(linear_cross_entropy, (hidden, weight.detach(), None, labels))[2]
    torch.testing.assert_close(alone[0], expected[0])
    alone = loss_and_gradients(linear_cross_entropy, (hidden.detach(), weight, None, labels))[2]
    torch.testing.assert_close(alone[0], expected[1])
    assert not linear_cross_entropy(hidden.detach(), weight.detach(), None, labels)[0].requires_grad


def test_large_logits_stay_finite():
    hidden, weight, _, labels = inputs(torch.float32, torch.float32, bias=False)
    scaled = (hidden.detach() * 1e4).requires_grad_()
    loss, _, gradients = loss_and_gradients(linear_cross_entropy, (scaled, weight, None, labels))
    torch.testing.assert_close(loss, reference_cross_entropy(scaled, weight, None, labels)[0].detach())
    assert all(g.isfinite().all() for g in gradients)


def test_no_target_gives_zero_and_zero_gradients():
    hidden, weight, bias, labels = inputs(torch.float32, torch.float32)
    loss, count, gradients = loss_and_gradients(
        linear_cross_entropy, (hidden, weight, bias, torch.full_like(labels, -100))
    )
    assert count == 0 and loss == 0
    assert all((g == 0).all() for g in gradients)


def test_a_second_backward_pass_is_refused_rather_than_wrong():
    hidden, weight, bias, labels = inputs(torch.float32, torch.float32)
    loss, _ = linear_cross_entropy(hidden, weight, bias, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


class Largest(TorchDispatchMode):
    """Records the bytes of the largest storage that any operation returns."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_exceeds_the_chunk(dtype):
    rows, vocabulary, width, chunk_bytes = 512, 4096, 16, 1 << 18
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)  # 256 KiB, like one chunk; all logits: 8 MiB
    labels = torch.randint(0, vocabulary, (rows,))
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, None, labels, chunk_bytes)[0].backward()
    assert largest.bytes <= chunk_bytes
    with Largest() as largest:
        reference_cross_entropy(hidden, weight, None, labels)[0].backward()
    assert largest.bytes == rows * vocabulary * 4
