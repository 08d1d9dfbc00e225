"""What routing a run saw: tokens by layer and expert, and which experts were chosen together.

A `.csv` file has a row of expert loads a layer, which `routing: {kind: matrix, file: ...}` of a scenario reads; a `.json`
file has the same and, by layer, the pairs of experts that most exceed chance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.comm.group import Group
from twin.spec.rundir import write_text

TOP_PAIRS = 64


def summarise_pairs(pairs_LEE: torch.Tensor, group: Group) -> list[list[list[float]]]:
    """Of every layer the TOP_PAIRS pairs chosen together most beyond chance: [expert, expert, tokens, lift], best first.

    Counts are summed over the group's ranks; all of them call this. Lift is the number of tokens that chose both over what
    independent choices would give; pairs are ranked by tokens beyond that number.
    """
    total = group.all_reduce(pairs_LEE.cpu().contiguous()).numpy().astype(np.float64)
    return [_top(layer) for layer in total]


def _top(pairs_EE: NDArray[np.float64]) -> list[list[float]]:
    tokens_E = pairs_EE.diagonal()
    choices = tokens_E.sum()
    chosen = pairs_EE.sum() - choices
    if not chosen:
        return []
    # of all ordered pairs of choices, how many would join these two if choices knew nothing of one another
    share_E = tokens_E / choices
    chance_EE = np.outer(share_E, share_E)
    np.fill_diagonal(chance_EE, 0.0)
    expected_EE = chance_EE / chance_EE.sum() * chosen
    first, second = np.triu_indices(len(pairs_EE), 1)
    beyond = (pairs_EE - expected_EE)[first, second]
    best = np.argsort(-beyond, kind="stable")[:TOP_PAIRS]
    return [[int(first[i]), int(second[i]), int(pairs_EE[first[i], second[i]]),
             round(float(pairs_EE[first[i], second[i]] / expected_EE[first[i], second[i]]), 4)]
            for i in best if beyond[i] > 0]


def write_routing(file: str | None, totals: Sequence[dict[str, Any]], model: str) -> None:
    """Write what the ranks counted, if a file is wanted and there are `totals`, their last words. Layers come in the model's
    order, dense ones left out."""
    if file is None or not totals:
        return
    path = Path(file)
    load_LE = np.sum([np.array(message["expert_load"], dtype=np.int64) for message in totals], axis=0)
    if path.suffix == ".csv":
        write_text(path, "".join(",".join(map(str, row)) + "\n" for row in load_LE.tolist()))
        return
    pairs: list[list[list[float]]] = [[] for _ in load_LE]
    for message in totals:  # instances counted apart
        for layer, found in enumerate(message.get("pairs", ())):
            pairs[layer] += found
    document = {"schema_version": 1, "model": model, "loads": load_LE.tolist(),
                "pairs": [sorted(layer, key=lambda p: -p[2])[:TOP_PAIRS] for layer in pairs],
                "pair_fields": ["expert", "expert", "tokens", "lift"]}
    write_text(path, json.dumps(document, separators=(",", ":")) + "\n")
