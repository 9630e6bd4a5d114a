"""A training step that is recorded once for each length, and then replayed with new contents.

A small step is bound by the starting of kernels, not by their arithmetic. A CUDA graph is a list of
kernels with the addresses they read and write; it starts all of them at once. It knows no Python:
what differs from step to step must be in a tensor that stays where it is (learning rates, weights
of penalties, rows), and no value may be asked for on the way. So

- rows are padded to one of a few lengths, and each length has a graph of its own;
- a step is warmed up before it is recorded, and what the warm-up changed is put back;
- pruning events, evaluations and checkpoints happen between two replays.

What records is exchangeable: CudaGraphs on a GPU, Tape on a CPU (for tests, and for notebook 16).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drlora_ref.experiments.tasks.data import Batch
from drlora_ref.importance import ema_update

# Tokens that a batch is padded to: few enough to record, close enough to waste little.
LENGTHS = (16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024)
PADDING = {"attention_mask": 0, "token_type_ids": 0, "labels": -100}
WARM_UP = 3  # runs before a recording: libraries choose their kernels, gradients get their memory
Key = tuple[tuple[str, torch.Size], ...]  # of a group: name and shape of each input


def padded_length(longest: int, lengths: tuple[int, ...] = LENGTHS) -> int:
    """To how many tokens a batch is padded whose longest row has so many; 0: to none of `lengths`.

    >>> padded_length(33), padded_length(40), padded_length(2000)
    (40, 40, 0)
    """
    return next((n for n in lengths if n >= longest), 0)


class Recorder(Protocol):
    """What records a step."""

    def record(self, step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Run `step` to warm it up, then record it: (what replays it, where its result will be).

        Raises RuntimeError if the step does what cannot be recorded.
        """


ASKS = [getattr(torch.ops.aten, name).default
        for name in ("_local_scalar_dense", "nonzero", "unique_consecutive")]  # fmt: skip


class Strict(TorchDispatchMode):
    """Within it a step that asks for a value, or mixes devices, raises RuntimeError.

    Recording such a step on a GPU would fail too, but leave the generator and the memory of that
    GPU in a state in which nothing goes on.

    >>> with Strict():
    ...     float(torch.ones(()))
    Traceback (most recent call last):
    RuntimeError: a value was asked for, which a recording cannot have
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        by_mask = function is torch.ops.aten.index.Tensor and any(
            t.dtype in (torch.bool, torch.uint8) for t in tensors[1:]
        )
        if by_mask or function in ASKS:
            raise RuntimeError("a value was asked for, which a recording cannot have")
        devices = {t.device.type for t in tensors if t.dim()}  # a CPU's number goes with any
        if function is torch.ops.aten._to_copy.default and kwargs.get("device"):
            devices |= {args[0].device.type, torch.device(kwargs["device"]).type}
        if len(devices) > 1:
            raise RuntimeError(f"{function} is between {' and '.join(sorted(devices))}")
        return function(*args, **kwargs)


class CudaGraphs:
    """Records CUDA graphs, all of them in one pool of memory.

    From now on this process works on a stream of its own: warm-up, recording, and all that happens
    between two replays. Work on the default stream would end a recording with an error. The GPU's
    default generator, which dropout draws from, is known to every graph, and goes on from replay to
    replay.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool: Any = None  # of all graphs, once there is one
        self.stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.set_stream(self.stream)

    def record(self, step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """As Recorder's; one that fails leaves the stream as it was."""
        for _ in range(WARM_UP - 1):
            step()
        with Strict():
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            result = step()
        self.pool = graph.pool()
        return graph.replay, result


class Tape(Strict):
    """A graph on a CPU: writes down every operation on tensors, and does them again in order.

    Like a CUDA graph it knows tensors and nothing else. Python is not run again: a branch stays
    the one that was taken, a number the one that was written down, and a name that was bound to a
    new tensor shows the old one. What asks for a value cannot be recorded.

    >>> x, tape = torch.ones(2), Tape()
    >>> replay, twice = tape.record(lambda: 2 * x)
    >>> _ = x.fill_(5.0)
    >>> replay()
    >>> twice
    tensor([10., 10.])
    """

    def record(self, step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """As Recorder's."""
        step()
        self.calls: list[tuple[Callable, tuple, dict, list[Tensor]]] = []
        with self:
            result = step()
        return _Replay(self.calls), result

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self.calls.append((function, args, kwargs or {}, _tensors(result)))
        return result


class _Replay:
    def __init__(self, calls: list[tuple[Callable, tuple, dict, list[Tensor]]]):
        self.calls = calls

    @torch.no_grad()
    def __call__(self) -> None:
        for function, args, kwargs, then in self.calls:
            now = _tensors(function(*args, **kwargs))
            for old, new in zip(then, now, strict=True):
                if old.data_ptr() != new.data_ptr():  # a view, or a change in place, is there
                    old.copy_(new)


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


class CapturedStep:
    """Takes optimizer steps by graphs, one for each length, and eagerly where that cannot be.

    take(group): the step itself on micro-batches that are on the device; (R, 2) as Engine's. It
    must not ask for a value, and changes tensors in place.
    state(): all tensors that a step changes, for a warm-up to be put back.
    batches, rows: how many micro-batches a whole group has, and how many rows each of them. The
    last group of an epoch may be smaller, and is taken eagerly.
    pad: the number of the token that fills rows up.
    recorder: None where nothing is to be recorded, since `why_not`.

    A batch is padded to the next of `lengths`, recorded or not: so both compute the same. Batches
    that are longer than all of them stay as they are, and are taken eagerly.
    """

    def __init__(
        self,
        take: Callable[[list[Batch]], Tensor],
        state: Callable[[], list[Tensor]],
        device: torch.device,
        batches: int,
        rows: int,
        pad: int,
        recorder: Recorder | None,
        why_not: str = "",
        lengths: tuple[int, ...] = LENGTHS,
    ):
        self.take, self.state, self.device = take, state, device
        self.whole, self.lengths = (batches, rows), lengths
        self.padding = {"input_ids": pad, "decoder_input_ids": pad} | PADDING
        self.recorder = recorder
        self.graphs: dict[Key, tuple[list[Batch], Callable[[], object], Tensor]] = {}
        self.why_not: list[str] = []
        if why_not:
            self._give_up(why_not)

    def __call__(self, group: list[Batch]) -> Tensor:
        """One optimizer step on these micro-batches, from the CPU."""
        fits, group = self._fitted(group)
        if not (self.recorder and fits):
            return self.take([self._moved(batch) for batch in group])
        key = tuple((name, t.shape) for batch in group for name, t in batch.items())
        if key not in self.graphs and not self._record(key, group):
            return self.take([self._moved(batch) for batch in group])
        inputs, replay, result = self.graphs[key]
        for static, batch in zip(inputs, group, strict=True):
            for name, tensor in batch.items():
                static[name].copy_(tensor, non_blocking=True)
        replay()
        return result.clone()  # the next replay writes over it

    def about(self) -> str:
        """What a record says of it: "captured", or why (in part) it was not."""
        return "; ".join(self.why_not) or "captured"

    def _fitted(self, group: list[Batch]) -> tuple[bool, list[Batch]]:
        """(whether it can be recorded, the group padded to common lengths)."""
        widths = {}
        for name in {name for batch in group for name, t in batch.items() if t.dim() > 1}:
            longest = max(batch[name].shape[-1] for batch in group)
            widths[name] = padded_length(longest, self.lengths)
        if 0 in widths.values():
            self._say(f"eager where a batch is longer than {self.lengths[-1]} tokens")
            return False, group
        rows = {len(next(iter(batch.values()))) for batch in group}
        padded = [{n: self._wide(n, t, widths) for n, t in batch.items()} for batch in group]
        return (len(group), rows) == (self.whole[0], {self.whole[1]}), padded

    def _wide(self, name: str, tensor: Tensor, widths: dict[str, int]) -> Tensor:
        if name not in widths:
            return tensor
        return F.pad(tensor, (0, widths[name] - tensor.shape[-1]), value=self.padding[name])

    def _moved(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.device, copy=True) for name, tensor in batch.items()}

    def _record(self, key: Key, group: list[Batch]) -> bool:
        """Record the graph of this shape; False, and no more graphs, if that cannot be.

        What runs out of memory raises: a graph needs no more than the eager step.
        """
        assert self.recorder is not None
        inputs = [self._moved(batch) for batch in group]
        before, drawn = [t.clone() for t in self.state()], _random_state()
        try:
            self.graphs[key] = (inputs, *self.recorder.record(lambda: self.take(inputs)))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause: BaseException = error  # the end of a recording that failed raises on top of it
            while cause.__context__:
                cause = cause.__context__
            self._give_up(" ".join(str(cause).split())[:200])
        finally:
            with torch.no_grad():
                for tensor, value in zip(self.state(), before, strict=True):
                    tensor.copy_(value)
            _set_random_state(drawn)
        return self.recorder is not None

    def _give_up(self, reason: str) -> None:
        self.recorder = None
        self._say(f"eager: {reason}")

    def _say(self, words: str) -> None:
        if words not in self.why_not:
            self.why_not.append(words)
            print(f"capture: {words}", flush=True)


def _random_state() -> list[Tensor]:
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *cuda]


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])


_instead: list[tuple[Recorder | None, str]] = []  # what recording_by says, innermost last


def find_recorder(device: torch.device, processes: int) -> tuple[Recorder | None, str]:
    """(what records steps on this device, or None; why there is nothing)."""
    if _instead:
        return _instead[-1]
    if processes > 1:
        return None, "several processes exchange their gradients"
    if device.type != "cuda":
        return None, "there is no GPU"
    return CudaGraphs(), ""


@contextmanager
def recording_by(recorder: Recorder | None, why_not: str = "") -> Iterator[None]:
    """Engines that are made within it record by this, whatever the device; None: not at all."""
    _instead.append((recorder, why_not))
    try:
        yield
    finally:
        _instead.pop()


def make_static(optimizer: torch.optim.AdamW) -> None:
    """Turn what AdamW keeps into tensors beside its parameters, in place, before its first step.

    Learning rates, step counts (so bias corrections) and averages: what a graph reads and writes.
    Call it after a schedule of learning rates was made, which then fills them.
    """
    for group in optimizer.param_groups:
        device = group["params"][0].device
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
        group["capturable"] = True
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that a static optimizer's step changes, its parameters left out."""
    return [t for state in optimizer.state.values() for t in state.values()]


def load_static(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """load_state_dict for an optimizer that was made static; before any graph is recorded."""
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].to(group["params"][0].device)


@torch.no_grad()
def smooth_in_place(allocator: Any, on: Tensor) -> None:
    """What a captured step does of lines 7-9 of Algorithm 1: scores and EMA, and later the zeros.

    `on`, a tensor of bool, is True until pruning has ended. From then on the EMA stays as it is,
    and the c of components outside the mask are zero. `allocator` is RankAllocator or
    ReplicaAllocator, whose own `step` is left with the pruning events.
    """
    fresh = ema_update(allocator.ema, allocator.scores(), allocator.beta)
    allocator.ema.copy_(torch.where(on, fresh, allocator.ema))
    layers = allocator.layers.values()
    cs = [layer.lora_c for layer in layers]
    stays = torch.stack([layer.component_mask for layer in layers]) | on
    torch._foreach_copy_(cs, torch.where(stays, torch.stack(cs), 0.0).unbind())
