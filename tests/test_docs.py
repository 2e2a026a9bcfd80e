"""Documentation: complete, and its code runs."""

import contextlib
import dataclasses
import importlib
import inspect
import io
import math
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import hardvary
from experiments.common import cli

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
FILES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *PAGES,
]
LANGUAGES = {"python", "bash", "text", "diff", "toml", "json", "bibtex"}
# What Sphinx acts on, and code hosts show as it is.
DIRECTIVES = {"{eval-rst}", "{toctree}"}
MODULES = {"": hardvary} | {
    f"{name}.": getattr(hardvary, name)
    for name in hardvary.__all__
    if inspect.ismodule(getattr(hardvary, name))
}
# By the name under which the package has them.
PUBLIC = {
    prefix + name: getattr(module, name)
    for prefix, module in MODULES.items()
    for name in module.__all__
    if not inspect.ismodule(getattr(module, name))
}
public_names = pytest.mark.parametrize("name", PUBLIC)


@dataclasses.dataclass(frozen=True)
class Block:
    language: str
    line: int
    code: str


def blocks(path):
    """Fenced blocks of a Markdown file."""
    found, language, start, lines = [], None, 0, []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        fence = re.match(r"\s*```(.*)", line)
        if fence and language is None:
            language, start, lines = fence.group(1).strip(), number, []
        elif fence:
            found.append(Block(language, start, "\n".join(lines)))
            language = None
        elif language is not None:
            lines.append(line)
    assert language is None, f"{path}:{start}: a fence that is never closed"
    return found


@public_names
def test_docstring_of_a_public_name_is_complete(name):
    thing = PUBLIC[name]
    doc = inspect.getdoc(thing)
    assert doc
    if not inspect.isfunction(thing):
        assert "Attributes:" in doc
        return
    for section in ("Args:", "Returns:", "Raises:", "Example:"):
        assert section in doc, section
    # In this order, with an example that the doctests run.
    positions = [doc.index(s) for s in ("Args:", "Returns:", "Raises:", "Example:")]
    assert positions == sorted(positions)
    assert ">>>" in doc


@public_names
def test_docstring_names_every_argument(name):
    thing = PUBLIC[name]
    doc = inspect.getdoc(thing)
    if inspect.isfunction(thing):
        names = inspect.signature(thing).parameters
    elif dataclasses.is_dataclass(thing):
        names = [field.name for field in dataclasses.fields(thing)]
    else:
        names = thing.__annotations__
    for argument in names:
        assert re.search(rf"^\s*{argument}: ", doc, re.MULTILINE), argument


def test_api_page_lists_what_is_public_and_nothing_else():
    """A module listed there is documented with all that its __all__ names."""
    page = (DOCS / "api.md").read_text()
    listed = re.findall(r"^   (hardvary\.\S+)$", page, re.MULTILINE)
    assert sorted(listed) == [f"hardvary.{name}" for name in hardvary.__all__]


def test_all_is_sorted_and_lists_what_the_package_exports():
    assert sorted(hardvary.__all__) == hardvary.__all__
    # Packages that are not public are attributes as soon as they are imported.
    exported = {
        name
        for name, value in vars(hardvary).items()
        if not name.startswith("_")
        and (name in hardvary.__all__ or not inspect.ismodule(value))
    }
    assert exported == set(hardvary.__all__)


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_all_of_a_public_module_lists_what_it_has(name):
    module = MODULES[name]
    own = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "").startswith("hardvary")
    }
    assert own == set(module.__all__)


def test_import_needs_jax_optax_and_numpy_alone():
    heavy = ("flax", "orbax", "matplotlib", "tyro", "tqdm", "optuna", "torch", "pandas")
    code = f"import sys, hardvary; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"


def test_readme_shows_python_code_and_the_change_as_a_diff():
    languages = {block.language for block in blocks(ROOT / "README.md")}
    assert {"python", "diff"} <= languages


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_code_block_says_its_language(path):
    unknown = [
        (block.line, block.language)
        for block in blocks(path)
        if block.language not in LANGUAGES | DIRECTIVES
        and not block.language.startswith("{include}")
    ]
    assert unknown == []


def with_python(paths):
    return [path for path in paths if any(b.language == "python" for b in blocks(path))]


# The first pages that a user runs, and one that searches for a while. They come first:
# what is compiled in either way is compiled again in the other.
OPTIMIZED = {"README.md", "quickstart.md", "consistency.md"}
# Pages are written for the pinned versions; jax 0.7 has no `jax.lax.pcast`.
NEEDS_JAX = {"many_devices.md": (0, 8)}


def marks_of(page):
    marks = [pytest.mark.optimized] if page in OPTIMIZED else []
    if page in NEEDS_JAX:
        too_old = jax.__version_info__ < NEEDS_JAX[page]
        reason = f"the code on {page} needs a newer jax"
        marks.append(pytest.mark.skipif(too_old, reason=reason))
    return marks


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.name, marks=marks_of(path.name))
        for path in sorted(
            with_python(FILES), key=lambda path: path.name not in OPTIMIZED
        )
    ],
)
@pytest.mark.usefixtures("standard_promotion")
def test_python_blocks_of_a_page_run_in_order(path, tmp_path, monkeypatch):
    """And print what the comments and the text blocks beside them say."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    output, printed = "", ""
    code = [block for block in blocks(path) if block.language != "bash"]
    with jax.numpy_rank_promotion("allow"):
        for block in code:
            if block.language == "text":
                assert_alike(block.code, printed)
            if block.language != "python":
                continue
            # The line numbers of a traceback are those of the page.
            source = "\n" * block.line + block.code
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(compile(source, str(path), "exec"), namespace)
            printed = stream.getvalue()
            output += printed
    lines = [tokens(line) for line in output.splitlines()]
    source = "\n".join(block.code for block in code if block.language == "python")
    promised = re.findall(r"^print\(.*\)  # (.+)$", source, re.MULTILINE)
    for line in promised:
        assert tokens(line) in lines, line


def assert_alike(expected, printed):
    """Equal, but for numbers, which a training run may end with a little off."""
    number = r"\d+(?:\.\d+)?"
    assert re.sub(number, "0", expected) == re.sub(number, "0", printed.rstrip())
    for one, other in zip(
        re.findall(number, expected), re.findall(number, printed), strict=True
    ):
        assert math.isclose(float(one), float(other), rel_tol=0.05, abs_tol=0.2), (
            printed
        )


def tokens(line):
    """Words of a printed line; how arrays are padded does not matter."""
    return re.sub(r"[\[\]]", " ", line).split()


def side_of_diff(code, sign):
    """The lines of a diff before ("-") or after ("+") the change."""
    lines = [line for line in code.splitlines() if line[:1] in ("", " ", sign)]
    return "\n".join(line[1:] for line in lines)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("sign", ["-", "+"], ids=["before", "after"])
def test_diff_of_the_readme_runs_on_both_sides(sign):
    [diff] = [b for b in blocks(ROOT / "README.md") if b.language == "diff"]
    namespace = {}
    with jax.numpy_rank_promotion("allow"):
        exec(side_of_diff(diff.code, sign), namespace)
        batch = jnp.ones((4, 8, 3)), jnp.ones((4, 8))
        params = jnp.zeros(3)
        state = namespace["tx"].init(params)
        updated, _, loss = namespace["step"](params, state, batch)
    assert loss == 0.5
    assert (updated > params).all()


def shell_commands(path):
    code = [block.code for block in blocks(path) if block.language == "bash"]
    lines = [line.split("#")[0].strip() for line in "\n".join(code).splitlines()]
    return [shlex.split(line) for line in lines if line]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_shell_commands_of_a_page_are_understood(path):
    for words in shell_commands(path):
        while re.fullmatch("[A-Z_]+=.*", words[0]):
            words = words[1:]
        assert_understood(words)


def assert_understood(words):
    makefile = (ROOT / "Makefile").read_text()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
    elif words[:2] == ["python", "-m"]:
        module = importlib.import_module(f"{words[2]}.__main__")
        parsed = []
        commands = parse_only(module.COMMANDS, parsed)
        assert cli.main(words[2], commands, words[3:]) == 0, words
        assert len(parsed) == 1
    else:
        assert words == ["pip", "install", "."]


def parse_only(commands, parsed):
    """The same commands, which append their calls to `parsed` and do nothing else."""

    def inert(command):
        if isinstance(command, cli.Group):
            inner = parse_only(command.commands, parsed)
            return dataclasses.replace(command, commands=inner)
        return dataclasses.replace(command, run=parsed.append)

    return {name: inert(command) for name, command in commands.items()}


def anchors(path):
    """Anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_relative_links_of_a_page_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)\)", path.read_text())
    for link in links:
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_of_a_page_stay_inside_the_documentation(path):
    """Sphinx knows no other files; links that start elsewhere are for code hosts."""
    links = re.findall(r"\]\((?!https?://|mailto:|#)([^)#\s]+)", path.read_text())
    outside = [
        link for link in links if DOCS not in (path.parent / link).resolve().parents
    ]
    assert outside == []


def test_every_page_is_in_a_table_of_contents():
    toctrees = [b for b in blocks(DOCS / "index.md") if b.language == "{toctree}"]
    entries = [
        line
        for block in toctrees
        for line in block.code.splitlines()
        if line and not line.startswith(":")
    ]
    listed = {page for entry in entries for page in DOCS.glob(f"{entry}.md")}
    assert listed == set(PAGES) - {DOCS / "index.md"}


def test_gallery_has_every_figure_with_its_page_and_its_command():
    entries = re.findall(
        r"^!\[.+\]\((.+)\)\n\n((?:.+\n)+)",
        (DOCS / "gallery.md").read_text(),
        re.MULTILINE,
    )
    figures = {
        str(path.relative_to(DOCS))
        for ending in ("png", "gif")
        for path in DOCS.glob(f"**/*.{ending}")
    }
    assert sorted(figure for figure, _ in entries) == sorted(figures)
    for figure, text in entries:
        [page] = re.findall(r"\]\(([^)#]+\.md)[^)]*\)", text)
        assert pathlib.Path(figure).name in (DOCS / page).read_text()
        [command] = re.findall(r"`((?:make|python) [^`]+)`", text)
        assert_understood(shlex.split(command))
