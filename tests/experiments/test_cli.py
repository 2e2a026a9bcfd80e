import dataclasses
import errno
import os
import pathlib

import pytest

from experiments.common.cli import Command, RunOptions, main
from experiments.common.run_dir import RunDirError, StoppedError
from experiments.common.validation import require


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the toy."""

    rate: float = 0.5
    """How fast it goes."""
    names: tuple[str, ...] = ("a",)
    """What it is called."""
    seed: int = 0
    """Where it starts."""

    def __post_init__(self):
        require("rate", self.rate, self.rate > 0, "positive")


@dataclasses.dataclass(frozen=True)
class Options(RunOptions):
    """Options of the toy."""

    workers: int = 1
    """How many work at it."""

    def __post_init__(self):
        require("workers", self.workers, self.workers >= 1, "at least 1")


CONFIGS = {"smoke": Config(rate=0.1), "cpu": Config(), "paper": Config(rate=9.0)}


@pytest.fixture
def call():
    """Runs the toy program; returns its exit code and the calls of its command."""

    def call(*argv, run=None):
        calls = []

        def toy(invocation):
            """Do the toy thing."""
            calls.append(invocation)
            if run is not None:
                run(invocation)

        return main(
            "python -m toy", {"go": Command(CONFIGS, Options, toy)}, argv
        ), calls

    return call


@pytest.mark.parametrize(
    ("argv", "rate"),
    [
        ([], 0.5),
        (["--preset", "smoke"], 0.1),
        (["--preset=paper"], 9.0),
        (["--rate", "3", "--preset", "smoke"], 3.0),
        (["--preset", "smoke", "--rate", "3"], 3.0),
    ],
)
def test_main_preset_gives_defaults_and_flags_override_them(call, argv, rate):
    code, (invocation,) = call("go", *argv)
    assert code == 0
    assert invocation.config == Config(rate=rate)
    assert type(invocation.config) is Config
    assert type(invocation.options) is Options


def test_main_passes_options_and_the_command_line(call):
    argv = [
        "go",
        "--out",
        "a dir",
        "--overwrite",
        "--workers",
        "2",
        "--names",
        "x",
        "y",
    ]
    _, (invocation,) = call(*argv)
    assert invocation.options == Options(
        preset="cpu", out=pathlib.Path("a dir"), overwrite=True, workers=2
    )
    assert invocation.config.names == ("x", "y")
    expected = "python -m toy go --out 'a dir' --overwrite --workers 2 --names x y"
    assert invocation.command == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rate", "-1"], "error: rate must be positive, got -1.0\n"),
        (["--workers", "0"], "error: workers must be at least 1, got 0\n"),
    ],
)
def test_main_invalid_value_is_one_line_and_exit_2(call, capsys, argv, message):
    code, calls = call("go", *argv)
    assert code == 2
    assert calls == []
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([], "Expected one of {go}"),
        (["stop"], "stop"),
        (["go", "--rate", "fast"], "--rate"),
        (["go", "--preset", "huge"], "--preset"),
        (["go", "--preset"], "--preset"),
        (["go", "--colour", "red"], "--colour"),
        (["go", "--pre", "smoke"], "--pre"),
    ],
)
def test_main_unparsable_arguments_exit_2_naming_them(call, capsys, argv, part):
    with pytest.raises(SystemExit) as exit_:
        call(*argv)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert part in error
    assert "Traceback" not in error


def test_main_help_documents_every_field_with_the_presets_default(call, capsys):
    with pytest.raises(SystemExit) as exit_:
        call("go", "--preset", "paper", "--help")
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "Do the toy thing.",
        "--rate FLOAT",
        "How fast it goes. (default: 9.0)",
        "What it is called.",
        "How many work at it.",
        "--preset {smoke,cpu,paper}",
        "--out",
        "--overwrite",
    ):
        assert part in text


def test_main_refused_directory_is_one_message_and_exit_2(call, capsys):
    def run(invocation):
        raise RunDirError("this one is taken")

    code, _ = call("go", run=run)
    assert code == 2
    assert capsys.readouterr().err == "error: this one is taken\n"


@pytest.mark.parametrize(
    ("argv", "again"),
    [
        ([], "the same command goes on"),
        (["--overwrite"], "the same command, without --overwrite, goes on"),
    ],
)
@pytest.mark.parametrize("message", [[], ["Stopped in the middle"]])
def test_main_interrupt_says_how_to_go_on_and_exits_130(
    call, capsys, argv, again, message
):
    def run(invocation):
        raise KeyboardInterrupt(*message)

    code, _ = call("go", *argv, run=run)
    assert code == 130
    stopped = message[0] if message else "Stopped"
    assert capsys.readouterr().err == f"\n{stopped}: {again} from what is saved.\n"


DISK_FULL = "No space left on device"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (StoppedError("A worker was killed"), "A worker was killed"),
        (OSError(errno.ENOSPC, DISK_FULL), f"a file cannot be written ({DISK_FULL})"),
        (
            OSError(errno.ENOSPC, DISK_FULL, "x/y"),
            f"x/y cannot be written ({DISK_FULL})",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "x"),
            "x cannot be written (Permission denied)",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "x"),
            "x cannot be written (Read-only file system)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_main_stopped_by_the_system_says_how_to_go_on_and_exits_1(
    call, capsys, error, message
):
    def run(invocation):
        raise error

    code, _ = call("go", run=run)
    assert code == 1
    err = capsys.readouterr().err
    assert err == f"\n{message}: the same command goes on from what is saved.\n"


def test_main_smoke_says_that_its_numbers_say_nothing(call, capsys):
    call("go", "--preset", "smoke")
    assert "smoke only shows that things run" in capsys.readouterr().err
    call("go")
    assert capsys.readouterr().err == ""


def test_main_smoke_that_is_all_there_is_says_nothing(capsys):
    def toy(invocation):
        """Do the toy thing."""

    command = Command(dict.fromkeys(CONFIGS, Config()), Options, toy)
    assert main("python -m toy", {"go": command}, ["go", "--preset", "smoke"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error",
    [ValueError("a bug"), FileNotFoundError(errno.ENOENT, os.strerror(2), "a bug")],
)
def test_main_bug_keeps_its_traceback(call, error):
    def run(invocation):
        raise error

    with pytest.raises(type(error), match="a bug"):
        call("go", run=run)


def test_run_path_names_what_differs_from_the_preset(call):
    _, (plain,) = call("go", "--preset", "smoke", "--seed", "3")
    assert plain.run_path("toy", "go-seed3", ("seed",)) == pathlib.Path(
        "runs/toy/go-seed3"
    )
    _, (changed,) = call("go", "--rate", "2", "--names", "x", "y")
    assert changed.run_path("toy", "go") == pathlib.Path(
        "runs/toy/go-rate=2.0-names=x+y"
    )
    _, (explicit,) = call("go", "--rate", "2", "--out", "here")
    assert explicit.run_path("toy", "go") == pathlib.Path("here")


@pytest.fixture
def settings_file(tmp_path):
    """A file in a directory whose name has a colon."""
    path = tmp_path / "12:30" / "settings.json"
    path.parent.mkdir()
    return path


def test_main_settings_come_between_preset_and_flags(call, settings_file):
    settings_file.write_text('{"rate": 3, "names": ["x"], "seed": 7}')
    arguments = ("--preset", "smoke", "--settings", str(settings_file), "--seed", "8")
    code, (invocation,) = call("go", *arguments)
    assert code == 0
    assert invocation.config == Config(rate=3.0, names=("x",), seed=8)
    assert type(invocation.config.rate) is float
    # The default directory's name tells them from the preset's.
    assert "rate=3.0" in str(invocation.run_path("toy", "run"))


def test_main_settings_are_a_part_of_the_file(call, settings_file):
    settings_file.write_text('{"part": {"seed": 7}}')
    code, (invocation,) = call("go", "--settings", f"{settings_file}:part")
    assert code == 0
    assert invocation.config == Config(seed=7)


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ('{"part": 1}', "", "has part, which this command does not know; FILE:KEY"),
        ('{"part": {"x": 1}}', ":part", "has x, which this command does not know"),
        ('{"part": 1}', ":part", "must be a JSON object, got 1"),
        ('{"rate": "fast"}', "", "rate must be float, got 'fast'"),
        ('{"seed": true}', "", "seed must be int, got True"),
        ('{"names": "x"}', "", "names must be tuple, got 'x'"),
        ("{", "", "cannot be read"),
    ],
)
def test_main_settings_that_do_not_fit_exit_2(
    text, key, message, call, settings_file, capsys
):
    settings_file.write_text(text)
    code, calls = call("go", "--settings", f"{settings_file}{key}")
    assert (code, calls) == (2, [])
    assert message in capsys.readouterr().err
