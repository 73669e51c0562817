"""Data that the retention protocol was not made with, out of the standard library and a generator.

    python other_data.py data
    titanmac continual --tasks qa:data/sort.jsonl qa:data/reverse.jsonl --steps 600 300 --out runs/a

What came of it is in docs/does-it-forget.md, "Other data". Another Python gives other texts.
"""

import argparse
import json
import random
import string
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

NAMES = ["bolt", "nut", "gear", "lamp", "wire", "pump", "fan", "belt", "hose", "cap"]
COLOURS = ["red", "blue", "green", "black", "white"]
BYTES = 600_000


def texts() -> dict[str, str]:
    """Python source, its documentation, and a table of comma-separated values."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    source = "".join(module.read_text(encoding="utf-8", errors="replace") for module in modules)
    lines = ["id,name,colour,count,price"]
    for number in range(12_000):
        count, name = random.randint(1, 99), random.choice(NAMES)
        price = count * (NAMES.index(name) + 1) / 10
        lines.append(f"{number},{name},{random.choice(COLOURS)},{count},{price:.2f}")
    return {
        "source": source[:BYTES],
        "topics": "\n\n".join(topics[key] for key in sorted(topics))[:BYTES],
        "table": "\n".join(lines) + "\n",
    }


def questions() -> dict[str, Iterable[tuple[str, str]]]:
    """Question and answer pairs: four functions of strings, and facts that nothing follows from."""
    digits = ["".join(random.choices(string.digits, k=4)) for _ in range(6000)]
    words = ["".join(random.choices("abcdefghijklmnop", k=4)) for _ in range(6000)]
    ordered = [(word + ">", "".join(sorted(word))) for word in digits]
    pairs = [(a, b) for a in range(97) for b in range(97)]
    facts = [f"colour of {name} {number}? " for name in NAMES for number in range(60)]
    return {
        "sort": ordered,
        "sort50": ordered[:50],
        "reverse": [(word + "<", word[::-1]) for word in words],
        "modulo": [(f"{a}+{b}%97=", str((a + b) % 97)) for a, b in pairs],
        "lookup": [(fact, random.choice(COLOURS)) for fact in facts],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    random.seed(0)
    for name, text in texts().items():
        (directory / f"{name}.txt").write_text(text, encoding="utf-8")
    for name, found in questions().items():
        lines = [json.dumps({"question": q, "answer": a}) for q, a in dict.fromkeys(found)]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
