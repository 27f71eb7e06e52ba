"""Which arithmetic the training kernels take over in each family, with torch in the kernels' place: on any machine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from burnish.kernels import training
from burnish.model.cache import Prefix
from burnish.model.families import read_spec
from burnish.model.positions import rotate
from burnish.model.transformer import Transformer

SHAPE = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32}
GATED = {**SHAPE, "intermediate_size": 50, "num_key_value_heads": 1, "sliding_window": 4}
KINDS = ["sliding_attention", "full_attention"]
PARTIAL = {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}
FAMILIES = {  # family -> config, the kernels that it uses
    "llama": (GATED, {"attention", "norm", "gate"}),
    "mistral": (GATED, {"attention", "norm", "gate"}),
    "qwen3": ({**GATED, "use_sliding_window": True, "layer_types": KINDS}, {"attention", "norm", "gate"}),
    "gemma2": (GATED, set()),
    "gemma3_text": ({**GATED, "query_pre_attn_scalar": 9}, set()),
    "opt": ({**SHAPE, "ffn_dim": 50, "max_position_embeddings": 32}, {"attention"}),
    "gpt_neox": ({**SHAPE, "intermediate_size": 50, **PARTIAL}, {"attention"}),
    "falcon": (SHAPE, {"attention"}),
    "mpt": (
        {"vocab_size": 61, "d_model": 64, "n_heads": 2, "n_layers": 2, "attn_config": {"softmax_scale": 1.0}},
        set(),
    ),
}


@pytest.fixture
def used(monkeypatch) -> set[str]:
    """The names of the kernels that ran."""
    names: set[str] = set()

    def attention(q, k, v, cosine, sine, mask, causal):
        names.add("attention")
        assert mask is None or mask.dtype == torch.bool and mask.shape[1] == 1
        if cosine is not None:
            assert cosine.shape[-1] == q.shape[-1]
            q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2), None

    class Norm:
        @staticmethod
        def apply(x, weight, eps):
            names.add("norm")
            assert x.dim() == 2
            return F.rms_norm(x, weight.shape, weight, eps)

    class Gate:
        @staticmethod
        def apply(gate, up):
            names.add("gate")
            return F.silu(gate) * up

    class Rotate:
        apply = staticmethod(rotate)

    monkeypatch.setattr(training, "library", lambda: True)
    monkeypatch.setattr(training, "_Rotate", Rotate)
    monkeypatch.setattr(training, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(training, "_RMSNorm", Norm)
    monkeypatch.setattr(training, "_GatedSiLU", Gate)
    return names


@pytest.mark.parametrize(("padded", "prefixed"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_fused_where_the_arithmetic_is_the_kernels(family, padded, prefixed, used):
    torch.manual_seed(0)
    config, kernels = FAMILIES[family]
    net = Transformer(read_spec({**config, "model_type": family}, "lm")).initialize(0.2).requires_grad_(False)
    net = net.to(torch.bfloat16)
    ids = torch.arange(3 * 19).view(3, 19) % 61
    mask = torch.arange(19) < torch.tensor([[19], [7], [11]]) if padded else torch.ones(3, 19, dtype=torch.bool)
    prefix = None
    if prefixed:
        prefix = Prefix(*torch.randn(2, 2, 1, net.spec.num_kv_heads, 3, net.spec.head_dim).to(torch.bfloat16))
    want = net(ids, attention_mask=mask, prefix=prefix)
    with training.fused(net):
        found = net(ids, attention_mask=mask, prefix=prefix)
    assert used == kernels
    torch.testing.assert_close(found[mask], want[mask], atol=0.05, rtol=0.05)
