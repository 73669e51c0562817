"""The newest model of a run directory: the one saved at the end, or the last checkpoint's."""

import json
from pathlib import Path
from typing import Any

from titanmac_integration._model._checkpoint import CONFIG_FILE
from titanmac_integration._training._checkpoint import (
    CHECKPOINTS_DIR,
    CheckpointStore,
    read_training_info,
)


def newest_model(run_dir: Path) -> Path:
    """The directory whose model was trained longest; ``run_dir`` itself when nothing is there."""
    steps = CheckpointStore(run_dir / CHECKPOINTS_DIR).steps()
    if not steps:
        return run_dir
    checkpoint = CheckpointStore(run_dir / CHECKPOINTS_DIR).path(steps[-1])
    try:
        saved = json.loads((run_dir / CONFIG_FILE).read_bytes())["info"]["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return checkpoint
    return run_dir if saved >= steps[-1] else checkpoint


def trained_on(directory: Path) -> dict[str, Any] | None:
    """What the tasks of the model in a directory were made of, as `make_tasks` takes it.

    None if `titanmac train` did not write that down there.
    """
    try:
        source = json.loads((directory / CONFIG_FILE).read_bytes())["info"].get("source")
        if source is None:
            source = read_training_info(directory)["source"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    known = isinstance(source, dict) and {"tasks", "data", "held_out"} <= set(source)
    return dict(source) if known else None
