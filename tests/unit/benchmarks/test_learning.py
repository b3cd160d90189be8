"""The learning benchmarks train what the product makes, on a model too small to learn it."""

import argparse
import importlib

import pytest
from places import BENCHMARKS

from apollo_ipc.demo.models import make_model, make_tokenizer

pytestmark = pytest.mark.slow  # tests/unit/curation/teach shows the material, tests/unit/step the loss


@pytest.fixture(scope="module")
def module():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module


@pytest.fixture(scope="module")
def model(module, tmp_path_factory):
    directory, size = tmp_path_factory.mktemp("model"), len(make_tokenizer())
    model_dir = make_model(directory, "qwen3", vocab_size=size)  # whatever it says has a token
    return module("learning_model").OfflineModel(model_dir)


def test_taught_facts_change_the_model_and_a_reset_puts_it_back(module, model):
    learning, data = module("learning"), module("learning_data")
    learning_model = module("learning_model")
    facts = data.chosen(data.facts_of("first"), 2, 0)
    own = learning.own_answers(model, ["How are you?"])
    before = model.distributions(own)
    learning.check_held_out(facts)
    whole = [learning.whole(learning.Fact(one.taught.text, one.answer)) for one in facts]
    tokens, rounds = learning.teach(model, whole, learning.Mix(lr=1e-3), ["near"])
    assert tokens > 1000
    assert rounds >= 1
    assert learning_model.kl(before, model.distributions(own)) > 0
    model.reset(0)
    assert learning_model.kl(before, model.distributions(own)) == pytest.approx(0, abs=1e-6)


def test_a_sequence_of_jobs_is_examined_by_age_and_brings_lessons_back(module, model):
    sequence, learning = module("learning_sequence"), module("learning")
    before = learning.Before([], learning.own_answers(model, ["How are you?"]), [], 0.0)
    before = before._replace(distributions=model.distributions(before.own))
    options = argparse.Namespace(mix={}, jobs=2, facts=1, every=1, seed=0)
    with_, without = (sequence.run(model, before, options, is_rehearsed=one) for one in (True, False))
    assert [*with_["looks"][-1]["by_age"]] == [0, 1]
    assert with_["tokens"] > without["tokens"]
    assert len(with_["kl"]) == 2
