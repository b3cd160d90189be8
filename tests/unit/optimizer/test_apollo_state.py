"""The optimizer's state: saved and resumed, carried over to other settings, or refused."""

import json

import pytest
import torch
from apollo_reference import identical, parameter, randn, run, snapshot
from apollo_worker.optimizer.apollo import Apollo

from apollo_ipc.errors import CheckpointError, UserError


def tiny_model(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.Tanh(), torch.nn.Linear(32, 16)).to(dtype)


def train(model, optimizer, steps):
    for i in steps:
        optimizer.lr = 1e-3 * (i + 1)
        model(randn(6, 24, seed=i).to(torch.bfloat16)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_a_resumed_run_is_bit_identical_also_when_parameters_come_in_another_order(rounding, tmp_path):
    from safetensors.torch import load_file, save_file

    options = {"lr": 1e-3, "rank": 8, "refresh_steps": 3, "rounding": rounding, "seed": 7}
    straight = tiny_model(torch.bfloat16)
    straight_optimizer = Apollo(straight.named_parameters(), **options)
    train(straight, straight_optimizer, range(10))

    first = tiny_model(torch.bfloat16)
    optimizer = Apollo(first.named_parameters(), **options)
    train(first, optimizer, range(4))
    save_file(optimizer.state_tensors(), tmp_path / "state.safetensors")
    meta = json.loads(json.dumps(optimizer.state_meta()))
    second = tiny_model(torch.bfloat16)
    second.load_state_dict(first.state_dict())
    resumed = Apollo(reversed(list(second.named_parameters())), **options)
    resumed.load_state(load_file(tmp_path / "state.safetensors"), meta)
    train(second, resumed, range(4, 10))

    assert identical(list(second.state_dict().values()), list(straight.state_dict().values()))
    own, other = resumed.state_tensors(), straight_optimizer.state_tensors()
    assert own.keys() == other.keys()
    assert identical([own[key] for key in own], [other[key] for key in own])


def test_torchs_own_state_dict_calls_keep_names_and_fp32():
    model = tiny_model(torch.bfloat16)
    optimizer = Apollo(model.named_parameters(), lr=1e-3, rank=8)
    train(model, optimizer, range(2))
    copy = Apollo(reversed(list(model.named_parameters())), lr=1e-3, rank=8)
    copy.load_state_dict(optimizer.state_dict())
    tensors = copy.state_tensors()
    assert tensors["0.weight.exp_avg"].dtype == torch.float32
    assert torch.equal(tensors["0.weight.exp_avg"], optimizer.state_tensors()["0.weight.exp_avg"])
    # Projected: max(shape) * rank twice, a step and a norm; Adam: its elements twice and a step.
    projected, adam = (32 + 32) * 8 * 2 * 4 + 2 * (8 + 4), (32 + 16) * 2 * 4 + 2 * 8
    assert copy.state_size_bytes() == projected + adam


def test_a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing():
    model = tiny_model()
    optimizer = Apollo(model.named_parameters(), lr=1e-3, rank=8)
    tensors, meta = {k: v.clone() for k, v in optimizer.state_tensors().items()}, optimizer.state_meta()
    other = Apollo(model.named_parameters(), lr=1e-3, rank=4)
    before = snapshot(other, *model.parameters())
    with pytest.raises(
        UserError, match=r"0\.weight\.exp_avg is float32 \[32, 8\].*saved with rank 8, now 4"
    ) as error:
        other.load_state(tensors, meta)
    assert error.value.field == "0.weight"
    with pytest.raises(UserError, match=r"lacks 2\.weight\.step"):
        optimizer.load_state({k: v for k, v in tensors.items() if not k.startswith("2.weight")}, meta)
    with pytest.raises(UserError, match=r"has 5\.weight\.step, which no parameter"):
        optimizer.load_state({**tensors, "5.weight.step": torch.tensor(0)}, meta)
    with pytest.raises(UserError, match="bfloat16"):
        optimizer.load_state({**tensors, "0.weight.exp_avg": tensors["0.weight.exp_avg"].bfloat16()}, meta)
    with pytest.raises(UserError, match="format 99"):
        optimizer.load_state(tensors, {**meta, "format_version": 99})
    assert identical(snapshot(other, *model.parameters()), before)


def test_another_refresh_interval_or_projection_keeps_the_moments_and_goes_on():
    param = parameter(32, 48)
    saved = Apollo([("w", param)], lr=1e-3, rank=8, refresh_steps=200)
    run(saved, param, [randn(32, 48, seed=i) for i in range(5)])
    for change in ({"refresh_steps": 2}, {"projection": "block_sign"}, {"seed": 7}):
        optimizer = Apollo([("w", param)], lr=1e-3, rank=8, **change)
        optimizer.load_state(saved.state_tensors(), saved.state_meta())
        for key, value in saved.state_tensors().items():
            assert torch.equal(optimizer.state_tensors()[key], value)
        run(optimizer, param, [randn(32, 48, seed=9)])
        assert optimizer.state_tensors()["w.step"] == 6
        assert torch.isfinite(param).all()


def test_another_rank_is_refused_by_name_and_a_trainer_starts_anew_with_a_warning(caplog):
    from types import SimpleNamespace

    from apollo_worker.trainer import attachment

    param = parameter(32, 48)
    saved = Apollo([("w", param)], lr=1e-3, rank=8)
    run(saved, param, [randn(32, 48)])
    other = Apollo([("w", param)], lr=1e-3, rank=16)
    with pytest.raises(
        UserError, match=r"w\.exp_avg is float32 \[48, 8\], but float32 \[48, 16\]"
    ) as refused:
        other.load_state(saved.state_tensors(), saved.state_meta())
    assert refused.value.field == "w"

    def damaged(*_):
        raise CheckpointError("optimizer.safetensors: damaged: it is shorter than its header says")

    for read in (lambda *_: (saved.state_tensors(), saved.state_meta()), damaged):
        caplog.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attachment, "read_optimizer", read)
            attachment.load_optimizer(
                SimpleNamespace(main_optimizer=other), None, SimpleNamespace(optimizer=None)
            )
        assert "moments start anew" in caplog.text
        assert other.state_tensors()["w.step"] == 0


def test_a_change_of_rounding_starts_or_drops_kahans_leftovers():
    model = tiny_model(torch.bfloat16)
    kahan = Apollo(model.named_parameters(), lr=1e-3, rank=8, rounding="kahan")
    stochastic = Apollo(model.named_parameters(), lr=1e-3, rank=8)
    stochastic.load_state(kahan.state_tensors(), kahan.state_meta())
    kahan.load_state(stochastic.state_tensors(), stochastic.state_meta())
    tensors = {k: v for k, v in kahan.state_tensors().items() if not k.endswith("compensation")}
    with pytest.raises(UserError, match=r"lacks 0\.weight\.compensation"):
        kahan.load_state(tensors, kahan.state_meta())


@pytest.mark.parametrize("limiter_ratio", [0.0, 1.01])
def test_moments_of_an_old_checkpoint_make_no_larger_steps_than_they_did(limiter_ratio):
    """A trainer that dies loses hundreds of steps of moments, never of weights."""
    params = {"norm": parameter(64), "w": parameter(48, 64)}
    options = {"lr": 1.0, "rank": 16, "limiter_ratio": limiter_ratio, "rounding": "nearest"}
    optimizer = Apollo(params.items(), **options)
    seeds = iter(range(10**6))

    def sizes(optimizer, num_steps):
        """name -> the largest root mean square of an update, in units of lr."""
        found = dict.fromkeys(params, 0.0)
        for _ in range(num_steps):
            before = {name: p.detach().clone() for name, p in params.items()}
            for p in params.values():
                p.grad = 0.01 + randn(*p.shape, seed=next(seeds), scale=0.01)
            optimizer.step()
            for name, p in params.items():
                size = (p.detach() - before[name]).square().mean().sqrt().item()
                found[name] = max(found[name], size)
        return found

    sizes(optimizer, 8)
    saved = {key: t.clone() for key, t in optimizer.state_tensors().items()}, optimizer.state_meta()
    usual = sizes(optimizer, 300)
    restarted = Apollo(params.items(), **options)
    restarted.load_state(*saved)
    # 8 steps' moments that passed for 308 steps' were divided by 1 - 0.999^308 = 0.27 and not by 0.008.
    for name, size in sizes(restarted, 60).items():
        assert size < 1.2 * usual[name], name
