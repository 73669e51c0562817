"""Two processes that train one model, started by torchrun."""

import gc
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blockell_format.snapshots import open_run
from titanmac_integration import (
    Batch,
    ProseTask,
    TitanMACConfig,
    Trainer,
    TrainingConfig,
    create_titanmac_model,
)
from titanmac_integration._training._processes import process_group, wait_for_all
from titanmac_integration.cli import main

Job = Callable[[int, int, Path], None]
FLAGS = [
    *("--d-model", "32", "--n-heads", "4", "--d-ff", "64", "--block-sparse-tile-size", "8"),
    *("--batch-size", "6", "--seq-len", "16", "--level-periods", "1,4,8", "--dropout", "0.1"),
    *("--tasks", "prose", "arithmetic", "--steps", "12", "--checkpoint-every", "6"),
    *("--log-every", "1", "--eval-every", "4", "--accumulation-steps", "3", "--eval-max-frac", "1"),
]


def torchrun(*flags: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    module = ["--nproc-per-node", "2", "-m", "titanmac_integration", "train", "--device", "cpu"]
    done = subprocess.run(
        [*command, *module, *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def checkpoint(out: Path, step: int) -> dict[str, torch.Tensor]:
    path = out / "checkpoints" / f"step-{step:08d}"
    return load_file(path / "model.safetensors") | load_file(path / "state.safetensors")


def training_losses(out: Path) -> dict[int, float]:
    lines = open_run(out).metrics()
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    shown = torchrun("--out", str(out), *FLAGS)
    assert shown.count("run directory:") == 1, "process 0 speaks for all"
    run = open_run(out)
    assert run.problems == []
    assert run.steps == [0, 8]
    snapshot = run.snapshot(8)
    assert snapshot.world_size == 2
    for layer, sums in snapshot.checksums.items():
        assert len(sums) == 2, layer
        assert sums[0] == sums[1], layer
    lines = run.metrics()
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval/prose/bits_per_byte" in line] == [4, 8, 12, 12]

    same, other = tmp_path / "same", tmp_path / "other"
    shutil.copytree(out, same)
    shutil.copytree(out, other)
    in_two_processes(resume, same)
    mine, theirs = checkpoint(same, 12), checkpoint(out, 12)
    assert mine.keys() == theirs.keys()
    assert any(name.startswith("/processes/1/random") for name in mine)
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert different == []

    # another number of processes: the data and all state go on, dropout draws anew
    assert main(["train", "--out", str(other), "--resume", "6", "--device", "cpu", "--quiet"]) == 0
    assert open_run(other).steps == [0, 8]
    losses = [training_losses(path) for path in (out, other)]
    assert losses[0].keys() == losses[1].keys()
    assert losses[0][6] == losses[1][6]
    assert losses[0][7] == pytest.approx(losses[1][7], rel=0.02)


def as_torchrun(rank: int, port: int) -> None:
    """What torchrun does, in less time."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", **address}


def resume(rank: int, port: int, out: Path) -> None:
    as_torchrun(rank, port)
    assert main(["train", "--out", str(out), "--resume", "6", "--device", "cpu", "--quiet"]) == 0


def leave_one_alone(rank: int, port: int, out: Path) -> None:
    as_torchrun(rank, port)
    cpu = torch.device("cpu")

    def first_fails() -> None:
        with process_group(cpu):
            wait_for_all(cpu)
            if rank == 0:
                raise ValueError("its own error")
            wait_for_all(cpu)

    lost = r"process 1 lost another one, whose message says why \(.*onnection"
    error, message = ((ValueError, "its own error"), (ConnectionError, lost))[rank]
    with pytest.raises(error, match=message):
        first_fails()


def test_the_other_process_of_one_that_fails_says_so_in_a_line(tmp_path: Path) -> None:
    in_two_processes(leave_one_alone, tmp_path)


def write_gradients(rank: int, port: int, out: Path) -> None:
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.save(gradients(), out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def one_thread(job: Job, rank: int, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    job(rank, port, out)


def in_two_processes(job: Job, out: Path) -> None:
    if torch.cuda.is_available():  # where torch refuses forks once there was a backward pass
        subprocess.run([sys.executable, __file__, job.__name__, str(out)], check=True)
    else:
        fork_two(job, out)


def fork_two(job: Job, out: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # garbage of other tests may hold threads: a child lacks them, and its collector would wait
    gc.collect()
    gc.freeze()
    context = torch.multiprocessing.get_context("fork")
    workers = [context.Process(target=one_thread, args=(job, r, port, out)) for r in range(2)]
    for process in workers:
        process.start()
    gc.unfreeze()
    for process in workers:
        process.join(timeout=120)
        assert process.exitcode == 0


def gradients() -> dict[str, torch.Tensor]:
    """Of a batch whose rows have different numbers of counted tokens, by name."""
    shape = {"d_model": 32, "n_heads": 4, "n_layers": 1, "d_ff": 64, "max_seq_len": 16}
    config = TitanMACConfig(**shape, window_size=8, use_block_sparse=True, block_sparse_layers=None)
    model = create_titanmac_model(config, seed=0).double()
    trainer = Trainer(model, TrainingConfig(batch_size=5, seq_len=16, accumulation_steps=2))
    batch = ProseTask("some words of a text " * 50).batch(5, 16, torch.Generator().manual_seed(0))
    labels = batch.labels.clone()
    labels[0, 4:] = -100
    labels[4] = -100
    loss = trainer._agree(
        trainer._runner.backward(Batch(batch.input_ids, labels), trainer.optimizer)
    )
    return {"loss": loss, **{name: p.grad for name, p in model.named_parameters()}}


def test_processes_compute_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    in_two_processes(write_gradients, tmp_path)
    expected = gradients()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)


if __name__ == "__main__":
    fork_two(globals()[sys.argv[1]], Path(sys.argv[2]))
