"""Bad input: one clear SpecError each, quickly, nothing written."""

import os
import time

import pytest

from twin.spec.errors import SpecError
from twin.spec.load import load_cluster, load_model, load_plan, load_scenario

BOMB = "a: &a [x,x]\nb: &b [*a,*a,*a]\nc: &c [*b,*b,*b]\nmodel: *c\n"
GOOD = """name: t
model: mixtral-8x7b
cluster: h200-1x8
workload:
  arrivals: {kind: poisson, rate_per_s: 1}
  isl: {kind: fixed, mean: 100}
  osl: {kind: fixed, mean: 10}
  requests: 10
"""

TEXTS = {
    "alias_bomb": BOMB,
    "alias": "name: &x t\nmodel: *x\n",
    "duplicate_key": GOOD + "name: again\n",
    "deep_flow": "a: " + "[" * 3000 + "]" * 3000,
    "deep_block": "\n".join("  " * i + "a:" for i in range(200)),
    "nan": GOOD.replace("mean: 100", "mean: .nan"),
    "inf": GOOD.replace("mean: 100", "mean: .inf"),
    "huge_float": GOOD.replace("mean: 100", "mean: 1e999"),
    "huge_int": GOOD.replace("requests: 10", "requests: " + "9" * 5000),
    "big_int": GOOD.replace("requests: 10", "requests: 99999999999999"),
    "negative": GOOD.replace("rate_per_s: 1", "rate_per_s: -1"),
    "zero": GOOD.replace("rate_per_s: 1", "rate_per_s: 0"),
    "wrong_unit": GOOD.replace("rate_per_s: 1", "rate_per_s: 4 GB/s"),
    "no_unit": GOOD.replace("rate_per_s: 1", 'rate_per_s: "4"'),
    "fraction_of_request": GOOD.replace("requests: 10", "requests: 8.5"),
    "text_for_int": GOOD.replace("requests: 10", 'requests: "10"'),
    "bool_for_number": GOOD.replace("rate_per_s: 1", "rate_per_s: true"),
    "unknown_key": GOOD.replace("workload:", "worklod:"),
    "unknown_nested": GOOD.replace("osl:", "oslx:"),
    "unknown_kind": GOOD.replace("poisson", "poison"),
    "python_tag": "!!python/object/apply:os.system ['true']\n",
    "tag": GOOD.replace("name: t", "name: !x t"),
    "set_tag": "name: !!set {a, b}\n",
    "list_at_top": "- 1\n- 2\n",
    "scalar_at_top": "hello\n",
    "empty": "",
    "only_comment": "# nothing\n",
    "two_documents": GOOD + "---\n" + GOOD,
    "tabs": "name:\tt\n\tmodel: x\n",
    "unclosed": 'name: "t\n',
    "bad_indent": "a:\n   b: 1\n  c: 2\n",
    "nul": "name: a\x00b\n",
    "unknown_model": GOOD.replace("mixtral-8x7b", "mixtrl-8x7b"),
    "unknown_cluster": GOOD.replace("h200-1x8", "h201-1x8"),
    "model_traversal": GOOD.replace("mixtral-8x7b", "../../../../etc/passwd"),
    "model_number": GOOD.replace("mixtral-8x7b", "7"),
    "missing_workload": "name: t\nmodel: mixtral-8x7b\ncluster: h200-1x8\n",
    "many_nodes": "a:\n" + "".join(f"  k{i}: {i}\n" for i in range(20_000)),
    "long_scalar": "name: " + "x" * 200_000,
    "complex_key": "? [a, b]\n: 1\n",
    "null_name": GOOD.replace("name: t", "name:"),
    "long_name": GOOD.replace("name: t", "name: " + "x" * 10_000),
    "empty_trace": GOOD.replace("{kind: poisson, rate_per_s: 1}", "{kind: trace, format: azure}"),
}


@pytest.mark.parametrize("case", sorted(TEXTS))
def test_bad_scenario(case, tmp_path):
    path = tmp_path / "scenario.yaml"
    path.write_text(TEXTS[case])
    before, began = set(os.listdir(tmp_path)), time.monotonic()
    with pytest.raises(SpecError) as caught:
        load_scenario(path)
    assert time.monotonic() - began < 5
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value) and len(str(caught.value)) < 5000
    assert set(os.listdir(tmp_path)) == before


JSONS = {
    "nan": '{"pools": NaN}',
    "inf": '{"a": 1e999}',
    "duplicate": '{"name": "a", "name": "b"}',
    "deep": "[" * 100_000,
    "depth": '{"pools":' + "[" * 50 + "]" * 50 + "}",
    "huge_int": '{"a": ' + "9" * 5000 + "}",
    "cut": '{"pools": [',
    "not_json": "hello",
    "array": "[1, 2]",
    "wrong_role": '{"pools": [{"role": "chef"}]}',
    "ep_not_dividing": '{"pools": [{"role": "mixed", "dp": 6, "ep": 4}]}',
    "mixed_and_prefill": '{"pools": [{"role": "mixed"}, {"role": "prefill"}]}',
}


@pytest.mark.parametrize("case", sorted(JSONS))
def test_bad_plan(case, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(JSONS[case])
    with pytest.raises(SpecError) as caught:
        load_plan(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("load", [load_scenario, load_plan, load_model, load_cluster])
def test_bad_places(load, tmp_path):
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(bytes(range(256)) * 10)
    fifo = tmp_path / "fifo.yaml"
    os.mkfifo(fifo)
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (2 << 20))
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    for place in (binary, fifo, large, folder, tmp_path / "absent.yaml", "x\x00y", "z" * 10_000):
        with pytest.raises(SpecError):
            load(place)


def test_messages_say_where_and_what(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(GOOD.replace("  osl:", "  ols:").replace("requests: 10", "requests: -3"))
    with pytest.raises(SpecError) as caught:
        load_scenario(path)
    text = str(caught.value)
    assert f"{path}:7: workload.ols: unknown field" in text and "did you mean 'osl'?" in text
    assert f"{path}:8: workload.requests" in text


def test_ep_message_names_legal_sizes(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(JSONS["ep_not_dividing"])
    with pytest.raises(SpecError, match=r"ep \(4\) does not divide .* = 6; legal: 1, 2, 3, 6"):
        load_plan(path)
