"""Parameter and KV counts against what is published, and against counts done by hand."""

import json

import pytest

from twin.spec.errors import SpecError
from twin.spec.hf import model_from_hf_config
from twin.spec.load import load_model, presets

# (preset, total parameters, active parameters), from the models' own cards and papers.
PUBLISHED = [
    ("deepseek-r1", 671e9, 37e9),
    ("kimi-k2", 1.04e12, 32.6e9),
    ("qwen3-30b-a3b", 30.5e9, 3.3e9),
    ("qwen3-235b-a22b", 235e9, 22e9),
    ("qwen3-coder-480b-a35b", 480e9, 35e9),
    ("qwen3.5-397b-a17b", 397e9, 17e9),
    ("mixtral-8x7b", 46.7e9, 12.9e9),
    ("mixtral-8x22b", 141e9, 39e9),
    ("gpt-oss-120b", 116.8e9, 5.1e9),
    ("gpt-oss-20b", 20.9e9, 3.6e9),
    ("minimax-m2.5", 230e9, 10e9),
    ("deepseek-v2-lite", 15.7e9, 2.4e9),
]


@pytest.mark.parametrize(("name", "total", "active"), PUBLISHED)
def test_counts_match_published(name, total, active):
    model = load_model(name)
    assert model.total_params == pytest.approx(total, rel=0.03)
    # Cards differ in whether the embedding counts as active: one of the two conventions must fit.
    low, high = model.active_params, model.active_params + model.embedding_params
    # They also round: "A10B" is anything from 9.5 to 10.5.
    rounding = 0.5e9 if active % 1e9 == 0 else 0.0
    assert low * 0.97 - rounding <= active <= high * 1.03 + rounding


def test_every_preset_loads():
    for name in presets("models"):
        model = load_model(name)
        assert model.total_params == sum(model.params.values()) > 1e9
        assert model.active_params <= model.total_params
        assert model.kv_bytes_per_token() > 0


def test_deepseek_r1_by_hand():
    model = load_model("deepseek-r1")
    q = 7168 * 1536 + 1536 + 1536 * 128 * 192
    kv = 7168 * 576 + 512 + 512 * 128 * 256
    assert model.attention_params == q + kv + 128 * 128 * 7168
    assert model.expert_params == 3 * 7168 * 2048
    assert model.params["routed_experts"] == 58 * 256 * 3 * 7168 * 2048
    assert model.params["gate"] == 58 * (256 * 7168 + 256)
    assert model.kv_bytes_per_token() == 61 * 576 * 2
    assert model.kv_bytes_per_token("fp8") == 61 * 576


def test_kv_heads_are_replicated_beyond_tp():
    model = load_model("qwen3-235b-a22b")
    one_rank = model.kv_bytes_per_token()
    assert model.kv_bytes_per_token(tp=4) * 4 == one_rank
    assert model.kv_bytes_per_token(tp=8) * 8 == 2 * one_rank


def test_formats():
    assert load_model("deepseek-r1").weight_dtype == "fp8_block"
    assert load_model("gpt-oss-120b").expert_dtype == "mxfp4"
    assert load_model("gpt-oss-120b").weight_dtype == "bf16"
    assert load_model("kimi-k2.5").expert_dtype == "int4"


def test_hybrid_layers():
    model = load_model("qwen3.5-397b-a17b")
    assert model.layer_attention.count("linear") == 45 and model.kv_layers == 15
    assert model.state_elements > 0


def test_unknown_type_says_which_are_known():
    with pytest.raises(SpecError, match="deepseek_v3"):
        model_from_hf_config({"model_type": "gpt2", "num_hidden_layers": 2})


def test_missing_field_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "mixtral", "num_hidden_layers": 2}))
    with pytest.raises(SpecError) as caught:
        load_model(path)
    assert str(path) in str(caught.value) and "missing field" in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"num_experts_per_tok": 9}, {"hidden_size": -1}, {"hidden_size": "big"}, {"num_hidden_layers": 1e9}]
)
def test_nonsense_is_refused(change):
    config = {
        "model_type": "mixtral", "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 100, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 96,
    }  # fmt: skip
    assert model_from_hf_config(config).moe.experts == 8
    with pytest.raises(SpecError):
        model_from_hf_config({**config, **change})
