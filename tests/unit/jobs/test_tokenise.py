"""Examples as token ids and target marks, and every way in which an example is refused."""

import threading

import msgspec
import pytest
from apollo_worker.jobs.example import content_hash
from apollo_worker.jobs.tokenise import Tokeniser, load_tokeniser
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import Example, Message, parse_train_data

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
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


def tokeniser(template=CHATML, *, max_tokens=1000, vocab_size=VOCAB_SIZE, **options):
    return Tokeniser(byte_tokenizer(template, **options), vocab_size=vocab_size, max_tokens=max_tokens)


def target_text(tok, encoded):
    """The text of each run of target tokens."""
    runs, previous = [], False
    for token, is_target in zip(encoded.input_ids, encoded.is_target, strict=True):
        if is_target:
            runs = runs if previous else [*runs, []]
            runs[-1].append(token)
        previous = is_target
    return [tok.tokenizer.decode(run) for run in runs]


def refusal(tok, example, path="examples[0]"):
    with pytest.raises(UserError) as error:
        tok.encode(example, path)
    assert error.value.code == "invalid_example"
    return error.value


def test_token_ids_are_taken_as_they_are_with_the_loss_on_the_continuation():
    encoded = tokeniser().encode(Example(context_ids=[5, 6, 7], continuation_ids=[8, 9]), "x")
    assert encoded.input_ids == [5, 6, 7, 8, 9]
    assert encoded.is_target == [False, False, False, True, True]


def test_token_ids_of_the_earlier_clients_shape_are_the_same_example():
    request = parse_train_data(
        {"training_data": {"samples": [{"context_ids": [1, 2], "continuation_ids": [3]}]}}
    )
    assert tokeniser().encode(request.examples[0], "x").is_target == [False, False, True]


def test_without_context_the_first_token_is_read_but_not_a_target():
    encoded = tokeniser().encode(Example(context_ids=[], continuation_ids=[8, 9, 10]), "x")
    assert encoded.is_target == [False, True, True]
    error = refusal(tokeniser(), Example(context_ids=[], continuation_ids=[8]))
    assert error.field == "examples[0].continuation_ids"
    assert "first token" in error.message


def test_generation_blocks_give_transformers_own_mask_token_by_token():
    tok = tokeniser(CHATML_GENERATION)
    encoded = tok.encode(Example(messages=CHAT), "x")
    expected = tok.tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in CHAT],
        tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    assert encoded.input_ids == expected["input_ids"]
    assert encoded.is_target == [bool(mask) for mask in expected["assistant_masks"]]
    assert target_text(tok, encoded) == ["Hallo.<|im_end|>", "  Still\nhere <|im_end|>"]


@pytest.mark.parametrize("num_messages", [3, 4, 5])
def test_the_prefix_method_gives_the_mask_that_generation_blocks_give(num_messages):
    example = Example(messages=CHAT[:num_messages])
    assert tokeniser(CHATML).encode(example, "x") == tokeniser(CHATML_GENERATION).encode(example, "x")


@pytest.mark.parametrize("template", [CHATML, CHATML_GENERATION])
def test_an_assistant_turn_of_weight_0_is_read_but_not_learned(template):
    first, last = (msgspec.structs.replace(CHAT[2], weight=weight) for weight in (0, 1))
    tok = tokeniser(template)
    plain = tok.encode(Example(messages=CHAT), "x")
    weighted = tok.encode(Example(messages=[*CHAT[:2], first, *CHAT[3:]]), "x")
    assert weighted.input_ids == plain.input_ids
    assert target_text(tok, weighted) == ["  Still\nhere <|im_end|>"]
    assert tok.encode(Example(messages=[*CHAT[:2], last, *CHAT[3:]]), "x") == plain
    error = refusal(tok, Example(messages=[*CHAT[:2], first]))
    assert "weight 0" in error.message


def call_of(arguments):
    return {"id": "c1", "type": "function", "function": {"name": "look", "arguments": arguments}}


SHOWS_CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}"
    "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_arguments_of_a_tool_call_reach_the_template_as_vllm_hands_them_to_it():
    tok = tokeniser(SHOWS_CALLS)
    for arguments in ('{"at": "x"}', {"at": "x"}):
        messages = [Message("user", "?"), Message("assistant", "", tool_calls=[call_of(arguments)])]
        assert target_text(tok, tok.encode(Example(messages=messages), "x")) == ["at=x<|im_end|>"]
    broken = [Message("user", "?"), Message("assistant", "", tool_calls=[call_of("[1")])]
    error = refusal(tok, Example(messages=broken))
    assert (error.field, "not a JSON object" in error.message) == ("examples[0].messages[1].tool_calls", True)
    seen = [*broken[:1], msgspec.structs.replace(broken[1], weight=0), Message("tool", "no"), CHAT[2]]
    assert target_text(tok, tok.encode(Example(messages=seen), "x")) == ["Hallo.<|im_end|>"]


def test_a_tool_call_that_the_template_does_not_show_is_refused():
    messages = [Message("user", "?"), Message("assistant", "", tool_calls=[call_of("{}")])]
    error = refusal(tokeniser(CHATML), Example(messages=messages))
    assert error.field == "examples[0].messages[1].tool_calls"
    assert "does not show tool calls" in error.message


def test_consecutive_and_empty_assistant_turns_are_targets_with_their_end():
    turns = [("user", "?"), ("assistant", ""), ("assistant", "b"), ("tool", "c"), ("assistant", "d")]
    for template in (CHATML, CHATML_GENERATION):
        tok = tokeniser(template)
        encoded = tok.encode(Example(messages=[Message(*turn) for turn in turns]), "x")
        assert target_text(tok, encoded) == ["<|im_end|>", "b<|im_end|>", "d<|im_end|>"]


def test_an_assistant_turn_that_nothing_precedes_needs_generation_blocks():
    example = Example(messages=[Message("assistant", "Hi"), Message("user", "?")])
    error = refusal(tokeniser(CHATML), example)
    assert error.field == "examples[0].messages[0]"
    tok = tokeniser(CHATML_GENERATION)
    assert target_text(tok, tok.encode(example, "x")) == ["Hi<|im_end|>"]


def test_a_template_without_an_end_token_keeps_the_newline_that_ends_the_turn():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tok = tokeniser(template)
    assert target_text(tok, tok.encode(Example(messages=CHAT[1:3]), "x")) == ["Hallo.\n"]


def test_an_empty_thought_is_part_of_the_prompt_and_an_earlier_turn_has_lost_its_own():
    tok = tokeniser(REASONING, merges=[("Ċ", "Ċ")], vocab_size=VOCAB_SIZE + 1)
    encoded = tok.encode(Example(messages=[*CHAT[:4], Message("assistant", "Still")]), "x")
    assert target_text(tok, encoded) == ["Hallo.<|im_end|>", "Still<|im_end|>"]


def test_a_thought_that_was_sent_is_trained_with_the_answer():
    tok = tokeniser(REASONING, merges=[("Ċ", "Ċ")], vocab_size=VOCAB_SIZE + 1)
    messages = [Message("user", "2+2?"), Message("assistant", "4", reasoning_content="two and two")]
    encoded = tok.encode(Example(messages=messages), "x")
    assert target_text(tok, encoded) == ["two and two\n</think>\n\n4<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused_and_not_guessed_at():
    counting = "{{ messages | length }}" + CHATML
    error = refusal(tokeniser(counting), Example(messages=CHAT))
    assert error.field == "examples[0].messages[2]"
    assert "{% generation %}" in error.message


def test_a_token_that_spans_the_end_of_the_prompt_is_refused():
    tok = tokeniser(CHATML, merges=[("Ċ", "Ċ")], vocab_size=VOCAB_SIZE + 1)
    error = refusal(tok, Example(messages=[Message("user", "?"), Message("assistant", "\nyes")]))
    assert error.field == "examples[0].messages[1]"


def test_messages_without_an_assistant_turn_are_refused():
    error = refusal(tokeniser(), Example(messages=CHAT[:2]), "examples[3]")
    assert error.field == "examples[3].messages"
    assert "assistant" in error.message


def test_a_missing_chat_template_is_said_and_the_other_forms_still_work():
    tok = tokeniser(None)
    error = refusal(tok, Example(messages=CHAT))
    assert "chat template" in error.message
    assert "prompt" in error.message
    tok.encode(Example(prompt="a", completion="b"), "x")


def test_what_the_template_refuses_is_the_users_error_in_the_templates_words():
    template = "{{ raise_exception('roles must alternate') }}"
    error = refusal(tokeniser(template), Example(messages=CHAT))
    assert "roles must alternate" in error.message
    assert error.field == "examples[0].messages"


def test_tools_reach_the_template():
    template = "{% for t in tools or [] %}{{ t.name }};{% endfor %}" + CHATML
    tok = tokeniser(template)
    encoded = tok.encode(Example(messages=CHAT, tools=[{"name": "search"}]), "x")
    assert tok.tokenizer.decode(encoded.input_ids).startswith("search;<|im_start|>system")


@pytest.mark.parametrize("bos", [None, "<|endoftext|>"])
def test_prompt_and_completion_are_tokenised_apart_with_bos_before_and_eos_after(bos):
    tok = tokeniser(bos=bos, merges=[("a", "b")], vocab_size=VOCAB_SIZE + 1)
    encoded = tok.encode(Example(prompt="xa", completion="bz"), "x")
    pieces = [tok.tokenizer.decode([token]) for token in encoded.input_ids]
    expected = ([bos] if bos else []) + ["x", "a", "b", "z", "<|im_end|>"]  # never the merged "ab"
    assert pieces == expected
    assert encoded.is_target == [False] * (len(expected) - 3) + [True] * 3


def test_without_an_eos_token_none_is_appended():
    tok = tokeniser(eos=None)
    assert len(tok.encode(Example(prompt="a", completion="bc"), "x").input_ids) == 3


def test_an_empty_prompt_leaves_the_first_token_out_of_the_loss():
    encoded = tokeniser().encode(Example(prompt="", completion="ab"), "x")
    assert encoded.is_target == [False, True, True]


def test_an_example_that_is_too_long_is_refused_with_both_lengths():
    tok = tokeniser(max_tokens=10)
    tok.encode(Example(context_ids=[1] * 5, continuation_ids=[2] * 5), "x")
    error = refusal(tok, Example(context_ids=[1] * 5, continuation_ids=[2] * 6), "examples[7]")
    assert error.field == "examples[7].continuation_ids"
    assert "11 tokens" in error.message
    assert "10" in error.message
    assert refusal(tok, Example(messages=CHAT)).field == "examples[0].messages"
    assert refusal(tok, Example(prompt="abcdef", completion="ghij")).field == "examples[0].completion"


def test_an_id_outside_the_vocabulary_is_refused_by_its_place():
    tok = tokeniser(vocab_size=100)
    error = refusal(tok, Example(context_ids=[1], continuation_ids=[2, 99, 3, 100]))
    assert error.field == "examples[0].continuation_ids[3]"
    assert "0 to 99" in error.message
    assert (
        refusal(tok, Example(context_ids=[100], continuation_ids=[2])).field == "examples[0].context_ids[0]"
    )
    error = refusal(tok, Example(prompt="a", completion="é"))
    assert "the tokenizer gives" in error.message


def test_two_forms_or_none_are_refused():
    assert refusal(tokeniser(), Example(prompt="a", completion="b", messages=CHAT)).field == "examples[0]"
    assert refusal(tokeniser(), Example()).field == "examples[0]"


def test_a_model_directory_without_a_tokenizer_takes_token_ids_only(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    tok = load_tokeniser(tmp_path, vocab_size=10, max_tokens=10)
    assert tok.encode(Example(context_ids=[1], continuation_ids=[2]), "x").input_ids == [1, 2]
    for example in (Example(prompt="a", completion="b"), Example(messages=CHAT)):
        assert "no tokenizer" in refusal(tok, example).message


def test_a_saved_tokenizer_is_loaded_with_its_template(tmp_path):
    byte_tokenizer(CHATML).save_pretrained(tmp_path)
    tok = load_tokeniser(tmp_path, vocab_size=VOCAB_SIZE, max_tokens=1000)
    example = Example(messages=CHAT)
    assert tok.encode(example, "x") == tokeniser().encode(example, "x")


def test_two_threads_may_tokenise_at_once():
    tok, errors = tokeniser(), []

    def work():
        try:
            for _ in range(30):
                tok.encode(Example(messages=CHAT), "x")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_equal_examples_have_equal_hashes_whatever_the_order_of_keys():
    def hashed(data):
        return content_hash(parse_train_data({"examples": [data]}).examples[0])

    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": 2}}}
    llac = {"function": {"arguments": {"b": 2, "a": 1}, "name": "f"}, "type": "function"}
    first = hashed({"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]})
    assert first == hashed({"messages": [{"tool_calls": [llac], "content": "", "role": "assistant"}]})
    assert len(first) == 32
    others = [
        hashed({"messages": [{"role": "assistant", "content": ""}]}),
        hashed({"prompt": "ab", "completion": "c"}),
        hashed({"prompt": "a", "completion": "bc"}),
        hashed({"context_ids": [1, 2], "continuation_ids": [3]}),
        hashed({"context_ids": [1], "continuation_ids": [2, 3]}),
    ]
    assert len({first, *others}) == 6
