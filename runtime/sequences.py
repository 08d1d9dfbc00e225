"""The requests of one DP rank, as its leader keeps them, and a step's work as it travels to the leader's TP peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from runtime.batch import Segment
from runtime.ngram import Ngram
from runtime.sampling import uniform
from runtime.types import FinishReason, SamplingParams
from twin.policy.steps import StepPlan


@dataclass
class LiveRequest:
    """`tokens` are prompt and output so far. `hands_over`: its KV goes to a decode instance after the first token; `early`: parts
    of it before, if the prompt is long enough, which `told` says has been said. `draft`
    is the MTP module's guess of the next token, -1 if there is none, and `draft_row` its state's row (`MtpDrafter`)."""

    request_id: int
    tokens: list[int]
    prompt_len: int
    params: SamplingParams
    seed: int
    hands_over: bool
    stops: frozenset[int] = field(default_factory=frozenset)
    early: bool = False
    told: bool = False
    began: bool = False
    ended: bool = False
    draft: int = -1
    draft_row: int = 0
    lookup: Ngram = field(default_factory=Ngram)

    @classmethod
    def of(cls, message: dict[str, Any]) -> LiveRequest:
        """From an `add`, `reserve` or `activate` message."""
        params = SamplingParams(**{**message["params"], "stop_token_ids": tuple(message["params"]["stop_token_ids"])})
        return cls(message["id"], message["tokens"], message["prompt_len"], params, message["seed"],
                   message.get("hands_over", False), frozenset() if params.ignore_eos else frozenset(params.stop_token_ids),
                   message.get("early", False))

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    def draw(self, ahead: int = 0) -> float:
        """The uniform number that decides the next token, or one further ahead."""
        return uniform(self.seed, self.generated + ahead) if self.params.temperature else 0.0

    def append(self, token: int) -> FinishReason | None:
        """Take a token; why the request ends with it, if it does."""
        self.tokens.append(token)
        self.draft = -1
        reason: FinishReason | None = "length" if self.generated >= self.params.max_tokens else None
        reason = "stop" if token in self.stops else reason
        self.ended = reason is not None
        return reason


Drafts = Callable[[LiveRequest, int], list[int]]
"""Up to so many drafts of a request's next tokens."""


def segments_of(plan: StepPlan, requests: dict[int, LiveRequest], table: Any,
                drafts: Drafts = lambda request, count: []) -> tuple[list[Segment], list[LiveRequest]]:
    """(the step's segments, decodes first; the request of each)."""
    segments, owners = [], []
    for request_id, width in zip(plan.decode, plan.decode_tokens, strict=True):
        request = requests[request_id]
        tokens = request.tokens
        ids = tokens[-1:] if width == 1 else tokens[-1:] + drafts(request, width - 1)
        segments.append(Segment(ids, len(tokens) - 1, table(request_id)))
        owners.append(request)
    for chunk in plan.prefill:
        request = requests[chunk.request_id]
        ids = request.tokens[chunk.start:chunk.start + chunk.tokens]
        segments.append(Segment(ids, chunk.start, table(chunk.request_id), True, chunk.is_last))
        owners.append(request)
    return segments, owners


def pack(segments: Sequence[Segment]) -> torch.Tensor:
    """Segments as one int64 tensor: count, then (tokens, start, flags, blocks) of each, then all tokens, all blocks."""
    heads = [(len(s.token_ids), s.start, s.is_prefill + 2 * s.wants_logits, len(s.blocks)) for s in segments]
    flat = [len(segments), *(n for head in heads for n in head)]
    body = [np.asarray(s.token_ids, dtype=np.int64) for s in segments] + [np.asarray(s.blocks, dtype=np.int64) for s in segments]
    return torch.from_numpy(np.concatenate([np.array(flat, dtype=np.int64), *body]))


def unpack(packed: torch.Tensor) -> list[Segment]:
    """The inverse of `pack`."""
    flat = packed.numpy()
    n = int(flat[0])
    heads = flat[1:1 + 4 * n].reshape(n, 4)
    token_ends = 1 + 4 * n + heads[:, 0].cumsum()
    block_ends = (int(token_ends[-1]) if n else 1) + heads[:, 3].cumsum()
    return [Segment(flat[t - k:t], int(start), flat[b - m:b], bool(flags & 1), bool(flags & 2))
            for (k, start, flags, m), t, b in zip(heads, token_ends, block_ends, strict=True)]
