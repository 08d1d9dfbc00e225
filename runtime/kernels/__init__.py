"""Triton kernels of the engine's fast path, each with a pure-torch twin in `reference.py`.

    align.py          which rows go to which expert, on the device
    moe.py            one MoE layer by two gathering GEMMs, activation and weighted sum fused in (decode and beyond)
    moe_prefill.py    one MoE layer of long prefills, the second GEMM by torch's grouped product
    moe_fp8.py        the two products of a long prefill's MoE layer wholly in fp8
    moe_rows.py       one MoE layer of a few tokens, a row at a time, the sum over choices in the second product
    skinny.py         products of a few rows with norm, bias and residual stream fused in
    products.py       fp8 products of a step's rows, cut along K, with what follows them
    moe_layer.py      which of them serves a layer
    attention_gqa.py  paged split-KV decode attention (grouped query heads)
    attention_mla.py  paged split-KV decode attention over a latent cache (absorbed MLA)
    attention_mla_hopper.py   the same for 64 heads and more on sm_90, in Gluon
    attention_prefill.py      causal attention of prompts of any lengths, windows and sinks
    attention_prefill_hopper.py  the same for common heads on sm_90, in Gluon
    splits.py         how decode attention is cut, and how the cuts are merged
    fused.py          norm, activation, quantisation
    rope.py           rotary embedding, query-key norm and the write into the paged cache
    gate.py           the router: scores, groups, top-k
    symm.py           dispatch, combine and barrier through peers' memory
    sampling.py       the next token
    step.py           what a decode step derives from its lengths, and leaves for the next one

Every function takes and returns torch tensors, launches on the current stream, never reads a value back to the host
and allocates only through torch, so that a whole step can be captured in a CUDA graph. Nothing here imports the
rest of the project. The kernel modules need triton; `reference.py` and `sampling.py` need torch alone.
"""
