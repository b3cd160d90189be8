"""The optimizer: state of each named parameter, and in-place writes to weights that are being served.

A step that is not finite changes nothing at all, which is decided on the device: the host never waits for
a gradient. The mathematics is in update.py, what is fast on a CPU and a GPU in cpu.py and gpu.py, the writing
into bf16 in rounding.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from apollo_ipc.config import DEFAULT_RANK
from apollo_ipc.errors import UserError
from apollo_worker.optimizer.backend import choose_backend
from apollo_worker.optimizer.projection import PROJECTIONS, Draw, derive_seed
from apollo_worker.optimizer.rounding import GRID_DTYPES, grid_within
from apollo_worker.optimizer.update import Backend, Hyper, Written, new_state

FORMAT_VERSION = 1
ROUNDINGS = ("stochastic", "nearest", "kahan")
# In units of lr, in which Adam's first update is 1 and later ones are 0.1 to 1. With a lower floor a quiet
# time, whose updates are short, keeps those after it short as well (docs/log.md).
LIMITER_FLOOR = 1.0


class Apollo(torch.optim.Optimizer):
    """Owns the state of each named parameter, and writes the parameters in place.

    named_parameters: leaf tensors under their HF names; their storage is never replaced, strides are free.
    rank: parameters that are not 2-D, or whose smaller dim is below it, use Adam (see `fallbacks`).
    stacks: names of those that hold experts along their first dimension: each expert is updated for itself,
    and one without any gradient not at all.
    alpha: None for sqrt(k / rank); the paper's choice at rank 1 is sqrt(128).
    projection: "gaussian", the paper's, or "block_sign", which costs no dense product.
    limiter_ratio: 0 switches the norm-growth limiter off; it never applies to Adam's parameters.
    limiter_floor: root mean square of an update, in units of lr, below which it does not bite.
    backend: None for the fastest that runs here; "torch" for the plain one.
    grid_dtypes: name -> dtype in which the checkpoint keeps it, where that is coarser than its storage.
    before_write: called before each parameter is touched; what it raises stops the write.
    lent: parameter -> its weight, contiguous, for the time of its update, where it has no memory of its own;
    None: every parameter's own memory is updated.
    `lr` and `weight_decay` (of `param_groups[0]` too) may be set between steps.

    Raises UserError with the name of the argument or parameter.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = DEFAULT_RANK,
        refresh_steps: int = 200,
        limiter_ratio: float = 1.01,
        limiter_floor: float = LIMITER_FLOOR,
        projection: str = "gaussian",
        rounding: str = "stochastic",
        seed: int = 0,
        alpha: float | None = None,
        grid_dtypes: Mapping[str, torch.dtype] | None = None,
        backend: str | None = None,
        before_write: Callable[[], None] | None = None,
        stacks: Collection[str] = (),
        lent: Callable[[Tensor], AbstractContextManager[Tensor]] | None = None,
    ):
        named = list(named_parameters)
        _check_hyperparameters(
            lr=lr, eps=eps, weight_decay=weight_decay, rank=rank, refresh_steps=refresh_steps,
            limiter_ratio=limiter_ratio, limiter_floor=limiter_floor, beta1=betas[0], beta2=betas[1],
            alpha=alpha, rounding=rounding, projection=projection,
        )  # fmt: skip
        _check_parameters(named)
        super().__init__([param for _, param in named], {"lr": lr, "weight_decay": weight_decay})
        self.betas, self.eps, self.rank, self.alpha = betas, eps, rank, alpha
        self.refresh_steps, self.projection = refresh_steps, projection
        self.limiter_ratio, self.limiter_floor = limiter_ratio, limiter_floor
        self.rounding, self.seed = rounding, seed
        self._names = {param: name for name, param in named}
        self._grids = {
            name: grid_within((grid_dtypes or {}).get(name, p.dtype), p.dtype) for name, p in named
        }
        if odd := next((n for n, grid in self._grids.items() if grid not in GRID_DTYPES), None):
            raise UserError(f"{odd} is {self._grids[odd]}; float32, bfloat16 or float16 is needed", field=odd)
        self._bad_updates = torch.zeros((), dtype=torch.int64, device=named[0][1].device)
        self._backends: dict[str, Backend[Any]] = {}  # by kind of device
        self._backend_name, self._before_write = backend, before_write
        self._stacks, self._lent = set(stacks), lent
        for name, param in named:
            self.state[param] = self._new_state(name, param)

    @property
    def lr(self) -> float:
        return self.param_groups[0]["lr"]

    @lr.setter
    def lr(self, lr: float) -> None:
        _check_hyperparameters(lr=lr)
        self.param_groups[0]["lr"] = lr

    @property
    def weight_decay(self) -> float:
        return self.param_groups[0]["weight_decay"]

    @weight_decay.setter
    def weight_decay(self, weight_decay: float) -> None:
        _check_hyperparameters(weight_decay=weight_decay)
        self.param_groups[0]["weight_decay"] = weight_decay

    def _matrix_shape(self, param: Tensor) -> torch.Size:
        """Of each expert where it is a stack of them."""
        return param.shape[1:] if self._names[param] in self._stacks else param.shape

    def _is_projected(self, param: Tensor) -> bool:
        shape = self._matrix_shape(param)
        return len(shape) == 2 and min(shape) >= self.rank

    def fallbacks(self) -> list[str]:
        """Names of the parameters that plain Adam updates."""
        return [name for param, name in self._names.items() if not self._is_projected(param)]

    def _new_state(self, name: str, param: Tensor) -> dict[str, Tensor]:
        return new_state(
            param.shape, param.device,
            rank=self.rank if self._is_projected(param) else None,
            compensation=self._grids[name] if self.rounding == "kahan" else None,
            is_stack=name in self._stacks,
        )  # fmt: skip

    def warm_up(self) -> None:
        """Compiles on a CPU what the first step would wait for otherwise, seconds after an installation.

        Optional; parameters, state and random bits stay as they are.
        """
        kinds: dict[Any, Tensor] = {}
        for param, name in self._names.items():
            kinds[param.device, param.dtype, self._grids[name], self._is_projected(param)] = param
        for (_, dtype, _, is_projected), param in kinds.items():
            name = self._names[param]
            draw = self._draw(name, param) if is_projected else None
            self._backend(param).warm_up(dtype, draw, self._hyper(name, param))

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every parameter that has a gradient."""
        assert closure is None, "a closure would evaluate the model on weights that are being served"
        for param in self._names:
            if param.grad is not None:
                self.update_parameter(param)
        self.flush()

    def update_parameter(self, param: Tensor) -> None:
        """One step of `param` from `param.grad`, which is taken over. Nothing waits for the device.

        On a CPU small gradients wait for one another, 2^23 elements at most (`Backend.take`); `flush` does
        what still waits.
        """
        grad, name = param.grad, self._names[param]
        assert grad is not None, f"{name} has no gradient"
        if grad.layout != torch.strided:
            raise UserError(f"{name} has a sparse gradient; build its layer with sparse=False", field=name)
        param.grad = None
        draw = self._draw(name, param) if self._is_projected(param) else None
        update = partial(self._update, param, grad, draw, self._hyper(name, param))
        self._note(self._backend(param).take(grad.numel(), update))

    def flush(self) -> None:
        """Does the updates that still wait: those of the step are done, or on their way on a GPU."""
        for backend in self._backends.values():
            self._note(backend.flush())

    def drop(self) -> None:
        """Forgets the gradients that still wait."""
        for backend in self._backends.values():
            backend.drop()

    @torch.no_grad()
    def _update(self, param: Tensor, grad: Tensor, draw: Draw | None, hyper: Hyper) -> Written:
        """In whichever thread the backend runs it."""
        if self._before_write is not None:
            self._before_write()
        backend, state = self._backend(param), self.state[param]
        with nullcontext(param.data) if self._lent is None else self._lent(param) as weight:
            if draw is None:
                written = backend.adam(weight, grad, state, hyper)
            else:
                written = backend.apollo(weight, grad, state, backend.sketch(draw), hyper)
        if self._lent is not None:
            backend.let_go(state)
        return written

    @torch.no_grad()
    def _note(self, written: list[Written]) -> None:
        for ok in written:
            if isinstance(ok, Tensor):
                self._bad_updates += (~ok).to(self._bad_updates.device)
            elif not ok:
                self._bad_updates += 1

    def _backend(self, param: Tensor) -> Backend[Any]:
        kind = param.device.type
        if kind not in self._backends:
            self._backends[kind] = choose_backend(kind, self._backend_name)
        return self._backends[kind]

    def _draw(self, name: str, param: Tensor) -> Draw:
        step = self.state[param]["step"]
        if step.dim():  # one P is for all experts: the one that was asked most often counts
            step = step.amax()
        return Draw(
            self.projection, self.seed, name, refresh_index=step // self.refresh_steps,
            min_dim=min(self._matrix_shape(param)), rank=self.rank, device=param.device,
        )  # fmt: skip

    def _hyper(self, name: str, param: Tensor) -> Hyper:
        alpha = math.sqrt(min(self._matrix_shape(param)) / self.rank) if self._is_projected(param) else 1.0
        return Hyper(
            lr=self.lr, weight_decay=self.weight_decay,
            beta1=self.betas[0], beta2=self.betas[1], eps=self.eps,
            alpha=alpha if self.alpha is None else self.alpha, limiter_ratio=self.limiter_ratio,
            limiter_floor=self.limiter_floor, rounding=self.rounding, grid=self._grids[name],
            rounding_seed=derive_seed(self.seed, name, "rounding"),
        )  # fmt: skip

    def take_bad_updates(self) -> int:
        """Updates left out since the last call because they were not finite. Waits for the device."""
        num_bad = int(self._bad_updates)
        self._bad_updates.zero_()
        return num_bad

    def state_tensors(self) -> dict[str, Tensor]:
        """`<parameter>.<key>` -> the live state tensor (not a copy): step, exp_avg, exp_avg_sq, ..."""
        return {
            f"{name}.{key}": value for p, name in self._names.items() for key, value in self.state[p].items()
        }

    def state_meta(self) -> dict[str, Any]:
        """What belongs to the tensors, as JSON: format version and hyperparameters."""
        return {
            "format_version": FORMAT_VERSION, "lr": self.lr, "weight_decay": self.weight_decay,
            "betas": list(self.betas), "eps": self.eps, "rank": self.rank, "alpha": self.alpha,
            "refresh_steps": self.refresh_steps, "limiter_ratio": self.limiter_ratio,
            "limiter_floor": self.limiter_floor, "projection": self.projection, "rounding": self.rounding,
            "seed": self.seed,
        }  # fmt: skip

    def state_size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state_tensors().values())

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Takes over what `state_tensors` and `state_meta` gave; hyperparameters stay the constructor's.

        A run goes on bit for bit if these are the same. Another seed or refresh interval only draws other
        projections; another rank does not fit. Kahan's leftovers are dropped, or start at 0, when the
        rounding has changed. Raises UserError, and changes nothing, if a tensor is missing, unknown or of
        the wrong shape or dtype.
        """
        if meta.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"optimizer state has format {meta.get('format_version')}; {FORMAT_VERSION} is read here"
            )
        own = self.state_tensors()
        if meta.get("rounding") != self.rounding:
            own = {key: value for key, value in own.items() if not key.endswith(".compensation")}
            tensors = {key: value for key, value in tensors.items() if not key.endswith(".compensation")}
        for key, value in own.items():
            name = key.rpartition(".")[0]
            if key not in tensors:
                raise UserError(f"optimizer state lacks {key}", field=name)
            if tensors[key].shape != value.shape or tensors[key].dtype != value.dtype:
                raise UserError(
                    f"optimizer state {key} is {_kind(tensors[key])}, but {_kind(value)} is needed "
                    f"(saved with rank {meta.get('rank')}, now {self.rank})",
                    field=name,
                )
        if unknown := next((key for key in tensors if key not in own), None):
            raise UserError(
                f"optimizer state has {unknown}, which no parameter of this model owns", field=unknown
            )
        for key, value in own.items():
            value.copy_(tensors[key])

    def state_dict(self) -> dict[str, Any]:
        """{"state": `state_tensors()`, "meta": `state_meta()`}: by name, unlike torch's by index."""
        return {"state": self.state_tensors(), "meta": self.state_meta()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Torch's own would cast fp32 moments to the parameter's dtype, and go by order."""
        self.load_state(state_dict["state"], state_dict["meta"])


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check_hyperparameters(**values: Any) -> None:
    """Raises UserError for the first value out of its range."""
    ranges: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "lr": ("finite and not negative", lambda x: 0 <= x < math.inf),
        "weight_decay": ("finite and not negative", lambda x: 0 <= x < math.inf),
        "limiter_ratio": ("0 (off) or at least 1", lambda x: x == 0 or 1 <= x < math.inf),
        "eps": ("above 0", lambda x: 0 < x < math.inf),
        "beta1": ("in [0, 1)", lambda x: 0 <= x < 1),
        "beta2": ("in [0, 1)", lambda x: 0 <= x < 1),
        "rank": ("a whole number, at least 1", lambda x: isinstance(x, int) and x >= 1),
        "refresh_steps": ("a whole number, at least 1", lambda x: isinstance(x, int) and x >= 1),
        "alpha": ("None or above 0", lambda x: x is None or 0 < x < math.inf),
        "limiter_floor": ("finite and not negative", lambda x: 0 <= x < math.inf),
        "projection": (f"one of {', '.join(PROJECTIONS)}", lambda x: x in PROJECTIONS),
        "rounding": (f"one of {', '.join(ROUNDINGS)}", lambda x: x in ROUNDINGS),
    }
    for name, value in values.items():
        right, is_right = ranges[name]
        if not is_right(value):
            raise UserError(f"{name} is {value}; it must be {right}", field=name)


def _check_parameters(named: list[tuple[str, Tensor]]) -> None:
    """Raises UserError for the first parameter that cannot be optimized under its name."""
    if not named:
        raise UserError("no parameters to train")
    owners: dict[int, str] = {}
    names: set[str] = set()
    for name, param in named:
        if not param.is_leaf:
            raise UserError(f"{name} is not a leaf tensor: it was computed from others", field=name)
        if not param.is_floating_point():
            raise UserError(f"{name} is {param.dtype}; only floating point is trained", field=name)
        if name in names:
            raise UserError(f"two parameters are called {name}", field=name)
        if id(param) in owners:
            raise UserError(f"{name} and {owners[id(param)]} are one tensor; name it once", field=name)
        names.add(name)
        owners[id(param)] = name
