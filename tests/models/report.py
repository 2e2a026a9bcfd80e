"""What was found, as rows of a table: on the screen and in models.csv."""

import itertools

from experiments.common.tables import format_rows
from tests.models.table import FAMILIES

COLUMNS = ("packages", "model", "outcome", "rules", "stacked because", "detail")
_WIDTHS = dict(zip(COLUMNS, ("<24", "<46", "<8", "<42", "<40", "<60"), strict=True))


def row_of(found):
    """A result of `check.examine` as a row of models.csv."""
    family = FAMILIES[found["family"]]
    return {
        "packages": ", ".join(map(" ".join, found.get("versions", {}).items())),
        "model": family.architectures[found["name"]].what,
        "outcome": found["outcome"],
        "rules": shares(found.get("rules") or {}),
        "stacked because": "; ".join(
            f"{reason} ({number})"
            for reason, number in (found.get("fallbacks") or {}).items()
        ),
        "detail": found["detail"],
    }


def shares(rules):
    """Rule -> components as `rule 60 %`, largest first."""
    total = sum(rules.values())
    ordered = sorted(rules.items(), key=lambda item: -item[1])
    return ", ".join(f"{rule} {number / total:.0%}" for rule, number in ordered)


def text_table(results):
    columns = {column: (column, _WIDTHS[column]) for column in COLUMNS}
    return format_rows(columns, [row_of(found) for found in results])


def page_table(results):
    """The table of docs/results/models.md, a group of rows for each family."""
    columns = ("model", "outcome", "rules", "stacked because")
    if any(found["detail"] for found in results):
        columns = (*columns, "detail")
    lines = [columns, ["---"] * len(columns)]
    for _, group in itertools.groupby(results, key=lambda found: found["family"]):
        rows = [row_of(found) for found in group]
        lines.append([f"**{rows[0]['packages']}**", *[""] * (len(columns) - 1)])
        lines += [[row[column] for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
