"""The packed copy of x from which the weight gradient of narrow tiles reads, against indexing.

Legend: C block columns, B tile side, N tokens.
"""

from __future__ import annotations

import pytest
import torch

from blockell_kernels._gluon._panels import packed


@pytest.mark.parametrize(
    ("N", "C", "B"), [(1, 3, 16), (64, 8, 16), (129, 11, 16), (70, 5, 32), (65, 3, 64)]
)
def test_panels_lie_one_behind_the_other(N, C, B):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(N, C * B + 8, device=device).to(torch.bfloat16)[:, : C * B]
    image = packed(x, B).view(-1, C, 64 * B)
    padded = torch.nn.functional.pad(x, (0, 0, 0, -N % 64))
    panels = padded.view(-1, 64, C, B).transpose(1, 2).reshape(-1, C, 64 * B)
    # 16-byte pieces of a line of 2*B bytes change places as the hardware swizzles.
    at = torch.arange(64 * B, device=device)
    swizzled = at ^ ((at >> 6) % (B // 8) << 3)
    assert torch.equal(image[:, :, swizzled], panels)
