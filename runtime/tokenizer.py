"""Text to tokens and back: a checkpoint's own `tokenizer.json`, or bytes where it has none.

Chat turns are written in one plain, role-marked form, not with the checkpoint's Jinja template (the runtime runs no
template language): HfTokenizer encodes `<role>: <content>` lines ending in `assistant:`; ByteTokenizer brackets each
turn with its own special tokens. Quality of chat answers may differ from the checkpoint's own template; speed does not.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from twin.spec.errors import SpecError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_HELD_TOKENS = 8
"""A UTF-8 character takes at most 4 bytes, so at most 4 byte-level tokens; more that still decode badly are bad."""


class Detokenizer(Protocol):
    """Turns one request's tokens into text as they come; never splits a character."""

    def push(self, token_id: int) -> str:
        """Text that this token completes; may be empty."""
        ...

    def finish(self) -> str:
        """Text still held back; a replacement character where a character never completed."""
        ...


class Tokenizer(Protocol):
    """What the gateway needs. `eos_ids` end a generation unless the request says `ignore_eos`."""

    vocab: int
    eos_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]: ...
    def encode_chat(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """Tokens of (role, content) turns and of the start of the assistant's next one."""
        ...

    def detokenizer(self) -> Detokenizer: ...


def load_tokenizer(folder: Path | None, vocab: int) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or bytes when there is no folder or no `tokenizer.json` in it.

    `vocab` is the model's. Raises SpecError when the file is bad or the tokenizer has ids that the model lacks.
    """
    if folder is not None and (folder / "tokenizer.json").is_file():
        return HfTokenizer(folder, vocab)
    return ByteTokenizer(vocab)


class ByteTokenizer:
    """Each UTF-8 byte is a token; 4 specials follow. Ids beyond (a model with a larger vocabulary may draw them)
    decode to a replacement character. Raises SpecError when `vocab` is below 260."""

    BOS, EOS, TURN_START, TURN_END = 256, 257, 258, 259
    SPECIALS = 4

    def __init__(self, vocab: int = 260) -> None:
        if vocab < 256 + self.SPECIALS:
            raise SpecError(f"vocabulary of {vocab} tokens is too small for the byte-level tokenizer", field="model.vocab",
                            expected=f"at least {256 + self.SPECIALS} (256 bytes and {self.SPECIALS} specials)",
                            hint="put a tokenizer.json into the checkpoint folder, or use a larger vocabulary")
        self.vocab = vocab
        self.eos_ids: tuple[int, ...] = (self.EOS, self.TURN_END)

    def encode(self, text: str) -> list[int]:
        """One token a byte, no BOS: `len` is the length in bytes exactly, which load tests rely on."""
        return list(text.encode("utf-8", errors="replace"))

    def encode_chat(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        ids = [self.BOS]
        for role, content in turns:
            ids += [self.TURN_START, *self.encode(f"{role}\n{content}"), self.TURN_END]
        return [*ids, self.TURN_START, *self.encode("assistant\n")]

    def detokenizer(self) -> Detokenizer:
        return _ByteDetokenizer()


class _ByteDetokenizer:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        if 0 <= token_id < 256:
            return self._decoder.decode(bytes((token_id,)))
        broken = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return broken if token_id < 256 + ByteTokenizer.SPECIALS else broken + REPLACEMENT

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class HfTokenizer:
    """A Hugging Face `tokenizer.json`. Special tokens written in a user's text are plain text, never control."""

    def __init__(self, folder: Path, vocab: int) -> None:
        from tokenizers import Tokenizer as Backend

        file = folder / "tokenizer.json"
        try:
            self._backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise SpecError(f"cannot read the tokenizer: {str(error)[:200]}", file=file) from error
        size = self._backend.get_vocab_size(with_added_tokens=True)
        if size > vocab:
            raise SpecError(f"tokenizer has {size} tokens but the model only {vocab}", file=file, field="vocab_size",
                            hint="the tokenizer belongs to another checkpoint")
        self._backend.encode_special_tokens = True
        self.vocab = vocab
        self.eos_ids = _eos_ids(folder, self._backend)

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text.encode("utf-8", errors="replace").decode()).ids)

    def encode_chat(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        lines = [f"{role}: {content}\n" for role, content in turns]
        return self.encode("".join(lines) + "assistant:")

    def detokenizer(self) -> Detokenizer:
        return _HfDetokenizer(self._backend)


class _HfDetokenizer:
    """Decodes a short sliding window: what the window says with the new token, less what it said without it."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._context: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        self._held.append(max(token_id, 0))
        text = self._text()
        if text.endswith(REPLACEMENT) and len(self._held) < _MAX_HELD_TOKENS:
            return ""
        return self._release(text)

    def finish(self) -> str:
        return self._release(self._text()) if self._held else ""

    def _text(self) -> str:
        before = self._backend.decode(self._context, skip_special_tokens=True)
        both = self._backend.decode(self._context + self._held, skip_special_tokens=True)
        return str(both[len(before):])

    def _release(self, text: str) -> str:
        self._context, self._held = self._held, []
        return text


def _eos_ids(folder: Path, backend: Any) -> tuple[int, ...]:
    """End-of-text ids: of generation_config.json, else config.json, else the tokenizer's own eos_token."""
    for name in ("generation_config.json", "config.json"):
        stated = _json_object(folder / name).get("eos_token_id")
        ids = stated if isinstance(stated, list) else [stated]
        found = tuple(i for i in ids if isinstance(i, int) and not isinstance(i, bool))
        if found:
            return found
    token = _json_object(folder / "tokenizer_config.json").get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    found_id = backend.token_to_id(text) if isinstance(text, str) else None
    return () if found_id is None else (found_id,)


def _json_object(file: Path) -> dict[str, Any]:
    """A JSON object of at most 16 MiB; {} when there is no such file. Raises SpecError when it is not one."""
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > 16 << 20:
            raise ValueError("larger than 16 MiB")
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SpecError(f"cannot read: {str(error)[:200]}", file=file) from error
    if not isinstance(found, dict):
        raise SpecError("is not a JSON object", file=file)
    return found
