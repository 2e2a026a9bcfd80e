"""Command lines from dataclasses: subcommands, presets, overrides, exit codes.

An experiment's `__main__.py` lists its subcommands as `Command`s and hands them to
`main`; a `Group` is a subcommand with subcommands of its own. The fields of a command's
config become flags, their docstrings the help; `--preset` picks the values, which
`--settings` and then the other flags override.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Generic, TypeVar, get_args

import tyro

from experiments.common.choices import Preset as Preset
from experiments.common.files import NOT_WRITTEN
from experiments.common.run_dir import RunDir, RunDirError, StoppedError
from experiments.common.settings import load_settings
from experiments.common.validation import require_at_least

DEFAULT_PRESET: Preset = "cpu"

# As `Path` leaves it, with one slash.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where to write, and how to treat what is there."""

    preset: Preset = DEFAULT_PRESET
    """Settings that other flags override: smoke only shows that things run, cpu is for
    two cores, paper for the paper's size with this project's recipe."""
    settings: str | None = None
    """JSON file with settings that other flags override, or FILE:KEY for a part of it,
    such as selected.json:held_out of a search."""
    out: Path | None = None
    """Run directory; without it a readable name under runs/."""
    overwrite: bool = False
    """Discard the run that the directory holds and start again."""


@dataclasses.dataclass(frozen=True)
class WorkerOptions(RunOptions):
    """Where to write, and with how many processes."""

    workers: int = 1
    """Runs at the same time, each in a process of its own."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "workers")


@dataclasses.dataclass(frozen=True)
class FigureOptions(WorkerOptions):
    """Where to write, with how many processes, and what is there already."""

    results: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Directory with the CSV of an earlier run: draws the figure again, beside it or in
    --out, and trains nothing. Other flags say nothing then."""


@dataclasses.dataclass(frozen=True)
class SearchOptions(WorkerOptions):
    """Where to write, with how many processes, and where the trials are kept."""

    storage: Path | None = None
    """Journal file that several commands share, each with an --out of its own, also on
    several machines that see the file; without it a journal in the run directory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Not shown: a URL may hold a password.
        if self.storage is not None and _URL.match(str(self.storage)):
            raise ValueError(
                "storage must be the path of a journal file, got a URL: several "
                "machines share a search through a journal on a file system of theirs"
            )


Config = TypeVar("Config")
Options = TypeVar("Options", bound=RunOptions)


@dataclasses.dataclass(frozen=True)
class Invocation(Generic[Config, Options]):
    """One call of a subcommand, parsed and validated."""

    config: Config
    options: Options
    preset_config: Config
    """The preset's values, before any flag."""
    command: str
    """The command line, for the manifest."""

    def run_path(self, experiment: str, name: str, named: Sequence[str] = ()) -> Path:
        """--out, or runs/EXPERIMENT/NAME with every setting that is not the preset's.

        Args:
          experiment: name of the experiment.
          name: what tells its runs apart at a glance: method, preset, seed.
          named: config fields that `name` covers already.
        """
        if self.options.out is not None:
            return self.options.out
        preset, config = vars(self.preset_config), vars(self.config)
        changes = [
            f"-{field}={_short(config[field])}"
            for field in config
            if field not in named and config[field] != preset[field]
        ]
        return Path("runs") / experiment / (name + "".join(changes))


def _short(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclasses.dataclass(frozen=True)
class Command(Generic[Config, Options]):
    """A subcommand.

    `configs` maps each preset to its config, an instance of a frozen dataclass
    that raises ValueError for invalid values when it is constructed. `run` gets
    the parsed call; its docstring is the subcommand's help.
    """

    configs: Mapping[Preset, Config]
    options: type[Options]
    run: Callable[[Invocation[Config, Options]], None]


def later(
    target: str,
    description: str,
    configs: Mapping[Preset, Config],
    options: type[Options],
    *arguments: Any,
) -> Command[Config, Options]:
    """A subcommand that is imported when it runs: --help need not wait for JAX.

    Args:
      target: its function, as MODULE:NAME.
      description: its help.
      configs: as `Command` has them.
      options: likewise.
      arguments: what the function takes behind the call.
    """

    def run(call: Invocation[Config, Options]) -> None:
        module, _, name = target.partition(":")
        getattr(importlib.import_module(module), name)(call, *arguments)

    run.__doc__ = description
    return Command(configs, options, run)


@dataclasses.dataclass(frozen=True)
class Group:
    """Subcommands behind one more word, and the line that the help has for them."""

    help: str
    commands: Mapping[str, Command[Any, Any]]


@contextlib.contextmanager
def entered(
    call: Invocation[Any, Options],
    path: Path,
    experiment: str,
    config: Any = None,
    outputs: Sequence[str] = (),
    parts: str | None = None,
) -> Iterator[RunDir]:
    """The run directory that a command works in, which it names.

    Args:
      call: what was asked for.
      path: the directory.
      experiment: name of the experiment and its subcommand.
      config: what defines the result, if that is not the call's config.
      outputs: see `RunDir`.
      parts: likewise.
    """
    with (
        RunDir(
            path,
            experiment,
            call.config if config is None else config,
            seed=getattr(call.config, "seed", None),
            command=call.command,
            overwrite=call.options.overwrite,
            outputs=outputs,
            parts=parts,
        ) as run,
        announced(run),
    ):
        yield run


@contextlib.contextmanager
def announced(run: RunDir) -> Iterator[None]:
    """Says which directory a command works in, whether anything is left to do, and at
    the end what the directory holds.
    """
    state = "finished; --overwrite runs it again" if run.finished else "running"
    print(f"{run.path}: {state}", flush=True)
    yield
    print(f"{run.path} holds {', '.join(run.contents())}")


def main(
    prog: str,
    commands: Mapping[str, Command[Any, Any] | Group],
    argv: Sequence[str],
) -> int:
    """Runs one of `commands` and returns the process's exit code.

    0: done. 1: a failure, with traceback; or stopped by the system, with one clear
    message on stderr. 2: refused, likewise. 130: stopped by Ctrl-C.

    Args:
      prog: how the program is called, such as `python -m experiments.synthetic`.
      commands: subcommands by name.
      argv: the arguments after `prog`.
    """
    named = commands.get(argv[0]) if argv else None
    if isinstance(named, Group):
        return main(f"{prog} {argv[0]}", named.commands, argv[1:] or ["--help"])
    preset = _find_preset(argv)
    try:
        settings = _find_settings(argv, named, preset)
    except ValueError as error:
        return _fail(str(error))
    command, draft, draft_options = tyro.extras.subcommand_cli_from_dict(
        {
            name: _parser(command, preset, settings if command is named else {})
            for name, command in commands.items()
        },
        prog=prog,
        args=list(argv),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    preset_config = command.configs[preset]
    try:
        config = type(preset_config)(**vars(draft))
        options = command.options(**vars(draft_options))
    except ValueError as error:
        return _fail(str(error))
    line = shlex.join([*prog.split(), *argv])
    if options.preset == "smoke" and command.configs["smoke"] != command.configs["cpu"]:
        print(
            "note: --preset smoke only shows that things run; its numbers say nothing",
            file=sys.stderr,
        )
    try:
        command.run(Invocation(config, options, preset_config, line))
    except RunDirError as error:
        return _fail(str(error))
    except KeyboardInterrupt as interrupt:
        _say_how_to_go_on(str(interrupt) or "Stopped", options)
        return 130
    except StoppedError as error:
        _say_how_to_go_on(str(error), options)
        return 1
    except OSError as error:
        if error.errno not in NOT_WRITTEN:
            raise
        where = error.filename or "a file"
        _say_how_to_go_on(f"{where} cannot be written ({error.strerror})", options)
        return 1
    return 0


def _say_how_to_go_on(stopped: str, options: RunOptions) -> None:
    again = ", without --overwrite," if options.overwrite else ""
    print(
        f"\n{stopped}: the same command{again} goes on from what is saved.",
        file=sys.stderr,
    )


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _find_preset(argv: Sequence[str]) -> Preset:
    """The preset that `argv` asks for; whether it is a valid one is for tyro to say."""
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("--preset", choices=get_args(Preset), default=DEFAULT_PRESET)
    try:
        preset: Preset = parser.parse_known_args(argv)[0].preset
    except argparse.ArgumentError:
        return DEFAULT_PRESET
    return preset


def _find_settings(
    argv: Sequence[str], command: Command[Any, Any] | None, preset: Preset
) -> dict[str, Any]:
    """Contents of the file that `argv` names, if it does."""
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("--settings")
    try:
        source = parser.parse_known_args(argv)[0].settings
    except argparse.ArgumentError:  # without a value, which tyro says
        return {}
    if source is None or command is None:
        return {}
    return load_settings(source, command.configs[preset])


def _parser(
    command: Command[Any, Any] | Group, preset: Preset, settings: Mapping[str, Any]
) -> Callable[..., Any]:
    """A function from whose signature tyro makes the subcommand's flags."""
    if isinstance(command, Group):

        def listed() -> None:
            """Only for the list of subcommands: `main` has taken groups out before."""

        listed.__doc__ = command.help
        return listed
    config = _unchecked(command.configs[preset], settings)
    options = _unchecked(command.options(preset=preset))

    def parse(config: Any, run: Any) -> Any:
        return command, config, run

    parse.__doc__ = command.run.__doc__
    parse.__annotations__ = {"config": type(config), "run": type(options)}
    parse.__defaults__ = (config, options)
    return parse


def _unchecked(
    instance: Any, settings: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """`instance` with other settings, as a subclass that takes any values.

    tyro would report a ValueError from a constructor under a name of its own; the
    values are validated once it is done.
    """
    cls = type(instance)
    body = {
        "__post_init__": lambda self: None,
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
    }
    draft: Any = dataclasses.dataclass(frozen=True)(type(cls.__name__, (cls,), body))
    return draft(**{**vars(instance), **settings})
