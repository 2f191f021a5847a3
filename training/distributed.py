"""Data parallel training: n processes, each with a copy of the model, take the shares of every batch.

    gradient of a step = sum over the processes of the gradient of (their rows' NLL + regulariser * their target tokens) / all target tokens

which is the gradient of one process with the whole batch. The gradients are added up before the method's optimiser sees them; the noise of
a step is a pure function of (seed, step). So parameters, optimiser and posterior are equal in all processes, bit for bit.

There is no DistributedDataParallel: it averages instead of adding up, hooks only what it finds trainable when it is built, and hides the
model's own forward. A LoRA's gradients are a few megabytes, so one sum at the end of a step costs little.

Two groups of processes: gradients travel in the default one (NCCL on GPUs, Gloo on CPUs); counts, losses and messages, which lie in
ordinary memory, in one of Gloo, which also waits out the release.
"""

import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from torch import Tensor

from credence.training.errors import TrainingError
from credence.training.modeling import LoraSite

GRADIENT_TIMEOUT = timedelta(minutes=30)
RELEASE_TIMEOUT = timedelta(hours=24)
"""How long processes wait for the first one, which fits the posterior and releases. One that ends is noticed at once."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of a run. One process alone does nothing here.

    Attributes:
        rank: number of this process, from 0. Process 0 writes files and messages.
        count: n.
        group: for counts and messages; None of one process.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, items: Sequence[_T], size: int) -> Sequence[_T]:
        """This process's items of a batch of at most n * ``size``; of a short one the last processes have fewer, or none."""
        return items[self.rank * size : (self.rank + 1) * size]

    def total(self, numbers: Tensor) -> Tensor:
        """Sum over the processes; the same bits in all of them."""
        if self.count == 1:
            return numbers
        summed = numbers.detach().cpu().clone()
        with _others():
            dist.all_reduce(summed, group=self.group)
        return summed.to(numbers.device)

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replaces every gradient by its sum over the processes; one that no process has stays None."""
        if self.count == 1:
            return
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        present = torch.tensor([float(p.grad is not None) for p in parameters], device=parts[0].device)
        flat = torch.cat([present, *(part.flatten() for part in parts)])
        with _others():
            dist.all_reduce(flat)
        start = len(parts)
        for parameter, is_there in zip(parameters, flat[: len(parts)].tolist(), strict=True):
            end = start + parameter.numel()
            parameter.grad = flat[start:end].view_as(parameter).clone() if is_there else None
            start = end

    def on_first(self, work: Callable[[], _T]) -> _T:
        """Does ``work`` in process 0 and returns its result, which must be picklable, in all.

        Raises:
            TrainingError: in the other processes, if the work failed in process 0, which raises its own error.
        """
        if self.count == 1:
            return work()
        return self.result(work() if self.is_first else None)

    def result(self, own: _T | None) -> _T:
        """Process 0's ``own`` in all processes; waits for it."""
        if self.count == 1:
            return own  # type: ignore[return-value]
        box = [own]
        with _others():
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Returns when all processes are here."""
        if self.count > 1:
            with _others():
                dist.barrier(group=self.group)

    def check_equal(self, tensors: Mapping[str, Tensor]) -> None:
        """Compares tensors between the processes, bit for bit.

        Raises:
            TrainingError: they differ, so there is no one adapter to write.
        """
        if self.count == 1:
            return
        digests: list[str] = [""] * self.count
        with _others():
            dist.all_gather_object(digests, _digest(tensors), group=self.group)
        if len(set(digests)) > 1:
            raise TrainingError(
                f"after the last step the {self.count} processes hold different adapters or method states; nothing is written. They must "
                "run the same versions on devices of the same kind; train in one process otherwise"
            )

    def place_signs(self, sites: Sequence[LoraSite], rows: int) -> None:
        """Gives this process's rows the flipout signs of their places in the whole batch.

        Args:
            rows: places of a full share, one member's.
        """
        for part in _parts(sites):
            if part.row_signs is not None and self.rank > 0:
                part.row_signs = functools.partial(_shifted, part.row_signs, self.rank * rows)


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """The processes that torchrun (or another launcher that sets the same variables) started this one with.

    A process that leaves with an error says so and closes its connections, on which the others end too.

    Raises:
        TrainingError: the launcher's variables are incomplete, or there are fewer GPUs than processes.
    """
    count = _world_size()
    if count <= 1:
        yield Processes()
        return
    was_open = dist.is_initialized()
    processes = _join(count, was_open)
    try:
        yield processes
    except BaseException as error:
        print(f"process {processes.rank} of {count} ends: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        _close()
        raise
    if not was_open:
        _close()


def is_first_process() -> bool:
    """Whether this process writes, by the launcher's variables: also before the processes are joined and after."""
    return _world_size() <= 1 or os.environ.get("RANK", "0") == "0"


def separate(accelerator: Any) -> None:
    """Makes accelerate prepare model and data as in one process: batches are shared out, and gradients added up, here."""
    accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)

    def whole_batches(loader: Any, device_placement: bool | None = None, **_: Any) -> Any:
        return prepare_data_loader(
            loader, accelerator.device, num_processes=1, process_index=0, put_on_device=bool(device_placement)
        )

    accelerator.prepare_data_loader = whole_batches


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _join(count: int, was_open: bool) -> Processes:
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise TrainingError(
            f"WORLD_SIZE is {count} and {', '.join(missing)} not set; start several processes with torchrun, or unset WORLD_SIZE"
        )
    use_gpu = torch.cuda.is_available()
    if use_gpu:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise TrainingError(
                f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}; start as many processes a machine "
                "as it has GPUs"
            )
        torch.cuda.set_device(local)
    if not was_open:
        dist.init_process_group("nccl" if use_gpu else "gloo", timeout=GRADIENT_TIMEOUT)
    with _others():
        group = dist.new_group(backend="gloo", timeout=RELEASE_TIMEOUT)
    return Processes(rank=dist.get_rank(), count=count, group=group)


def _close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _others() -> Iterator[None]:
    """An operation of all processes."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise TrainingError(
            f"another process of the run ended or cannot be reached ({reason}); the first message of a process that ended says why"
        ) from None


def _parts(sites: Sequence[LoraSite]) -> Iterator[LoraSite]:
    for site in sites:
        if site.members:
            yield from site.members
        else:
            yield site


def _shifted(signs: Callable[[int], tuple[Tensor, Tensor]], first: int, rows: int) -> tuple[Tensor, Tensor]:
    s, t = signs(first + rows)
    return s[first:], t[first:]


def tensors_in(document: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a nested state, by their paths in it."""
    if isinstance(document, Tensor):
        return {prefix: document}
    items = (
        document.items()
        if isinstance(document, Mapping)
        else enumerate(document)
        if isinstance(document, list | tuple)
        else ()
    )
    return {path: tensor for key, inner in items for path, tensor in tensors_in(inner, f"{prefix}/{key}").items()}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
