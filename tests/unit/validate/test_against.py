"""`eptwin validate against`: rows and records in small files made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.unit.validate.test_rows import AGG, write
from twin.cli import cli
from twin.spec.errors import SpecError
from twin.validate.against import judge, summarise
from twin.validate.records import judge_records

RECORDS = """
- {id: ll, model: deepep-microbench, gpu: H800, nodes: 2, ep: 16, tokens_per_gpu: 128, hidden: 7168, topk: 8, experts: 256,
   metric: dispatch_latency, value: 118, unit: us, date: 2025-06-01}
- {id: ll-first-release, model: deepep-microbench, gpu: H800, nodes: 1, ep: 8, tokens_per_gpu: 128, hidden: 7168, topk: 8,
   experts: 256, metric: dispatch_latency, value: 163, unit: us, date: '2025-02-25'}
- {id: sglang-decode, model: deepseek-v3/r1, gpu: H100-80G, phase: decode, ep: 72, isl: 2000, osl: 100, batch_per_gpu: 256,
   features: {TBO: true, EPLB: true, redundant_experts: 32},
   metric: output_throughput, value: 22282, unit: tok/s/node}
- {id: kv, model: qwen3-8b, gpu: H800, tp: 8, kv_mb: 578, metric: kv_transfer_time, value: 4.75, unit: ms}
- {id: heads, model: qwen3-235b-a22b, gpu: H800, tp: 8, isl: 4096, metric: kv_transfer_time, unit: ms}
- {id: nodes, model: deepseek-v3/r1, metric: mean_nodes, value: 226, unit: nodes}
- {id: no-gpu, model: deepseek-v3/r1, gpu: abacus, phase: decode, ep: 8, batch_per_gpu: 4,
   metric: output_throughput, unit: tok/s/GPU}
"""


def test_rows_are_judged_and_summed_up(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", {**AGG, "rival_tpot_ms": "24"}, {**AGG, "tp_size": "16", "moe_ep_size": "4"},
                 {**AGG, "model_path": "nobody/knows"})
    verdicts = judge(path)
    assert [v.answer is not None for v in verdicts] == [True, False, False]
    found = summarise(verdicts)
    assert (found["rows"], found["mistakes_of_the_collection"], found["answered"], found["row_coverage"]) == (3, 1, 1, 0.5)
    assert found["peers"]["rival"]["tpot"]["median_abs_error"] == pytest.approx(1.0)  # 24 ms where 12 were measured
    low, high = verdicts[0].interval_s("tpot")
    assert low < verdicts[0].predicted_s("tpot") < high
    assert verdicts[0].error("tpot") == pytest.approx(verdicts[0].predicted_s("tpot") / 0.012 - 1)


def test_more_users_and_longer_prompts_take_longer(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", AGG, {**AGG, "batch_size": "64"}, {**AGG, "isl": "8192"})
    few, many, long = (v.answer for v in judge(path))
    assert few and many and long
    assert few.tpot_s < many.tpot_s and few.ttft_s < many.ttft_s and few.ttft_s < long.ttft_s


def test_what_cannot_have_been_as_a_row_says_is_noted(tmp_path: Path) -> None:
    base = {**AGG, "isl": "4000", "osl": "8"}
    rows = [base, {**base, "osl": "1"}, {**base, "isl": "300000"}, {**base, "moe_ep_size": "16"}]
    plain, one, long, uneven = (v.answer for v in judge(write(tmp_path / "rows.csv", *rows)))
    assert plain is not None and one is not None and long is not None and uneven is not None
    assert plain.notes == () and "decode step" in one.notes[0] and "context" in long.notes[0] and "ranks" in uneven.notes[0]
    assert one.tpot_low_s <= one.tpot_s <= one.tpot_high_s and one.tpot_s < 2 * plain.tpot_s
    done = CliRunner().invoke(cli, ["validate", "against", str(tmp_path / "rows.csv")])
    assert done.output.count("note: ") == 3


def test_the_command_prints_json_and_is_the_same_each_time(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", AGG, {**AGG, "system": "tpu"})
    first, again = (CliRunner().invoke(cli, ["validate", "against", str(path), "--json"]) for _ in range(2))
    assert first.exit_code == 0 and first.stdout == again.stdout
    document = json.loads(first.stdout)
    assert document["rows"][0]["answered"] and "system" in document["rows"][1]["reason"]
    assert document["summary"]["by_gpu"]["h200_sxm"]["rows"] == 1
    shown = CliRunner().invoke(cli, ["validate", "against", str(path), "--limit", "1"])
    assert shown.exit_code == 0 and "TPOT" in shown.stdout and "1 of 1 rows answered" in shown.stdout


def test_records_are_answered_in_their_own_units_or_say_why(tmp_path: Path) -> None:
    path = tmp_path / "published.yaml"
    path.write_text(RECORDS, encoding="utf-8")
    found = {r.name: r for r in judge_records(path)}
    for name, most in (("ll", 0.2), ("ll-first-release", 0.2), ("sglang-decode", 0.12), ("kv", 0.1)):
        error = found[name].error
        assert error is not None and abs(error) < most, name
    heads = found["heads"].found
    assert heads is not None  # 4 KV heads on 8 ranks: twice the model's own 4096 x 188 KiB travel
    assert heads.value > 2 * 4096 * 188 * 1024 / 400e9 * 1e3
    assert "no word" in found["nodes"].reason and "abacus" in found["no-gpu"].reason
    shown = CliRunner().invoke(cli, ["validate", "against", str(path), "--json"])
    assert shown.exit_code == 0 and json.loads(shown.stdout)["summary"]["answered"] == 5


@pytest.mark.parametrize("text", ["a: 1", "[]", "- {id: x}", "- [1, 2]", "{", "- &a [*a]"])
def test_files_that_hold_no_records_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError):
        judge_records(path)


@pytest.mark.parametrize("words", [["--against", "{}"], ["--json", "--against={}"], ["--against", "{}", "--json"]], ids=" ".join)
def test_against_is_an_option_too(tmp_path: Path, words: list[str]) -> None:
    """`eptwin validate --against FILE` is `eptwin validate against FILE`, whatever stands around it."""
    table = tmp_path / "none.csv"
    said = CliRunner().invoke(cli, ["validate", *(word.format(table) for word in words)])
    assert "none.csv" in str(said.exception or said.output)
    assert "No such option" not in said.output
