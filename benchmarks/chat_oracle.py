"""vLLM's own code as the judge of what was tokenised: its prompts, and where it stops."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace
from typing import Any

from apollo_worker.jobs.served_tokenizer import ServedTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.renderers.chat_utils import parse_chat_messages
from vllm.renderers.hf import resolve_chat_template_content_format, safe_apply_chat_template

# What looks like a special token in a template's text; tags of thoughts and calls are tokens, not special.
_SPECIAL = re.compile(
    r"<\|[^|<>\s{}']{1,40}\|>|<\uff5c[^\uff5c<>{}']{1,40}\uff5c>|\[/?[A-Z_]{3,24}\]|\[\|\w+\|\]|<(?:start|end)_of_\w+>"
    r"|</?s>|<(?:bos|eos|pad)>|<\|\w+>|<\w+\|>|<extra_id_\d+>|<(?:SPECIAL_\d+)>"
)
_DEEPSEEK_BEGIN, _DEEPSEEK_END = (f"<\uff5c{name}\u2581of\u2581sentence\uff5c>" for name in ("begin", "end"))
_TAGS = re.compile(r"</?(?:think|thinking|tool_call|tool_response|tools|answer)>")
_ROLES = ("system", "developer", "user", "assistant", "tool")
# A mark in the template, the tokenizer's eos, further ones of its generation configuration; the first match.
_ENDS: list[tuple[str, str, list[str]]] = [
    ("<|return|>", "<|return|>", ["<|call|>", "<|endoftext|>"]),
    ("<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", []),
    ("<|eot_id|>", "<|eot_id|>", ["<|eom_id|>"]),
    ("<|eot|>", "<|eot|>", ["<|eom|>"]),
    ("<turn|>", "<eos>", ["<turn|>", "<|tool_response>"]),
    ("<end_of_turn>", "<eos>", ["<end_of_turn>"]),
    ("<|im_end|>", "<|im_end|>", ["<|endoftext|>"]),
    (_DEEPSEEK_END, _DEEPSEEK_END, []),
    ("[|endofturn|]", "[|endofturn|]", []),
    ("<|observation|>", "<|endoftext|>", ["<|user|>", "<|observation|>"]),
    ("<|end_of_text|>", "<|end_of_text|>", []),
    ("<|end_of_role|>", "<|end_of_text|>", []),
    ("<|end|>", "<|endoftext|>", ["<|end|>"]),
    ("<|message_sep|>", "</s>", ["<|message_sep|>"]),
    ("<|end_of_sentence|>", "<|end_of_sentence|>", []),
    ("<|assistant_end|>", "</s>", ["<|assistant_end|>"]),
    ("<|eom|>", "<|eom|>", []),
    ("<|endofturn|>", "<|endofturn|>", []),
    ("<end_of_utterance>", "<end_of_utterance>", []),
]


def tokenizer_for(template: str) -> ServedTokenizer:
    """One token a byte, a few pairs joined, and the special tokens that the template's text names."""
    eos, others = next(((eos, more) for mark, eos, more in _ENDS if mark in template), ("</s>", []))
    bos = next((one for one in ("<|begin_of_text|>", "<bos>", _DEEPSEEK_BEGIN) if one in template), "<s>")
    special = dict.fromkeys([bos, eos, *others, *_SPECIAL.findall(template), "<unk>", "<pad>"])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n")]
    vocab = {one: i for i, one in enumerate([*alphabet, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in special])
    backend.add_tokens([AddedToken(one, normalized=False) for one in dict.fromkeys(_TAGS.findall(template))])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token="<unk>", pad_token="<pad>"
    )
    fast.chat_template = template
    return ServedTokenizer(fast, [fast.convert_tokens_to_ids(one) for one in others])


class Refused(Exception):
    """vLLM would answer 400."""


class Oracle:
    """vLLM's rendering with one tokenizer (vllm/renderers/online_renderer.py, preprocess_chat)."""

    def __init__(self, served: ServedTokenizer, name: str):
        # vLLM caches content formats by it, and looks for a processor there: on no hub.
        name = served.tokenizer.name_or_path = f"/nowhere/{name}"
        self._served = served
        self.stop_texts = served.stop_texts
        self._config: Any = SimpleNamespace(
            multimodal_config=None,
            enable_prompt_embeds=False,
            hf_config=SimpleNamespace(model_type="llama"),
            hf_text_config=SimpleNamespace(model_type="llama"),
            tokenizer=name,
            model=name,
            tokenizer_revision=None,
            revision=None,
            code_revision=None,
            trust_remote_code=False,
            is_multimodal_model=False,
            allowed_local_media_path="",
            allowed_media_domains=None,
        )

    def render(self, messages: list[dict[str, Any]], body: dict[str, Any], *, is_prompt: bool = True) -> str:
        """Raises Refused."""
        tokenizer: Any = self._served.tokenizer
        try:
            request = ChatCompletionRequest(
                messages=messages,  # pyright: ignore[reportArgumentType]
                add_generation_prompt=is_prompt,
                **({"tools": body["tools"]} if body.get("tools") else {}),
                **(
                    {"chat_template_kwargs": body["chat_template_kwargs"]}
                    if "chat_template_kwargs" in body
                    else {}
                ),
            )
            tools = [tool.model_dump() for tool in request.tools] if request.tools else None
            params = request.build_chat_params(None, "auto").with_defaults(
                {"tools": tools, "tokenize": False}
            )
            content_format = resolve_chat_template_content_format(
                None, tools, "auto", tokenizer, model_config=self._config
            )
            conversation, _, _ = parse_chat_messages(request.messages, self._config, content_format)
            text = safe_apply_chat_template(
                self._config, tokenizer, conversation, **params.get_apply_chat_template_kwargs()
            )
        except Exception as error:
            raise Refused(str(error)) from error
        assert isinstance(text, str)
        return text

    def prompt_ids(self, messages: list[dict[str, Any]], body: dict[str, Any]) -> list[int]:
        return self._served.tokenizer(self.render(messages, body), add_special_tokens=False)["input_ids"]


def sent(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as a client would send them to vLLM: `weight` is ours."""
    return copy.deepcopy(
        [{name: value for name, value in one.items() if name != "weight"} for one in messages]
    )


def learned(messages: list[dict[str, Any]]) -> list[int]:
    return [i for i, one in enumerate(messages) if one["role"] == "assistant" and one.get("weight") != 0]


def squashed(text: str) -> str:
    return "".join(text.split())


def faults(
    oracle: Oracle,
    served: ServedTokenizer,
    body: dict[str, Any],
    turns: dict[int, tuple[list[int], list[int]]],
) -> list[str]:
    """What is wrong with `turns`: message -> (context ids, target ids)."""
    messages = body["messages"]
    found = [f"message {i} is not trained" for i in learned(messages) if i not in turns]
    for i, (context, target) in turns.items():
        if context != oracle.prompt_ids(sent(messages[:i]), body):
            found.append(f"message {i}: the context is not vLLM's prompt")
        stops = [token in served.stop_ids for token in target]
        if not stops[-1] or any(stops[:-1]):
            found.append(f"message {i}: the targets do not end with the first stop token")
        said, message = served.decode(target), messages[i]
        found += [
            f"message {i}: {part!r} is not said"
            for part in parts(message)
            if squashed(part) not in squashed(said)
        ]
        if empty_thought(said, message):
            found.append(f"message {i}: an empty thought")
        else:
            found += _strange(oracle, body, i, said)
    return found


def _strange(oracle: Oracle, body: dict[str, Any], i: int, said: str) -> list[str]:
    """Targets that neither the template's rendering of the turn nor the message itself has."""
    messages = body["messages"]
    try:
        whole = oracle.render(sent(messages[: i + 1]), body, is_prompt=False)
    except Refused:
        return []
    text = squashed(said)
    for stop in oracle.stop_texts:
        text = text.removesuffix(squashed(stop))
    own = squashed("</think>".join(parts(messages[i])))
    is_known = text in squashed(whole) or text in (own, own.removeprefix("<think>"))
    return [] if is_known else [f"message {i}: {text[:60]!r} is in no rendering"]


def parts(message: dict[str, Any]) -> list[str]:
    """All that a message says."""
    content = message.get("content") or ""
    if isinstance(content, list):
        texts = [one if isinstance(one, str) else one.get("text") or "" for one in content]
        content = "\n".join(filter(None, texts))
    calls = [one["function"] for one in message.get("tool_calls") or []]
    thought = message.get("reasoning") or message.get("reasoning_content") or ""
    return [one for one in (thought, *content.split("</think>"), *(c["name"] for c in calls)) if one.strip()]


def empty_thought(said: str, message: dict[str, Any]) -> bool:
    if message.get("reasoning") or message.get("reasoning_content"):
        return False
    return (
        re.match(r"\s*(<think>\s*)?</think>|\s*(\[THINK\])?\[/THINK\]|\s*<\|START_THINKING\|><\|END_", said)
        is not None
    )


def could_be_trained(oracle: Oracle, served: ServedTokenizer, body: dict[str, Any]) -> bool:
    """Whether each learned turn's rendering simply goes on where vLLM's prompt ends, says all and ends."""
    messages = body["messages"]
    try:
        for i in learned(messages):
            context = oracle.render(sent(messages[:i]), body)
            whole = oracle.render(sent(messages[: i + 1]), body, is_prompt=False)
            said = whole.removeprefix(context)
            others = [one for one in messages[:i] if one["role"] not in _ROLES]
            if any(squashed(part) not in squashed(context) for one in others for part in parts(one)):
                return False  # vLLM serves the turn as if that message were not there
            calls = messages[i].get("tool_calls") or []
            is_whole = all(squashed(part) in squashed(said) for part in parts(messages[i]))
            if i == 0 or said == whole or not is_whole or empty_thought(said, messages[i]):
                return False
            names = [call["function"]["name"] for call in calls]
            if any(said.count(name) < names.count(name) for name in names):
                return False
            ends = max((said.rfind(squashed(part)[-8:]) for part in parts(messages[i])), default=0)
            if not any(stop in said[ends:] for stop in served.stop_texts):
                return False
    except Refused:
        return False
    return True
