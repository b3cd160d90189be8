"""The chunked loss against torch's cross entropy over full logits, values and gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from apollo_worker.step.loss import BLOCK_TOKENS, IGNORED, gather_targets, target_loss, token_logprobs

torch.set_num_threads(2)
T, H, V = 37, 24, 211  # 37 is no multiple of the chunk sizes below


def inputs(dtype=torch.float32, bias=False, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    hidden = (torch.randn(T, H, generator=generator) * scale).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    b = torch.randn(V, generator=generator).to(dtype).requires_grad_() if bias else None
    targets = torch.randint(0, V, (T,), generator=generator)
    return hidden, weight, b, targets


def full_logits(hidden, weight, bias, softcap=None, logit_scale=None):
    """As transformers writes it for Gemma 2 and Cohere; in fp64."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    if logit_scale is not None:
        logits = logits * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, [t for t in tensors if t is not None])


@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0}, {"logit_scale": 0.0625}, {"logit_scale": 1 / 8.0, "softcap": 30.0}]
)
def test_loss_and_gradients_are_those_of_full_logits(chunk_tokens, bias, options):
    hidden, weight, b, targets = inputs(bias=bias)
    loss = target_loss(hidden, weight, b, targets, chunk_tokens=chunk_tokens, **options)
    expected = F.cross_entropy(full_logits(hidden, weight, b, **options), targets)
    # fp32 logits of size up to 20 carry an error of some 24 * 6e-8 * 20 = 3e-5; it averages out over T.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    got, right = gradients(loss, hidden, weight, b), gradients(expected, hidden, weight, b)
    for mine, reference in zip(got, right, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=3e-5 * reference.abs().max().item())


def test_bf16_gradients_are_rounded_once_and_keep_their_dtype():
    hidden, weight, _, targets = inputs(torch.bfloat16, scale=0.2)
    loss = target_loss(hidden, weight, None, targets, chunk_tokens=8)
    expected = F.cross_entropy(full_logits(hidden, weight, None), targets)
    # Logits of size up to 5 are rounded to bf16: 2^-9 of that is 0.01 each, at random, 37 of them.
    assert abs(loss.item() - expected.item()) < 0.01
    assert loss.dtype == torch.float32
    got, right = gradients(loss, hidden, weight), gradients(expected, hidden, weight)
    for mine, reference in zip(got, right, strict=True):
        assert mine.dtype == torch.bfloat16
        # Each softmax probability is off by up to 1 % (see above), and so is the sum.
        assert ((mine.double() - reference).norm() / reference.norm()).item() < 0.01


def test_a_bf16_head_gradient_is_off_by_roundings_of_its_terms_only_however_it_is_cut():
    generator = torch.Generator().manual_seed(1)
    # Eighths below 4 that bf16 holds exactly: the order of a matmul's sum does not matter.
    hidden = torch.randint(-1, 2, (T, H), generator=generator).bfloat16()
    weight = (torch.randint(-1, 2, (V, H), generator=generator) / 8).bfloat16().requires_grad_()
    targets = torch.randint(0, V, (T,), generator=generator)
    logits = hidden.double() @ weight.detach().double().T
    dlogits = (logits.softmax(dim=1) - F.one_hot(targets, V)) / T
    exact, size = dlogits.T @ hidden.double(), dlogits.abs().T @ hidden.double().abs()
    # A term is rounded to bf16 (2^-9), and so are the sums of its block and of all; fp32's errors are less.
    bound = 3.1 * 2**-9 * size.detach() + 1e-6
    for chunk_tokens in (1, 8, 64):  # two blocks of 24, two of 24, one
        loss = target_loss(hidden, weight, None, targets, chunk_tokens=chunk_tokens)
        (got,) = gradients(loss, weight)
        assert ((got.double() - exact).abs() <= bound).all()


def test_many_equal_terms_of_a_bf16_head_gradient_are_all_counted():
    """A sum in bf16 stops at 256 of them."""
    num_tokens = 2 * BLOCK_TOKENS
    hidden = torch.ones(num_tokens, BLOCK_TOKENS, dtype=torch.bfloat16)
    weight = torch.zeros(2, BLOCK_TOKENS, dtype=torch.bfloat16, requires_grad=True)
    loss = target_loss(hidden, weight, None, torch.zeros(num_tokens, dtype=torch.int64), is_mean=False)
    (got,) = gradients(loss, weight)
    assert torch.equal(got[1], torch.full_like(got[1], 0.5 * num_tokens))


def test_the_gradient_scales_with_what_arrives_from_above():
    hidden, weight, _, targets = inputs()
    once = gradients(target_loss(hidden, weight, None, targets), hidden, weight)
    scaled = gradients(0.25 * target_loss(hidden, weight, None, targets), hidden, weight)
    for a, b in zip(once, scaled, strict=True):
        assert torch.equal(a * 0.25, b)


def test_only_what_requires_a_gradient_gets_one():
    hidden, weight, _, targets = inputs()
    frozen = weight.detach()
    target_loss(hidden, frozen, None, targets).backward()
    assert hidden.grad is not None
    target_loss(hidden.detach(), weight, None, targets).backward()
    assert weight.grad is not None
    assert not target_loss(hidden.detach(), frozen, None, targets).requires_grad
    with torch.no_grad():
        assert not target_loss(hidden, weight, None, targets).requires_grad


def test_a_second_backward_is_refused_and_not_silently_wrong():
    hidden, weight, _, targets = inputs()
    loss = target_loss(hidden, weight, None, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_token_logprobs_are_the_log_softmax_at_the_targets():
    hidden, weight, bias, targets = inputs(bias=True)
    for options in ({}, {"softcap": 3.0, "logit_scale": 0.5}):
        got = token_logprobs(hidden, weight, bias, targets, chunk_tokens=8, **options)
        expected = full_logits(hidden, weight, bias, **options).log_softmax(dim=1)[torch.arange(T), targets]
        assert not got.requires_grad
        # fp32 logits of size up to 20: see above.
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=3e-5)
        loss = target_loss(hidden, weight, bias, targets, **options)
        torch.testing.assert_close(-got.mean(), loss, rtol=1e-6, atol=1e-6)


def test_a_label_is_predicted_by_the_position_before_it():
    hidden = torch.arange(5.0)[:, None].expand(5, 3)  # position i holds the value i
    labels = torch.tensor([7, IGNORED, 8, IGNORED, 9])
    gathered, targets = gather_targets(hidden, labels)
    assert gathered[:, 0].tolist() == [1.0, 3.0]  # the first label has no predictor
    assert targets.tolist() == [8, 9]


def test_gathered_targets_give_the_loss_that_transformers_computes():
    generator = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(2, 9, H, generator=generator), torch.randn(V, H, generator=generator)
    labels = torch.randint(0, V, (2, 9), generator=generator)
    labels[torch.rand(2, 9, generator=generator) < 0.5] = IGNORED
    from transformers.loss.loss_utils import ForCausalLMLoss

    expected = ForCausalLMLoss(hidden @ weight.T, labels, vocab_size=V)
    gathered, targets = gather_targets(hidden, labels)
    got = target_loss(gathered, weight, None, targets, chunk_tokens=4)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # two fp32 computations, as above


def test_the_gradient_flows_through_the_gathering_to_the_right_positions():
    hidden = torch.randn(6, H, generator=torch.Generator().manual_seed(3)).requires_grad_()
    labels = torch.tensor([IGNORED, 3, IGNORED, IGNORED, 5, IGNORED])
    gathered, targets = gather_targets(hidden, labels)
    target_loss(gathered, torch.randn(V, H), None, targets).backward()
    assert (hidden.grad.abs().sum(dim=1) > 0).tolist() == [True, False, False, True, False, False]


def test_no_tensor_of_vocabulary_times_all_targets_is_ever_made():
    num_tokens, vocab, chunk = 96, 5003, 8
    hidden, weight = torch.randn(num_tokens, H), torch.randn(vocab, H, requires_grad=True)
    targets = torch.randint(0, vocab, (num_tokens,))
    sizes = LargestTensor()
    with sizes:
        target_loss(hidden, weight, None, targets, chunk_tokens=chunk).backward()
    assert sizes.largest == max(chunk * vocab, vocab * H)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in itertools.chain(result if isinstance(result, tuple | list) else [result]):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return result
