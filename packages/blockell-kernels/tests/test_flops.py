"""torch's counter sees the multiply-adds of the blocks that are present, and those only."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from blockell_format import create_random_topology
from blockell_kernels import block_ell_linear, block_ell_mlp, probe_size

N, B, C, H, R = 7, 8, 6, 5, 4  # tokens, tile side, block columns, hidden and output block rows
PRODUCT = 2 * N * B * B


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def weight(rows, columns, live, slots=None):
    """Tiles [R, slots, B, B] and their columns."""
    slots = live if slots is None else slots
    indices = torch.full((rows, slots), -1, dtype=torch.int32)
    indices[:, :live] = create_random_topology(rows, columns, live)
    return torch.randn(rows, slots, B, B, requires_grad=True), indices


def test_full_density_counts_as_much_as_dense():
    x = torch.randn(N, C * B, requires_grad=True)
    values, columns = weight(R, C, C)
    dense, bias = nn.Linear(C * B, R * B), torch.zeros(R * B, requires_grad=True)
    count = counted(lambda: block_ell_linear(x, values, columns, bias).sum().backward())
    assert count == counted(lambda: dense(x).sum().backward()) == 3 * PRODUCT * R * C


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("sample", ["none", "norms", "gradient"])
@pytest.mark.parametrize("needs", ["both", "input", "values", "neither"])
def test_a_layer(activation, sample, needs):
    """Live blocks count, spare slots do not; statistics of absent blocks ask for all of them."""
    x = torch.randn(N, C * B, requires_grad=needs in ("both", "input"))
    values, columns = weight(R, C, 2, slots=3)
    values.requires_grad_(needs in ("both", "values"))
    probe = torch.zeros(probe_size(R, C), requires_grad=True)
    options = {"num_live": 2, "activation": activation, "probe": probe, "sample": sample}
    bias = torch.zeros(R * B, requires_grad=True)
    of_values = C if sample == "gradient" else 2 * values.requires_grad
    made = []
    forward = counted(lambda: made.append(block_ell_linear(x, values, columns, bias, **options)))
    assert forward == PRODUCT * R * 2
    backward = counted(made[0].sum().backward)
    assert backward == PRODUCT * R * (2 * x.requires_grad + of_values)
    made = [block_ell_linear(x, values, columns, bias, **options)]  # nobody counts here
    assert counted(made[0].sum().backward) == backward


@pytest.mark.parametrize("recompute", ["none", "activation", "hidden"])
@pytest.mark.parametrize("sample", ["none", "gradient"])
@pytest.mark.parametrize("frozen", ["", "x", "1", "x1", "2"])
def test_an_mlp(recompute, sample, frozen):
    x = torch.randn(N, C * B, requires_grad="x" not in frozen)
    (values1, cols1), (values2, cols2) = weight(H, C, 3), weight(R, H, 2)
    values1.requires_grad_("1" not in frozen)
    values2.requires_grad_("2" not in frozen)
    probe2 = torch.zeros(probe_size(R, H), requires_grad=sample == "gradient")
    made = []

    def forward():
        y = block_ell_mlp(
            x, values1, cols1, None, values2, cols2, None, "gelu", recompute=recompute,
            probe2=probe2 if sample == "gradient" else None, sample2=sample,
        )  # fmt: skip
        made.append(y)

    layer1, layer2 = PRODUCT * H * 3, PRODUCT * R * 2
    assert counted(forward) == layer1 + layer2
    need_hidden = x.requires_grad or values1.requires_grad
    expected = layer1 * (x.requires_grad + values1.requires_grad) + layer2 * need_hidden
    expected += PRODUCT * R * H if sample == "gradient" else layer2 * values2.requires_grad
    need_a = values2.requires_grad or sample == "gradient"
    expected += layer1 * (recompute == "hidden" and (need_hidden or need_a))
    assert counted(made[0].sum().backward) == expected


def test_no_tokens_count_nothing():
    values, columns = weight(R, C, 2)
    x = torch.randn(3, 0, C * B, requires_grad=True)
    assert counted(lambda: block_ell_linear(x, values, columns).sum().backward()) == 0


def test_by_module():
    """The counter's table attributes products to modules, as it does for torch's own."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.values, self.columns = weight(R, C, 2)
            self.values = nn.Parameter(self.values.detach())

        def forward(self, x):
            return functional.relu(block_ell_linear(x, self.values, self.columns))

    model = nn.Sequential(Layer())
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(N, C * B)).sum().backward()
    counts = counter.get_flop_counts()["Sequential.0"]
    assert counts == {
        torch.ops.blockell.linear: PRODUCT * R * 2,
        torch.ops.blockell.linear_backward: PRODUCT * R * 2,
    }


def test_a_counter_that_is_imported_first():
    """In the tests above this package came first; torch's counter is not imported by it."""
    code = (
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "import torch, blockell_kernels as bk\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    bk.block_ell_linear(torch.zeros(3, 16), torch.zeros(1, 1, 8, 8),"
        " torch.zeros(1, 1, dtype=torch.int32))\n"
        "print(counter.get_total_flops())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == str(2 * 3 * 64), done.stderr
