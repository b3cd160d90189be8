"""Examples as token ids and target marks: the forms, the limits, completions. Chats: test_chat_turns.py."""

import threading

import pytest
from apollo_worker.jobs.example import Turn, content_hash
from apollo_worker.jobs.served_tokenizer import ServedTokenizer, generation_stop_ids
from apollo_worker.jobs.tokenise import Tokeniser, load_tokeniser
from chat_tokenizers import CHAT, CHATML, VOCAB_SIZE, byte_tokenizer, one, refusal, said, tokeniser
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from apollo_ipc.wire.requests import Example, parse_train_data


def test_token_ids_are_taken_as_they_are_with_the_loss_on_the_continuation():
    encoded = one(tokeniser(), Example(context_ids=[5, 6, 7], continuation_ids=[8, 9]))
    assert encoded.input_ids == [5, 6, 7, 8, 9]
    assert encoded.is_target == [False, False, False, True, True]
    assert encoded.turns == [Turn(3, 5)]


def test_token_ids_of_the_earlier_clients_shape_are_the_same_example():
    request = parse_train_data(
        {"training_data": {"samples": [{"context_ids": [1, 2], "continuation_ids": [3]}]}}
    )
    assert one(tokeniser(), request.examples[0]).is_target == [False, False, True]


def test_without_context_the_first_token_is_read_but_not_a_target():
    encoded = one(tokeniser(), Example(context_ids=[], continuation_ids=[8, 9, 10]))
    assert encoded.is_target == [False, True, True]
    error = refusal(tokeniser(), Example(context_ids=[], continuation_ids=[8]))
    assert error.field == "examples[0].continuation_ids"
    assert "first token" in error.message


def test_an_id_that_no_token_has_is_no_target():
    tok = tokeniser(vocab_size=VOCAB_SIZE + 5)  # an embedding with rows to spare
    one(tok, Example(context_ids=[VOCAB_SIZE], continuation_ids=[VOCAB_SIZE - 1]))
    error = refusal(tok, Example(context_ids=[1], continuation_ids=[2, VOCAB_SIZE]))
    assert error.field == "examples[0].continuation_ids[1]"
    assert f"no token of the tokenizer has the id {VOCAB_SIZE}" in error.message


@pytest.mark.parametrize("bos", [None, "<|endoftext|>"])
def test_a_completion_stands_behind_the_prompt_as_completions_tokenise_it(bos):
    tok = tokeniser(bos=bos, merges=[("a", "b")])
    encoded = one(tok, Example(prompt="xa", completion="bz"))
    pieces = [tok.tokenizer.decode([token]) for token in encoded.input_ids]
    expected = ([bos] if bos else []) + ["x", "a", "b", "z", "<|im_end|>"]  # never the merged "ab"
    assert pieces == expected
    assert encoded.is_target == [False] * (len(expected) - 3) + [True] * 3


def word_tokenizer(legacy):
    """Like SentencePiece's: a word begins with its space. legacy: as Llama 2's normalizer does it."""
    words = [
        "<unk>",
        "</s>",
        "\u2581",
        "=",
        "4",
        "key",
        "abc",
        "\u2581key",
        "\u2581abc",
        "\u25814",
        "\u2581=",
    ]
    letters = [c for c in "abcdefghijklmnopqrstuvwxyz" if c not in words]
    backend = Tokenizer(models.Unigram([(one, -(len(one) ** 0.5)) for one in [*words, *letters]], unk_id=0))
    if legacy:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        backend.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("legacy", [True, False])
def test_no_space_is_put_before_a_completion(legacy):
    tok = Tokeniser(ServedTokenizer(word_tokenizer(legacy)), vocab_size=1000, max_tokens=100)
    assert said(tok, Example(prompt="key=", completion="abc")) == [("key=", "abc</s>")]
    four, space_four = (one(tok, Example(prompt="key=", completion=c)) for c in ("4", " 4"))
    assert four.input_ids != space_four.input_ids
    for sequence, text in ((four, "key=4</s>"), (space_four, "key= 4</s>")):
        assert tok.tokenizer.decode(sequence.input_ids) == text
        prompt = tok.tokenizer.encode_prompt("key=")
        assert sequence.input_ids[: len(prompt)] == prompt, "what /v1/completions makes of the prompt"


def test_a_completion_that_the_tokenizer_cannot_write_is_refused():
    tok = Tokeniser(ServedTokenizer(word_tokenizer(True)), vocab_size=1000, max_tokens=100)
    error = refusal(tok, Example(prompt="key=", completion="\u4e16"))
    assert (error.field, "cannot write" in error.message) == ("examples[0].completion", True)


def test_without_an_eos_token_none_is_appended_and_the_job_is_told():
    encoded = one(tokeniser(eos=None), Example(prompt="a", completion="bc"))
    assert len(encoded.input_ids) == 3
    assert "no end is learned" in encoded.notes[0]


def test_an_empty_prompt_leaves_the_first_token_out_of_the_loss():
    assert one(tokeniser(), Example(prompt="", completion="ab")).is_target == [False, True, True]


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
    error = refusal(tok, Example(context_ids=[100], continuation_ids=[2]))
    assert error.field == "examples[0].context_ids[0]"
    assert "the tokenizer gives" in refusal(tok, Example(prompt="a", completion="\u00e9")).message


def test_two_forms_or_none_are_refused():
    assert refusal(tokeniser(), Example(prompt="a", completion="b", messages=CHAT)).field == "examples[0]"
    assert refusal(tokeniser(), Example()).field == "examples[0]"


def test_a_model_directory_without_a_tokenizer_takes_token_ids_only(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    tok = load_tokeniser(tmp_path, vocab_size=10, max_tokens=10)
    assert one(tok, Example(context_ids=[1], continuation_ids=[2])).input_ids == [1, 2]
    for example in (Example(prompt="a", completion="b"), Example(messages=CHAT)):
        assert "no tokenizer" in refusal(tok, example).message


def test_a_saved_tokenizer_is_loaded_with_its_template(tmp_path):
    byte_tokenizer(CHATML).save_pretrained(tmp_path)
    tok = load_tokeniser(tmp_path, vocab_size=VOCAB_SIZE, max_tokens=1000)
    assert one(tok, Example(messages=CHAT)) == one(tokeniser(), Example(messages=CHAT))


def test_the_generation_configuration_says_where_vllm_stops(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert generation_stop_ids(tmp_path) == [7]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert generation_stop_ids(tmp_path) == [3, 4]


def test_several_examples_are_numbered_and_each_is_a_sign_of_life():
    signs = []
    examples = [(3, Example(messages=CHAT)), (5, Example(prompt="a", completion="b"))]
    sequences = tokeniser().encode_all(examples, lambda: signs.append(1))
    assert [sequence.example for sequence in sequences] == [3, 5]
    assert len(signs) == 4  # two turns, two examples


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


def test_weights_and_teachers_stand_beside_the_targets_that_are_left():
    example = Example(
        context_ids=[],
        continuation_ids=[8, 9, 10, 11],
        weights=[1.0, -0.5, 0.0, 2.0],
        top_logprobs=[None, [(9, -0.1), (7, -3.0)], [(1, 0.0)], None],
    )
    encoded = one(tokeniser(), example)
    assert encoded.is_target == [False, True, False, True]  # nothing predicts the first; the third weighs 0
    assert encoded.weights == [-0.5, 2.0]
    assert encoded.top_logprobs == [[(9, -0.1), (7, -3.0)], None]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"weights": [1.0]}, ".weights"),
        ({"weights": [1.0, float("inf")]}, ".weights"),
        ({"weights": [0.0, 0.0]}, ".continuation_ids"),
        ({"top_logprobs": [None]}, ".top_logprobs"),
        ({"top_logprobs": [None, [(1, -0.1), (1, -3.0)]]}, ".top_logprobs[1]"),
        ({"top_logprobs": [None, []]}, ".top_logprobs[1]"),
        ({"top_logprobs": [[(1, -0.1), (2, -0.1)], None]}, ".top_logprobs[0]"),
        ({"top_logprobs": [None, [(9999, -0.1)]]}, ".top_logprobs[1][0]"),
    ],
)
def test_what_cannot_be_a_weight_or_a_teacher_is_refused_with_its_path(fields, field):
    example = Example(context_ids=[5], continuation_ids=[8, 9], **fields)
    assert refusal(tokeniser(), example).field == f"examples[0]{field}"


def test_weights_go_with_token_ids_only():
    example = Example(prompt="a", completion="b", weights=[1.0])
    assert refusal(tokeniser(), example).field == "examples[0].weights"
