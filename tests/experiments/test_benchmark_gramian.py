"""Steps that weight environments, beside other systems that are not installed here."""

import csv
import functools
import io
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.benchmark import contestants, gramian, steps, workloads
from experiments.benchmark.__main__ import COMMANDS, PROG
from experiments.common.cli import main
from experiments.common.run_dir import RunDirError

SMALL = workloads.Sizes(shrink=16)


def run(*arguments):
    return main(PROG, COMMANDS, ["gramian", "--preset", "smoke", *map(str, arguments)])


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def answering(step):
    """What a process with that step would answer; it is built when it is needed."""

    compiled = functools.cache(lambda: contestants.compile_made(*step()))

    def ask(request):
        if "check" in request:
            return gramian.check(compiled())
        count = request["steps"]
        return {**compiled().run(count), "seconds": 1.0 * count}

    return ask


def refusing(request):
    assert "check" in request
    return {"refused": "ValueError: no such layer"}


@pytest.mark.parametrize("name", workloads.ALL_WORKLOADS)
def test_every_step_of_this_library_takes_every_workload(name):
    workload = workloads.build(name, SMALL)
    for contestant in ("upgrad", "clip", "whitened"):
        step, arguments = gramian.make_step(contestant, workload, 1.0)
        params, _, loss = jax.eval_shape(step, *arguments)
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(
            jnp.shape, workload.params
        )
        assert loss.shape == ()


@pytest.fixture
def fake_peers(monkeypatch):
    """PyTorch and JAX Privacy take the steps of this library, or refuse."""
    alike = {"plain": "plain", "autogram": "stacked", "autojac": "upgrad"}

    def start_torch(stack, python, script, path, way):
        assert (python.name, script) == ("torch-python", "torch_gramian.py")
        data = np.load(path)
        workload = workloads.build(str(data["workload"]), SMALL)
        norm = float(data["max_norm"])
        ask = refusing
        if way in alike:
            ask = answering(lambda: gramian.make_step(alike[way], workload, norm))
        return ask, {"torch": "0.0"}

    def start_privacy(stack, python, name, norm, config):
        assert python.name == "privacy-python"
        workload = workloads.build(name, config.sizes)
        ask = answering(lambda: gramian.make_step("clip", workload, norm))
        return ask, {"jax_privacy": "0.1", "temp_bytes": 7, "compile_seconds": 1.5}

    monkeypatch.setattr(gramian, "start_torch", start_torch)
    monkeypatch.setattr(gramian, "start_privacy", start_privacy)


def test_gramian_measures_every_contestant_and_says_who_refused(
    tmp_path, capsys, fake_peers
):
    arguments = ("--out", tmp_path, "--workloads", "mlp_80x1", "--growth")
    pythons = ("--torch-python", "torch-python", "--privacy-python", "privacy-python")
    assert run(*arguments, *pythons) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["torch"], summary["jax_privacy"]) == ("0.0", "0.1")
    (result,) = summary["workloads"].values()
    measured = [name for name in gramian.LABELS if name != "torch_ghost"]
    assert set(result["median_seconds_per_step"]) == set(measured)
    assert result["left_out"] == {"torch_ghost": "ValueError: no such layer"}
    losses = list(result["first_step_loss"].values())
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    over_plain = result["time_over_plain"]
    assert over_plain["plain"] == over_plain["torch_plain"] == 1
    assert over_plain["torch_autogram"] == 1  # of PyTorch's own plain step
    assert result["time_over_upgrad"]["upgrad"] == 1
    assert result["temp_minus_plain_in_params"]["plain"] == 0
    assert result["temp_bytes"]["jax_privacy"] == 7
    assert result["compile_seconds"]["jax_privacy"] == 1.5
    lengths = {name: of["update_norm"] for name, of in result["checked"].items()}
    # Half of the environments are clipped, and conflicts lengthen UPGrad's mean.
    assert lengths["clip"] < lengths["plain"] < lengths["upgrad"]

    rows = rows_of(tmp_path / "gramian.csv")
    assert [(row["workload"], row["round"]) for row in rows] == [
        ("mlp_80x1", "1"),
        ("mlp_80x1", "2"),
    ]
    assert list(rows[0]) == ["workload", "round", *measured]
    grown = rows_of(tmp_path / "gramian_growth.csv")
    assert {row["grows"] for row in grown} == {"environments", "width"}
    assert {row["contestant"] for row in grown} == set(gramian.GROWING)
    for figure in ("gramian.png", "gramian_growth.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert "| mlp_80x1 | hardvary, fused UPGrad |" in table
    assert "Opacus ghost clipping | left out: ValueError: no such layer |" in table
    assert "| environments | step |" in table

    assert run(*arguments, *pythons) == 0
    assert f"{tmp_path}: finished; --overwrite" in capsys.readouterr().out


def test_steps_of_the_same_rule_make_the_same_update_and_another_than_the_mean():
    workload = workloads.build("mlp_80x1", SMALL)
    norm = gramian.median_norm(workload)
    compiled = {
        name: contestants.compile_made(*gramian.make_step(name, workload, norm))
        for name in gramian.CONTESTANTS
    }
    checks = {name: gramian.check(step) for name, step in compiled.items()}
    gramian.require_same_updates(checks)
    moved = {name: of["loss_after"] for name, of in checks.items()}
    for name in ("upgrad", "clip"):
        assert moved[name] != pytest.approx(moved["plain"], rel=1e-3)
    # The check leaves the steps that are measured where they were.
    assert compiled["plain"].arguments[0] is workload.params
    assert compiled["plain"].run(1)["loss"] == checks["plain"]["loss"]


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("loss_after", "losses after the first step"),
        ("update_norm", "norms of the first update"),
    ],
)
@pytest.mark.parametrize("value", [1.01, float("nan")])
def test_other_updates_are_refused(key, what, value):
    same = {"loss_after": 1.0, "update_norm": 1.0}
    checks = {"upgrad": same, "torch_autogram": {**same, key: value}}
    with pytest.raises(RunDirError, match=f"do not train the same; {what}"):
        gramian.require_same_updates(checks)
    # A mean and a projection may differ.
    gramian.require_same_updates({"plain": same, "upgrad": {**same, key: 1.01}})


def test_stacked_gradients_are_left_out_where_they_are_too_large(monkeypatch):
    workload = workloads.image_mlp(4, 8)
    names, left_out = gramian.fitting(gramian.CONTESTANTS, workload)
    assert (tuple(names), left_out) == (gramian.CONTESTANTS, {})
    monkeypatch.setattr(contestants, "STACKED_LIMIT", 4 * workload.param_bytes)
    names, left_out = gramian.fitting(gramian.CONTESTANTS, workload)
    assert names == ["plain", "upgrad", "clip", "whitened"]
    assert set(left_out) == {"stacked", "stacked_clip"}
    assert left_out["stacked"] == "stacked gradients would take 0.0 GB"


def test_jax_privacy_process_answers_with_its_step(monkeypatch, capsys):
    def clipped_grad(fun, *, l2_clip_norm, normalize_by, **flags):
        assert flags == {"keep_batch_dim": False, "return_values": True}

        def of_batch(params, batch):
            values, grads = jax.vmap(jax.value_and_grad(fun), (None, 0))(params, batch)
            norms = jax.vmap(optax.tree.norm)(grads)
            scale = jnp.minimum(1, l2_clip_norm / norms) / normalize_by
            mean = jax.tree.map(lambda g: jnp.tensordot(scale, g, 1), grads)
            return mean, types.SimpleNamespace(values=values)

        return of_batch

    module = types.ModuleType("jax_privacy")
    module.clipped_grad, module.__version__ = clipped_grad, "0.1"
    monkeypatch.setitem(sys.modules, "jax_privacy", module)
    monkeypatch.delitem(
        sys.modules, "experiments.benchmark.privacy_gramian", raising=False
    )
    from experiments.benchmark import privacy_gramian

    requests = [
        {"load": "mlp_80x1", "sizes": {"shrink": 16}, "max_norm": 4.0, "rounds": 1},
        {"check": gramian.CHECK_RATE},
        {"steps": 2},
    ]
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    privacy_gramian.serve()
    loaded, checked, taken = map(json.loads, capsys.readouterr().out.splitlines())
    assert loaded["jax_privacy"] == "0.1"
    assert loaded["temp_bytes"] > 0
    assert loaded["compile_seconds"] > 0
    workload = workloads.build("mlp_80x1", SMALL)
    clip = contestants.compile_made(*gramian.make_step("clip", workload, 4.0))
    gramian.require_same_updates({"clip": gramian.check(clip), "jax_privacy": checked})
    assert taken["loss"] == pytest.approx(checked["loss"])
    assert steps.steps_of(lambda _: taken)(2)["seconds"] == taken["seconds"] / 2


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--torch-python", "the PyTorch process ended early"),
        ("--privacy-python", "the JAX Privacy process ended early"),
    ],
)
def test_an_interpreter_that_fails_says_so(tmp_path, capsys, flag, message):
    python = tmp_path / "python"
    arguments = ("--workloads", "mlp_80x1", flag, python, "--out", tmp_path / "run")
    assert run(*arguments) == 2
    assert f"{flag} {python}: No such file" in capsys.readouterr().err
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--shrink", "0"], "shrink must be at least 1, got 0"),
        (
            ["--growth-envs", "8", "4"],
            "growth_envs must be one or more in ascending order, got (8, 4)",
        ),
        (["--round-seconds", "nan"], "round_seconds must be in [0, 3600), got nan"),
        (
            ["--workloads", "cnn_80x1", "cnn_80x1"],
            "workloads must be one or more different ones, got "
            "('cnn_80x1', 'cnn_80x1')",
        ),
    ],
)
def test_invalid_value_is_one_line_and_exit_2(arguments, message, capsys):
    assert run(*arguments) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_grouped_cnn_has_one_loss_per_environment():
    def losses(sizes):
        workload = workloads.build("grouped_cnn_64x1", sizes)
        of_all = jax.vmap(workload.loss_fn, (None, 0))
        return workload.params, of_all(workload.params, workload.batch)

    params, of_each = jax.eval_shape(lambda: losses(workloads.Sizes()))
    assert of_each.shape == (64,)
    # 3x3 convolutions 3-32-64-64, the last two of 32 and 64 groups, dense 1024-128-10.
    convolutions = 896 + (9 * 64 + 64) + (9 * 64 + 64)
    dense = 1024 * 128 + 128 + 128 * 10 + 10
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == convolutions + dense


def test_tables_know_every_contestant():
    assert gramian.PRESETS["cpu"].workloads == workloads.WORKLOADS
    assert set(gramian.COLORS) == set(gramian.LABELS)
    torch = {f"torch_{way}" for way in gramian.TORCH_WAYS}
    named = {*gramian.CONTESTANTS, *torch, "jax_privacy"}
    assert named == set(gramian.LABELS)
    assert {name for names in gramian.ALIKE for name in names} == named
