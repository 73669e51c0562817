"""Several processes that train one model: who am I, and what do the others say."""

import contextlib
import os
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def launched_by_torchrun(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the variables that torchrun sets are there."""
    environment = os.environ if environment is None else environment
    return all(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes that torchrun started; nothing without torchrun.

    The backend is NCCL for CUDA devices and gloo for the CPU.

    Raises:
        ConnectionError: another process has ended, most likely by an error that it printed.
    """
    if not launched_by_torchrun() or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except RuntimeError as error:
        # gloo has no class of its own
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).splitlines()[0].rpartition("] ")[2]
        raise ConnectionError(
            f"process {rank()} lost another one, whose message says why ({reason})"
        ) from error
    finally:
        dist.destroy_process_group()


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of ``values`` over all processes, in place; as it is in a single process."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_bytes(data: bytes, device: torch.device) -> list[bytes]:
    """This process's ``data`` -> that of every process, by number. Lengths may differ."""
    if world_size() == 1:
        return [data]
    length = torch.tensor([len(data)], device=device)
    lengths = [torch.empty_like(length) for _ in range(world_size())]
    dist.all_gather(lengths, length)
    longest = max(int(n) for n in lengths)
    mine = torch.zeros(longest, dtype=torch.uint8)
    mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    mine = mine.to(device)
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine)
    return [part[: int(n)].cpu().numpy().tobytes() for part, n in zip(parts, lengths, strict=True)]


def wait_for_all(device: torch.device) -> None:
    """Return when every process is here."""
    if world_size() > 1:
        sum_over_processes(torch.zeros(1, device=device)).item()
