"""Reading checkpoints: what is wrong is named; fp8 blocks; random weights that do not depend on the cut."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runtime_checkpoints import Checkpoints
from safetensors.torch import load_file, save_file

from runtime.layout import layouts, single
from runtime.model.params import Piece, rank_params
from runtime.weights import RandomReader, SafetensorsReader, load_params, load_weights
from twin.spec.errors import SpecError
from twin.spec.plan import Plan, PoolPlan

Tensors = dict[str, torch.Tensor]


def _drop(t: Tensors) -> None:
    del t["model.layers.2.mlp.experts.3.up_proj.weight"]


def _add(t: Tensors) -> None:
    t["model.layers.0.mlp.surprise.weight"] = torch.zeros(2)


def _reshape(t: Tensors) -> None:
    t["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 64)


def _retype(t: Tensors) -> None:
    t["model.norm.weight"] = torch.zeros(64, dtype=torch.int64)


@pytest.mark.parametrize(("spoil", "message"), [
    (_drop, r"model\.layers\.2\.mlp\.experts\.3\.up_proj\.weight: tensor is missing \(expected shape \[32, 64\]\)"),
    (_add, r"model\.layers\.0\.mlp\.surprise\.weight: tensor does not belong to this model"),
    (_reshape, r"q_proj\.weight: tensor has shape \[3, 64\] \(expected \[128, 64\]\)"),
    (_retype, r"model\.norm\.weight: tensor is stored as I64"),
])
def test_wrong_tensors_are_named(checkpoints: Checkpoints, tmp_path: Path, spoil: Callable[[Tensors], None],
                                 message: str) -> None:
    made = checkpoints["qwen3_moe"]
    tensors = load_file(made.folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SpecError, match=message):
        load_weights(made.model, single(made.model), checkpoint=tmp_path, seed=0, dtype=torch.float32)


def test_mtp_modules_and_derived_tensors_may_be_there(checkpoints: Checkpoints, tmp_path: Path) -> None:
    made = checkpoints["deepseek_v3"]
    tensors = load_file(made.folder / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(2)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    save_file(tensors, tmp_path / "model.safetensors")
    load_weights(made.model, single(made.model), checkpoint=tmp_path, seed=0, dtype=torch.float32)


def test_mxfp4_experts_are_widened_as_transformers_does(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Whole, and each rank's own share of experts or of their width, which cuts through blocks."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    made, stream = checkpoints["gpt_oss"], torch.Generator().manual_seed(4)
    narrow = load_file(made.folder / "model.safetensors")
    wide = dict(narrow)
    for name in [n for n in narrow if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, depth, width = narrow.pop(name).shape
        blocks = torch.randint(256, (experts, width, depth // 32, 16), generator=stream, dtype=torch.uint8)
        scales = torch.randint(110, 130, (experts, width, depth // 32), generator=stream, dtype=torch.uint8)
        narrow |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        wide[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
        assert wide[name].shape == (experts, depth, width)
    folders = {"narrow": narrow, "wide": wide}
    for folder, tensors in folders.items():
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    for cut in ({}, {"dp": 2, "ep": 2}, {"tp": 4, "ep": 1, "kv_blocks": 8}):
        plan = Plan(pools=(PoolPlan(role="mixed", **cut),))
        for at in layouts(plan, made.model):
            a, b = (load_weights(made.model, at, checkpoint=tmp_path / folder, seed=0, dtype=torch.bfloat16)
                    for folder in folders)
            assert all(torch.equal(a[name], b[name]) for name in b)
            assert a["0.experts.w13"].any()
    del narrow["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(narrow, tmp_path / "narrow" / "model.safetensors")
    with pytest.raises(SpecError, match="missing") as told:
        load_weights(made.model, single(made.model), checkpoint=tmp_path / "narrow", seed=0, dtype=torch.bfloat16)
    assert "down_proj_scales" in str(told.value)


def test_shards_by_index_and_no_way_out_of_the_folder(checkpoints: Checkpoints, tmp_path: Path) -> None:
    made = checkpoints["mixtral"]
    tensors = load_file(made.folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {k: f for f, keys in parts.items() for k in keys}}))
    whole, at = {}, single(made.model)
    for folder in (made.folder, tmp_path):
        whole[folder] = load_weights(made.model, at, checkpoint=folder, seed=0, dtype=torch.float32)
    assert all(torch.equal(whole[tmp_path][n], t) for n, t in whole[made.folder].items())
    for bad in ('{"weight_map": {"x": "../a.safetensors"}}', "[]", "{", '{"weight_map": {"x": 3}}'):
        index.write_text(bad)
        with pytest.raises(SpecError):
            SafetensorsReader(tmp_path)


def test_damaged_files_are_bad_input(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for content in (b"", b"\xff" * 64, (checkpoints["mixtral"].folder / "model.safetensors").read_bytes()[:1000]):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(SpecError, match="cannot read the checkpoint"):
            SafetensorsReader(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(SpecError):
        SafetensorsReader(tmp_path)


def test_fp8_blocks_are_scaled_wherever_the_cut_falls(tmp_path: Path) -> None:
    stream = torch.Generator().manual_seed(3)
    stored = torch.randn(300, 200, generator=stream).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, generator=stream) + 0.5
    save_file({"w": stored, "w_scale_inv": scale}, tmp_path / "model.safetensors")
    rows, columns = torch.arange(300) // 128, torch.arange(200) // 128
    want = stored.float() * scale[rows][:, columns]
    with SafetensorsReader(tmp_path) as reader:
        for take in (((0, 300), (0, 200)), ((100, 230), (0, 200)), ((0, 300), (60, 190)), ((129, 130), (127, 129))):
            got = reader.read(Piece("w", (300, 200), take))
            assert torch.equal(got, want[slice(*take[0]), slice(*take[1])])


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "qwen3_moe"])
def test_random_weights_do_not_depend_on_the_cut(checkpoints: Checkpoints, name: str) -> None:
    """Every element that any rank holds is the element that a single process holds there."""
    model = checkpoints[name].model
    whole = RandomReader(5)
    plan = Plan(pools=(PoolPlan(role="mixed", dp=2, tp=2, ep=2),))
    for at in layouts(plan, model):
        params = rank_params(model, at)
        loaded = load_params(params, RandomReader(5), torch.float32)
        for param in params:
            for piece in param.pieces:
                part = whole.tensor(piece.source, piece.shape)[tuple(slice(*r) for r in piece.take)]
                part = part if piece.stride is None else part[..., piece.stride::2]
                part = part.mT if piece.transpose else part
                here = loaded[param.name][tuple(i if isinstance(i, int) else slice(*i) for i in piece.into)]
                assert torch.equal(here, part.reshape(here.shape)), (param.name, piece.source)
    assert not torch.equal(RandomReader(6).tensor("x.weight", (4, 4)), whole.tensor("x.weight", (4, 4)))


def test_the_cuts_of_all_ranks_cover_the_model(checkpoints: Checkpoints) -> None:
    """Of every checkpoint tensor, the union of what the ranks of an instance read is the whole."""
    model = checkpoints["deepseek_v3"].model
    plan = Plan(pools=(PoolPlan(role="mixed", dp=2, tp=2, ep=2),))
    seen: dict[str, torch.Tensor] = {}
    for at in layouts(plan, model):
        for param in rank_params(model, at):
            for piece in param.pieces:
                mask = seen.setdefault(piece.source, torch.zeros(piece.shape, dtype=torch.bool))
                mask[tuple(slice(*r) for r in piece.take)] = True
    assert all(mask.all() for mask in seen.values())


@pytest.mark.parametrize(("pool", "message"), [
    ({"tp": 3, "dp": 1}, r"pools\.0\.tp: 3 does not divide attention heads \(8\) \(expected one of 1, 2, 4, 8\)"),
    ({"dp": 5, "ep": 5}, r"pools\.0\.ep: 5 does not divide expert slots"),
    ({"dp": 2, "ep": 2, "redundant_experts": 1}, r"expert slots \(experts \+ redundant_experts\) \(17\)"),
    ({"dp": 3, "ep": 1}, r"3 does not divide the experts' intermediate size"),
])
def test_a_cut_that_cannot_be_is_refused_before_anything_starts(checkpoints: Checkpoints, pool: dict[str, int],
                                                               message: str) -> None:
    with pytest.raises(SpecError, match=message):
        layouts(Plan(pools=(PoolPlan(role="mixed", **pool),)), checkpoints["qwen3_moe"].model)
