"""The command on models of packages that are here; its table and its page."""

import ast
import csv
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

from tests.models import __main__ as command
from tests.models import check, report
from tests.models.table import FAMILIES

HERE = pathlib.Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "results"


def test_examine_a_model_of_a_released_package_is_equal():
    found = check.examine("equinox_nn", "weight_norm")
    assert (found["outcome"], found["detail"]) == ("equal", "")
    assert found["decided"] > 0.9
    assert sum(found["rules"].values()) == found["components"] > 0
    assert found["versions"].keys() == {"jax", "equinox"}


def test_examine_a_wrong_gramian_is_wrong(monkeypatch):
    ask = check.ask

    def ask_wrongly(grads, weights):
        answers = ask(grads, weights)
        return answers | {"gramian": jax.tree.map(jnp.negative, answers["gramian"])}

    monkeypatch.setattr(check, "ask", ask_wrongly)
    found = check.examine("haiku_nets", "deep_rnn")
    assert found["outcome"] == "wrong"
    assert "gramian of" in found["detail"]


def test_every_architecture_is_a_function_of_its_family_and_the_reverse():
    for family, entry in FAMILIES.items():
        tree = ast.parse((HERE / "families" / f"{family}.py").read_text())
        public = [
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        ]
        assert sorted(public) == sorted(entry.architectures), family


def test_command_goes_on_behind_a_model_that_ends_its_process(monkeypatch, tmp_path):
    # In place of `tests.models.check`: dies at the second model.
    script = (
        "import json, os, sys\n"
        "family, *names = sys.argv[1:]\n"
        "for name in names:\n"
        "    if name == 'linen_conv_lstm': os._exit(3)\n"
        "    print(json.dumps({'family': family, 'name': name, 'outcome': 'equal',\n"
        "        'detail': '', 'rules': {'scan': 1}, 'fallbacks': {}}), flush=True)\n"
    )
    monkeypatch.setattr(command, "CHECK", (sys.executable, "-c", script))
    names = ["linen_bidirectional_rnn", "linen_conv_lstm", "nnx_u_net"]
    arguments = ["--out", str(tmp_path), *(f"flax_nn.{name}" for name in names)]
    assert command.main(arguments) == 1
    results = json.loads((tmp_path / "models.json").read_text())["results"]
    outcomes = {found["name"]: found["outcome"] for found in results}
    assert outcomes == dict(zip(names, ["equal", "crashed", "equal"], strict=True))

    # The same once more, for one of them: the others stay.
    monkeypatch.setattr(command, "CHECK", (sys.executable, "-c", "pass"))
    assert command.main([*arguments[:2], "flax_nn.nnx_u_net"]) == 1
    with open(tmp_path / "models.csv", newline="") as file:
        rows = [row["outcome"] for row in csv.DictReader(file)]
    assert rows == ["equal", "crashed", "crashed"]


def test_command_refuses_an_unknown_name():
    with pytest.raises(SystemExit, match=r"unknown: flax_nn\.lstm; families: "):
        command.main(["flax_nn.lstm"])


def test_kept_results_are_of_all_models_and_right_and_on_the_page():
    results = json.loads((DOCS / "models.json").read_text())["results"]
    found = [(result["family"], result["name"]) for result in results]
    assert found == command.chosen(())
    assert {result["outcome"] for result in results} <= set(command.GOOD)
    with open(DOCS / "models.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [report.row_of(r) for r in results]
    page = (DOCS / "models.md").read_text()
    assert report.page_table(results) in page
    assert f"all {len(results)} architectures" in page
