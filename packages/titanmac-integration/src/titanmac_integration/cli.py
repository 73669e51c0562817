"""The ``titanmac`` command."""

import argparse
import sys
from collections.abc import Sequence

from ._cli import continual, evaluate, generate, train
from ._training._trainer import NonFiniteLossError


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``titanmac``."""
    parser = argparse.ArgumentParser(
        prog="titanmac", description="Train TitanMAC models with block-sparse layers."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train.add_parser(commands)
    continual.add_parser(commands)
    evaluate.add_parser(commands)
    generate.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 error, 130 interrupted."""
    arguments = build_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except (ValueError, OSError, ImportError, NonFiniteLossError) as error:
        print(f"titanmac {arguments.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"titanmac {arguments.command}: interrupted", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
