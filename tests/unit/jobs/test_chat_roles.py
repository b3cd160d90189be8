"""Roles that no model knows: vLLM takes any string, and what the template makes of it is served."""

from chat_tokenizers import CHATML, assistant, example_of, refusal, said, tokeniser, user

ROBOT = {"role": "robot", "content": "Beep."}
EXAMPLE = example_of([user(), ROBOT, assistant("yes")])


def test_a_role_that_the_template_shows_is_read_as_it_is_served():
    ((context, target),) = said(tokeniser(CHATML), EXAMPLE)
    assert "<|im_start|>robot\nBeep.<|im_end|>" in context
    assert target == "yes<|im_end|>"


def test_a_role_that_the_template_passes_over_is_refused_at_its_field():
    dropping = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'robot' %}")
    error = refusal(tokeniser(dropping), EXAMPLE)
    assert error.field == "examples[0].messages[1].role"
    assert error.message == (
        "the model's chat template shows nothing of a message of the role 'robot': use system, user, "
        "assistant or tool"
    )


def test_a_role_at_which_the_template_raises_is_refused_with_its_words():
    raising = "{% for m in messages if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endfor %}"
    error = refusal(tokeniser(raising + CHATML), EXAMPLE)
    assert (error.field, "no robots" in error.message) == ("examples[0].messages", True)
