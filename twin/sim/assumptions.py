"""What a prediction takes for granted, in words, and what its reader should be warned of."""

from __future__ import annotations

from collections.abc import Sequence

from twin.cost.handover import HandoverStyle, handover_of
from twin.spec.plan import Plan
from twin.spec.results import PoolResult
from twin.spec.scenario import Scenario
from twin.spec.summarise import RunSummary


def assumptions(scenario: Scenario, plan: Plan) -> tuple[str, ...]:
    """In a fixed order; only what bears on this plan and traffic."""
    said = [
        "The DP ranks of an instance step together: the slowest sets the pace, ranks without work step along.",
        "Requests reach the batch at the next step boundary; the gateway, tokenisation and sampling take no time of their own.",
        "Sequences end after exactly the drawn output length, and the router knows that length.",
    ]
    if plan.separated:
        said += [
            _handover(handover_of(plan.engine, scenario.kv_send)),
            "KV transfers share links with one another and with exchanges and all-reduces of steps, max-min fair; an exchange "
            "counts on its links as spread evenly over the step.",
            "A sequence pre-empted in a decode instance is computed anew there.",
        ]
    if any(pool.mtp_draft_tokens for pool in plan.pools):
        said.append("Each draft token is accepted by chance, with the same probability at every position; tokens of one step "
                    "come out together, and a gap is the time between such steps.")
    if any(pool.prefix_cache for pool in plan.pools):
        said.append(f"{scenario.workload.prefix_share:.0%} of every prompt is found in the prefix cache; cached blocks are "
                    "counted as if each request had its own.")
    if scenario.workload.arrivals.kind == "closed_loop":
        said.append("All users of the closed loop send their first request at time zero.")
    said += _experts(scenario, plan)
    return tuple(said)


def _handover(style: HandoverStyle) -> str:
    when = {"prompt": "A prompt's KV is sent after its prefill has ended",
            "chunk": "All chunks of a prompt but the last are sent while the last is computed",
            "layer": "All layers of a prompt but the last are sent while its last chunk is computed"}
    heard = " and both ranks are between steps" if style.between_steps else ""
    return f"{when[style.sends]}, once the decode rank has given it memory and a seat{heard}; the first token comes out at the " \
           "prefill side."


def _experts(scenario: Scenario, plan: Plan) -> list[str]:
    if scenario.model.moe is None:
        return []
    half_life_s, said = scenario.routing.drift_half_life_s, []
    if half_life_s is not None:
        said.append(f"Which experts are popular drifts with a half life of {half_life_s:g} s, the same in all pools; placements "
                    "were made for the popularity at time zero. Calibrated steps feel nothing of it.")
    elif scenario.routing.kind != "uniform":
        said.append("Expert popularity does not drift during the run, unless its file has it in windows; the placement was made "
                    "for the popularity at time zero.")
    if any(pool.eplb is not None for pool in plan.pools):
        said.append("Rebalancing decides in no time, by loads that hold the noise of sampling; weights on their way are spread "
                    "evenly over the steps that they take.")
    return said


def warnings(scenario: Scenario, plan: Plan, summary: RunSummary, pools: Sequence[PoolResult]) -> tuple[str, ...]:
    """What makes the figures less than they seem."""
    said = []
    if summary.steady.verdict != "steady":
        said.append(f"{summary.steady.verdict}: {summary.steady.reason}")
    if summary.counts.rejected:
        said.append(f"{summary.counts.rejected} of {summary.counts.submitted} requests were refused")
    for pool in pools:
        if pool.preemptions:
            said.append(f"the {pool.role} pool ran out of KV memory: {pool.preemptions} pre-emptions")
    if plan.gpus < scenario.cluster.gpus:
        said.append(f"{scenario.cluster.gpus - plan.gpus} of {scenario.cluster.gpus} GPUs are not used")
    return tuple(said)
