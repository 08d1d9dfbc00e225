"""fp8 weights: which matrices of a rank are stored so, and how they are made from wider ones.

Row-wise: value = fp8 * scale of its row, scale = max|row| / 448 (the largest number of e4m3). Embedding, head, norms,
router and the projections that MLA absorbs into its queries stay wide.
"""

from __future__ import annotations

import re

import torch

from runtime.ops import Fp8Weight, Weight

FP8 = torch.float8_e4m3fn
_LARGEST = 448.0
_NARROW = re.compile(r"\d+\.(qkv|out|q_down|q_up|kv_down|(ffn|shared|experts)\.(w13|w2))")


def weight_of(params: dict[str, torch.Tensor], name: str) -> Weight:
    """A matrix with the scales that belong to it."""
    scale = params.get(f"{name}.scale")
    return params[name] if scale is None else Fp8Weight(params[name], scale)


def join(params: dict[str, torch.Tensor], first: str, second: str) -> Fp8Weight | None:
    """One fp8 matrix over another as one, of which the parameters become parts; None unless both are fp8."""
    a, b = weight_of(params, first), weight_of(params, second)
    if not isinstance(a, Fp8Weight) or not isinstance(b, Fp8Weight):
        return None
    both = Fp8Weight(torch.cat([a.data.view(torch.uint8), b.data.view(torch.uint8)]).view(FP8), torch.cat([a.scale, b.scale]))
    rows = len(a.scale)
    for name, part in ((first, slice(None, rows)), (second, slice(rows, None))):
        params[name], params[f"{name}.scale"] = both.data[part], both.scale[part]
    return both


def quantise(params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters with fp8 matrices and `<name>.scale` beside them; the wide ones are let go one by one."""
    out: dict[str, torch.Tensor] = {}
    for name in list(params):
        wide = params.pop(name)
        if _NARROW.fullmatch(name) is None:
            out[name] = wide
            continue
        out[name], out[f"{name}.scale"] = quantise_rows(wide)
    return out


def quantise_rows(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(fp8 [..., N, K], fp32 scale a row [..., N]); the leading dim is done piece by piece to spare memory."""
    narrow = torch.empty(wide.shape, dtype=FP8, device=wide.device)
    scale = torch.empty(wide.shape[:-1], dtype=torch.float32, device=wide.device)
    for i in range(len(wide)) if wide.dim() > 2 else (slice(None),):
        rows = wide[i].float()
        scale[i] = rows.abs().amax(-1).clamp(min=1e-10) / _LARGEST
        narrow[i] = (rows / scale[i][..., None]).to(FP8)
    return narrow, scale
