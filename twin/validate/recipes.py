"""Deployments that benchmark tables do not tell apart by their columns: runs with multi-token-prediction drafts.

InferenceX publishes, for one configuration, runs with and without drafts; the tables keep no column for it. Its recipes
(configs/nvidia-master.yaml, January to April 2026) pin images and search spaces, and where these differ they tell.
"""

from __future__ import annotations

from collections.abc import Mapping

ACCEPTANCE = 0.7
"""Chance that a draft is accepted given that those before it were."""


def drafts_of(texts: Mapping[str, str], numbers: Mapping[str, float], model: str) -> int:
    """Draft tokens a step that the recipe of this row used; 0 where the recipe has none or does not tell.

    TensorRT-LLM on B200: image 1.2.0rc6.post3 was used for drafts alone, three of them, one under attention DP.
    SGLang on B200 in fp8: DeepSeek-R1 at 8k/1k ran without drafts on eight GPUs for 4 users only; Qwen3.5 on four GPUs
    without expert parallelism ran with drafts only. Two drafts each.
    """
    fp8 = texts.get("precision", "") == "fp8"
    if texts["system"] != "b200_sxm":
        return 0
    if texts["backend"] == "trtllm" and texts.get("backend_version", "").endswith("1.2.0rc6.post3"):
        return 1 if numbers.get("attention_dp_size", 1) > 1 else 3
    if texts["backend"] != "sglang" or not fp8 or not texts.get("backend_version", "").startswith("0.5.9"):
        return 0
    tp, ep = numbers.get("tp_size", 1), numbers.get("moe_ep_size", 1)
    if model.startswith("deepseek") and tp == 8 and numbers["isl"] == 8192:
        return 2 if numbers.get("batch_size", 1) > 4 else 0
    return 2 if model.startswith("qwen3.5") and tp == 4 and ep == 1 else 0
