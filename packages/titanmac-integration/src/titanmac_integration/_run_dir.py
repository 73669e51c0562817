"""Run directories: made, refused or replaced."""

import shutil
from pathlib import Path

from blockell_format.snapshots import DirectoryLock

from ._training._checkpoint import CHECKPOINTS_DIR

RUN_FILE = "run.json"
RESULTS_FILE = "results.json"
DENSE_DIR = "dense"
TOKENIZER_FILE = "tokenizer.json"
TENSORBOARD_DIR = "tensorboard"
# everything that a run leaves behind; nothing else in the directory is ever deleted
OWN_FILES = (
    "metrics.jsonl",
    "model.safetensors",
    "model.json",
    TOKENIZER_FILE,
    RESULTS_FILE,
    RUN_FILE,
)
OWN_DIRS = ("topology", DENSE_DIR, CHECKPOINTS_DIR, TENSORBOARD_DIR)


def prepare_run_dir(path: Path, *, force: bool) -> None:
    """Make sure that ``path`` can take a new run.

    With ``force`` the files of an older run are deleted, other files stay.

    Raises:
        FileExistsError: the directory holds a run and ``force`` is off, or another process is
            writing to it.
        NotADirectoryError: ``path`` is a file.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"--out (={path}) must be a directory, but is a file.")
    if not (path / RUN_FILE).exists():
        return
    if not force:
        raise FileExistsError(
            f"--out (={path}) already holds a run; choose another directory, or pass --force to "
            "replace the run (titanmac train can continue one: --resume)."
        )
    lock = DirectoryLock(path)
    try:
        for name in OWN_DIRS:
            if (path / name).is_dir() and not (path / name).is_symlink():
                shutil.rmtree(path / name)
        for name in OWN_FILES:
            (path / name).unlink(missing_ok=True)
    finally:
        lock.release()
