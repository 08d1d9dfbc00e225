"""Experts that betray every mistake of an exchange: each transforms rows in its own way, and all sums are exact.

Rows are integers of -2..2, expert e turns x into a_e x + b_e with small integers that depend on the expert (b_e on the
column too), and weights are 1 or 2: every partial sum of up to 8 choices is an integer below 256, which bf16 holds exactly,
and rows scaled to fp8 come back exactly as well. So a token that met a wrong expert, one twice, one not at all, or with
a wrong weight differs, and whoever is right is equal to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROUTES = ("uniform", "one expert", "one rank", "not the last rank", "padded")


@dataclass(frozen=True)
class Traffic:
    """What a rank brings: rows [T, H], slots over all ranks [T, K] int32 (-1: none), weights [T, K] fp32."""

    x_TH: torch.Tensor
    slots_TK: torch.Tensor
    weights_TK: torch.Tensor


def traffic(tokens: int, hidden: int, choices: int, slots: int, ranks: int, *, route: str, seed: int,
            dtype: torch.dtype, device: torch.device | str = "cpu") -> Traffic:
    """Random rows with choices as `route` says: distinct ones over all slots; all tokens to slot 0 alone; all to the first
    rank; none to the last rank; or every second token padding that chooses nothing. `ranks` share the slots evenly."""
    stream = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (tokens, hidden), generator=stream)
    each = slots // ranks
    allowed = {"one rank": each, "not the last rank": max(slots - each, 1)}.get(route, slots)
    order = torch.rand(tokens, allowed, generator=stream).argsort(-1)[:, :choices]
    chosen = torch.full((tokens, choices), -1)
    chosen[:, :order.shape[1]] = order
    if route == "one expert":
        chosen = torch.full((tokens, choices), -1)
        chosen[:, 0] = 0
    elif route == "padded":
        chosen[1::2] = -1
    elif route not in ROUTES:
        raise ValueError(f"no route {route!r}; there are: {', '.join(ROUTES)}")
    weights = torch.randint(1, 3, (tokens, choices), generator=stream)
    return Traffic(x.to(device, dtype), chosen.to(device, torch.int32), weights.to(device, torch.float32))


def slopes(slots: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """a_e [E], of -4..4 without 0."""
    e = torch.arange(slots, device=device) * 5 % 8
    return (e - 4 + (e >= 4).long()).float()


def offsets(slots: int, hidden: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """b_e [E, H], of -4..4, another pattern over the columns for every expert."""
    e, h = torch.arange(slots, device=device)[:, None], torch.arange(hidden, device=device)
    return ((e * 7919 + h * 104729 + e * h * 31 >> 3) % 9 - 4).float()


def apply_experts(x_NH: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor, first_slot: int, slots: int,
                  expert_tp: int = 1) -> torch.Tensor:
    """What the experts from `first_slot` on make of rows with local slots (-1: none); of `expert_tp` ranks with the same
    experts, one rank's equal share. Rows that chose nothing give zeros, whatever they hold."""
    a_E, b_EH = slopes(slots, x_NH.device), offsets(slots, x_NH.shape[1], x_NH.device)
    out_NH = torch.zeros(x_NH.shape, dtype=torch.float32, device=x_NH.device)
    for k in range(slots_NK.shape[1]):
        here = (slots_NK[:, k] >= 0)[:, None]
        expert = slots_NK[:, k].long().clamp(min=0) + first_slot
        made = weights_NK[:, k:k + 1] * (a_E[expert][:, None] * x_NH.float() + b_EH[expert]) / expert_tp
        out_NH += torch.where(here, made, 0.0)
    return out_NH.to(x_NH.dtype)


def expected(sent: Traffic, slots: int) -> torch.Tensor:
    """What must come back, [T, H], in the dtype of the rows."""
    return apply_experts(sent.x_TH, sent.slots_TK, sent.weights_TK, 0, slots)


def mistakes(got_TH: torch.Tensor, sent: Traffic, slots: int) -> str:
    """Empty when all is right, else how many rows differ and the first of them."""
    want = expected(sent, slots)
    if got_TH.shape != want.shape or got_TH.dtype != want.dtype:
        return f"{tuple(got_TH.shape)} {got_TH.dtype} instead of {tuple(want.shape)} {want.dtype}"
    wrong = (got_TH != want).any(1).nonzero().flatten()  # NaN differs from everything
    if not len(wrong):
        return ""
    t = int(wrong[0])
    return (f"{len(wrong)} of {len(want)} rows differ; row {t} with slots {sent.slots_TK[t].tolist()} begins "
            f"{got_TH[t, :4].tolist()} instead of {want[t, :4].tolist()}")
