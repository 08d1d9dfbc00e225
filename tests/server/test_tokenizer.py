"""Text to tokens and back, whatever the model's vocabulary and however the bytes fall."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.gateway_text import StopScanner
from runtime.tokenizer import REPLACEMENT, ByteTokenizer, HfTokenizer, Tokenizer, load_tokenizer
from twin.spec.errors import SpecError


def shown(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.detokenizer()
    return [*(stream.push(i) for i in ids), stream.finish()]


@given(st.text())
def test_bytes_round_trip_without_splitting_a_character(text: str) -> None:
    tokenizer = ByteTokenizer()
    pieces = shown(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert REPLACEMENT not in "".join(pieces) or REPLACEMENT in text


@given(st.lists(st.integers(0, 200_000)), st.integers(260, 200_000))
def test_any_ids_decode(ids: list[int], vocab: int) -> None:
    text = "".join(shown(ByteTokenizer(vocab), [i % vocab for i in ids]))
    text.encode()


def test_ids_beyond_bytes() -> None:
    pieces = shown(ByteTokenizer(1000), [ord("a"), 257, 999, 0xC3, 999, 0xA9, 0xC3])
    assert pieces == ["a", "", REPLACEMENT, "", REPLACEMENT * 2, REPLACEMENT, "", REPLACEMENT]


def test_a_small_vocabulary_is_an_error_with_a_hint() -> None:
    with pytest.raises(SpecError, match=r"260.*\n.*hint"):
        ByteTokenizer(259)


def test_byte_chat_marks_turns_that_text_cannot_forge() -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode_chat([("user", "<|turn|>")])
    assert ids[0] == tokenizer.BOS
    assert [i for i in ids if i > 255] == [256, 258, 259, 258]
    assert max(tokenizer.encode("\ud800")) < 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE tokenizer with one special token, as a checkpoint has it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
                                  special_tokens=[AddedToken("<eos>", special=True)])
    backend.train_from_iterator(["the cat sat on the mat, the cat"], trainer)
    path = tmp_path_factory.mktemp("checkpoint")
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return path


@settings(max_examples=50)
@given(text=st.text(max_size=40))
def test_checkpoint_tokenizer_round_trips_in_pieces(folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(folder, 400)
    assert isinstance(tokenizer, HfTokenizer)
    ids = tokenizer.encode(text)
    assert "".join(shown(tokenizer, ids)) == text


@settings(max_examples=50)
@given(ids=st.lists(st.integers(0, 399), max_size=60))
def test_checkpoint_tokenizer_survives_random_ids(folder: Path, ids: list[int]) -> None:
    "".join(shown(load_tokenizer(folder, 400), ids)).encode()


def test_special_tokens_in_text_are_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, 400)
    eos = tokenizer.eos_ids
    assert len(eos) == 1
    assert eos[0] not in tokenizer.encode("hello <eos>")
    assert "".join(shown(tokenizer, [*tokenizer.encode("the cat"), eos[0]])) == "the cat"
    assert "".join(shown(tokenizer, tokenizer.encode_chat([("user", "the cat")]))) == "user: the cat\nassistant:"


def test_eos_of_the_generation_config_wins(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert load_tokenizer(tmp_path, 400).eos_ids == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert load_tokenizer(tmp_path, 400).eos_ids == (7, 8)


@pytest.mark.parametrize("content", ["", "{}", "[" * 3000, "\x00" * 100, '{"model": {"type": "Zebra"}}'])
def test_bad_tokenizer_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(SpecError, match="tokenizer"):
        load_tokenizer(tmp_path, 400)


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(SpecError, match="model only 260"):
        load_tokenizer(folder, 260)


def test_no_folder_means_bytes(tmp_path: Path) -> None:
    assert isinstance(load_tokenizer(None, 512), ByteTokenizer)
    assert isinstance(load_tokenizer(tmp_path, 512), ByteTokenizer)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
       st.lists(st.integers(1, 4), max_size=30))
def test_stop_scanner_equals_cutting_the_whole_text(text: str, stops: list[str], cuts: list[int]) -> None:
    """However the text is cut up, what is shown is what cutting all of it at the first complete stop would show."""
    scanner, out, at = StopScanner(stops), "", 0
    for size in [*cuts, len(text)]:
        out += scanner.push(text[at:at + size])
        at += size
        if scanner.stopped or at >= len(text):
            break
    out += "" if scanner.stopped else scanner.finish()
    ends = {len(text[:n]): stop for n in range(len(text) + 1) for stop in stops if text[:n].endswith(stop)}
    assert scanner.stopped == bool(ends)
    if not ends:
        assert out == text
    else:
        assert text.startswith(out)
        assert not any(stop in out for stop in stops)
        assert any(text.startswith(stop, len(out)) for stop in stops)
