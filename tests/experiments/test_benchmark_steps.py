"""Single training steps and their growth, without PyTorch; bad input."""

import csv
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmark import contestants, growth, loops, steps, workloads
from experiments.benchmark.__main__ import COMMANDS, PROG
from experiments.common.cli import main
from experiments.common.run_dir import RunDirError

SMALL = workloads.Sizes(shrink=16)


def run(command, *arguments):
    return main(PROG, COMMANDS, [command, "--preset", "smoke", *map(str, arguments)])


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_steps_measures_every_contestant(tmp_path, capsys):
    arguments = ("--out", tmp_path, "--workloads", "mlp_16x128")
    assert run("steps", *arguments, "--deep-layers", 1) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["workloads"]) == ["mlp_16x128"]
    for result in summary["workloads"].values():
        for name in ("median_seconds_per_step", "temp_bytes", "compile_seconds"):
            assert list(result[name]) == list(contestants.CONTESTANTS), name
            assert all(value > 0 for value in result[name].values()), name
        losses = list(result["first_step_loss"].values())
        np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
        assert result["time_over_plain"]["plain"] == 1
        assert result["time_over_fused"]["fused"] == 1
        assert result["temp_minus_plain_in_params"]["plain"] == 0
        # What stacking takes shows.
        assert result["temp_bytes"]["vmap"] > result["temp_bytes"]["plain"]
    assert summary["deep_transformer"]["layers"] == 1
    assert set(summary["deep_transformer"]["compile_seconds"]) == {"plain", "fused"}
    assert "torch" not in summary

    rows = rows_of(tmp_path / "steps.csv")
    assert [(row["workload"], row["round"]) for row in rows] == [
        (name, index) for name in summary["workloads"] for index in ("1", "2")
    ]
    assert list(rows[0]) == ["workload", "round", *contestants.CONTESTANTS]
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert "| mlp_16x128 | hardvary, fused |" in table
    assert "| transformer, 1 layers | hardvary, fused |" in table

    assert run("steps", *arguments, "--deep-layers", 1) == 0
    assert f"{tmp_path}: finished; --overwrite" in capsys.readouterr().out


def test_growth_measures_both_directions(tmp_path, capsys):
    assert run("growth", "--out", tmp_path, "--envs", 2, "--widths", 8) == 0
    names = list(contestants.CONTESTANTS)
    envs = rows_of(tmp_path / "growth_envs.csv")
    assert [(row["size"], row["contestant"]) for row in envs] == [
        ("2", name) for name in names
    ]
    widths = rows_of(tmp_path / "growth_widths.csv")
    assert [row["contestant"] for row in widths] == names
    assert all(float(row["seconds_per_step"]) > 0 for row in envs + widths)
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert "| environments | step |" in capsys.readouterr().out


def test_loops_measures_parts_and_a_scan_of_steps(tmp_path, capsys):
    assert run("loops", "--out", tmp_path, "--workloads", "mlp_80x1") == 0
    rows = rows_of(tmp_path / "loops.csv")
    # Five environments, so that a second part of five has one each.
    assert [(r["contestant"], r["parts"], r["in_scan"]) for r in rows] == [
        (way, parts, in_scan)
        for way in loops.WAYS
        for parts, in_scan in [("1", "False"), ("5", "False"), ("1", "True")]
    ]
    assert all(float(row["seconds_per_step"]) > 0 for row in rows)
    assert all(int(row["temp_bytes"]) > 0 for row in rows)
    assert (tmp_path / "loops.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert "| mlp_80x1 | 1/5 |" in table
    assert "| mlp_80x1 | all, 4 steps in a scan |" in table


@pytest.mark.parametrize("way", loops.WAYS)
def test_microbatches_and_scanned_steps_end_where_single_steps_do(way):
    workload = workloads.build("cnn_80x1", SMALL)
    step, arguments = loops.make_step(way, workload, 1)
    params, state, batch = arguments
    first_loss = None
    for _ in range(loops.SCANNED):
        params, state, loss = jax.jit(step)(params, state, batch)
        first_loss = loss if first_loss is None else first_loss
    in_parts, _ = loops.make_step(way, workload, 5)
    for other in (loops.scanned(step), loops.scanned(in_parts)):
        actual, _, loss = jax.jit(other)(*arguments)
        np.testing.assert_allclose(loss, first_loss, rtol=1e-5)
        moved = jax.tree.map(jnp.subtract, params, arguments[0])
        again = jax.tree.map(jnp.subtract, actual, arguments[0])
        assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(moved)) > 0
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=0.01, atol=1e-7),
            again,
            moved,
        )


def shapes_of(name, sizes):
    """Parameters, batch and losses of a workload, without computing them."""

    def evaluate():
        workload = workloads.build(name, sizes)
        losses = jax.vmap(workload.loss_fn, (None, 0))(workload.params, workload.batch)
        return jax.tree.leaves(workload.params), workload.batch, losses

    return jax.eval_shape(evaluate)


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_workload_has_float32_parameters_and_one_loss_per_environment(name):
    params, (inputs, _), losses = shapes_of(name, SMALL)
    assert {leaf.dtype for leaf in params} == {np.dtype("float32")}
    assert losses.shape == inputs.shape[:1]


@pytest.mark.parametrize(
    ("name", "batch", "parameters"),
    [
        ("mlp_80x1", (80, 1), 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10),
        ("mlp_16x128", (16, 128), 18 * 256 + 256 + 2 * (256 * 256 + 256) + 257),
        ("cnn_80x1", (80, 1), 896 + 18496 + 73856 + 2048 * 10 + 10),
        # 3x3 kernels and norms from 16 to 128 channels, and a head without biases.
        ("fastresnet_80x1", (80, 1), 9 * 45_616 + 2 * 560 + 1280),
    ],
)
def test_workload_at_full_size_is_the_one_it_names(name, batch, parameters):
    params, (inputs, _), _ = shapes_of(name, workloads.Sizes())
    assert inputs.shape[:2] == batch
    assert sum(leaf.size for leaf in params) == parameters


def test_masked_contestants_make_the_same_update():
    workload = workloads.build("mlp_16x128", SMALL)
    updated = {}
    for name in ("vmap", "scan", "fused"):
        step, arguments = contestants.make_step(name, workload)
        updated[name] = jax.tree.leaves(jax.jit(step)(*arguments)[0])
    start = jax.tree.leaves(workload.params)
    assert any((a != b).any() for a, b in zip(updated["vmap"], start, strict=True))
    for name in ("scan", "fused"):
        for a, b in zip(updated[name], updated["vmap"], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-7)


def test_stacked_gradients_are_left_out_where_they_are_too_large(monkeypatch):
    workload = workloads.image_mlp(4, 8)
    assert contestants.jax_contestants(workload) == contestants.CONTESTANTS
    monkeypatch.setattr(contestants, "STACKED_LIMIT", 4 * workload.param_bytes)
    assert "vmap" not in contestants.jax_contestants(workload)


def test_measure_takes_as_many_steps_as_fit_and_refuses_other_losses():
    def contestant(seconds, loss):
        return lambda num_steps: {"seconds": seconds, "loss": loss}

    fast, slow = contestant(0.01, 2.0), contestant(5.0, 2.0)
    _, taken, rows = steps.measure({"fast": fast, "slow": slow}, 3, 0.1, "")
    assert taken == {"fast": 10, "slow": 1}
    assert rows[2] == {"round": 3, "fast": 0.01, "slow": 5.0}
    for loss in (2.01, float("nan")):
        with pytest.raises(RunDirError, match=r"do not train the same.*first step"):
            steps.measure({"fast": fast, "other": contestant(1.0, loss)}, 3, 0.1, "")


def test_rows_get_the_columns_of_all():
    rows = [
        {"workload": "a", "round": 1, "plain": 1.0},
        {"workload": "b", "round": 1, "plain": 1.0, "vmap": 2.0},
    ]
    assert steps.with_all_columns(rows)[0] == {**rows[0], "vmap": None}


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("steps", ["--rounds", "0"], "rounds must be at least 1, got 0"),
        ("steps", ["--shrink", "0"], "shrink must be at least 1, got 0"),
        ("steps", ["--deep-layers", "-1"], "deep_layers must be at least 0, got -1"),
        (
            "steps",
            ["--round-seconds", "nan"],
            "round_seconds must be in [0, 3600), got nan",
        ),
        (
            "steps",
            ["--workloads", "mlp_80x1", "mlp_80x1"],
            "workloads must be one or more different ones, got "
            "('mlp_80x1', 'mlp_80x1')",
        ),
        (
            "growth",
            ["--envs", "8", "4"],
            "envs must be one or more in ascending order, got (8, 4)",
        ),
        ("growth", ["--widths", "0"], "widths must be at least 1 each, got (0,)"),
        ("growth", ["--base-envs", "0"], "base_envs must be at least 1, got 0"),
        (
            "loops",
            ["--parts", "2", "1"],
            "parts must be one or more in ascending order, got (2, 1)",
        ),
        ("loops", ["--rounds", "0"], "rounds must be at least 1, got 0"),
    ],
)
def test_invalid_value_is_one_line_and_exit_2(command, arguments, message, capsys):
    assert run(command, *arguments) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_steps_unknown_workload_is_refused_with_the_choices(capsys):
    with pytest.raises(SystemExit):
        run("steps", "--workloads", "vgg")
    assert "mlp_80x1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="workloads must be one of mlp_80x1, "):
        steps.StepsConfig(workloads=("vgg",))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "No such file"),
        ("exit 1", "the PyTorch process ended early"),
        ("echo '{\"threads\": 0}'; cat >/dev/null", "PyTorch does not take"),
    ],
)
def test_steps_with_an_interpreter_that_fails_says_so(
    tmp_path, capsys, script, message
):
    python = tmp_path / "python"
    if script is not None:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    arguments = ("--workloads", "mlp_80x1", "--torch-python", python)
    assert run("steps", "--out", tmp_path / "run", *arguments) == 2
    assert message in capsys.readouterr().err


def test_presets_are_valid_and_cover_every_workload():
    assert steps.PRESETS["cpu"].workloads == workloads.WORKLOADS
    assert set(workloads.LABELS) == set(workloads.ALL_WORKLOADS)
    assert set(contestants.COLORS) == set(contestants.LABELS)
    assert growth.PRESETS["cpu"].envs[-1] == 1024
