"""Engines that lose ranks: the others go on, and every request gets the tokens it would have got."""

from __future__ import annotations

import asyncio

import pytest
from chaos_kit import OUTPUT, REQUESTS, Story, plan_of, run_with_faults
from runtime_checkpoints import NEW_TOKENS, Checkpoint, Checkpoints

from runtime.flight import Flight
from runtime.frontend import Frontend
from runtime.options import EngineOptions
from runtime.types import SamplingParams
from twin.spec.errors import SpecError
from twin.spec.plan import Plan

TIMEOUT_S = 3.0
EPLB = {"window_steps": 6, "period_steps": 6, "budget_bytes": 30_000}
MIXED = plan_of({"role": "mixed", "dp": 3, "ep": 3, "redundant_experts": 2, "eplb": EPLB})
TENSOR = plan_of({"role": "mixed", "dp": 2, "tp": 2, "ep": 4})
SEPARATED = plan_of({"role": "prefill", "tp": 2, "ep": 2}, {"role": "decode", "dp": 2, "ep": 2})
ONE = plan_of({"role": "mixed"})


@pytest.fixture(scope="module")
def undisturbed(checkpoints: Checkpoints) -> list[list[int]]:
    """What one process answers."""
    story = run_with_faults(checkpoints["qwen3_moe"], ONE, "")
    assert not story.recoveries
    return story.tokens


def struck_and_served(made: Checkpoint, plan: Plan, faults: str, undisturbed: list[list[int]]) -> Story:
    """Run; the fault fired, the others noticed in time, served again in time, and nobody got a wrong token."""
    story = run_with_faults(made, plan, faults, timeout_s=TIMEOUT_S)
    wanted = faults.count(",") + 1
    assert sum(story.fired) == wanted, f"fired {story.fired}: the test means them all to strike"
    assert story.tokens == undisturbed
    assert [t[:NEW_TOKENS] for t in story.tokens[:4]] == made.tokens
    assert all(len(tokens) == OUTPUT for tokens in story.tokens)
    assert len(story.recoveries) == wanted
    first = story.recoveries[0]
    grace_s = TIMEOUT_S if ":stop" in faults.split(",")[0] else 0.0
    struck = min(story.struck.values())
    assert first.noticed - struck < grace_s + 1.0
    assert first.heard - struck < grace_s + 1.0, "every survivor has heard of it"
    assert first.ready - struck < grace_s + 5.0
    return story


def test_two_losses_and_an_error_in_one_run(checkpoints: Checkpoints, undisturbed: list[list[int]]) -> None:
    """Three ranks lose one in dispatch; one raises an error in a step (all go on); another dies: one is left."""
    story = struck_and_served(checkpoints["qwen3_moe"], MIXED, "1:dispatch:kill:12,0:decode:raise:14,2:combine:kill:80",
                              undisturbed)
    assert sorted(r.lost for r in story.recoveries) == [(), (1,), (2,)]
    assert story.recoveries[-1].world == 1
    assert len(story.tokens) == REQUESTS


def test_a_request_that_breaks_the_step_fails_alone(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batch is found out by trying the others again; a request that a rank cannot even read is refused at once."""
    made, message = checkpoints["qwen3_moe"], Flight.message
    unreadable, breaking = [5, 5, 5], [7, 7, 7]

    def spoilt(flight: Flight, op: str, **more: object) -> dict[str, object]:
        found = message(flight, op, **more)
        if flight.prompt == breaking:
            return {**found, "seed": "no number", "params": {**found["params"], "temperature": 1.0}}
        return {**found, "params": {}} if flight.prompt == unreadable else found

    monkeypatch.setattr(Flight, "message", spoilt)

    async def run() -> None:
        frontend = Frontend(plan_of({"role": "mixed", "dp": 2, "ep": 2}), made.model,
                            EngineOptions(checkpoint=str(made.folder), recover=True))
        await frontend.start()

        async def ask(prompt: list[int], reasons: set[str | None]) -> list[int]:
            events = [event async for event in frontend.submit(prompt, SamplingParams(max_tokens=NEW_TOKENS))]
            assert events[-1].finish_reason in reasons, (prompt, events)
            return [event.token_id for event in events]

        try:
            with pytest.raises(SpecError):
                await ask(unreadable, set())
            good = [ask(prompt, {"length"}) for prompt in made.prompts]
            *tokens, _ = await asyncio.wait_for(asyncio.gather(*good, ask(breaking, {"error"})), 40)
            assert tokens == made.tokens
            assert 1 <= len(frontend.recoveries) <= 3
            assert all(not r.lost and r.world == 2 for r in frontend.recoveries), frontend.recoveries
            assert await ask(made.prompts[0], {"length"}) == made.tokens[0]
        finally:
            await frontend.stop()

    asyncio.run(run())


CHAOS = [(MIXED, f"{rank}:{point}:{how}:{nth}") for rank, point, how, nth in (
    (0, "prefill", "kill", 2), (1, "dispatch", "kill", 9), (2, "combine", "kill", 20), (0, "migration", "kill", 1),
    (1, "idle", "kill", 2), (2, "prefill", "stop", 1), (0, "dispatch", "stop", 30), (1, "combine", "stop", 5),
    (2, "migration", "stop", 1), (0, "idle", "stop", 2))]
CHAOS += [(TENSOR, f"{rank}:{point}:{how}:{nth}") for rank, point, how, nth in (
    (0, "prefill", "kill", 3), (3, "dispatch", "kill", 11), (1, "combine", "stop", 7), (2, "idle", "kill", 2))]
CHAOS += [(SEPARATED, f"{rank}:{point}:{how}:{nth}") for rank, point, how, nth in (
    (0, "prefill", "kill", 2), (1, "dispatch", "stop", 6), (2, "combine", "kill", 8), (3, "dispatch", "kill", 15))]
CHAOS += [(ONE, "0:decode:kill:9"), (ONE, "0:prefill:stop:2")]


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("plan", "faults"), CHAOS, ids=[f"{p.gpus}ranks-{f.replace(':', '-')}" for p, f in CHAOS])
def test_any_rank_at_any_point(checkpoints: Checkpoints, undisturbed: list[list[int]], plan: Plan, faults: str) -> None:
    assert len(CHAOS) == 20
    struck_and_served(checkpoints["qwen3_moe"], plan, faults, undisturbed)
