"""The command line, as a user runs it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from blockell_dashboard import __version__
from blockell_dashboard._server import APP_SCRIPT
from blockell_dashboard.cli import main


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"blockell-dashboard {__version__}\n"


def test_help_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for word in (
        "RUN_DIR",
        "--port",
        "--address",
        "--headless",
        "--no-browser",
        "export",
        "example",
    ):
        assert word in out


@pytest.mark.parametrize("port", ["99999", "-1", "http"])
def test_a_bad_port_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([f"--port={port}", "x"])
    assert exit_info.value.code == 2
    assert f"port (={port}) must be a number from 0 to 65535." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("_server", ["."]), ("export", ["export", "."]), ("example", ["example", "."])],
)
def test_ctrl_c_while_it_imports(
    module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    name = f"blockell_dashboard.{module}"
    monkeypatch.setitem(sys.modules, name, Interrupted(name))
    assert main(arguments) == 130


def test_export_and_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, report = tmp_path / "run", tmp_path / "report.html"
    assert main(["example", str(run), "--decisions", "3"]) == 0
    assert main(["example", str(run)]) == 1
    assert main(["export", str(run), "-o", str(report), "--layer", "blocks.0.mlp.fc1"]) == 0
    assert report.stat().st_size > 1_000_000
    assert main(["export", str(run), "-o", str(report)]) == 1
    assert "exists; choose another name" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), "-o", str(tmp_path / "x.html")]) == 1
    assert "does not exist" in capsys.readouterr().err


def _wait_for_server(process: subprocess.Popen[str]) -> str:
    """The address that the server prints."""
    assert process.stdout is not None
    for line in process.stdout:
        match = re.search(r"http://[\w.\[\]:-]+", line)
        if match:
            return match[0]
    raise AssertionError(f"the server ended with status {process.wait()}")


def _get(url: str) -> str:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:  # refused, or too busy to answer in time
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@pytest.mark.parametrize("way", ["blockell-dashboard", "streamlit run"])
def test_the_server_listens_on_this_machine_only(way: str, good_run: Path) -> None:
    if way == "streamlit run":
        command = ["streamlit", "run", str(APP_SCRIPT), "--server.port=0", "--server.headless=true"]
        command += ["--", "--dir", str(good_run)]
    else:
        command = ["blockell_dashboard", str(good_run), "--headless", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"},
    )
    try:
        url = _wait_for_server(process)
        assert url.startswith("http://127.0.0.1:")
        assert _get(f"{url}/_stcore/health") == "ok"
        assert "<html" in _get(url)
    finally:
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=30)
    assert "Traceback" not in rest


def test_a_missing_directory_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[object] = []
    monkeypatch.setattr(
        "blockell_dashboard._server.serve", lambda *args, **options: served.append(options) or 0
    )
    assert main([str(tmp_path / "later"), "--no-browser"]) == 0
    assert "is not a directory yet" in capsys.readouterr().err
    assert served == [{"address": "127.0.0.1", "port": None, "headless": True}]
