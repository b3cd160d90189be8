"""One training step on the live weights: forward, loss at target positions, backward with APOLLO in it."""

from __future__ import annotations

import dataclasses
import logging
import math
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from apollo_ipc.config import Train
from apollo_ipc.errors import NotReady, UserError
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.model.hf_model import vocab_size_of
from apollo_worker.model.live_model import LiveModel
from apollo_worker.optimizer.apollo import Apollo
from apollo_worker.step.gradient_sum import GradientSum
from apollo_worker.step.loss import (
    IGNORED,
    Teacher,
    gather_targets,
    loss_of_logits,
    target_loss,
    teacher_of,
    token_logprobs,
)

log = logging.getLogger(__name__)


class VllmDied(NotReady):
    """The process that owns the weights ended in the middle of a step; nothing was written after that."""

    code = "vllm_died"


@dataclasses.dataclass(frozen=True)
class StepResult:
    """loss: of the update, as `step_on` says, in nats. is_bad: not everything was written."""

    loss: float
    is_bad: bool


class Inputs(NamedTuple):
    """A sequence on the model's device: ids (1, S); labels (1, S) on the CPU, IGNORED where not a target;
    coefficients (T,) fp32 and the teacher of its T targets, where it has them."""

    ids: Tensor
    labels: Tensor
    coefficients: Tensor | None = None
    teacher: Teacher | None = None


@dataclasses.dataclass(frozen=True)
class Head:
    """How this model makes logits of hidden states: `softcap(logit_scale * (W h + b))`."""

    layer: nn.Linear
    softcap: float | None
    logit_scale: float | None

    def options(self, chunk_tokens: int) -> dict:
        return {"chunk_tokens": chunk_tokens, "softcap": self.softcap, "logit_scale": self.logit_scale}


class Trainer:
    """Owns the optimizer of one live model. Not thread-safe: one step at a time."""

    def __init__(self, live: LiveModel, options: Train):
        self.live = live
        self.options = options
        # The configured rank's moments, which outlive jobs; a job with a rank of its own borrows the weights.
        self.main_optimizer = self.optimizer = make_optimizer(live, options, options.rank)
        self._sum, self._is_last = GradientSum(), True  # of the step's examples: is this one its last?
        self._measured: tuple[Sequence[TokenisedExample], float] | None = None  # since the last step
        # The optimizer in backward: a gradient lives until its parameter is updated. Once a backward pass,
        # after a tied parameter's last use.
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._take_gradient)
            for parameter in live.model.parameters()
        ]
        if options.activation_checkpointing:
            enable_activation_checkpointing(live.model)
        self.head = read_head(live.model)
        if not self._head_is_exact():
            log.warning(
                "this model makes its logits in a way of its own: whole logits at the targets are used"
            )
            self.head = None

    def step(self, example: TokenisedExample, lr: float, weight_decay: float | None = None) -> StepResult:
        """Trains on one example, in place: `step_on` with one."""
        return self.step_on([example], lr, weight_decay)

    def step_on(
        self,
        examples: Sequence[TokenisedExample],
        lr: float,
        weight_decay: float | None = None,
        on_example: Callable[[], None] | None = None,
        *,
        is_mean: bool = True,
    ) -> StepResult:
        """One update, in place. Its loss is the mean over the examples of the mean over an example's targets;
        without is_mean the sum of all of them. Raises VllmDied when the exporter is gone.

        A non-finite loss of any of them stops before anything is written; a non-finite gradient leaves its
        weight bit-identical. Gradients of several examples are summed in fp32.
        on_example: called after each example but the last.
        """
        self._measured = None
        self.optimizer.lr = lr
        self.optimizer.weight_decay = self.options.weight_decay if weight_decay is None else weight_decay
        values: list[float] = []
        try:
            for example in examples:
                self._is_last = len(values) == len(examples) - 1
                values.append(self._backward(example, 1 / len(examples) if is_mean else 1.0, is_mean))
                if not math.isfinite(values[-1]):
                    self._drop_gradients()
                    return StepResult(values[-1], is_bad=True)
                if on_example is not None and not self._is_last:
                    on_example()
            for parameter in self._sum.parameters():  # what the last example did not reach: an expert, say
                self._take_gradient(parameter)
            self.optimizer.flush()
        except BaseException as error:
            # What this step has left must not become part of the next one, nor live on in a traceback:
            # the graph holds views of weights that may be about to go.
            traceback.clear_frames(error.__traceback__)
            self._drop_gradients()
            raise
        # Waits for the device, so that the step's last write is done when this returns.
        loss = sum(values) / (len(values) if is_mean else 1)
        return StepResult(loss, is_bad=self.optimizer.take_bad_updates() > 0)

    def _backward(self, example: TokenisedExample, weight: float, is_mean: bool = True) -> float:
        """The example's loss; its gradients, times `weight`, are in the parameters or used up by the
        optimizer. No backward pass where the loss is not finite."""
        require_vllm(self.live)
        inputs = self._inputs(example)
        with torch.enable_grad():
            loss = self._loss(inputs, is_mean)
            value = float(loss.detach())
            if math.isfinite(value):
                (loss if weight == 1 else loss * weight).backward()
        return value

    def _take_gradient(self, parameter: Tensor) -> None:
        if not self._is_last:
            self._sum.add(parameter)
            return
        self._sum.give_back(parameter)
        self.optimizer.update_parameter(parameter)

    def _drop_gradients(self) -> None:
        self._sum.clear()
        self.optimizer.drop()
        self.live.model.zero_grad(set_to_none=True)

    def accumulation_bytes(self) -> int:
        """What accumulation keeps more than a step on one example: every parameter's gradient, in fp32."""
        return 4 * sum(parameter.numel() for parameter in self.live.model.parameters())

    def prepare_accumulation(self, num_examples: int) -> list[str]:
        """Notes on what updates of `num_examples` cost. Raises UserError where the GPU has no room for it."""
        if num_examples == 1:
            return []
        needed = self.accumulation_bytes()
        if self.live.device.type == "cuda" and needed > (free := free_bytes(self.live.device)):
            raise UserError(
                f"gradient accumulation over {num_examples} examples keeps all gradients: "
                f"{needed / 1e9:.1f} GB, and the GPU has {free / 1e9:.1f} GB free; leave accumulate_steps at "
                "1, or give vLLM a smaller --gpu-memory-utilization",
                field="options.accumulate_steps",
                code="not_enough_memory",
            )
        cost = f"{needed / 1e9:.3g} GB more"
        return [f"gradient accumulation over {num_examples} examples keeps all gradients: {cost}"]

    def use_rank(self, rank: int | None) -> None:
        """None: the configured rank. Another one trains with moments that start at 0 and end with the job."""
        rank = rank or self.options.rank
        if self.optimizer is self.main_optimizer and rank == self.options.rank:
            return
        is_main = rank == self.options.rank
        self.optimizer = self.main_optimizer if is_main else make_optimizer(self.live, self.options, rank)

    def close(self) -> None:
        """Takes its hooks off the model, so that another trainer may train it."""
        for hook in self._hooks:
            hook.remove()

    def smaller_dims(self) -> dict[str, int]:
        """Name of each matrix -> its smaller dimension: at a rank above it, Adam updates the matrix."""
        return {name: min(p.shape) for name, p in self.live.model.named_parameters() if p.dim() == 2}

    def _inputs(self, example: TokenisedExample) -> Inputs:
        ids, device = torch.tensor([example.input_ids], dtype=torch.int64), self.live.device
        labels = torch.where(torch.tensor([example.is_target]), ids, IGNORED)
        coefficients = None
        if example.weights is not None:
            coefficients = torch.tensor(example.weights, dtype=torch.float32, device=device)
        teacher = teacher_of(labels[labels != IGNORED], example.top_logprobs)
        if teacher is not None:
            teacher = Teacher(teacher.ids.to(device), teacher.logprobs.to(device))
        return Inputs(ids.to(device), labels, coefficients, teacher)

    def _loss(self, inputs: Inputs, is_mean: bool = True) -> Tensor:
        ids, labels, coefficients, teacher = inputs
        if self.head is None:
            logits, targets = self._own_logits(ids, labels)
            return loss_of_logits(logits, targets, coefficients, teacher, is_mean)
        hidden, targets = gather_targets(self._hidden(ids), labels)
        head = self.head
        return target_loss(
            hidden,
            head.layer.weight,
            head.layer.bias,
            targets,
            coefficients=coefficients,
            teacher=teacher,
            is_mean=is_mean,
            **head.options(self.options.logit_chunk_tokens),
        )

    def _hidden(self, ids: Tensor) -> Tensor:
        """(1, S, H): the base model's last hidden states."""
        return self.live.model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    def _own_logits(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """((T, V), (T,)) by the model's own forward pass, for heads that we do not know."""
        positions = torch.nonzero(labels[0, 1:] != IGNORED)[:, 0]
        logits = self.live.model(input_ids=ids, use_cache=False).logits[0]
        return logits[positions.to(logits.device)], labels[0, positions + 1].to(logits.device)

    @property
    def vocab_size(self) -> int:
        return vocab_size_of(self.live.model)

    @torch.no_grad()
    def mean_loss(self, examples: Sequence[TokenisedExample]) -> float:
        """What a step on them would see: the mean of their losses, in nats a token. Nothing is trained. Asked
        again for the same before the next step, it is not computed again."""
        if self._measured is None or self._measured[0] != examples:
            losses = [float(self._loss(self._inputs(example))) for example in examples]
            self._measured = examples, sum(losses) / len(losses)
        return self._measured[1]

    @torch.no_grad()
    def logprobs(self, input_ids: list[int]) -> Tensor:
        """log p of each token given those before it, (S - 1,) fp32 on the CPU."""
        ids, labels, *_ = self._inputs(TokenisedExample(input_ids, [True] * len(input_ids)))
        if self.head is None:
            logits, targets = self._own_logits(ids, labels)
            return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0].cpu()
        hidden, targets = gather_targets(self._hidden(ids), labels)
        head = self.head
        return token_logprobs(
            hidden,
            head.layer.weight,
            head.layer.bias,
            targets,
            **head.options(self.options.logit_chunk_tokens),
        ).cpu()

    @torch.no_grad()
    def _head_is_exact(self) -> bool:
        """Whether hidden states through `self.head` give what the model's own forward pass gives."""
        if self.head is None:
            return False
        ids = torch.arange(8, device=self.live.device)[None] % self.head.layer.weight.shape[0]
        expected = self.live.model(input_ids=ids, use_cache=False).logits[0].float()
        logits = self.head.layer(self._hidden(ids)[0]).float() * (self.head.logit_scale or 1.0)
        if (cap := self.head.softcap) is not None:
            logits = cap * torch.tanh(logits / cap)
        # bf16 rounds at different places in the two: 2**-7 of the largest logit, a few times over.
        return bool(
            torch.allclose(logits, expected, rtol=0, atol=4 * 2**-7 * float(expected.abs().max() + 1))
        )


def free_bytes(device: torch.device) -> int:
    """What this process can still allocate: free on the GPU, or held by torch and unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def require_vllm(live: LiveModel) -> None:
    if not live.is_alive():
        raise VllmDied("vLLM has ended; the step was stopped and its weights are gone with it")


def make_optimizer(live: LiveModel, options: Train, rank: int) -> Apollo:
    return Apollo(
        live.model.named_parameters(),
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        weight_decay=options.weight_decay,
        rank=rank,
        refresh_steps=options.refresh_steps,
        projection=options.projection,
        limiter_ratio=options.limiter_ratio,
        limiter_floor=options.limiter_floor,
        rounding=options.rounding,
        seed=options.seed,
        grid_dtypes=live.grid_dtypes(),
        before_write=partial(require_vllm, live),
    )


def read_head(model) -> Head | None:
    """The head by the names that transformers' configurations use; None where the output is not linear."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        return None
    config = model.config
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies
    if divisor := getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / divisor
    return Head(layer, getattr(config, "final_logit_softcapping", None), scale)


def enable_activation_checkpointing(model) -> None:
    """Recomputes each layer's activations in backward. Dropout stays off: only the layers' flag is set."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
