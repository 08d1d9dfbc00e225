"""Speculative decoding: drafts of the next tokens, and which of them stand.

A step computes a request's newest token and drafts after it; the row after each gives the token that the request would
have drawn there without drafts, because a draw depends on logits, seed and index alone (`runtime.sampling`). Drafts that
equal what was drawn stand, and the first draw that differs replaces its draft. So outputs are the same tokens with and
without drafts, greedy or sampled: this is rejection sampling with a draft of probability one, which stands with the
probability that the model gives it. Drafts are drawn with the same random numbers as the tokens they guess, so that the
better the drafter's distribution, the more of them stand. KV of drafts that fell is overwritten by the steps that follow.

Legend: T tokens of a step, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from runtime.batch import Segment, make_step
from runtime.comm.group import Group
from runtime.model.mtp import Mtp
from runtime.sampling import sample
from runtime.sequences import LiveRequest
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan

Owners = Sequence[LiveRequest]
"""The request of every segment of a step; empty on ranks that follow a leader."""


def uses_mtp(plan: Plan, model: ModelSpec) -> bool:
    """Whether the ranks of a plan hold the model's MTP module. Where any pool drafts all do: prefill computes the module's
    KV of prompts, and KV caches that go from one pool to another are as many on both sides."""
    return model.mtp_layers > 0 and any(pool.mtp_draft_tokens for pool in plan.pools)


def draw(logits_RV: torch.Tensor, owners: Owners, ahead: Sequence[int], greedy_R: torch.Tensor | None = None) -> list[int]:
    """The token that each row's owner draws `ahead[r]` tokens after its newest; `greedy_R` if it is known already."""
    if not owners:
        return []
    if greedy_R is None or any(owner.params.temperature for owner in owners):
        draws = [owner.draw(far) for owner, far in zip(owners, ahead, strict=True)]
        greedy_R = sample(logits_RV, [owner.params for owner in owners], draws)
    tokens: list[int] = greedy_R.tolist()
    return tokens


def verify(segments: Sequence[Segment], owners: Owners, logits_RV: torch.Tensor,
           greedy_R: torch.Tensor | None = None) -> list[list[int]]:
    """New tokens of every segment: the drafts that stand and one more; none for a prompt still in progress."""
    widths = [0 if not s.wants_logits else 1 if s.is_prefill else len(s.token_ids) for s in segments]
    if widths.count(1) == len(widths):
        return [[token] for token in draw(logits_RV, owners, [0] * len(widths), greedy_R)]
    rows = [owner for owner, width in zip(owners, widths, strict=True) for _ in range(width)]
    drawn = draw(logits_RV, rows, [far for width in widths for far in range(width)], greedy_R)
    found, row = [], 0
    for segment, width in zip(segments, widths, strict=True):
        new, row = drawn[row:row + width], row + width
        kept = 1
        while kept < width and new[kept - 1] == segment.token_ids[kept]:
            kept += 1
        found.append(new[:kept])
    return found


class MtpDrafter:
    """Drafts by the model's MTP module, on one rank. All ranks of an instance make the same calls in lockstep.

    After a step `follow` runs the module over the tokens that stand, which gives each request its first draft; before the
    next one `extend` runs it on its own drafts for the further ones, whose KV has its blocks by then.
    """

    def __init__(self, mtp: Mtp, cache: torch.Tensor, pool: PoolPlan, tp: Group,
                 within: Callable[[str], AbstractContextManager[None]], *, alone: bool = False) -> None:
        """`alone`: no other rank waits for this one's share of the module's experts."""
        self._mtp, self._cache, self._tp, self._within = mtp, cache, tp, within
        self._block, self._drafts = pool.block_tokens, pool.role != "prefill"
        self._leads, self._alone = tp.index == 0, alone
        self._states = cache.new_zeros((0, mtp.transformer.model.hidden), dtype=mtp.transformer.params["embed"].dtype)

    @staticmethod
    def passes(segments: Sequence[Segment]) -> int:
        """How often `extend` must run the module for these segments: for every draft but the first."""
        return max((len(s.token_ids) - 2 for s in segments if not s.is_prefill), default=0)

    def extend(self, segments: list[Segment], owners: Owners, passes: int, capacity: int) -> list[Segment]:
        """The step's segments with every draft after the first filled in. `passes`: the most that any rank needs."""
        if passes < 1:
            return segments
        with self._within("draft"), torch.inference_mode():
            members = [i for i, s in enumerate(segments) if not s.is_prefill and len(s.token_ids) > 2]
            ids = [list(s.token_ids) for s in segments]
            states = self._states[self._told([owners[i].draft_row for i in members] if self._leads else [0] * len(members))]
            for far in range(1, passes + 1):
                keep = [k for k, i in enumerate(members) if len(ids[i]) > far + 1]
                members, states = [members[k] for k in keep], states[keep]
                step = make_step([Segment(ids[i][far:far + 1], segments[i].start + far - 1, segments[i].blocks)
                                  for i in members], self._block, self._cache.device)
                states = self._mtp.forward(step, states, self._cache, capacity)
                logits = self._mtp.logits(states)
                drawn = draw(logits, [owners[i] for i in members], [far] * len(members)) if self._leads else [0] * len(members)
                for i, token in zip(members, self._told(drawn).tolist(), strict=True):
                    ids[i][far + 1] = token
        return [replace(s, token_ids=ids[i]) for i, s in enumerate(segments)]

    def follow(self, segments: Sequence[Segment], owners: Owners, hidden_TH: torch.Tensor, capacity: int) -> None:
        """Give the module what the step computed: states of its tokens, and the tokens after them, which the owners have by
        now. Owners that go on get their first draft."""
        with self._within("draft"), torch.inference_mode():
            after = self._told([token for s, owner in zip(segments, owners, strict=True) for token in _after(s, owner)]
                               if self._leads else [0] * sum(len(s.token_ids) for s in segments)).tolist()
            parts: list[Segment] = []
            rows: list[int] = []
            going, row = [], 0
            for i, s in enumerate(segments):
                stand = [token for token in after[row:row + len(s.token_ids)] if token >= 0]
                if stand:
                    parts.append(replace(s, token_ids=stand, wants_logits=True))
                    rows += range(row, row + len(stand))
                    going.append(i)
                row += len(s.token_ids)
            if self._alone and not parts:
                return
            step = make_step(parts, self._block, self._cache.device)
            states = self._mtp.forward(step, hidden_TH[rows], self._cache, capacity)
            ends = torch.tensor([len(s.token_ids) for s in parts], dtype=torch.int64).cumsum(0) - 1
            self._states = states[ends.to(states.device)]
            if self._drafts:
                logits = self._mtp.logits(self._states)
                mine = [owners[i] for i in going] if self._leads else []
                for place, (owner, token) in enumerate(zip(mine, draw(logits, mine, [0] * len(mine)), strict=True)):
                    owner.draft, owner.draft_row = token, place

    def _told(self, values: list[int]) -> torch.Tensor:
        """The leader's values on all its TP ranks."""
        found = torch.tensor(values, dtype=torch.int64, device=self._cache.device)
        return self._tp.broadcast(found) if len(values) else found


def _after(segment: Segment, owner: LiveRequest) -> list[int]:
    """The token after each of the segment's, -1 where none stands; nothing stands of a request that ended."""
    length = len(segment.token_ids)
    found = [] if owner.ended else owner.tokens[segment.start + 1:segment.start + 1 + length]
    return found + [-1] * (length - len(found))
