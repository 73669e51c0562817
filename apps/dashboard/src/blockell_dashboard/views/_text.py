"""Text for people: escaping, durations, commands to try."""

from __future__ import annotations

import re

__all__ = ["DEMO_COMMANDS", "duration", "escape"]

DEMO_COMMANDS = """\
nox -s demo                             # in a checkout: trains a small model in minutes
titanmac continual --out runs/demo      # the same, where titanmac-integration is installed
blockell-dashboard example runs/try     # a made-up run: at once, no torch needed"""


def escape(text: str) -> str:
    """Text from a file as Markdown that shows exactly these characters."""
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!|~$:])", r"\\\1", text.replace("\n", " "))


def duration(seconds: float) -> str:
    """A time span in its two largest units at most: 12 s, 3 min, 2 h 5 min, 4 d."""
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d"
