"""What is trained of a chat is what vLLM serves: a test for each way in which it could be something else."""

import pytest
from apollo_worker.jobs.tokenise import Tokeniser, load_tokeniser
from chat_tokenizers import (
    CHAT,
    CHATML,
    CHATML_GENERATION,
    NEXT_ROLE,
    REASONING,
    TWO_ENDS,
    VOCAB_SIZE,
    answers,
    assistant,
    byte_tokenizer,
    call,
    example_of,
    one,
    refusal,
    said,
    tokeniser,
    user,
)

from apollo_ipc.errors import UserError
from apollo_ipc.manifest import Serving
from apollo_ipc.wire.requests import Example

PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "<|im_end|>\n{% endfor %}" + PROMPT
)
# In the manner of DeepSeek's distilled models: the prompt opens a thought, no turn shows one.
OPENED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{{ part.text }};{% endfor %}<|im_end|>\n{% endfor %}" + PROMPT
)


def test_each_turn_stands_behind_the_prompt_that_is_served():
    tok = tokeniser(CHATML)
    sequence = one(tok, Example(messages=CHAT))
    fast = tok.tokenizer.tokenizer
    sent = [{"role": m.role, "content": m.content} for m in CHAT]
    assert [turn.message for turn in sequence.turns] == [2, 4]
    for turn in sequence.turns:
        prompt = fast.apply_chat_template(sent[: turn.message], add_generation_prompt=True, return_dict=False)
        assert sequence.input_ids[: turn.start] == prompt
    assert answers(tok, Example(messages=CHAT)) == ["Hallo.<|im_end|>", "  Still\nhere <|im_end|>"]


def test_a_turn_of_weight_0_is_read_and_not_learned():
    tok = tokeniser(CHATML)
    messages = [user(), assistant("a", weight=0), user(), assistant("b", weight=1)]
    assert answers(tok, example_of(messages)) == ["b<|im_end|>"]
    assert (
        one(tok, example_of(messages)).input_ids
        == one(tok, example_of([*messages[:3], assistant("b")])).input_ids
    )
    assert "weight 0" in refusal(tok, example_of(messages[:2])).message
    assert "nothing to learn" in refusal(tok, example_of(messages[:1])).message


# --- 1: an answer of a server, as it came ---


@pytest.mark.parametrize("template", [CHATML, CALLS])
def test_an_answer_of_the_server_is_a_message(template):
    unused = {"refusal": None, "annotations": None, "audio": None, "function_call": None, "reasoning": None}
    tok = tokeniser(template)
    assert answers(tok, example_of([user(), assistant("yes", tool_calls=[], **unused)])) == ["yes<|im_end|>"]
    parts = [{"type": "text", "text": "a"}, "b", {"type": "text", "text": ""}]
    assert answers(tok, example_of([user(parts), assistant(parts)])) == ["a\nb<|im_end|>"]


def test_null_beside_calls_is_an_empty_text():
    messages = [user(), assistant(None, tool_calls=[{**call(), "index": 0}])]
    assert answers(tokeniser(CALLS), example_of(messages)) == ['[look {"at": "x"}]<|im_end|>']


def test_a_template_that_goes_through_parts_gets_parts():
    assert answers(tokeniser(PARTS), example_of([user("a"), assistant(["b", "c"])])) == ["b;c;<|im_end|>"]
    image = {"type": "image_url", "image_url": {"url": "x"}}
    error = refusal(tokeniser(PARTS), example_of([user([{"type": "text", "text": "a"}, image]), assistant()]))
    assert error.field == "examples[0].messages[0].content[1]"


# --- 2, 3, 11: thoughts ---


def test_an_answer_without_a_thought_is_not_learned_behind_a_prompt_that_opens_one():
    error = refusal(tokeniser(OPENED), example_of([user("2+2?"), assistant("4")]))
    assert error.field == "examples[0].messages[1]"
    assert "reasoning" in error.message
    assert "enable_thinking" in error.message


def test_a_thought_that_no_turn_shows_is_said_behind_a_prompt_that_opens_one():
    tok = tokeniser(OPENED)
    expected = "two and two\n</think>\n\n4<|im_end|>"
    asked = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert said(tok, example_of([user("2+2?"), assistant("4", reasoning="two and two")])) == [
        (asked, expected)
    ]
    as_served = example_of([user("2+2?"), assistant("two and two\n</think>\n\n4")])
    assert said(tok, as_served) == [(asked, expected)]


def test_a_thought_that_is_lost_is_refused_and_not_left_out():
    error = refusal(tokeniser(CHATML), example_of([user(), assistant(reasoning_content="hm")]))
    assert error.field == "examples[0].messages[1].reasoning"


def test_earlier_thoughts_that_are_served_no_more_make_sequences_of_their_own():
    tok = tokeniser(REASONING)
    example = example_of([user("a"), assistant("b", reasoning="c"), user("d"), assistant("e", reasoning="f")])
    first, second = tok.encode(example, "x")
    assert (first.turns[0].message, second.turns[0].message) == (1, 3)
    assert answers(tok, example) == ["c\n</think>\n\nb<|im_end|>", "f\n</think>\n\ne<|im_end|>"]
    assert said(tok, example)[1][0] == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


def test_an_empty_thought_is_never_a_target():
    error = refusal(tokeniser(REASONING), example_of([user(), assistant()]))
    assert "teaches it not to think" in error.message
    bare = REASONING.replace(
        "{% else %}<think>\n{% endif %}", "{% endif %}"
    )  # as Qwen3: the turn has both tags
    assert "teaches it not to think" in refusal(tokeniser(bare), example_of([user(), assistant()])).message


def test_chat_template_kwargs_are_those_of_the_request_that_is_served():
    example = example_of([user("2+2?"), assistant("4")], chat_template_kwargs={"enable_thinking": False})
    ((context, target),) = said(tokeniser(REASONING), example)
    assert context.endswith("assistant\n<think>\n\n</think>\n\n")
    assert target == "4<|im_end|>"
    served = tokeniser(REASONING).tokenizer
    serving = Serving(default_chat_template_kwargs={"enable_thinking": False})
    tok = Tokeniser(served, vocab_size=1000, max_tokens=1000, serving=serving)
    assert said(tok, example_of([user("2+2?"), assistant("4")])) == [(context, target)]
    error = refusal(tok, example_of([user(), assistant()], chat_template_kwargs={"tokenize": True}))
    assert error.field == "examples[0].chat_template_kwargs.tokenize"


# --- 7, 8: roles and tools ---


def test_a_developer_is_the_system_where_the_template_knows_none():
    messages = [
        user("a"),
        assistant("b"),
        {"role": "developer", "content": "be brief"},
        user("c"),
        assistant("d"),
    ]
    ((_, first), (context, _)) = said(tokeniser(), example_of(messages))
    assert first == "b<|im_end|>"
    assert context.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na")
    assert "developer" not in context
    knows = CHATML + "{# 'developer' #}"
    assert "<|im_start|>developer\nbe brief" in said(tokeniser(knows), example_of(messages))[1][0]


def test_tools_are_shown_as_vllm_shows_them():
    template = "{% if tools is not none and tools is defined %}{{ tools | tojson }}{% endif %}" + CHATML
    tool = {"function": {"parameters": {"b": 1, "a": 2}, "name": "n", "more": 1}, "type": "function"}
    ((context, _),) = said(tokeniser(template), example_of([user(), assistant()], tools=[tool]))
    function = '{"name": "n", "description": null, "parameters": {"b": 1, "a": 2}}'
    shown = f'[{{"type": "function", "function": {function}}}]'
    assert context.startswith(shown + "<|im_start|>user")
    plain = example_of([user(), assistant()])
    assert said(tokeniser(template), example_of([user(), assistant()], tools=[])) == said(
        tokeniser(template), plain
    )
    error = refusal(tokeniser(template), example_of([user(), assistant()], tools=[{"name": "n"}]))
    assert error.field == "examples[0].tools[0]"


# --- 9, 10: calls ---


def test_a_call_is_taken_where_a_turn_without_one_would_be_refused():
    strict = CALLS.replace(
        "{% for c in",
        "{% if m.role == 'assistant' and not m.tool_calls %}{{ raise_exception('no') }}{% endif %}"
        "{% for c in",
    )
    messages = [user(), assistant(None, tool_calls=[call()])]
    assert answers(tokeniser(strict), example_of(messages)) == ['[look {"at": "x"}]<|im_end|>']


def test_no_part_of_a_learned_turn_vanishes():
    both = [user(), assistant("Wait.", tool_calls=[call()])]
    two = [user(), assistant(None, tool_calls=[call(), call(number=2)])]
    assert answers(tokeniser(CALLS), example_of(both)) == ['Wait.[look {"at": "x"}]<|im_end|>']
    assert answers(tokeniser(CALLS), example_of(two)) == ['[look {"at": "x"}][look {"at": "x"}]<|im_end|>']
    error = refusal(tokeniser(CHATML), example_of(both))
    assert error.field == "examples[0].messages[1].tool_calls[0]"
    only_calls = CALLS.replace("{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}")
    assert refusal(tokeniser(only_calls), example_of(both)).field == "examples[0].messages[1].content"
    first_call = CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    assert refusal(tokeniser(first_call), example_of(two)).field == "examples[0].messages[1].tool_calls[1]"


def test_arguments_are_objects_in_the_template_and_broken_ones_are_not_learned():
    for arguments in ('{"at": "x"}', {"at": "x"}):
        messages = [user(), assistant("", tool_calls=[call(arguments=arguments)])]
        assert answers(tokeniser(CALLS), example_of(messages)) == ['[look {"at": "x"}]<|im_end|>']
    broken = assistant("", tool_calls=[call(arguments="[1")])
    error = refusal(tokeniser(CALLS), example_of([user(), broken]))
    assert error.field == "examples[0].messages[1].tool_calls[0].function.arguments"
    seen = [user(), {**broken, "weight": 0}, {"role": "tool", "content": "no"}, assistant("d")]
    assert answers(tokeniser(CALLS), example_of(seen)) == ["d<|im_end|>"]


# --- 12: texts that compare badly ---


@pytest.mark.parametrize("text", ["", "\n\nyes", "e\u0301 \U0001f642", "  a\n", "{{ x }} {% y %}"])
def test_any_text_is_an_answer(text):
    tok = tokeniser(merges=[("Ċ", "Ċ")])
    assert answers(tok, example_of([user(), assistant(text)])) == [f"{text}<|im_end|>"]
    assert one(tok, example_of([user(), assistant(text)])).input_ids[: -len(text.encode()) or None]


def test_a_token_that_would_span_the_end_of_the_prompt_is_not_used():
    tok = tokeniser(merges=[("Ċ", "Ċ")])
    example = example_of([user(), assistant("\nyes")])
    prompt = tok.tokenizer.encode(said(tok, example)[0][0])
    assert one(tok, example).input_ids[: len(prompt)] == prompt


# --- 13: what vLLM was started with ---


def test_what_vllm_was_started_with_counts(tmp_path):
    byte_tokenizer(CHATML).save_pretrained(tmp_path / "served")
    byte_tokenizer(NEXT_ROLE).save_pretrained(tmp_path)
    serving = Serving(tokenizer=str(tmp_path / "served"), chat_template=TWO_ENDS, stop_ids=[VOCAB_SIZE - 1])
    tok = load_tokeniser(tmp_path, vocab_size=1000, max_tokens=1000, serving=serving)
    assert answers(tok, example_of([user(), assistant("b")])) == ["b<|end|>"]
    as_parts = Serving(
        content_format="openai", chat_template=PARTS.replace("m.content %}", "(m.content or x) %}")
    )
    tok = load_tokeniser(tmp_path, vocab_size=1000, max_tokens=1000, serving=as_parts)
    assert answers(tok, example_of([user("a"), assistant("b")])) == ["b;<|im_end|>"]


def test_a_tokenizer_that_renders_by_itself_is_refused_by_name(tmp_path):
    byte_tokenizer(CHATML).save_pretrained(tmp_path)
    tok = load_tokeniser(tmp_path, vocab_size=9, max_tokens=9, serving=Serving(tokenizer_mode="mistral"))
    error = refusal(tok, example_of([user(), assistant()]))
    assert "'mistral'" in error.message
    one(tok, Example(context_ids=[1], continuation_ids=[2]))


# --- the rest ---


def test_an_assistant_turn_that_nothing_precedes_is_refused():
    error = refusal(tokeniser(CHATML_GENERATION), example_of([assistant("Hi"), user()]))
    assert error.field == "examples[0].messages[0]"
    greeting = [assistant("Hi", weight=0), user(), assistant()]
    assert answers(tokeniser(), example_of(greeting)) == ["yes<|im_end|>"]


def test_consecutive_turns_are_each_learned():
    messages = [user(), assistant(""), assistant("b"), {"role": "tool", "content": "c"}, assistant("d")]
    assert answers(tokeniser(), example_of(messages)) == ["<|im_end|>", "b<|im_end|>", "d<|im_end|>"]


def test_a_template_that_rewrites_what_came_before_gives_a_sequence_for_each_turn():
    counting = "{{ messages | length }}" + CHATML
    tok = tokeniser(counting)
    with pytest.raises(UserError, match="prompt goes on with"):
        tok.encode(example_of([user(), assistant("a"), user(), assistant("b")]), "x")
    dated = "{{ (messages | length) // 2 }}" + CHATML
    sequences = tokeniser(dated).encode(
        example_of([user(), user(), assistant("a"), user(), assistant("b")]), "x"
    )
    assert [[turn.message for turn in sequence.turns] for sequence in sequences] == [[2], [4]]


def test_a_template_that_is_missing_or_refuses_is_said():
    error = refusal(tokeniser(None), example_of([user(), assistant()]))
    assert "chat template" in error.message
    assert "prompt" in error.message
    error = refusal(
        tokeniser("{{ raise_exception('roles must alternate') }}"), example_of([user(), assistant()])
    )
    assert "roles must alternate" in error.message
    assert error.field == "examples[0].messages"


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer):
        self._tokenizer, self.num_chars = tokenizer, 0

    def __call__(self, text, **options):
        self.num_chars += len(text)
        return self._tokenizer(text, **options)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


def test_a_long_conversation_is_tokenised_about_three_times_and_not_once_for_each_turn():
    tok = tokeniser(max_tokens=10**6)
    counting = Counting(tok.tokenizer.tokenizer)
    tok.tokenizer.tokenizer = counting
    sequence = one(tok, example_of([user("some words"), assistant("some more words")] * 100))
    assert len(sequence.turns) == 100
    # Once for its prompts, once for its turns, once to check; what follows a special token counts again.
    assert counting.num_chars < 4 * len(tok.tokenizer.decode(sequence.input_ids))
