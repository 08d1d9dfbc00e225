"""Round trips, overrides, presets, run directories and plan checks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twin.spec.check import check_plan, plan_problems
from twin.spec.errors import SpecError
from twin.spec.load import load_cluster, load_model, load_plan, load_scenario, presets, validate
from twin.spec.parse import parse_yaml
from twin.spec.plan import Plan, PoolPlan
from twin.spec.provenance import provenance
from twin.spec.results import Summary
from twin.spec.rundir import dump_json, dump_yaml, read_run, write_run, write_text
from twin.spec.scenario import Scenario


def test_every_scenario_round_trips(tmp_path):
    for name in presets("scenarios"):
        scenario = load_scenario(name)
        text = dump_yaml(scenario)
        document = parse_yaml(text, "dumped")
        assert validate(Scenario, document.data, document) == scenario
        write_run(tmp_path / name, scenario=scenario, plan=scenario.plan or Plan(pools=(PoolPlan(role="mixed"),)))
        assert read_run(tmp_path / name).scenario == scenario


def test_overrides():
    name = presets("scenarios")[0]
    changed = load_scenario(name, ["workload.requests=7", "seed=5", "workload.slo.tpot_s=20 ms"])
    assert (changed.workload.requests, changed.seed, changed.workload.slo.tpot_s) == (7, 5, 0.02)
    with pytest.raises(SpecError, match="expected path"):
        load_scenario(name, ["nonsense"])
    with pytest.raises(SpecError, match="unknown field"):
        load_scenario(name, ["workload.nothing=1"])


def test_every_cluster_loads():
    for name in presets("clusters"):
        assert load_cluster(name).gpus >= 1
    four = load_cluster("h200-4x8")
    assert (four.nodes, four.gpus) == (4, 32)
    with pytest.raises(SpecError, match="did you mean"):
        load_cluster("h200-4x8x")


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**12), 10**12)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=12,
    )
)
def test_any_data_gives_a_plan_or_a_spec_error(data):
    document = parse_yaml("{}", "fuzz")
    try:
        validate(Plan, data, document)
    except SpecError:
        pass


@given(st.text(max_size=200))
def test_any_text_parses_or_is_refused(text):
    try:
        parse_yaml(text, "fuzz")
    except SpecError:
        pass


def test_plan_checks_name_every_problem():
    model, cluster = load_model("deepseek-r1"), load_cluster("h200-4x8")
    good = Plan(pools=(PoolPlan(role="mixed", dp=32, ep=32),))
    check_plan(good, model, cluster)
    bad = Plan(pools=(PoolPlan(role="mixed", dp=1, tp=3, ep=3, instances=20, redundant_experts=3),))
    text = " ".join(p.message for p in plan_problems(bad, model, cluster))
    assert "does not divide the 128 attention heads" in text
    assert "259 slots do not divide over ep = 3" in text
    assert "28 more than its 32" in text
    with pytest.raises(SpecError, match="node group"):
        check_plan(Plan(pools=(PoolPlan(role="mixed", node_group="nope"),)), model, cluster)
    with pytest.raises(SpecError, match="model is dense"):
        check_plan(Plan(pools=(PoolPlan(role="mixed", dp=2, ep=2),)), load_model("qwen3-8b"), cluster)


def test_vllm_names_are_accepted(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text('{"pools": [{"role": "mixed", "data_parallel_size": 4, "tensor_parallel_size": 2, "ep": 8}]}')
    plan = load_plan(path)
    assert plan.pools[0].world == 8 and plan.pools[0].expert_tp == 1


def test_files_are_written_whole(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "one")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(SpecError, match="cannot"):
        write_run(path / "below", plan=Plan(pools=(PoolPlan(role="mixed"),)))


def test_plan_json_round_trips(tmp_path):
    plan = Plan(pools=(PoolPlan(role="prefill", tp=8, ep=8), PoolPlan(role="decode", dp=8, ep=8)))
    write_run(tmp_path, plan=plan)
    assert load_plan(tmp_path / "plan.json") == plan == read_run(tmp_path).plan
    assert dump_json(plan) == (tmp_path / "plan.json").read_text()


def test_summary_percentiles():
    summary = Summary.of([4.0, 1.0, 3.0, 2.0])
    assert (summary.p50, summary.mean, summary.max, summary.count) == (2.5, 2.5, 4.0, 4)
    assert summary.p90 == pytest.approx(3.7)
    assert Summary.of([]).p50 is None


def test_provenance_depends_on_what_was_asked():
    a = Plan(pools=(PoolPlan(role="mixed"),))
    b = Plan(pools=(PoolPlan(role="mixed", dp=2),))
    assert provenance(a).spec_sha256 != provenance(b).spec_sha256 == provenance(b).spec_sha256
