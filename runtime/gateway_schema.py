"""What the service accepts: the OpenAI request bodies, with a bound on everything.

Unknown fields are ignored, as clients send many. Known ones that would change the answer and that the engine does not
have (logprobs, tools, penalties, ...) are refused by name rather than silently dropped.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from runtime.types import SamplingParams

MAX_CHOICES = 8
"""Most sequences one HTTP request may start: prompts x n."""
MAX_STOPS = 8
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logprobs": (None, False), "top_logprobs": (None, 0), "prompt_logprobs": (None,), "logit_bias": (None, {}),
    "tools": (None, []), "functions": (None, []), "tool_choice": (None, "none", "auto"), "function_call": (None, "none"),
    "frequency_penalty": (None, 0), "presence_penalty": (None, 0), "repetition_penalty": (None, 1), "best_of": (None, 1),
    "echo": (None, False), "suffix": (None, ""), "min_tokens": (None, 0), "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]), "audio": (None,), "guided_json": (None,), "guided_regex": (None,),
    "guided_choice": (None,), "guided_grammar": (None,), "structured_outputs": (None,),
}
"""Fields the engine does not have, and the values that ask nothing of it."""

Text = Annotated[str, Field(max_length=1 << 20)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Stop = Annotated[str, Field(min_length=1, max_length=128)]


class Body(BaseModel):
    """Base: strictly typed, no NaN, other fields let through (and never looked at)."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, hide_input_in_errors=True)


class StreamOptions(Body):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class Sampling(Body):
    """What both routes take. `temperature` 0 is greedy."""

    model: Annotated[str, Field(max_length=256)] | None = ""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=32)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _only_what_we_have(self) -> Sampling:
        for name, value in (self.model_extra or {}).items():
            neutral = _NEUTRAL.get(name)
            if neutral is not None and not any(type(value) in (type(n), float) and value == n for n in neutral):
                raise ValueError(f"{name} is not supported")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def output_limit(self) -> int | None:
        """The client's own limit on output tokens, if any."""
        return self.max_tokens

    def sampling_params(self, max_tokens: int, eos_ids: tuple[int, ...]) -> SamplingParams:
        """As the engine takes it. `ignore_eos` drops the model's own ends, not the client's `stop_token_ids`."""
        wanted = tuple(self.stop_token_ids or ()) + (() if self.ignore_eos else eos_ids)
        return SamplingParams(
            max_tokens=max_tokens, temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p, top_k=max(self.top_k or 0, 0), min_p=self.min_p or 0.0,
            seed=self.seed, stop_token_ids=tuple(dict.fromkeys(wanted))[:64], ignore_eos=not wanted)


class TextPart(Body):
    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """One turn. `content` is text or a list of text parts; None is empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=1024)] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(Sampling):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 24)] | None = None

    @property
    def output_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


Ids = Annotated[list[TokenId], Field(min_length=1, max_length=1 << 20)]


class CompletionRequest(Sampling):
    """`prompt` is text or token ids, or a list of either."""

    prompt: (Annotated[Text, Field(min_length=1)] | Ids
             | Annotated[list[Annotated[Text, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)]
             | Annotated[list[Ids], Field(min_length=1, max_length=MAX_CHOICES)])

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class Error(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The shape of every error of the service."""

    error: Error
