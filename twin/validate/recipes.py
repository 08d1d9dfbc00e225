"""How public benchmark runs were served, as data: what InferenceX's recipes set beside the columns of a table.

InferenceX (github.com/SemiAnalysisAI/InferenceX, benchmarks/ and .github/configs/nvidia-master.yaml, October 2025 to April
2026) pins for each model, GPU and engine an image, a search space and the flags of the server. Tables of its results keep the
image's version, not the flags; a row is matched with the recipe of its time by version.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from twin.cost.serving import Serving

ACCEPTANCE = 0.7
"""Chance that a draft is accepted given that those before it were."""

_POLL_30 = ((16, 30), (0, 10))  # --scheduler-recv-interval: 30 from 16 users on, else 10
_DEEPSEEK = "deepseek-(r1|v3$)"
_B = "b[23]00"


@dataclass(frozen=True)
class Recipe:
    """Flags of one server script. Patterns match from the start of a name; an empty one matches everything.

    budget_tokens: --chunked-prefill-size, --max-num-batched-tokens or --max-num-tokens, 0 for the engine's own; prompts: the
    budget is that many prompts instead; padded: the budget holds one prompt and all users' tokens, up to the next 64, and no
    less than budget_tokens. poll: decode steps between looks for new requests, by least users. running: most requests
    that run at once. wait: TensorRT-LLM's batch_wait_timeout_iters and batch_wait_max_tokens_ratio. expert_parallel: experts
    are cut by EP whatever the columns say. kv: --kv-cache-dtype, empty where it is what quantised weights bring
    (`words.kv_dtype`). since: first day (ISO date) of the script; rows that do not say when they ran match only recipes without.
    """

    engine: str
    model: str
    gpu: str = ""
    experts: str = ""
    version: str = ""
    drafts: bool | None = None
    tp: tuple[int, ...] = ()
    isl: int = 0
    osl: int = 0
    users: int = 0
    budget_tokens: int = 0
    prompts: int = 0
    padded: bool = False
    poll: tuple[tuple[int, int], ...] = ((0, 1),)
    running: int = 0
    wait: tuple[int, float] = (0, 0.0)
    expert_parallel: bool = False
    kv: Literal["", "bf16", "fp8"] = ""
    since: str = ""


RECIPES = (
    Recipe("sglang", _DEEPSEEK, _B, "fp4", budget_tokens=16384, poll=_POLL_30, running=256),
    Recipe("sglang", _DEEPSEEK, _B, "fp8", tp=(4,), budget_tokens=8192, poll=((0, 10),), running=32),
    Recipe("sglang", _DEEPSEEK, _B, "fp8", drafts=True, budget_tokens=16384, poll=_POLL_30, running=512),
    Recipe("sglang", _DEEPSEEK, _B, "fp8", budget_tokens=32768, poll=_POLL_30, running=128),
    Recipe("sglang", _DEEPSEEK, "h200", isl=1024, osl=1024, budget_tokens=32768, running=512),
    Recipe("sglang", _DEEPSEEK, "h200", budget_tokens=32768, running=256),
    Recipe("sglang", "qwen3.5", "b300", "fp8", budget_tokens=16384, poll=((0, 10),)),
    Recipe("sglang", "qwen3.5", _B, budget_tokens=32768, poll=_POLL_30, running=128),
    Recipe("sglang", "qwen3.5", "h200", budget_tokens=16384, running=128, kv="fp8"),
    Recipe("sglang", "glm-5", _B, "fp4", since="2026-04-09", budget_tokens=32768, poll=((0, 10),)),
    Recipe("sglang", "glm-5", _B, "fp4", budget_tokens=131072),
    Recipe("sglang", "glm-5", _B, budget_tokens=32768),
    Recipe("trtllm", _DEEPSEEK, drafts=True, padded=True),
    Recipe("trtllm", _DEEPSEEK, version="(1\\.1\\.0|$)", padded=True),  # until 2026-01-21
    Recipe("trtllm", _DEEPSEEK, "b200", "fp8", isl=1024, osl=1024, users=64, padded=True, budget_tokens=8192, wait=(40, 0.8)),
    Recipe("trtllm", _DEEPSEEK, padded=True, budget_tokens=8192),
    Recipe("trtllm", "gpt-oss", budget_tokens=20000),
    Recipe("trtllm", "llama-3.1-70b", tp=(1, 2, 4), isl=1024, osl=1024, budget_tokens=16384, wait=(20, 0.9)),
    Recipe("trtllm", "llama-3.1-70b", budget_tokens=16384),
    # before April 2026: vLLM's own cache and budget, experts by EP whatever EP's size
    Recipe("vllm", "minimax", "b200", "fp8", version="0\\.1[78]", expert_parallel=True, kv="bf16"),
    Recipe("vllm", "minimax", _B, prompts=2),
    Recipe("vllm", "minimax", "h200", tp=(8,), expert_parallel=True),  # since 2026-03-13; the runs on four GPUs before had none
    Recipe("vllm", "kimi-k2", "b200", "fp4", since="2026-04-20", prompts=2),
    Recipe("vllm", "gpt-oss", "b200", since="2025-12-05"),
    Recipe("vllm", "llama-3.1-70b", "h[12]00", "fp8", kv="fp8"),
    Recipe("vllm", "gpt-oss", "b200", version="$", kv="bf16"),
)


def day_of(texts: Mapping[str, str]) -> str:
    """The day a row was measured (ISO), empty where it does not say."""
    found = re.search(r"\bmeasured=(\d{4}-\d\d-\d\d)", texts.get("silicon_data_source", ""))
    return found.group(1) if found else ""


def recipe_of(texts: Mapping[str, str], numbers: Mapping[str, float], model: str, experts: str, users: int,
              drafts: int) -> Recipe | None:
    """The first recipe that a row fits; None where InferenceX published none that differs from the engine's defaults."""
    day = day_of(texts)
    for r in RECIPES:
        names = ((r.engine, texts["backend"]), (r.model, model), (r.gpu, texts["system"]), (r.experts, experts),
                 (r.version, texts.get("backend_version", "")))
        sizes = ((r.isl, numbers["isl"]), (r.osl, numbers["osl"]))
        if (all(re.match(pattern, name) for pattern, name in names)
                and all(not wanted or wanted == size for wanted, size in sizes)
                and (r.drafts is None or r.drafts == bool(drafts)) and users >= r.users and day >= r.since
                and (not r.tp or numbers.get("tp_size", 1) in r.tp)):
            return r
    return None


def served_as(recipe: Recipe, serving: Serving, isl: int, users: int, drafts: int) -> Serving:
    """The engine's scheduler under a recipe's flags."""
    budget = recipe.budget_tokens or serving.budget_tokens
    if recipe.prompts:
        budget = recipe.prompts * isl
    if recipe.padded:
        budget = max(recipe.budget_tokens, -(-((1 + drafts) * users + isl + 64) // 64) * 64)
    poll = next(steps for least, steps in recipe.poll if users >= least)
    return replace(serving, budget_tokens=budget, poll_steps=poll, running=recipe.running or serving.running,
                   wait_steps=recipe.wait[0], wait_share=recipe.wait[1])


def drafts_of(texts: Mapping[str, str], numbers: Mapping[str, float], model: str) -> int:
    """Draft tokens a step that the recipe of this row used; 0 where the recipe has none or the columns do not tell.

    Runs with and without drafts share all columns of these tables; images and search spaces tell some apart. TensorRT-LLM on
    B200: image 1.2.0rc6.post3 was used for drafts alone, three of them, one under attention DP; so, by what its rows take beside
    those of the image before, was 1.1.0rc2.post2 on H200. SGLang on B200 in fp8, two
    drafts each: DeepSeek-R1 at 8k/1k ran without drafts on eight GPUs for 4 users only, and for up to 64 users at other
    lengths; Qwen3.5 on four GPUs without expert parallelism ran with drafts only.
    """
    fp8 = texts.get("precision", "") == "fp8"
    version = texts.get("backend_version", "")
    if (texts["backend"], texts["system"], version) in (("trtllm", "b200_sxm", "1.2.0rc6.post3"),
                                                        ("trtllm", "h200_sxm", "1.1.0rc2.post2")):
        return 1 if numbers.get("attention_dp_size", 1) > 1 else 3
    if (texts["backend"], texts["system"]) != ("sglang", "b200_sxm") or not fp8 or not version.startswith("0.5.9"):
        return 0
    tp, ep = numbers.get("tp_size", 1), numbers.get("moe_ep_size", 1)
    if model.startswith("deepseek") and tp == 8:
        return 2 if numbers.get("batch_size", 1) > (4 if numbers["isl"] == 8192 else 64) else 0
    return 2 if model.startswith("qwen3.5") and tp == 4 and ep == 1 else 0
