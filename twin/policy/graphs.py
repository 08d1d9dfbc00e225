"""Which batch sizes our engine captures as CUDA graphs: the runtime captures them, the cost model pads to them."""

from __future__ import annotations


def ladder(most: int) -> tuple[int, ...]:
    """Rows: 1, 2, 4, 8, then multiples of 16 to 64, of 32 to 256, of 64 above; `most` is the last."""
    sizes = (1, 2, 4, 8, *range(16, 64, 16), *range(64, 256, 32), *range(256, most + 64, 64))
    return (*(s for s in sizes if s < most), most)
