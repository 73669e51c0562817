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
SERVICES = ["auth", "db", "cache", "web", "mail"]
LEVELS = ["INFO", "INFO", "INFO", "WARN", "ERROR"]
ROMAN = list(
    zip(
        (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1),
        ["M", "CM", "D", "CD", "C", "XC", "L", "XL", "X", "IX", "V", "IV", "I"],
        strict=True,
    )
)
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


def further_questions() -> dict[str, Iterable[tuple[str, str]]]:
    """Six digits sorted, four others sorted, the parity of bits, Roman numerals, capitals."""

    def sorted_digits(length: int) -> list[tuple[str, str]]:
        words = ["".join(random.choices(string.digits, k=length)) for _ in range(6000)]
        return [(word + ">", "".join(sorted(word))) for word in words]

    six, four = sorted_digits(6), sorted_digits(4)
    bits = [format(random.randrange(2**12), "012b") for _ in range(6000)]
    numbers = random.sample(range(1, 4000), 3999)
    words = ["".join(random.choices("abcdefghijklmnop", k=4)) for _ in range(6000)]
    return {
        "sort6": six,
        "sortagain": four,
        "parity": [(word + "?", str(word.count("1") % 2)) for word in bits],
        "roman": [(f"{number}=", roman(number)) for number in numbers],
        "upper": [(word + "^", word.upper()) for word in words],
    }


def roman(number: int) -> str:
    written = ""
    for value, letters in ROMAN:
        written += number // value * letters
        number %= value
    return written


def log() -> str:
    """Lines of a log: time, level, service, message."""
    lines, seconds = [], 0
    for number in range(9000):
        seconds += random.randint(0, 9)
        level = random.choice(LEVELS)
        clock = f"{seconds // 3600 % 24:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        head = f"{clock} {level} {random.choice(SERVICES)}: "
        messages = {
            "INFO": f"request {number} done in {random.randint(1, 400)} ms",
            "WARN": f"queue at {random.randint(70, 99)}%",
            "ERROR": f"timeout after {random.randint(1, 9) * 10} s",
        }
        lines.append(head + messages[level])
    return "\n".join(lines) + "\n"


def write_questions(directory: Path, found: dict[str, Iterable[tuple[str, str]]]) -> None:
    for name, pairs in found.items():
        lines = [json.dumps({"question": q, "answer": a}) for q, a in dict.fromkeys(pairs)]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    random.seed(0)
    for name, text in texts().items():
        (directory / f"{name}.txt").write_text(text, encoding="utf-8")
    write_questions(directory, questions())
    random.seed(1)
    write_questions(directory, further_questions())
    (directory / "log.txt").write_text(log(), encoding="utf-8")


if __name__ == "__main__":
    main()
