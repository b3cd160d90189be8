"""The real model in one process for learning.py: asked in batches, trained by the worker's own step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from apollo_worker.front.admission import load
from apollo_worker.jobs.job_plan import JobPlan, plan
from apollo_worker.model.live_model import load_offline
from apollo_worker.step.packing import packed
from apollo_worker.step.step import CROSS_ENTROPY, Trainer
from apollo_worker.step.update import make_update
from apollo_worker.trainer.attachment import model_facts

from apollo_curation.teach.job import OwnAnswer
from apollo_ipc.config import Config
from apollo_ipc.wire.requests import TrainRequest

T = TypeVar("T", bound=msgspec.Struct)
BATCH = 24  # questions answered at a time
NUM_LOGPROBS = 20
LORA_RANK = 16


class OfflineModel:
    """A Writer (apollo_curation.teach.writer) whose weights can be put back to what they were."""

    def __init__(self, model_dir: Path, config: Config | None = None):
        self.config = config or Config()
        self.live = load_offline(model_dir)
        self._base = {name: p.detach().clone() for name, p in self.live.model.named_parameters()}
        self.trainer = Trainer(self.live, self.config.train)
        self._tokeniser = load(model_facts(self.live, self.trainer, self.config))
        served = self._tokeniser.tokenizer
        assert served is not None
        self._tokenizer, self._stop_ids = served.tokenizer, set(served.stop_ids)

    def reset(self, seed: int) -> None:
        """The first weights, and an optimizer without moments."""
        with torch.no_grad():
            for name, parameter in self.live.model.named_parameters():
                parameter.copy_(self._base[name])
        self.trainer.close()
        train = msgspec.structs.replace(self.config.train, seed=seed)
        self.trainer = Trainer(self.live, train)

    def plan(self, request: TrainRequest) -> JobPlan:
        return plan(request, self._tokeniser, self.config.train, lambda _: set())

    def train(self, request: TrainRequest) -> int:
        """The number of tokens that went through the model."""
        todo = self.plan(request)
        self.train_plan(todo)
        return num_tokens(todo)

    def train_plan(self, todo: JobPlan) -> None:
        for step in range(todo.num_steps):
            self.trainer.step_on(
                todo.examples_of(step),
                todo.learning_rate(step),
                0.0,
                objective=todo.objective,
                embeddings=todo.embeddings,
            )

    def train_with(self, request: TrainRequest, make: Callable[[Any], Step]) -> int:
        """The same plan and loss by another optimizer; make: of the model."""
        self.trainer.close()
        todo, update, forward = self.plan(request), make(self.live.model), self.trainer.forward
        for step in range(todo.num_steps):
            examples = todo.examples_of(step)
            rows = make_update(
                examples, CROSS_ENTROPY, is_mean=True, reference=None, logprobs=self.trainer.logprobs_of
            ).rows
            for layout in packed(examples, self.config.train.max_tokens, forward.longest_shared):
                with torch.enable_grad():
                    forward.loss(forward.batch_of(rows, layout)).backward()
            update(todo.learning_rate(step))
        return num_tokens(todo)

    def contexts(self, questions: Sequence[str]) -> list[list[int]]:
        return [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
            for text in questions
        ]

    def say(self, questions: Sequence[str], *, max_tokens: int) -> list[str]:
        return [
            self._tokenizer.decode(ids, skip_special_tokens=True)
            for ids, _ in self._generate(self.contexts(questions), max_tokens, keep=False)
        ]

    def own_answers(self, questions: Sequence[str], *, max_tokens: int) -> list[OwnAnswer]:
        contexts = self.contexts(questions)
        answers = self._generate(contexts, max_tokens, keep=True)
        return [OwnAnswer(context, ids, rows) for context, (ids, rows) in zip(contexts, answers, strict=True)]

    def write(self, prompts: Sequence[str], kind: type[T], *, max_tokens: int) -> list[T | None]:
        """Nothing: no guided decoding here, and a model of this size writes no forms of use (docs/log.md)."""
        return [None for _ in prompts]

    def token_logprobs(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        return [self.trainer.logprobs(ids).tolist() for ids in sequences]

    @torch.no_grad()
    def distributions(self, answers: Iterable[OwnAnswer]) -> list[torch.Tensor]:
        """Of each answer, (tokens, vocabulary) log-probabilities, fp16."""
        found = []
        for answer in answers:
            ids = torch.tensor([[*answer.context_ids, *answer.ids]])
            logits = self.live.model(input_ids=ids, use_cache=False).logits[0].float()
            found.append(logits[-len(answer.ids) - 1 : -1].log_softmax(-1))
        return found

    def text_loss(self, texts: Iterable[str]) -> float:
        """Nats a token."""
        values = [
            v for text in texts for v in self.trainer.logprobs(self._tokenizer(text)["input_ids"]).tolist()
        ]
        return -sum(values) / len(values)

    @torch.no_grad()
    def _generate(
        self, contexts: Sequence[list[int]], max_tokens: int, *, keep: bool
    ) -> list[tuple[list[int], list[list[tuple[int, float]]]]]:
        """Greedy. keep: with the top log-probabilities. Of like lengths together, padded on the left."""
        order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
        found: dict[int, tuple[list[int], list[list[tuple[int, float]]]]] = {}
        pad = min(self._stop_ids)
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            width = max(len(contexts[i]) for i in batch)
            ids = torch.tensor([[pad] * (width - len(contexts[i])) + contexts[i] for i in batch])
            mask = torch.tensor([[0] * (width - len(contexts[i])) + [1] * len(contexts[i]) for i in batch])
            model: Any = self.live.model
            made = model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=max_tokens, pad_token_id=pad,
                eos_token_id=sorted(self._stop_ids), output_logits=keep, return_dict_in_generate=True,
            )  # fmt: skip
            for row, i in enumerate(batch):
                said = made.sequences[row, width:].tolist()
                end = next((at + 1 for at, one in enumerate(said) if one in self._stop_ids), len(said))
                rows = []
                for at in range(end if keep else 0):
                    values, tokens = made.logits[at][row].float().log_softmax(-1).topk(NUM_LOGPROBS)
                    rows.append(list(zip(tokens.tolist(), values.clamp(max=0).tolist(), strict=True)))
                found[i] = said[:end], rows
        return [found[i] for i in range(len(contexts))]


Step = Callable[[float], None]  # an update at this rate; gradients are used up


def num_tokens(todo: JobPlan) -> int:
    return sum(len(one.input_ids) for step in range(todo.num_steps) for one in todo.examples_of(step))


def kl(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
    """KL(before || after) in nats a token, over the whole vocabulary."""
    sums = [(p.exp() * (p - q)).sum(-1) for p, q in zip(before, after, strict=True)]
    return float(torch.cat(sums).mean())


def adamw(model: Any) -> Step:
    """fp32 master weights; the model's own are their bf16 rounding."""
    pairs = [(p, p.detach().float().clone().requires_grad_()) for p in model.parameters()]
    optimizer = torch.optim.AdamW([master for _, master in pairs], weight_decay=0.0)

    def update(lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr
        for parameter, master in pairs:
            master.grad, parameter.grad = (None if parameter.grad is None else parameter.grad.float()), None
        optimizer.step()
        with torch.no_grad():
            for parameter, master in pairs:
                parameter.copy_(master)

    return update
