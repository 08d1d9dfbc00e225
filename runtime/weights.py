"""Weights: from a safetensors folder, or random from a seed; each rank reads only the rectangles that it holds.

Nothing in a checkpoint is executed: only `config.json`, the safetensors index and safetensors files are read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from runtime import mxfp4
from runtime.layout import RankLayout
from runtime.model.params import Param, Piece, Placement, Range, checkpoint_tensors, rank_params
from twin.spec.errors import Problem, SpecError
from twin.spec.model import ModelSpec

FP8_BLOCK = 128
"""Side of the blocks that share a scale in DeepSeek's fp8 checkpoints (`weight_block_size`)."""
_MAX_INDEX_BYTES = 64 << 20
_MXFP4 = ("_blocks", "_scales")
_READABLE = {"F32", "BF16", "F16", "F8_E4M3"}
_IGNORED = re.compile(r"(rotary_emb\.inv_freq|_scale_inv)$")


class Reader(Protocol):
    """Where tensors come from."""

    def read(self, piece: Piece) -> torch.Tensor:
        """The piece's `take` of its source, in fp32 or the stored format."""


class Kept:
    """Weights that a rank holds already, by the pieces that they were loaded from."""

    def __init__(self, params: Iterable[Param], tensors: Mapping[str, torch.Tensor]) -> None:
        self._whole = {param: tensors[param.name] for param in params}
        self._parts = {_source(piece): part_of(tensors[param.name], piece) for param in self._whole for piece in param.pieces}

    def whole(self, param: Param) -> torch.Tensor | None:
        """The parameter, if it is the same."""
        return self._whole.get(param)

    def part(self, piece: Piece) -> torch.Tensor | None:
        """What fills the piece's place, if any parameter held it."""
        return self._parts.get(_source(piece))


def _source(piece: Piece) -> Piece:
    """The piece wherever it goes."""
    return replace(piece, into=())


def part_of(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The part of a parameter that a piece fills, as a view."""
    return tensor[tuple(i if isinstance(i, int) else slice(*i) for i in piece.into)]


def load_params(params: Iterable[Param], reader: Reader, dtype: torch.dtype, device: torch.device | str = "cpu",
                kept: Kept | None = None) -> dict[str, torch.Tensor]:
    """Allocate and fill a rank's parameters. Raises SpecError naming a tensor that cannot be had."""
    loaded: dict[str, torch.Tensor] = {}
    for param in params:
        same = kept.whole(param) if kept is not None else None
        if same is not None:
            loaded[param.name] = same
            continue
        tensor = torch.zeros(param.shape, dtype=torch.float32 if param.kind == "fp32" else dtype, device=device)
        for piece in param.pieces:
            part = part_of(tensor, piece)
            held = kept.part(piece) if kept is not None else None
            if held is not None:
                part.copy_(held)
                continue
            value = reader.read(piece)
            value = value if piece.stride is None else value[..., piece.stride::2]
            value = value.transpose(-1, -2) if piece.transpose else value
            part.copy_(value.reshape(part.shape))
        loaded[param.name] = tensor
    return loaded


def load_weights(model: ModelSpec, at: RankLayout, *, checkpoint: Path | None, seed: int, dtype: torch.dtype,
                 device: torch.device | str = "cpu", placement: Placement | None = None,
                 mtp: bool = False, kept: Kept | None = None) -> dict[str, torch.Tensor]:
    """A rank's weights from a checkpoint folder, or random ones when `checkpoint` is None; `mtp`: the module's as well."""
    params = rank_params(model, at, placement, mtp=mtp)
    if checkpoint is None:
        return load_params(params, RandomReader(seed, device), dtype, device, kept)
    with SafetensorsReader(checkpoint) as reader:
        reader.check(checkpoint_tensors(model, mtp=mtp), model.layers, tied=model.tie_embeddings)
        return load_params(params, reader, dtype, device, kept)


class RandomReader:
    """Random weights keyed by (seed, tensor name): however a model is cut, its weights are the same.

    Matrices are normal with variance 1 / fan-in, norms near one, biases and sinks small.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.seed, self.device = seed, torch.device(device)
        self._last: tuple[str, torch.Tensor] | None = None  # fused experts read one tensor many times

    def read(self, piece: Piece) -> torch.Tensor:
        if self._last is None or self._last[0] != piece.source:
            self._last = (piece.source, self.tensor(piece.source, piece.shape))
        return self._last[1][tuple(slice(*r) for r in piece.take)]

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The whole tensor, fp32."""
        digest = blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        stream = torch.Generator(self.device).manual_seed(int.from_bytes(digest, "little") >> 1)
        values = torch.randn(shape, generator=stream, device=self.device)
        if name.endswith("norm.weight"):
            return 1 + 0.1 * values
        if len(shape) == 1 or name.endswith("bias"):
            return 0.1 * values
        fan_in = shape[-2] if len(shape) == 3 else shape[-1]  # fused expert tensors are input-major
        return values / math.sqrt(fan_in)


class SafetensorsReader:
    """A checkpoint folder: `model.safetensors`, or the shards that `model.safetensors.index.json` lists."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = ExitStack()
        self._where: dict[str, Any] = {}
        try:
            for name in _shards(folder):
                handle = self._files.enter_context(safe_open(folder / name, framework="pt"))
                self._where.update(dict.fromkeys(handle.keys(), handle))
        except (OSError, SafetensorError) as err:
            self._files.close()
            raise SpecError(f"cannot read the checkpoint: {str(err)[:200]}", file=folder) from None

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def check(self, expected: Mapping[str, tuple[int, ...]], layers: int, *, tied: bool = False) -> None:
        """Raise SpecError for every missing, extra or wrongly shaped tensor. MTP modules (layers beyond the last) and
        derived tensors are not asked for and may be there."""
        problems: list[Problem] = []
        narrow: set[str] = set()
        for name, shape in expected.items():
            if name not in self._where and f"{name}_blocks" in self._where:
                for suffix, stored in zip(_MXFP4, mxfp4.stored_shapes(shape), strict=True):
                    problems += self._check_one(name + suffix, stored, {"U8"})
                    narrow.add(name + suffix)
                continue
            problems += self._check_one(name, shape, _READABLE)
        problems += [Problem("tensor does not belong to this model", field=name)
                     for name in sorted(self._where.keys() - expected.keys() - narrow) if not _may_ignore(name, layers, tied)]
        if problems:
            raise SpecError(problems, file=self.folder)

    def _check_one(self, name: str, shape: tuple[int, ...], formats: set[str]) -> list[Problem]:
        if name not in self._where:
            return [Problem("tensor is missing", field=name, expected=f"shape {list(shape)}")]
        part = self._where[name].get_slice(name)
        if tuple(part.get_shape()) != shape:
            return [Problem(f"tensor has shape {list(part.get_shape())}", field=name, expected=f"{list(shape)}")]
        if part.get_dtype() not in formats:
            return [Problem(f"tensor is stored as {part.get_dtype()}", field=name,
                            expected="one of " + ", ".join(sorted(formats)))]
        return []

    def read(self, piece: Piece) -> torch.Tensor:
        if piece.source not in self._where:
            return self._widened(piece)
        value: torch.Tensor = self._slice(piece.source, piece.take)
        if value.dtype != torch.float8_e4m3fn:
            return value
        return self._dequantised(piece, value)

    def _widened(self, piece: Piece) -> torch.Tensor:
        """The piece of an mxfp4 tensor in bf16; only the blocks that it touches are read."""
        experts, (first, last), columns = piece.take
        blocks = (first // mxfp4.BLOCK, -(-last // mxfp4.BLOCK))
        where = (experts, columns, blocks)
        packed, scales = (self._slice(piece.source + suffix, where) for suffix in _MXFP4)
        start = blocks[0] * mxfp4.BLOCK
        return mxfp4.widen(packed, scales)[..., first - start:last - start].transpose(1, 2)

    def _dequantised(self, piece: Piece, value: torch.Tensor) -> torch.Tensor:
        name = f"{piece.source}_scale_inv"
        if name not in self._where:
            raise SpecError("tensor is missing", file=self.folder, field=name, expected="a scale per 128x128 block")
        blocks = [(start // FP8_BLOCK, -(-stop // FP8_BLOCK)) for start, stop in piece.take]
        scale: torch.Tensor = self._slice(name, blocks).float()
        for dim, (start, stop) in enumerate(piece.take):
            scale = scale.index_select(dim, torch.arange(start, stop) // FP8_BLOCK - start // FP8_BLOCK)
        return value.float() * scale

    def _slice(self, name: str, take: Iterable[Range]) -> torch.Tensor:
        value: torch.Tensor = self._where[name].get_slice(name)[tuple(slice(*r) for r in take)]
        return value


def _may_ignore(name: str, layers: int, tied: bool) -> bool:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    is_mtp = layer is not None and int(layer[1]) >= layers
    return is_mtp or bool(_IGNORED.search(name)) or (tied and name == "lm_head.weight")


def _shards(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise SpecError("the index is too large", file=index, expected=f"at most {_MAX_INDEX_BYTES} bytes")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SpecError("is not a safetensors index", file=index, expected='{"weight_map": {tensor: file}}') from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise SpecError(f"names a file outside its folder: {str(name)[:80]}", file=index, field="weight_map")
    return names
