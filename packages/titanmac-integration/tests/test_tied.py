"""A shared table's gradient in one piece is torch's."""

from collections.abc import Callable

CHECK = """
import sys, torch
from titanmac_integration import TitanMACConfig, create_titanmac_model
from titanmac_integration._layers import _linear_loss, _tied, _tied_kernels
from titanmac_integration._model import _titanmac
device = sys.argv[1]
torch.manual_seed(0)
for N, D, V in ((1, 5, 3), (70, 130, 4), (33, 128, 50), (0, 8, 3), (40, 8, 1)):
    rows, indices = torch.randn(N, D, device=device), torch.randint(V, (N,), device=device)
    table = torch.randn(V, D, device=device)
    expected = table.clone().index_add(0, indices, rows)
    before = table._version
    got = _tied_kernels.add_rows_(table, rows, indices)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert got is table and (N == 0 or table._version > before)

shape = dict(d_model=32, n_heads=4, n_layers=2, d_ff=64, max_seq_len=64, window_size=8,
             n_persistent=2, vocab_size=37)
tokens = torch.randint(37, (2, 20), device=device)
results, called = [], []
look_up = _tied.look_up
_titanmac.look_up = lambda *args: called.append(1) or look_up(*args)
for tied in (False, True):
    _titanmac.takes_table = lambda table: tied and torch.is_grad_enabled()
    model = create_titanmac_model(TitanMACConfig(**shape), device=device)
    for _ in range(2):  # gradients add up
        output = model(tokens, tokens, return_logits=False)
        output["loss"].backward(retain_graph=True)
        output["loss"].backward()
    results.append({n: p.grad for n, p in model.named_parameters()})
    with torch.no_grad():
        model(tokens, tokens, return_logits=False)
assert len(called) == 2
for name, plain in results[0].items():
    torch.testing.assert_close(results[1][name], plain, rtol=1e-4, atol=1e-6)
seen = []
model.embedding.register_forward_hook(lambda *_: seen.append(1))
model(tokens, tokens, return_logits=False)
assert len(called) == 2 and seen == [1], "looked past a hook"

table = torch.randn(5, 3, device=device, requires_grad=True)
indices = torch.tensor([[1, 1], [4, 0]], device=device)
for part in (0, 1):
    used = _tied.look_up(indices, table)[part]
    plain = (torch.nn.functional.embedding(indices, table), table)[part]
    grads = [torch.autograd.grad(x.pow(2).sum(), table)[0] for x in (used, plain)]
    torch.testing.assert_close(*grads)
print("agrees")
"""


def test_the_table_gets_torchs_gradient(assert_agrees: Callable[[str], None]) -> None:
    """In Triton's interpreter where there is no GPU."""
    assert_agrees(CHECK)
