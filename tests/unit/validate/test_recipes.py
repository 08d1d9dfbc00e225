"""Which published recipe a row fits, and what its flags make of the engine's scheduler."""

from __future__ import annotations

import pytest

from twin.cost.serving import Serving
from twin.validate.recipes import RECIPES, Recipe, drafts_of, recipe_of, served_as

PLAIN = Serving(True, False, 8192, 1)


def find(engine: str, model: str, system: str, experts: str, *, version: str = "", users: int = 8, drafts: int = 0,
         **numbers: float) -> Recipe | None:
    texts = {"backend": engine, "system": system, "backend_version": version}
    return recipe_of(texts, {"isl": 1024.0, "osl": 1024.0, "tp_size": 8.0, **numbers}, model, experts, users, drafts)


def test_budgets_of_tensorrt_llm_grew_when_the_image_did() -> None:
    early, late = (find("trtllm", "deepseek-r1", "b200_sxm", "fp4", version=v) for v in ("1.1.0rc2.post2", "1.2.0rc6.post2"))
    assert early is not None and late is not None
    assert served_as(early, PLAIN, 1024, 16, 0).budget_tokens == 1152  # 1024 + 16 + 64, up to the next 64
    assert served_as(late, PLAIN, 1024, 16, 0).budget_tokens == 8192
    assert served_as(late, PLAIN, 8192, 64, 0).budget_tokens == 8320


def test_drafts_count_in_the_budget_and_choose_the_recipe() -> None:
    with_drafts = find("trtllm", "deepseek-r1", "b200_sxm", "fp4", version="1.2.0rc6.post3", drafts=3)
    assert with_drafts is not None and served_as(with_drafts, PLAIN, 1024, 16, 3).budget_tokens == 1152
    assert [find("sglang", "deepseek-r1", "b200_sxm", "fp8_block", drafts=d).running for d in (0, 2)] == [128, 512]  # type: ignore[union-attr]


def test_requests_are_looked_for_less_often_with_many_users() -> None:
    recipe = find("sglang", "deepseek-v3", "b200_sxm", "fp4")
    assert recipe is not None
    assert [served_as(recipe, PLAIN, 1024, users, 0).poll_steps for users in (4, 15, 16, 64)] == [10, 10, 30, 30]


def test_prompts_of_a_dense_model_wait_only_where_the_recipe_said_so() -> None:
    assert [find("trtllm", "llama-3.1-70b", "h200_sxm", "fp8", tp_size=tp, osl=osl).wait  # type: ignore[union-attr]
            for tp, osl in ((4.0, 1024.0), (8.0, 1024.0), (4.0, 8192.0))] == [(20, 0.9), (0, 0.0), (0, 0.0)]


def test_what_no_recipe_names_keeps_the_engines_own() -> None:
    assert find("vllm", "qwen3-235b-a22b-fp8", "h200_sxm", "fp8_block") is None


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.engine} {r.model} {r.gpu} {r.experts}")
def test_every_recipe_serves_someone(recipe: Recipe) -> None:
    assert served_as(recipe, PLAIN, 1024, max(recipe.users, 8), 0).budget_tokens >= 1024


def test_search_spaces_tell_runs_with_drafts_apart() -> None:
    def drafts(users: float, isl: float) -> int:
        texts = {"backend": "sglang", "system": "b200_sxm", "precision": "fp8", "backend_version": "0.5.9"}
        return drafts_of(texts, {"isl": isl, "tp_size": 8.0, "batch_size": users}, "deepseek-r1")

    assert [drafts(4, 8192), drafts(8, 8192), drafts(64, 1024), drafts(128, 1024)] == [0, 2, 0, 2]


def test_the_day_of_a_run_chooses_its_script() -> None:
    def kimi(source: str) -> Recipe | None:
        texts = {"backend": "vllm", "system": "b200_sxm", "backend_version": "0.17.0", "silicon_data_source": source}
        return recipe_of(texts, {"isl": 8192.0, "osl": 1024.0, "tp_size": 4.0}, "kimi-k2.5", "fp4", 16, 0)

    before, after, unsaid = (kimi(s) for s in ("x; measured=2026-03-11T00", "x; measured=2026-04-20T00", "x"))
    assert before is unsaid is None
    assert after is not None and after.prompts == 2
