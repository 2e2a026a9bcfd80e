"""The range of versions of JAX: its lower end, and what differs within it."""

import configparser
import importlib
import importlib.metadata
import pathlib
import re
import sys
import types

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hardvary
from hardvary import _compat

LIBRARY = pathlib.Path(hardvary.__file__).parent
ROOT = pathlib.Path(__file__).parent.parent
LOWEST = ".".join(map(str, _compat.LOWEST_JAX))
# Names that a version in the range lacks, and questions for the version.
OF_SOME_VERSIONS = re.compile(
    r"jax\._src|jax\.__version__|jex\.(DebugInfo|gensym|get_opaque_trace_state)"
    r"|jex\.(jaxprs_in_params|subjaxprs|new_jaxpr_eqn)|lax\.(pcast|pvary)"
    r"|[^`]jax\.reshard\(\w+, (?!jax\.P\(\)\))|jax\.(set_mesh|enable_x64)"
    r"|\.manual_axis_type|\.vma\b|\bft_in\b|\bnum_consts\b"
)


@pytest.mark.parametrize("version", ["0.4.38", "0.6.2", "0.6.3.dev20250601", "0.6"])
def test_require_jax_below_the_range_raises(version):
    found = re.escape(version)
    with pytest.raises(ImportError, match=rf"jax {LOWEST} or newer, found jax {found}"):
        _compat.require_jax(version)


@pytest.mark.parametrize("version", ["0.7.0", "0.7.0rc1", "0.10.2", "0.12.0.1", "1.0"])
def test_require_jax_in_the_range_passes(version):
    _compat.require_jax(version)


def test_import_with_a_jax_below_the_range_says_so(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "hardvary"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(jax, "__version__", "0.6.2")
    with pytest.raises(ImportError, match=r"hardvary needs jax .* found jax 0\.6\.2"):
        importlib.import_module("hardvary")


def test_what_differs_between_versions_is_asked_for_in_one_place():
    found = [
        f"{path.relative_to(LIBRARY)}: {match.group()}"
        for path in sorted(LIBRARY.rglob("*.py"))
        if path.name != "_compat.py"
        for match in OF_SOME_VERSIONS.finditer(path.read_text())
    ]
    assert found == []


def test_the_range_is_the_same_wherever_it_is_said():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert f"jax>={LOWEST}" in setup["options"]["install_requires"].split()
    pins = (ROOT / "requirements-oldest.txt").read_text()
    assert f"\njax=={LOWEST}.0\n" in pins
    assert f"\njaxlib=={LOWEST}.0\n" in pins
    pythons = re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])
    assert setup["options"]["python_requires"] == f">={pythons[0]}"
    for path in (ROOT / "README.md", ROOT / "docs" / "quickstart.md"):
        text = path.read_text()
        assert f"Python {pythons[0]} to {pythons[-1]}" in text, path
        assert f"jax {LOWEST} or newer" in text, path


def test_pins_of_the_demo_name_all_that_they_need():
    # They are installed as they are, without a look at what they depend on.
    pins = dict(
        line.split("==")
        for line in (ROOT / "requirements-demo.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    pinned = {canonicalize_name(name): version for name, version in pins.items()}

    def is_met(needed: Requirement) -> bool:
        version = pinned.get(canonicalize_name(needed.name))
        return version is not None and version in needed.specifier

    # What other versions need, in which the library is tested too, is no matter.
    found = {d.name: d for d in importlib.metadata.distributions()}
    missing = [
        f"{name} needs {needed}"
        for name, version in pins.items()
        if name in found and found[name].version == version
        for needed in map(Requirement, found[name].requires or [])
        if needed.marker is None or needed.marker.evaluate({"extra": ""})
        if not is_met(needed)
    ]
    assert "flax" in pinned
    assert missing == []


def scan_equation():
    def loop(scale, offset, start, xs):
        return jax.lax.scan(lambda c, x: (c * scale + offset, c + x), start, xs)

    closed = jax.make_jaxpr(loop)(1.0, 2.0, jnp.float32(3), jnp.ones(4))
    return next(eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name == "scan")


def test_scan_counts_of_a_scan():
    assert _compat.scan_counts(scan_equation()) == (2, 1)


class Parts:
    """Of a scan's inputs, as jax 0.11 keeps them."""

    def unpack(self):
        return ("w", "b"), ("h",), ("x", "y")


@pytest.mark.parametrize(
    "params",
    [{"num_consts": 2, "num_carry": 1}, {"ft_in": Parts()}],
    ids=["before jax 0.11", "since jax 0.11"],
)
def test_scan_counts_of_either_form(params):
    assert _compat.scan_counts(types.SimpleNamespace(params=params)) == (2, 1)


@pytest.mark.parametrize(
    "aval",
    [
        types.SimpleNamespace(vma=frozenset({"data"})),
        types.SimpleNamespace(
            manual_axis_type=types.SimpleNamespace(varying=frozenset({"data"}))
        ),
    ],
    ids=["before jax 0.10", "since jax 0.10"],
)
def test_varying_axes_of_either_form(aval):
    assert _compat.varying_axes(aval) == {"data"}


def test_vary_in_shard_map_varies():
    seen = []

    def inside(x):
        varying = _compat.vary(jnp.zeros(2), ("data",))
        seen.extend(
            _compat.varying_axes(jax.typeof(a)) for a in (jnp.zeros(2), varying)
        )
        return x + varying

    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), axis_types=axis_types)
    over = P("data")
    jax.shard_map(inside, mesh=mesh, in_specs=over, out_specs=over)(jnp.ones(4))
    assert seen == [frozenset(), {"data"}]


def test_vary_without_pcast_varies(monkeypatch):
    monkeypatch.delattr(jax.lax, "pcast", raising=False)
    monkeypatch.setattr(jax.lax, "pvary", lambda x, axes: (x, axes), raising=False)
    assert _compat.vary(1, ("data",)) == (1, ("data",))
    assert _compat.vary_call("w", ("a", "b")) == "jax.lax.pvary(w, ('a', 'b'))"


def test_reshard_before_it_was_public(monkeypatch):
    monkeypatch.delattr(jax, "reshard", raising=False)
    reshard = lambda x, spec: (x, spec)  # noqa: E731
    monkeypatch.setattr(jax.sharding, "reshard", reshard, raising=False)
    assert _compat.reshard(1, P("data")) == (1, P("data"))


def test_names_of_jaxprs_make_one_that_runs():
    closed = jax.make_jaxpr(jax.jit(jnp.tanh))(1.0)
    (eqn,) = closed.jaxpr.eqns
    (var,) = eqn.invars
    other = _compat.gensym()(var.aval)
    jaxpr = jex.Jaxpr(
        constvars=(),
        invars=[other],
        outvars=eqn.outvars,
        eqns=[eqn.replace(invars=[other])],
        debug_info=_compat.DebugInfo("test", "", (), ()),
    )
    assert jax.core.eval_jaxpr(jaxpr, (), 0.5) == [pytest.approx(jnp.tanh(0.5))]
    assert len(list(_compat.jaxprs_in_params(eqn.params))) == 1
