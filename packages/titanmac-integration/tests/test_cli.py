"""The command line, as a user calls it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from blockell_format.snapshots import open_run
from titanmac_integration import TitanMACConfig, TrainingConfig, load_checkpoint
from titanmac_integration._cli.flags import field_docs, model_config
from titanmac_integration.cli import build_parser, main

SMALL = [
    *("--d-model", "32", "--n-heads", "4", "--d-ff", "64", "--block-sparse-tile-size", "8"),
    *("--batch-size", "4", "--seq-len", "16", "--level-periods", "1,2,4", "--device", "cpu"),
    *("--eval-every", "0", "--quiet"),
]


def test_train_then_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    flags = ["--tasks", "arithmetic", "prose", "--steps", "6", *SMALL, "--no-tie-weights"]
    assert main(["train", "--out", str(out), *flags]) == 0
    assert "untrained  trained" in capsys.readouterr().out
    measures = json.loads((out / "results.json").read_text())["measures"]
    assert set(measures) == {"eval/arithmetic/exact_match", "eval/prose/bits_per_byte"}
    assert main(["eval", str(out), "--tasks", "prose", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert f"{measures['eval/prose/bits_per_byte']:.2f}" in shown


def test_flags_reach_the_configuration(tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = [
        *("--n-layers", "3", "--block-sparse-layers", "0,2", "--dropout", "0.1"),
        *("--block-sparse-density", "0:0.25,2:0.75", "--block-sparse-candidate-score", "outer"),
        *("--block-sparse-components", "mlp,attention", "--block-sparse-row-group", "auto"),
    ]
    command = ["train", "--tasks", "prose", "--steps", "1", "--out", str(out), *SMALL]
    assert main([*command, *flags]) == 0
    config = load_checkpoint(out).config
    assert config.block_sparse_layers == (0, 2)
    assert config.block_sparse_density == {0: 0.25, 2: 0.75}
    assert config.block_sparse_components == ("mlp", "attention")
    assert config.block_sparse_row_group == "auto"
    assert config.dropout == 0.1
    assert main([*command, "--force", "--block-sparse-layers", "all"]) == 0
    assert load_checkpoint(out).config.block_sparse_layers is None


@pytest.mark.parametrize(
    ("preset", "flags", "switch"),
    [
        ("demo", ["--titans-variant", "MAG"], "--use-neural-memory"),
        ("demo", ["--memory-width", "16"], "--use-neural-memory"),
        ("small", ["--block-sparse-density", "0.25"], "--use-block-sparse"),
    ],
)
def test_a_flag_of_a_part_that_is_off_is_refused(
    preset: str,
    flags: list[str],
    switch: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["train", "--preset", preset, "--out", str(tmp_path / "run"), *flags]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert f"{flags[0]} (={flags[1]}) has no effect without {switch}; add that, or leave" in error
    arguments = build_parser().parse_args([*command, switch])
    assert getattr(model_config(arguments, preset), switch[2:].replace("-", "_"))
    off = build_parser().parse_args([*command, switch.replace("--", "--no-")])
    model_config(off, preset)  # whoever switches a part off knows that it is off


def test_every_field_is_a_flag_with_help() -> None:
    text = build_parser()._subparsers._group_actions[0].choices["train"].format_help()
    for cls in (TitanMACConfig, TrainingConfig):
        docs = field_docs(cls)
        for field in dataclasses.fields(cls):
            assert "--" + field.name.replace("_", "-") in text
            assert docs[field.name].split()[0] in text


def test_an_existing_run_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    command = ["train", "--tasks", "prose", "--steps", "4", "--out", str(out), *SMALL]
    assert main(command) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert main(command) == 1
    error = capsys.readouterr().err
    assert f"--out (={out}) already holds a run; choose another directory, or pass --force" in error
    assert all(path.read_bytes() == content for path, content in before.items())
    assert main([*command, "--lr", "-1", "--force"]) == 1, "checked before anything is deleted"
    assert main([*command, "--seq-len", "999", "--force"]) == 1
    (tmp_path / "short.txt").write_text("too short")
    short = ["--data", str(tmp_path / "short.txt"), "--held-out", "0.3"]
    assert main([*command, *short, "--force"]) == 1
    assert "seq_len (=16) must be at most 7, the length of the tr" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main([*command, "--wandb", "project", "--force"]) == 1
    assert "pip install 'titanmac-integration[wandb]'" in capsys.readouterr().err
    assert all(path.read_bytes() == content for path, content in before.items())
    assert main([*command, "--steps", "8", "--force"]) == 0
    assert open_run(out).steps == [0, 4, 8]
    assert (out / "notes.txt").read_text() == "mine"


def test_force_leaves_what_another_process_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["train", "--tasks", "prose", "--steps", "1", "--out", str(out), *SMALL]
    assert main(command) == 0
    before = {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
    write = "import sys, pathlib; from blockell_format.snapshots import DirectoryLock as Lock;"
    write += "lock = Lock(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", write, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        assert main([*command, "--force"]) == 1
        other.stdin.close()
    assert f"another process (pid {other.pid}) is writing to {out}" in capsys.readouterr().err
    for path, content in before.items():
        assert path.name == ".writer.lock" or path.read_bytes() == content
    assert main([*command, "--force"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--d-model", "33"], r"d_model (=33) must be a multiple of 2 * n_heads (=8)"),
        (["--lr", "0"], "lr (=0.0) must be a number above 0"),
        (["--steps", "0"], "--steps (=0) must be at least 1"),
        (["--checkpoint-every", "-1"], "checkpoint_every (=-1) must be 0 (off) or more"),
        (["--keep-checkpoints", "0"], "keep (=0) must be an integer of at least 1"),
        (["--accumulation-steps", "9"], "accumulation_steps (=9) must be at most batch_size (=4)"),
        (["--precision", "int4"], "precision (='int4') must be one of fp32, bf16, fp16"),
        (["--tokenizer", "x"], "tokenizer (='x') must be \"bytes\" or the path of a tokenizer"),
        (["--device", "abacus"], "--device (=abacus) cannot be used"),
        (["--device", "meta"], "--device (=meta) cannot be used"),
        (["--vocab-size", "100"], "vocab_size (=100) must be at least 256"),
        (["--level-periods", "1,2"], "level_periods (=(1, 2)) must be three integers"),
        (["--held-out", "0.2"], "--held-out (=0.2) goes with --data; the built-in tasks have"),
        (["--dense", "--use-block-sparse"], "--dense and --use-block-sparse exclude each other"),
    ],
)
def test_bad_flags_make_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), *SMALL, *flags]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_out_may_not_be_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    assert main(["train", "--out", str(path), "--steps", "1", *SMALL]) == 1
    assert "must be a directory, but is a file" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_eval_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tmp_path)]) == 1
    assert "must hold a checkpoint" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    assert main(["eval", str(tmp_path / "file")]) == 1
    assert "file') must be a directory; give that of a run" in capsys.readouterr().err


def test_ctrl_c_is_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("titanmac_integration._cli.evaluate.newest_model", interrupted)
    assert main(["eval", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "titanmac eval: interrupted\n"


TWICE = (["--block-sparse-density", "0:0.5,0:0.7,1:0.5"], ["--cms-levels", "a:1,a:2"])


@pytest.mark.parametrize("flags", TWICE)
def test_nothing_is_given_twice(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--out", "x", *flags])
    assert f"{flags[0]}: invalid" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["train"], ["train", "--out", "x", "--tasks", "x"]])
def test_usage_errors_exit_with_two(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
