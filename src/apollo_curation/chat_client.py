"""The served model, or a judge, over the OpenAI API: answers, JSON by a schema, log-probabilities, load."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import msgspec

from apollo_curation.settings import CurationConfig
from apollo_ipc.errors import NotReady, UserError
from apollo_ipc.wire.requests import Message

REQUEST_TIMEOUT_S = 300.0
RETRY_S = 1.0
THOUGHT_END = "</think>"
_GAUGE = re.compile(r"^vllm:num_requests_(running|waiting)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
_COUNTER = re.compile(r"^vllm:request_success_total(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


class ModelAway(NotReady):
    """Nobody answered for as long as we were ready to wait."""

    code = "model_away"


class TooSlow(ModelAway):
    """It took the request, and had not answered it after REQUEST_TIMEOUT_S."""


class ServerRefused(UserError):
    """A server said no, and would again. said: its own sentence; status: of HTTP; field: what it named;
    is_of_this_request: another one may be taken."""

    def __init__(self, message: str, *, said: str, status: int, field: str | None, code: str | None):
        super().__init__(message, field=field, code=code)
        self.said = said
        self.status = status
        self.is_of_this_request = status in (400, 413, 422)


class Load(msgspec.Struct, frozen=True):
    """What vLLM says it is doing: requests now running and waiting, and requests ended since its start."""

    num_running: int
    num_waiting: int
    num_ended: int


class ChatAnswer(msgspec.Struct, frozen=True):
    """is_cut_off: max_tokens came before its end."""

    message: Message
    is_cut_off: bool = False


class ChatClient:
    """url: of an OpenAI-compatible server; model: empty for the first one that it lists.

    patience_s: a server that does not answer, or answers 502 to 504 or 429, is asked again for so long, then
    ModelAway is raised. Any other refusal is a ServerRefused (a UserError) with what the server said. Safe
    for several threads. stop: asked between two attempts; when it answers true, ModelAway is raised at once.
    """

    def __init__(
        self,
        url: str,
        model: str = "",
        api_key: str = "",
        *,
        patience_s: float = 300.0,
        stop: Callable[[], bool] = lambda: False,
    ):
        self.url = url.rstrip("/").removesuffix("/v1")
        self.patience_s = patience_s
        self.num_ended = 0  # requests of ours that vLLM counts among the ended ones
        self._model = model
        self._texts: dict[int, str] = {}  # of tokens
        self._stop = stop
        self._lock = threading.Lock()
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=REQUEST_TIMEOUT_S)

    @property
    def model(self) -> str:
        with self._lock:
            if not self._model:
                models = self._request("GET", "/v1/models").json().get("data") or []
                if not models:
                    raise UserError(f"{self.url} lists no model; name one", field="curation.model")
                self._model = models[0]["id"]
            return self._model

    def chat(self, messages: list[Message], *, max_tokens: int, **options: Any) -> Message:
        """The message of `answer`, whose options these are."""
        return self.answer(messages, max_tokens=max_tokens, **options).message

    def answer(
        self,
        messages: list[Message],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        schema: dict[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> ChatAnswer:
        """The model's next turn, without its thoughts. schema: JSON Schema that the answer must follow, by
        guided decoding."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": wire(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        if schema is not None:
            form = {"name": "answer", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        if tools:
            body["tools"] = tools
        choice = self._generate("/v1/chat/completions", body)
        message = choice["message"]
        # Without a reasoning parser in the server, a thought stands before the answer.
        said = Message(
            role="assistant",
            content=(message.get("content") or "").rpartition(THOUGHT_END)[2].lstrip("\n"),
            tool_calls=message.get("tool_calls") or None,
        )
        return ChatAnswer(said, is_cut_off=choice.get("finish_reason") == "length")

    def answer_logprobs(
        self, context: list[Message], answer: Message, tools: list[dict[str, Any]] | None = None
    ) -> list[float]:
        """Log-probability in nats of each token of `answer`, its end of turn included, after `context`. What
        the template puts behind the end of the turn is no part of it: the model stops before it.

        One forward pass in vLLM (prompt_logprobs), which neither samples nor reads the prefix cache.
        Raises UserError where the chat template does not let the answer's tokens be told apart.
        """
        whole = self.tokens([*context, answer], tools=tools, add_generation_prompt=False)
        # Reasoning models open a thought in the generation prompt; a turn without one is rendered without it.
        for options in ({}, {"enable_thinking": False}):
            prompt = self.tokens(context, tools=tools, add_generation_prompt=True, template=options)
            if len(prompt) < len(whole) and whole[: len(prompt)] == prompt:
                whole = self._without_trailing_space(whole, len(prompt) + 1)
                return self.token_logprobs(whole)[len(prompt) - 1 :]
        raise UserError(
            "the chat template renders this conversation in another way with its answer than without: the "
            "answer's tokens cannot be told apart",
            code="invalid_example",
        )

    def tokens(
        self,
        messages: list[Message],
        *,
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None = None,
        template: dict[str, Any] | None = None,
    ) -> list[int]:
        """The conversation through the model's chat template, by vLLM's own /tokenize."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": wire(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        if tools:
            body["tools"] = tools
        if template:
            body["chat_template_kwargs"] = template
        return self._request("POST", "/tokenize", body).json()["tokens"]

    def _without_trailing_space(self, ids: list[int], least: int) -> list[int]:
        """Without tokens of nothing but white space at its end; `least` tokens stay."""
        while len(ids) > least and not self._token_text(ids[-1]).strip():
            ids = ids[:-1]
        return ids

    def _token_text(self, token: int) -> str:
        if token not in self._texts:
            body = {"model": self.model, "tokens": [token]}
            self._texts[token] = self._request("POST", "/detokenize", body).json()["prompt"]
        return self._texts[token]

    def text_tokens(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        body = {"model": self.model, "prompt": text, "add_special_tokens": add_special_tokens}
        return self._request("POST", "/tokenize", body).json()["tokens"]

    def token_logprobs(self, ids: list[int]) -> list[float]:
        """Of each token given those before it, in nats: len(ids) - 1 values."""
        body = {
            "model": self.model,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
        }
        entries = self._generate("/v1/completions", body)["prompt_logprobs"]
        return [entry[str(token)]["logprob"] for entry, token in zip(entries[1:], ids[1:], strict=True)]

    def completion_logprobs(self, ids: list[int], *, max_tokens: int, num_logprobs: int) -> dict[str, Any]:
        """What the model says greedily behind these tokens: OpenAI's `logprobs` of a completion, tokens as
        "token_id:N". Those are the raw model's, whatever the sampling (vLLM's logprobs_mode raw_logprobs)."""
        body = {
            "model": self.model,
            "prompt": ids,
            "max_tokens": max_tokens,
            "temperature": 0,
            "logprobs": num_logprobs,
            "return_tokens_as_token_ids": True,
        }
        return self._generate("/v1/completions", body)["logprobs"]

    def load(self) -> Load:
        """From vLLM's own metrics. Raises UserError where the server has none."""
        text = self._request("GET", "/metrics").text
        gauges: dict[str, float] = {"running": 0.0, "waiting": 0.0}
        found = _GAUGE.findall(text)
        if not found:
            raise UserError(f"{self.url}/metrics has no vllm:num_requests_running: is it a vLLM?")
        for name, value in found:  # one of each engine
            gauges[name] += float(value)
        ended = sum(float(value) for value in _COUNTER.findall(text))
        return Load(int(gauges["running"]), int(gauges["waiting"]), int(ended))

    def close(self) -> None:
        self._http.close()

    def _generate(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The first choice of an answer."""
        choice = self._request("POST", path, body).json()["choices"][0]
        with self._lock:
            self.num_ended += 1
        return choice

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        return request_patiently(self._http, method, path, body, patience_s=self.patience_s, stop=self._stop)


def request_patiently(
    http: httpx.Client,
    method: str,
    path: str,
    body: Any = None,
    *,
    patience_s: float,
    stop: Callable[[], bool] = lambda: False,
    headers: dict[str, str] | None = None,
    timeout_s: float = REQUEST_TIMEOUT_S,
) -> httpx.Response:
    """The answer, once there is one (see ChatClient). Only for requests that may be sent twice."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            response = http.request(method, path, json=body, headers=headers, timeout=timeout_s)
        except httpx.TransportError as error:
            problem, away = f"{type(error).__name__}: {error}", ModelAway
            if isinstance(error, httpx.ReadTimeout):
                away = TooSlow
        else:
            away = ModelAway
            if response.is_success:
                return response
            problem = f"{response.status_code}: {_said(response)}"
            if response.status_code not in (429, 502, 503, 504):
                raise ServerRefused(
                    f"{str(http.base_url).rstrip('/')}{path} answered {problem}",
                    said=_said(response),
                    status=response.status_code,
                    field=_named(response, "param"),
                    code=_named(response, "code"),
                )
        if time.monotonic() >= deadline or stop():
            raise away(f"{http.base_url} did not answer for {patience_s:g} s ({problem})")
        time.sleep(min(RETRY_S, max(0.0, deadline - time.monotonic())))


def wire(messages: list[Message]) -> list[dict[str, Any]]:
    """As the OpenAI API takes them: without `weight`, which only training knows."""
    plain = [msgspec.structs.replace(message, weight=None) for message in messages]
    return msgspec.to_builtins(plain)


def _said(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        return error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        return response.text[:300]


def _named(response: httpx.Response, name: str) -> str | None:
    """Text that OpenAI's error object has under this name; vLLM's own codes are numbers."""
    try:
        found = response.json()["error"][name]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def learner(config: CurationConfig, stop: Callable[[], bool] = lambda: False) -> ChatClient:
    """The served model that learns."""
    own = config.curation
    return ChatClient(own.url, own.model, own.api_key, patience_s=own.patience_s, stop=stop)


def judging(config: CurationConfig, stop: Callable[[], bool] = lambda: False) -> ChatClient:
    """The model that judges: the learner, unless another server is configured."""
    own = config.judge
    if not own.url:
        return learner(config, stop)
    return ChatClient(own.url, own.model, own.api_key, patience_s=config.curation.patience_s, stop=stop)
