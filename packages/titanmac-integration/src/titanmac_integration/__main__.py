"""``python -m titanmac_integration``: the ``titanmac`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
