"""What the optimizer refuses, by name."""

import math

import pytest
import torch
from apollo_reference import (
    parameter,
)
from apollo_worker.optimizer.apollo import Apollo

from apollo_ipc.config import DEFAULT_RANK
from apollo_ipc.errors import UserError


def test_the_default_rank_is_the_one_of_the_configuration():
    assert Apollo([("w", parameter(4, 4))], lr=1e-3).rank == DEFAULT_RANK


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 2.5}, "rank"),
        ({"lr": math.nan}, "lr"),
        ({"lr": -1e-5}, "lr"),
        ({"lr": math.inf}, "lr"),
        ({"betas": (1.0, 0.999)}, "beta1"),
        ({"eps": 0.0}, "eps"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"refresh_steps": 0}, "refresh_steps"),
        ({"limiter_ratio": 0.5}, "limiter_ratio"),
        ({"rounding": "up"}, "rounding"),
        ({"alpha": 0.0}, "alpha"),
    ],
)
def test_a_hyperparameter_out_of_range_is_refused_by_name(options, field):
    with pytest.raises(UserError, match=field) as error:
        Apollo([("w", parameter(4, 4))], **{"lr": 1e-3, **options})
    assert error.value.field == field


def test_a_parameter_that_cannot_be_trained_is_refused_by_name():
    leaf = parameter(4, 4)
    for named, message in [
        ([("w", leaf * 2)], "w is not a leaf"),
        ([("w", torch.zeros(4, dtype=torch.int32))], "only floating point"),
        ([("w", leaf.data.double())], "float64"),
        ([("w", leaf), ("w", parameter(2, 2))], "two parameters are called w"),
        ([("w", leaf), ("tied", leaf)], "tied and w are one tensor"),
        ([], "no parameters"),
    ]:
        with pytest.raises(UserError, match=message):
            Apollo(named, lr=1e-3)


def test_a_sparse_gradient_is_refused_by_the_parameters_name():
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = Apollo([("embed.weight", embedding.weight)], lr=1e-3)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UserError, match=r"embed\.weight has a sparse gradient"):
        optimizer.step()
