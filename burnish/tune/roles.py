"""Which projections of a network do what, by their names: burnish's own, and those usual in transformers."""

from __future__ import annotations

import re

from burnish.config import UserError
from burnish.model.network import Network
from burnish.model.surgery import linears

NAMES = {
    "attention output": r"o_proj|out_proj|out_lin|attention\.output\.dense|self_attn\.dense|attn\.c_proj|attn\.proj",
    "feed-forward output": r"down_proj|fc_out|fc2|lin2|w2|(?<!attention\.)output\.dense|dense_4h_to_h|mlp\.c_proj",
    "fused": r"qkv_proj",
    "key": r"k_proj|key|k_lin|key_proj",
    "value": r"v_proj|value|v_lin|value_proj",
}


def projections(net: Network, role: str, technique: str) -> list[str]:
    """The paths of the projections with this role. Raises UserError where no name tells."""
    found = [path for path, _ in linears(net) if re.fullmatch(rf"(.*\.)?({NAMES[role]})", path)]
    if not found:
        leaves = sorted({path.rpartition(".")[2] for path, _ in linears(net)})
        raise UserError(
            f"technique '{technique}': no {role} projection is known in this {net.spec.family} model; "
            f"it has: {', '.join(leaves)}"
        )
    return found
