"""Drafts change when tokens come, never which; two halves of a step give what the whole gives."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from runtime_worlds import Served, draw_alone, fork_world, serve

from runtime.batch import Segment, halve, logit_rows, make_step
from runtime.frontend import Frontend
from runtime.layout import single
from runtime.measure import draft_shares, group_steps
from runtime.metrics import ServiceMetrics
from runtime.model.mtp import Mtp
from runtime.model.params import checkpoint_tensors
from runtime.ngram import Ngram
from runtime.options import EngineOptions
from runtime.rank import build_rank
from runtime.sampling import uniform
from runtime.sequences import LiveRequest
from runtime.speculate import uses_mtp, verify
from runtime.tiny import tiny_config, write_checkpoint
from runtime.types import SamplingParams
from runtime.weights import load_weights
from twin.spec.errors import SpecError
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan

POOL = {"role": "mixed", "block_tokens": 4, "kv_blocks": 64, "max_num_seqs": 4, "max_batch_tokens": 24, "chunk_tokens": 8}
TOKENS = 20


@dataclass(frozen=True)
class Made:
    """A checkpoint, requests and what each gives when it is computed alone, without drafts."""

    folder: Path
    model: ModelSpec
    requests: list[tuple[list[int], SamplingParams]]
    outputs: list[list[int]]


@pytest.fixture(scope="module", params=["deepseek_v3", "glm4_moe"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("mtp") / request.param, request.param, mtp=1)


@pytest.fixture(scope="module")
def without_module(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("ngram") / "qwen3_moe", "qwen3_moe", mtp=0)


@torch.no_grad()
def make(folder: Path, arch: str, mtp: int) -> Made:
    config = tiny_config(arch, hidden=64, layers=2, experts=8, top_k=2, vocab=64, context=256, mtp=mtp)
    model = write_checkpoint(folder, config, echo=0.25)
    stream = torch.Generator().manual_seed(3)
    requests = []
    for i, length in enumerate((23, 1, 14, 9, 5, 2)):
        prompt = torch.randint(0, 64, (length,), generator=stream).tolist()
        hot = {"temperature": 0.7, "top_k": 12} if i % 3 == 2 else {}
        requests.append((prompt, SamplingParams(max_tokens=TOKENS - i, seed=i, **hot)))
    plan = Plan(pools=(PoolPlan(**POOL),))
    outputs = [draw_alone(model, plan, str(folder), prompt, params) for prompt, params in requests]
    return Made(folder, model, requests, outputs)


def run(made: Made, tmp_path: Path, **pool: object) -> list[Served]:
    plan = Plan(pools=(PoolPlan(**{**POOL, **pool}),))
    served = fork_world(plan.gpus, tmp_path, serve, made.model, plan, str(made.folder), made.requests)
    outputs = {i: tokens for rank in served for i, tokens in rank.outputs.items()}
    assert [outputs[i] for i in range(len(made.requests))] == made.outputs
    return list(served)


CUTS = [{}, {"dp": 2, "ep": 2}, {"tp": 2, "ep": 2}, {"dp": 2, "tp": 2, "ep": 4, "comm": "ag_rs"},
        {"dp": 2, "ep": 2, "redundant_experts": 2}]


@pytest.mark.parametrize("cut", CUTS, ids=lambda c: "-".join(f"{k}{v}" for k, v in c.items()) or "one")
def test_the_module_drafts_and_tokens_stay(made: Made, tmp_path: Path, cut: dict[str, object]) -> None:
    served = run(made, tmp_path, mtp_draft_tokens=2, **cut)
    leaders = [rank for rank in served if rank.records]
    drafted, stood = (sum(rank.drafts[k][0] for rank in leaders) for k in (0, 1))
    assert 0.3 * drafted < stood < drafted, "drafts must stand and fall, else the test shows little"
    steps = sum(len(rank.records) for rank in leaders)
    assert steps < sum(map(len, made.outputs)) * 0.8
    for rank in leaders:
        assert rank.drafts[1][0] >= rank.drafts[1][1], "a draft stands only on those before it"
        assert all(record["parts"]["draft"] > 0 for record in rank.records)


@pytest.mark.parametrize("drafts", [1, 4])
def test_requests_that_lose_their_blocks_resume(made: Made, tmp_path: Path, drafts: int) -> None:
    served = run(made, tmp_path, mtp_draft_tokens=drafts, dp=2, ep=2, kv_blocks=12, prefix_cache=True)
    assert any(rank.preempted for rank in served), "the test means to pre-empt"


def test_lookup_drafts_where_there_is_no_module(without_module: Made, tmp_path: Path) -> None:
    served = run(without_module, tmp_path, mtp_draft_tokens=3, dp=2, ep=2)
    assert all(0 < stood <= drafted for rank in served for drafted, stood in zip(*rank.drafts, strict=True))
    assert not any("draft" in record["parts"] for rank in served for record in rank.records)


@pytest.mark.parametrize("cut", [{"dp": 2, "ep": 2}, {"tp": 2, "ep": 2, "comm": "ag_rs"}, {"dp": 2, "tp": 2, "ep": 2}],
                         ids=["dp2", "tp2-ag_rs", "dp2-tp2"])
@pytest.mark.parametrize("drafts", [0, 2])
def test_halves_give_what_the_whole_gives(made: Made, tmp_path: Path, cut: dict[str, object], drafts: int) -> None:
    served = run(made, tmp_path, tbo=True, tbo_min_tokens=6, mtp_draft_tokens=drafts, **cut)
    steps = max(len(rank.records) for rank in served)
    assert 3 <= served[0].halved < steps, "large steps are halved, small ones are not"
    assert len({rank.halved for rank in served}) == 1, "all ranks agree"


def test_halves_are_even_and_keep_order() -> None:
    table = [3, 1, 2, 0, 5]
    segments = [Segment([7], 4, table), Segment([5, 6, 7], 2, table), Segment(list(range(9)), 0, table, True, True),
                Segment([1, 2], 3, table, True, False)]
    whole = make_step(segments, 4)
    for parts in (halve(segments), halve(segments[2:3]), halve(segments[:1]), halve([])):
        a, b = (sum(len(s.token_ids) for s in part) for part in parts)
        assert a - b in (0, 1)
    steps = [make_step(part, 4) for part in halve(segments)]
    for name in ("token_ids_T", "positions_T", "slots_T"):
        assert torch.equal(torch.cat([getattr(step, name) for step in steps]), getattr(whole, name))
    assert torch.equal(logit_rows(steps), whole.logit_rows)
    assert logit_rows(steps).tolist() == [0, 1, 2, 3, 12]


@torch.no_grad()
def test_the_module_equals_a_plain_reading_of_its_checkpoint(tmp_path: Path) -> None:
    """Against transformers: the module's decoder layer as the last of a model one layer longer."""
    from transformers import AutoModelForCausalLM
    config = tiny_config("deepseek_v3", hidden=64, layers=2, experts=8, top_k=2, vocab=64, context=64, mtp=1)
    model = write_checkpoint(tmp_path / "m", config, seed=4)
    longer = {**config, "num_hidden_layers": 3, "num_nextn_predict_layers": 0}
    write_checkpoint(tmp_path / "longer", longer, seed=4)  # tensors are keyed by name: the layers are the same
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "longer", attn_implementation="eager").eval()
    tensors = load_weights(model, single(model), checkpoint=tmp_path / "m", seed=0, dtype=torch.float32, mtp=True)
    ids = torch.randint(0, 64, (1, 11), generator=torch.Generator().manual_seed(5))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (64,), tensors[name], model.norm_eps)

    x, where = hf.model.embed_tokens(ids), torch.arange(11)[None]
    mask = torch.full((11, 11), float("-inf")).triu(1)[None, None]
    angles = hf.model.rotary_emb(x, where)

    def layer(i: int, x: torch.Tensor, n: int) -> torch.Tensor:
        out = hf.model.layers[i](x, attention_mask=mask[..., :n, :n], position_ids=where[:, :n],
                                 position_embeddings=tuple(a[:, :n] for a in angles))
        return out[0] if isinstance(out, tuple) else out

    states = hf.model.norm(layer(1, layer(0, x, 11), 11))[:, :10]
    after = hf.model.embed_tokens(ids[:, 1:])
    after[:, 0] = 0
    joined = torch.cat([norm(after, "2.enorm"), norm(states, "2.hnorm")], -1) @ tensors["2.eh_proj"].T
    want = hf.lm_head(norm(layer(2, joined, 10), "2.head_norm"))[0]

    plan = Plan(pools=(PoolPlan(**{**POOL, "mtp_draft_tokens": 1}),))
    rank = build_rank(model, plan, EngineOptions(checkpoint=str(tmp_path / "m")), 0, lambda phase: None)
    assert isinstance(rank.mtp, Mtp)
    got = rank.transformer.hidden([make_step([Segment(ids[0].tolist(), 0, [4, 2, 9], True)], 4)], rank.kv, 11)
    torch.testing.assert_close(got[:10], states[0], atol=1e-4, rtol=0)
    parts = []
    for start, stop in ((0, 4), (4, 9), (9, 10)):  # a prompt in two chunks, then a decode
        step = make_step([Segment(ids[0, start + 1:stop + 1].tolist(), start, [4, 2, 9], stop < 10)], 4)
        parts.append(rank.mtp.forward(step, got[start:stop], rank.kv[-1], 11))
    torch.testing.assert_close(rank.mtp.logits(torch.cat(parts)), want, atol=1e-4, rtol=0)


def owners_of(count: int, params: SamplingParams) -> list[LiveRequest]:
    return [LiveRequest(i, [0], 1, params, i, False) for i in range(count)]


@pytest.mark.parametrize("count", [3000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_verified_tokens_follow_the_models_distribution(count: int) -> None:
    """Whatever is drafted. Of two tokens in a row, where the first stands, the second follows the second row's law; drafts
    stand as often as the model draws them. Chi-square at 1e-4."""
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0], [0.0, 1.5, -0.5, 0.3], [0.1, 0.2, 0.3, 0.4]])
    params = SamplingParams(temperature=0.8, max_tokens=9)
    want = (logits / 0.8).softmax(-1)
    stream = torch.Generator().manual_seed(7)
    drafts = torch.multinomial(torch.tensor([0.4, 0.3, 0.2, 0.1]), 2 * count, True, generator=stream).view(count, 2)
    segments = [Segment([0, *pair], 0, [0]) for pair in drafts.tolist()]
    found = verify(segments, owners_of(count, params), logits.repeat(count, 1))
    firsts = torch.tensor([tokens[0] for tokens in found]).bincount(minlength=4)
    seconds = torch.tensor([tokens[1] for tokens in found if len(tokens) > 1]).bincount(minlength=4)
    for seen, law in ((firsts, want[0]), (seconds, want[1])):
        expected = law * seen.sum()
        assert float(((seen - expected) ** 2 / expected).sum()) < 21.1, "chi-square with 3 degrees of freedom, p = 1e-4"
    stood = sum(len(tokens) > 1 for tokens in found) / count
    likely = float((want[0] * torch.tensor([0.4, 0.3, 0.2, 0.1])).sum())
    assert stood == pytest.approx(likely, abs=4 * (0.25 / count) ** 0.5)


def test_verification_takes_the_longest_head_that_stands() -> None:
    logits = torch.nn.functional.one_hot(torch.tensor([5, 6, 7, 1, 2]), 9).float()
    greedy = SamplingParams(max_tokens=9)
    prompt = Segment([3, 4], 0, [0], True)
    unfinished = Segment([3], 0, [0], True, False)
    for drafts, kept in (([5, 6, 7], [5, 6, 7, 1]), ([5, 6, 0], [5, 6, 7]), ([5, 0, 7], [5, 6]), ([0, 6, 7], [5])):
        segments = [Segment([8, *drafts], 4, [0, 1]), prompt, unfinished]
        assert verify(segments, owners_of(3, greedy), logits) == [kept, [2], []]
    assert uniform(3, 2) == LiveRequest(0, [1, 2, 3], 1, SamplingParams(temperature=1.0), 3, False).draw()
    assert verify([unfinished], owners_of(1, greedy), logits[:0]) == [[]]


def test_lookup_finds_the_last_occurrence() -> None:
    for text, count, want in (("abcdeabc", 3, "dea"), ("abcxabcyabc", 2, "ya"), ("xbcyabc", 2, "ya"), ("abab", 5, "ababa"),
                              ("aaaa", 3, "aaa"), ("abcdef", 3, ""), ("a", 3, ""), ("", 2, ""), ("abcabc", 0, "")):
        tokens = [ord(c) for c in text]
        grown, at_once = Ngram(), Ngram()
        for n in range(len(tokens) + 1):
            found = grown.propose(tokens[:n], count)
        assert found == at_once.propose(tokens, count) == [ord(c) for c in want], text


def test_who_holds_the_module(made: Made) -> None:
    drafts = {"mtp_draft_tokens": 1}
    model = made.model
    separated = Plan(pools=(PoolPlan(**{**POOL, "role": "prefill"}), PoolPlan(**{**POOL, **drafts, "role": "decode"})))
    assert uses_mtp(separated, model)
    assert not uses_mtp(Plan(pools=(PoolPlan(**POOL),)), model)
    assert not uses_mtp(separated, model.model_copy(update={"mtp_layers": 0}))
    with_module = set(checkpoint_tensors(model, mtp=True)) - set(checkpoint_tensors(model))
    assert all(name.startswith("model.layers.2.") for name in with_module)
    names = {f"model.layers.2.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "input_layernorm")}
    assert names <= with_module


def test_a_checkpoint_without_the_module_says_so(made: Made, tmp_path: Path) -> None:
    config = json.loads((made.folder / "config.json").read_text())
    write_checkpoint(tmp_path / "m", {k: v for k, v in config.items() if k != "num_nextn_predict_layers"})
    plan = Plan(pools=(PoolPlan(**{**POOL, "mtp_draft_tokens": 1}),))
    with pytest.raises(SpecError, match=r"model\.layers\.2\.input_layernorm\.weight: tensor is missing"):
        build_rank(made.model, plan, EngineOptions(checkpoint=str(tmp_path / "m")), 0, lambda phase: None)


def test_prompts_computed_elsewhere_bring_the_modules_kv(tmp_path: Path) -> None:
    """Prefill on TP 2 hands over to a drafting decode instance on DP 2: same tokens, one layer more of KV, and a measurement
    that says how many drafts were right."""
    made = make(tmp_path / "deepseek_v3", "deepseek_v3", mtp=1)
    plan = Plan(pools=(PoolPlan(**{**POOL, "role": "prefill", "tp": 2, "ep": 2}),
                       PoolPlan(**{**POOL, "role": "decode", "dp": 2, "ep": 2, "mtp_draft_tokens": 2})))
    together = fork_world(1, tmp_path, serve, made.model, Plan(pools=(PoolPlan(**{**POOL, "mtp_draft_tokens": 2}),)),
                          str(made.folder), made.requests)[0]

    async def work() -> None:
        frontend = Frontend(plan, made.model, EngineOptions(checkpoint=str(made.folder), record=True))
        await frontend.start()
        try:
            streams = [frontend.submit(prompt, replace(params, seed=i)) for i, (prompt, params) in enumerate(made.requests)]
            assert [[event.token_id async for event in stream] for stream in streams] == made.outputs
            tokens = sum(len(prompt) for prompt, _ in made.requests)
            layers = made.model.layers
            assert frontend.moved_bytes == tokens * made.model.kv_bytes_per_token("fp32") * (layers + 1) // layers
            prefill, decode = frontend.stats().instances
            assert not prefill.drafted
            assert decode.stood[0] / decode.drafted[0] > 0.8 * together.drafts[1][0] / together.drafts[0][0]
            metrics = ServiceMetrics("tiny", frontend.stats).render().decode()
            assert f'position="1",role="decode"}} {float(decode.stood[1])}' in metrics
        finally:
            await frontend.stop()
        shares = draft_shares(group_steps(frontend.records.steps, 0.0))
        assert shares == tuple(round(s / d, 6) for s, d in zip(decode.stood, decode.drafted, strict=True))

    asyncio.run(work())
