"""Where a learned turn ends: at the first token at which vLLM stops."""

from chat_tokenizers import (
    CHAT,
    CHATML,
    CHATML_GENERATION,
    NEXT_ROLE,
    TWO_ENDS,
    answers,
    assistant,
    example_of,
    one,
    refusal,
    tokeniser,
    user,
)

from apollo_ipc.wire.requests import Example

# --- 4, 5, 6, 14: where a turn ends ---


def test_the_token_of_the_next_role_ends_a_turn_where_vllm_stops_at_it():
    tok = tokeniser(NEXT_ROLE, eos="<|endoftext|>", stops=["<|user|>"])
    assert answers(tok, example_of([user("a"), assistant("b"), user("c"), assistant("d")])) == [
        "b<|user|>",
        "d<|user|>",
    ]


def test_a_turn_ends_with_the_first_token_at_which_vllm_stops():
    tok = tokeniser(TWO_ENDS, eos="<|endoftext|>", stops=["<|end|>"])
    assert answers(tok, example_of([user("a"), assistant("b"), user("c"), assistant("d")])) == [
        "b<|end|>",
        "d<|end|>",
    ]


def test_marks_are_not_believed():
    wide = CHATML.replace("{% for m in messages %}", "{% for m in messages %}{% generation %}")
    wide = wide.replace("{% endfor %}", "{% endgeneration %}{% endfor %}")
    for template in (CHATML_GENERATION, wide):
        assert one(tokeniser(template), Example(messages=CHAT)) == one(
            tokeniser(CHATML), Example(messages=CHAT)
        )


def test_an_end_at_which_vllm_does_not_stop_is_refused():
    error = refusal(tokeniser(CHATML, eos="<|endoftext|>"), example_of([user(), assistant()]))
    assert error.field == "examples[0].messages[1]"
    assert "<|im_end|>" in error.message
    assert "generation_config.json" in error.message
    tok = tokeniser(CHATML, eos="<|endoftext|>", stops=["<|im_end|>"])
    assert answers(tok, example_of([user(), assistant()])) == ["yes<|im_end|>"]


def test_a_turn_without_an_end_gets_the_one_at_which_vllm_stops_and_the_job_is_told():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tok = tokeniser(template)
    assert answers(tok, example_of([user(), assistant("Hallo.")])) == ["Hallo.<|im_end|>"]
    assert "ends no turn" in one(tok, example_of([user(), assistant()])).notes[0]


def test_a_stop_token_in_the_midst_of_a_turn_is_refused():
    error = refusal(tokeniser(), example_of([user(), assistant("a<|im_end|>b")]))
    assert "in the midst" in error.message
