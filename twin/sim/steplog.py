"""What every step of an instance did: growing columns, so that statistics come out of arrays, whatever the step size.

Steps are logged one by one or many at once; as all statistics are taken from the whole columns at the end, they do not
depend on which of the two happened.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

COLUMNS = ("end_s", "step_s", "decode_seqs", "prefill_seqs", "prefill_tokens", "output_tokens", "kv_tokens",
           "kv_tokens_fullest", "waiting")
_INDEX = {name: i for i, name in enumerate(COLUMNS)}


class StepLog:
    """Columns over the steps of one instance, in order.

    `end_s`, `step_s`: when it ended, how long it took. `decode_seqs`, `prefill_seqs` (chunks),
    `prefill_tokens`: its batch, summed over ranks.
    `output_tokens` that came out. `kv_tokens`: KV memory in use during the step, in tokens, summed over ranks, and
    `kv_tokens_fullest` on the fullest rank. `waiting` requests.
    """

    def __init__(self) -> None:
        self._data: NDArray[np.float64] = np.zeros((len(COLUMNS), 256))
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, steps: int, **columns: NDArray[np.float64] | NDArray[np.int64] | float) -> int:
        """Log `steps` steps, each column an array [steps] or one number for all; the index of the first of them."""
        first, end = self._size, self._size + steps
        while end > self._data.shape[1]:
            self._data = np.concatenate([self._data, np.zeros_like(self._data)], axis=1)
        for name, values in columns.items():
            self._data[_INDEX[name], first:end] = values
        self._size = end
        return first

    def column(self, name: str) -> NDArray[np.float64]:
        """A view of one column [steps]."""
        return self._data[_INDEX[name], :self._size]

    def longest_s(self, first: int, last: int) -> float:
        """The longest of the steps first..last."""
        return float(self._data[1, first:last + 1].max())
