"""What importing the package costs."""

import subprocess
import sys


def test_dynamo_is_imported_by_what_needs_it() -> None:
    code = "import sys, titanmac_integration; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
