"""``titanmac generate``: text that a saved model writes."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

from titanmac_integration._data._tokenizer import make_tokenizer
from titanmac_integration._model._checkpoint import load_checkpoint

from .flags import resolve_device
from .plan import stored_tokenizer
from .saved import newest_model


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "generate",
        help="let the model of a run directory continue a prompt",
        description="Print the prompt and what the model writes after it, up to an end of text.",
    )
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="directory of the run, or of a checkpoint"
    )
    parser.add_argument("--prompt", required=True, help="what to continue")
    parser.add_argument(
        "--max-new-tokens", type=int, default=200, metavar="N", help="at most N (default: 200)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0 takes the most probable token, above it tokens are drawn (default: 0)",
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="draw out of the K most probable tokens only"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--device", default="auto", help='"auto", "cpu", "cuda", ...')
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the text."""
    device = resolve_device(arguments.device)
    if not 0 <= arguments.seed < 1 << 64:
        raise ValueError(f"--seed (={arguments.seed}) must be in [0, 2**64).")
    model = load_checkpoint(newest_model(arguments.run_dir), device=device)
    tokenizer = make_tokenizer(stored_tokenizer(arguments.run_dir))
    try:  # what the system's encoding does not know arrives as halves of characters
        prompt = tokenizer.encode(os.fsencode(arguments.prompt).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt must be text in UTF-8: {error}.") from error
    if not prompt:
        raise ValueError("--prompt (='') must hold at least one token.")
    tokens = model.generate(
        torch.tensor([prompt], device=device),
        arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        generator=torch.Generator(device).manual_seed(arguments.seed),
    )[0].tolist()
    written = tokens[len(prompt) :]
    if tokenizer.end_of_text in written:
        written = written[: written.index(tokenizer.end_of_text)]
    # a model may have more tokens than its tokenizer; those mean nothing
    known = [token for token in written if token < tokenizer.vocab_size]
    text = tokenizer.decode([*prompt, *known])
    encoding = sys.stdout.encoding or "utf-8"  # a console may not know every character
    print(text.encode(encoding, "replace").decode(encoding))
    return 0
