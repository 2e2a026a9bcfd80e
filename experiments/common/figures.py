"""Commands that draw figures, each from a CSV that it can be drawn from again."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from experiments.common.cli import FigureOptions, Invocation, entered
from experiments.common.run_dir import RunDir, RunDirError, save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Options = TypeVar("Options", bound=FigureOptions)
# The figure that a table shows, by the name of both.
Drawings = Mapping[str, Callable[[Sequence[Mapping[str, Any]]], "Figure"]]


def figure_dir(
    path: Path,
    experiment: str,
    call: Invocation[Any, Options],
    config: Any,
    figures: Sequence[str],
    parts: str,
) -> AbstractContextManager[RunDir]:
    """The run directory of a command that draws `figures`.

    Args:
      path: the directory.
      experiment: name of the experiment and its subcommand.
      call: what was asked for.
      config: what defines the result.
      figures: names without extension; a CSV and a PNG belong to each.
      parts: name of the experiment whose runs are its parts.
    """
    return entered(call, path, experiment, config, outputs_of(figures), parts)


def outputs_of(figures: Iterable[str]) -> list[str]:
    """The files of figures: a table and a picture of each."""
    return [f"{figure}{end}" for figure in figures for end in (".csv", ".png")]


def finish_figures(
    run: RunDir,
    drawings: Drawings,
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    summary: Mapping[str, Any],
) -> None:
    """Writes each figure's CSV, draws it from there as --from does, and finishes."""
    for name, rows in tables.items():
        run.write_metrics(rows, f"{name}.csv")
        run.save_figure(
            f"{name}.png", drawings[name](read_table(run.path / f"{name}.csv"))
        )
    run.finish(summary)


def redraw(options: FigureOptions, drawings: Drawings, names: Sequence[str]) -> bool:
    """With --from, draws figures from there, beside their CSV or in --out.

    Returns:
      Whether that is what was asked for, so that nothing is left to do.
    """
    if options.results is None:
        return False
    out = options.out or options.results
    for name in names:
        source = options.results / f"{name}.csv"
        try:
            figure = drawings[name](read_table(source))
        except KeyError as error:
            raise RunDirError(
                f"{source} has no column {error}: it is not of this figure"
            ) from None
        out.mkdir(parents=True, exist_ok=True)
        save_png(out / f"{name}.png", figure)
        print(f"Figure: {out / f'{name}.png'}")
    return True


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV; what reads as a number is one.

    Raises:
      RunDirError: there is no such file, or it has no rows.
    """

    def value(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text

    try:
        reader = csv.DictReader(io.StringIO(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise RunDirError(
            f"{path} is not there: --from takes the directory of a finished figure, "
            "--reruns a table of seeds"
        ) from None
    rows = [{name: value(text) for name, text in row.items()} for row in reader]
    if not rows:
        raise RunDirError(f"{path} has no rows: make the figure again without --from")
    return rows
