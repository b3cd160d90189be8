"""One training step on the live weights: forward, loss at target positions, backward with APOLLO in it."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import dataclasses
import logging
import math
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from apollo_ipc.config import Train
from apollo_ipc.cpu_products import convert_where_needed
from apollo_ipc.errors import NotReady, UserError
from apollo_worker.jobs.example import TokenisedExample, Turn, sequence_of
from apollo_worker.jobs.job_plan import AdamRule, JobPlan
from apollo_worker.jobs.objective import Objective
from apollo_worker.model.experts import expert_stacks, set_routers, trained_parameters
from apollo_worker.model.hf_model import vocab_size_of
from apollo_worker.model.live_model import LiveModel
from apollo_worker.optimizer.apollo import Apollo
from apollo_worker.step.forward import Forward, enable_activation_checkpointing, max_tokens_of
from apollo_worker.step.gradient_sum import GradientSum
from apollo_worker.step.packing import MAX_PADDING, PackedRow, packed
from apollo_worker.step.update import Row, make_update

log = logging.getLogger(__name__)
CROSS_ENTROPY = Objective()


class VllmDied(NotReady):
    """The process that owns the weights ended in the middle of a step; nothing was written after that."""

    code = "vllm_died"


@dataclasses.dataclass(frozen=True)
class StepResult:
    """loss: of the update, as `step_on` says, in nats. is_bad: not everything was written; forward_s: seconds
    until its losses were known."""

    loss: float
    is_bad: bool
    forward_s: float = dataclasses.field(default=0.0, compare=False)


class Trainer:
    """Owns the optimizer of one live model. Not thread-safe: one step at a time."""

    def __init__(self, live: LiveModel, options: Train):
        self.live = live
        self.options = options
        if live.device.type == "cpu":
            convert_where_needed()
        set_routers(live.model, is_trained=options.router == "train")
        # The configured rank's moments, which outlive jobs; a job with a rank of its own borrows the weights.
        self.main_optimizer = self.optimizer = make_optimizer(live, options, options.rank)
        self._max_padding = MAX_PADDING  # of a pass: this job's
        self._sum, self._is_last = GradientSum(), True  # of the step's passes: is this one its last?
        self._forward_s = 0.0  # of this step
        self._measured: tuple[Sequence[TokenisedExample], float] | None = None  # since the last step
        # The optimizer in backward: a gradient lives until its parameter is updated. Once a backward pass,
        # after a tied parameter's last use.
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._take_gradient)
            for _, parameter in trained_parameters(live.model)
        ]
        if options.activation_checkpointing:
            enable_activation_checkpointing(live.model)
        self.forward = Forward(live, options.logit_chunk_tokens)
        self.head = self.forward.head
        if self.head is None:
            log.warning(
                "this model makes its logits in a way of its own: whole logits at the targets are used"
            )

    def step(self, example: TokenisedExample, lr: float, weight_decay: float | None = None) -> StepResult:
        """Trains on one example, in place: `step_on` with one."""
        return self.step_on([example], lr, weight_decay)

    def step_on(
        self,
        examples: Sequence[TokenisedExample],
        lr: float,
        weight_decay: float | None = None,
        on_batch: Callable[[], None] | None = None,
        *,
        is_mean: bool = True,
        objective: Objective = CROSS_ENTROPY,
        reference: Sequence[Tensor] | None = None,
        adam: AdamRule | None = None,
        embeddings: Literal["train", "freeze"] = "train",
    ) -> StepResult:
        """One update, in place. Its loss is the mean over the examples of the mean over an example's targets,
        without is_mean the sum of all of them, or as the objective has it. Raises VllmDied when the exporter
        is gone.

        A non-finite loss stops before anything is written; a non-finite gradient leaves its weight
        bit-identical. Several examples share a pass (`packed`); gradients of several passes are summed in
        fp32. on_batch: called after each pass but the last; reference: (T,) log p of each example's targets,
        by the weights before the job, where the objective needs it; adam: of this step's moments; embeddings:
        whether they and the output layer are trained.
        """
        self._measured, self._forward_s = None, 0.0
        self.optimizer.lr = lr
        self.optimizer.weight_decay = self.options.weight_decay if weight_decay is None else weight_decay
        self._use_adam(adam or AdamRule())
        told = on_batch or (lambda: None)
        frozen = self._freeze_embeddings() if embeddings == "freeze" else []
        try:
            update = make_update(
                examples,
                objective,
                is_mean=is_mean,
                reference=reference,
                logprobs=partial(self.logprobs_of, on_batch=told),
            )
            loss = 0.0 if update.loss is None else update.loss
            batches = self._packed([row.example for row in update.rows])
            for number, layout in enumerate(batches):
                self._is_last = number == len(batches) - 1
                value = self._backward(update.rows, layout)
                loss += value if update.loss is None or not math.isfinite(value) else 0.0
                if not math.isfinite(loss):
                    self._drop_gradients()
                    return StepResult(loss, is_bad=True, forward_s=self._forward_s)
                if not self._is_last:
                    told()
            for parameter in self._sum.parameters():  # what the last pass did not reach: an expert, say
                self._take_gradient(parameter)
            self.optimizer.flush()
        except BaseException as error:
            # What this step has left must not become part of the next one, nor live on in a traceback:
            # the graph holds views of weights that may be about to go.
            traceback.clear_frames(error.__traceback__)
            self._drop_gradients()
            raise
        finally:
            self.live.forget()
            for parameter in frozen:
                parameter.requires_grad_(True)
        # Waits for the device, so that the step's last write is done when this returns.
        return StepResult(loss, self.optimizer.take_bad_updates() > 0, self._forward_s)

    def _backward(self, rows: Sequence[Row], layout: Sequence[PackedRow]) -> float:
        """What the rows of the layout add to the loss; their gradients are in the parameters or used up by
        the optimizer. No backward pass where it is not finite."""
        require_vllm(self.live)
        started, batch = time.perf_counter(), self.forward.batch_of(rows, layout)
        with torch.enable_grad():
            with self.live.forgetting():
                loss = self.forward.loss(batch)
            value = float(loss.detach())  # waits for the device
            self._forward_s += time.perf_counter() - started
            if math.isfinite(value):
                loss.backward()
        return value

    def _freeze_embeddings(self) -> list[Tensor]:
        """Until they are set free again, no gradient of theirs is computed."""
        model = self.live.model
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        own: dict[int, Tensor] = {
            id(p): p for layer in layers if layer is not None for p in layer.parameters()
        }
        frozen = [p for p in own.values() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        return frozen

    def _packed(self, examples: Sequence[TokenisedExample]) -> list[list[PackedRow]]:
        longest = max_tokens_of(self.live.model, self.options.max_tokens)
        return packed(examples, longest, self.forward.longest_shared, self._max_padding)

    def _take_gradient(self, parameter: Tensor) -> None:
        if not self._is_last:
            self._sum.add(parameter)
            self.live.forget(parameter)
            return
        self._sum.give_back(parameter)
        self.optimizer.update_parameter(parameter)

    def _drop_gradients(self) -> None:
        self._sum.clear()
        self.optimizer.drop()
        self.live.model.zero_grad(set_to_none=True)

    def accumulation_bytes(self) -> int:
        """What accumulation keeps more than a step on one example: every parameter's gradient, in fp32."""
        return 4 * sum(parameter.numel() for _, parameter in trained_parameters(self.live.model))

    def prepare_accumulation(self, plan: JobPlan) -> list[str]:
        """Notes on what the job's updates cost. Where the GPU has no room for several passes, they are padded
        into one if that holds them. Raises UserError where it does not."""
        self._max_padding = MAX_PADDING
        num_passes = self._num_passes(plan)
        if num_passes == 1:
            return []
        needed = self.accumulation_bytes()
        if self.live.device.type == "cuda" and needed > (free := free_bytes(self.live.device)):
            self._max_padding = 1.0
            if self._num_passes(plan) == 1:
                room = f"there is no room for the gradients of {num_passes}"
                return [f"an update's examples are padded into one pass: {room}"]
            raise UserError(
                f"an update of {num_passes} passes keeps all gradients: {needed / 1e9:.1f} GB, and the GPU "
                f"has {free / 1e9:.1f} GB free; take fewer or shorter examples an update "
                "(options.accumulate_steps), or give vLLM a smaller --gpu-memory-utilization",
                field="options.accumulate_steps",
                code="not_enough_memory",
            )
        cost = f"{needed / 1e9:.3g} GB more"
        return [f"gradient accumulation over {num_passes} passes keeps all gradients: {cost}"]

    def _num_passes(self, plan: JobPlan) -> int:
        """Of its largest update."""
        return max((len(self._packed(some)) for some in plan.updates()), default=1)

    def use_rank(self, rank: int | None) -> None:
        """None: the configured rank. Another one trains with moments that start at 0 and end with the job."""
        rank = rank or self.options.rank
        if self.optimizer is self.main_optimizer and rank == self.options.rank:
            return
        is_main = rank == self.options.rank
        self.optimizer = self.main_optimizer if is_main else make_optimizer(self.live, self.options, rank)

    def _use_adam(self, rule: AdamRule) -> None:
        options, own = self.options, (rule.beta1, rule.beta2, rule.eps)
        configured = (options.beta1, options.beta2, options.eps)
        beta1, beta2, eps = (a if b is None else b for a, b in zip(configured, own, strict=True))
        self.optimizer.betas, self.optimizer.eps = (beta1, beta2), eps

    def close(self) -> None:
        """Takes its hooks off the model, so that another trainer may train it."""
        for hook in self._hooks:
            hook.remove()

    def smaller_dims(self) -> dict[str, int]:
        """Name of each matrix, or stack of them, -> the smaller dimension: at a rank above it, Adam updates
        it."""
        named, stacks = trained_parameters(self.live.model), expert_stacks(self.live.model)
        shapes = {name: p.shape[name in stacks :] for name, p in named}
        return {name: min(shape) for name, shape in shapes.items() if len(shape) == 2}

    @property
    def vocab_size(self) -> int:
        return vocab_size_of(self.live.model)

    @torch.no_grad()
    def mean_loss(self, examples: Sequence[TokenisedExample]) -> float:
        """What a step on them would see: the mean of their losses, in nats a token. Nothing is trained. Asked
        again for the same before the next step, it is not computed again."""
        if self._measured is None or self._measured[0] != examples:
            update = make_update(
                examples, CROSS_ENTROPY, is_mean=True, reference=None, logprobs=self.logprobs_of
            )
            losses = [
                float(self.forward.loss(self.forward.batch_of(update.rows, layout)))
                for layout in self._packed(examples)
            ]
            self._measured = examples, sum(losses)
        return self._measured[1]

    def logprobs_of(
        self, examples: Sequence[TokenisedExample], on_batch: Callable[[], None] = lambda: None
    ) -> list[Tensor]:
        """log p of each example's targets, (T,) fp32 on the CPU. Nothing is trained. on_batch: called after
        each pass. Raises VllmDied."""
        found: list[Tensor] = [torch.empty(0)] * len(examples)
        for layout in self._packed(examples):
            require_vllm(self.live)
            at = [i for row in layout for i in row.at]
            values = self.forward.logprobs(self.forward.read(examples, layout)).cpu()
            for i, own in zip(at, values.split([examples[i].num_targets for i in at]), strict=True):
                found[i] = own
            on_batch()
        return found

    def logprobs(self, input_ids: list[int]) -> Tensor:
        """log p of each token given those before it, (S - 1,) fp32 on the CPU."""
        return self.logprobs_of([sequence_of(input_ids, [Turn(0, len(input_ids))])])[0]


def free_bytes(device: torch.device) -> int:
    """What this process can still allocate: free on the GPU, or held by torch and unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def require_vllm(live: LiveModel) -> None:
    if not live.is_alive():
        raise VllmDied("vLLM has ended; the step was stopped and its weights are gone with it")


def make_optimizer(live: LiveModel, options: Train, rank: int) -> Apollo:
    return Apollo(
        trained_parameters(live.model),
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
        stacks=expert_stacks(live.model),
        lent=live.gathering.opened if live.gathering else None,
    )
