"""Memory that CPU products gather into is kept, and seen by nobody else."""

import threading

import torch

from blockell_kernels import block_ell_linear
from blockell_kernels._cpu import FRESH_ELEMENTS
from blockell_kernels._cpu_rule import FEW_ELEMENTS
from blockell_kernels._cpu_scratch import MAX_ELEMENTS, scratch


def test_it_is_kept_per_thread_and_dtype_and_grows() -> None:
    like = torch.zeros(1)
    first = scratch(like, 3, 5)
    assert first.shape == (3, 5)
    assert scratch(like, 5, 3).data_ptr() == first.data_ptr()
    assert scratch(like.double(), 5, 3).dtype == torch.float64
    assert scratch(like, 1000, 3).shape == (1000, 3)
    assert scratch(like, 0, 3).shape == (0, 3)
    others: list[int] = []
    thread = threading.Thread(target=lambda: others.append(scratch(like, 3, 5).data_ptr()))
    thread.start()
    thread.join()
    assert others[0] != scratch(like, 3, 5).data_ptr()
    large = scratch(like, MAX_ELEMENTS + 1)
    assert large.data_ptr() != scratch(like, MAX_ELEMENTS + 1).data_ptr()


def test_results_of_one_call_are_not_touched_by_the_next() -> None:
    columns = torch.tensor([[0, 2], [1, 3], [0, 1], [2, 3]], dtype=torch.int32)
    values = torch.randn(4, 2, 8, 8, requires_grad=True)
    with torch.inference_mode():  # what is kept from here serves training, too
        block_ell_linear(torch.randn(64, 32), values, columns, backend="gathered")
    x = torch.randn(64, 32, requires_grad=True)
    y = block_ell_linear(x, values, columns, backend="gathered")
    kept = y.detach().clone()
    block_ell_linear(torch.randn(64, 32), values, columns, backend="gathered")
    assert torch.equal(y, kept)
    expected = block_ell_linear(x.detach(), values.detach(), columns, backend="reference")
    torch.testing.assert_close(y.detach(), expected)
    y.sum().backward()
    gradients = x.grad.clone(), values.grad.clone()
    other = torch.randn(64, 32, requires_grad=True)
    block_ell_linear(other, values.detach(), columns, backend="gathered").sum().backward()
    assert torch.equal(x.grad, gradients[0])
    assert torch.equal(values.grad, gradients[1])


def test_an_input_gradient_of_few_tokens_gathers_into_kept_memory() -> None:
    """Its parts are larger than what the system gives from memory that was used before."""
    N, R, C, K, B = 64, 16, 8, 4, 16
    assert FRESH_ELEMENTS < N * R * K * B <= FEW_ELEMENTS
    columns = torch.stack([torch.randperm(C)[:K] for _ in range(R)]).int()
    values, x = torch.randn(R, K, B, B).double(), torch.randn(N, C * B).double()
    found = {}
    for backend in ("gathered", "reference"):
        inputs = x.clone().requires_grad_()
        block_ell_linear(inputs, values, columns, backend=backend).square().sum().backward()
        found[backend] = inputs.grad
    torch.testing.assert_close(found["gathered"], found["reference"])
