"""Tokenizers of one token a byte, templates of each kind, and what comes of an example with them."""

from __future__ import annotations

import pytest
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.jobs.served_tokenizer import ServedTokenizer
from apollo_worker.jobs.tokenise import Tokeniser
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import Example, Message, parse_train_data

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>"]
VOCAB_SIZE = 256 + len(SPECIAL)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"  # templates trim a bare newline
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A reasoning model in the manner of Qwen3.5: turns after the last question carry their thought, an empty one
# too; earlier turns have lost it; the generation prompt opens a thought unless thinking is switched off.
REASONING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% endif %}"
)
# In the manner of GLM: nothing ends a turn but the role that comes next.
NEXT_ROLE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# In the manner of Phi: each turn has an end of its own, and after the last one stands the end of text.
TWO_ENDS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
CHAT = [
    Message("system", "Be brief."),
    Message("user", "Grüße?"),
    Message("assistant", "Hallo."),
    Message("user", "And <b>now</b>?"),
    Message("assistant", "  Still\nhere "),
]


def byte_tokenizer(template=None, *, merges=(), eos="<|im_end|>", bos=None):
    """One token a byte, special tokens after them; `merges` joins pairs of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet)}
    backend = Tokenizer(
        models.BPE(vocab={**vocab, **{a + b: 256 + i for i, (a, b) in enumerate(merges)}}, merges=merges)
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if bos:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer


def tokeniser(template=CHATML, *, max_tokens=1000, vocab_size=VOCAB_SIZE + 10, stops=(), **options):
    """stops: further tokens at which vLLM stops, by their text."""
    fast = byte_tokenizer(template, **options)
    served = ServedTokenizer(fast, [fast.convert_tokens_to_ids(one) for one in stops])
    return Tokeniser(served, vocab_size=vocab_size, max_tokens=max_tokens)


def example_of(messages, **more) -> Example:
    """As it comes out of a request's body."""
    return parse_train_data({"messages": messages, **more}).examples[0]


def one(tok: Tokeniser, example: Example) -> TokenisedExample:
    """The only sequence of `example`."""
    (sequence,) = tok.encode(example, "examples[0]")
    return sequence


def said(tok: Tokeniser, example: Example) -> list[tuple[str, str]]:
    """(context, targets) of each learned turn, as text."""
    decode = tok.tokenizer.decode  # pyright: ignore[reportOptionalMemberAccess]
    return [
        (decode(sequence.input_ids[: turn.start]), decode(sequence.input_ids[turn.start : turn.end]))
        for sequence in tok.encode(example, "examples[0]")
        for turn in sequence.turns
    ]


def answers(tok: Tokeniser, example: Example) -> list[str]:
    return [target for _, target in said(tok, example)]


def refusal(tok: Tokeniser, example: Example, path: str = "examples[0]") -> UserError:
    with pytest.raises(UserError) as error:
        tok.encode(example, path)
    assert error.value.code == "invalid_example"
    return error.value


def user(text="?"):
    return {"role": "user", "content": text}


def assistant(text="yes", **more):
    return {"role": "assistant", "content": text, **more}


def call(name="look", arguments='{"at": "x"}', number=1):
    function = {"name": name, "arguments": arguments}
    return {"id": f"c{number}", "type": "function", "function": function}
