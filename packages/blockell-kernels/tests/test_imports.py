"""Importing the package is lean: this code does not import triton, nor print, nor warn."""

import subprocess
import sys


def run(code):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# torch may import triton by itself: what is tested is that this package adds nothing to it
TRITON_MODULES = "sorted(m for m in sys.modules if m.split('.')[0] == 'triton')"
SETUP = "import sys, warnings\nwarnings.simplefilter('ignore')\nimport torch\n"


def test_import_does_not_import_triton():
    code = (
        f"{SETUP}before = {TRITON_MODULES}\nimport blockell_kernels\n"
        f"assert {TRITON_MODULES} == before, 'triton was imported'\n"
        "assert not any('_triton' in m for m in sys.modules if m.startswith('blockell'))"
    )
    assert run(code) == ""


def test_a_cpu_call_does_not_import_triton():
    code = (
        f"{SETUP}before = {TRITON_MODULES}\nimport blockell_kernels as bk\n"
        "x = torch.zeros(3, 16, requires_grad=True)\n"
        "c = torch.zeros(1, 1, dtype=torch.int32)\n"
        "bk.block_ell_linear(x, torch.zeros(1, 1, 8, 8), c).sum().backward()\n"
        f"assert {TRITON_MODULES} == before, 'triton was imported'"
    )
    assert run(code) == ""


def test_the_first_test_can_fail():
    code = f"{SETUP}before = {TRITON_MODULES}\nsys.modules['triton'] = sys\n"
    assert run(code + f"print({TRITON_MODULES} == before)").strip() == "False"


def test_public_names_exist_and_are_documented():
    import blockell_kernels

    for name in blockell_kernels.__all__:
        assert getattr(blockell_kernels, name).__doc__, name


def test_what_the_table_of_ways_names_can_be_imported_first():
    """Modules of both packages import each other."""
    code = f"{SETUP}import importlib\n"
    for name in ("_gluon._whole", "_gluon._halves"):
        code += f"importlib.import_module('blockell_kernels.{name}')\n"
        code += "for name in [m for m in sys.modules if '_kernels._triton' in m or "
        code += "'_kernels._gluon' in m]:\n    del sys.modules[name]\n"
    assert run(code) == ""
