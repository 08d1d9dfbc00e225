"""DeepSeek's MTP module: one more decoder layer that guesses the token after the next.

At position i it takes the model's finished state of i and the embedding of token i + 1, normalises both, projects them
to one state, runs its layer (with KV of its own, at position i) and, with a norm of its own and the model's head, gives
logits of token i + 2. Its own output state serves as the state of i + 1 for a guess further ahead. Embedding and head
are the model's: the copies that checkpoints ship beside the module are the same numbers.

Source: DeepSeek-V3 technical report (arXiv 2412.19437) section 2.2; tensor names and the masked embedding at position 0
as in the published checkpoints and the engines that serve them.
"""

from __future__ import annotations

import torch

from runtime.batch import StepInput
from runtime.model.params import Placement, mtp_placement, with_mtp
from runtime.model.transformer import Params, Transformer, drive, make_layer


class Mtp:
    """The module of a transformer whose `params` were loaded with it."""

    def __init__(self, transformer: Transformer, params: Params, placement: Placement | None = None) -> None:
        self.transformer = transformer
        model, at, i = with_mtp(transformer.model), transformer.at, transformer.model.layers
        self.layer = make_layer(model, at, i, params, transformer.rig, mtp_placement(model, at.slots, placement))
        self._embed_norm, self._state_norm, self._join, self._head_norm = (
            params[f"{i}.{name}"] for name in ("enorm", "hnorm", "eh_proj", "head_norm"))

    def forward(self, step: StepInput, states_TH: torch.Tensor, cache: torch.Tensor, capacity: int) -> torch.Tensor:
        """States [T, H] of a step whose tokens are those after `positions_T`, given the states of these positions."""
        main, ops, eps = self.transformer, self.transformer.rig.ops, self.transformer.model.norm_eps
        embedded = main.embed(step.token_ids_T).masked_fill((step.positions_T == 0)[:, None], 0)
        both = torch.cat([ops.rms_norm(embedded, self._embed_norm, eps), ops.rms_norm(states_TH, self._state_norm, eps)], -1)
        stream_TH = ops.linear(both, self._join)
        stages = self.layer.stages(main.rig, None, stream_TH, step, cache, main.angles_PA, capacity)
        x_TH, stream_TH = drive([stages])[0]
        return stream_TH if x_TH is None else stream_TH + x_TH

    def logits(self, states_RH: torch.Tensor) -> torch.Tensor:
        """Logits fp32 [R, V] of the tokens after the next, the same on all TP ranks."""
        main = self.transformer
        return main.head(main.rig.ops.rms_norm(states_RH, self._head_norm, main.model.norm_eps))
