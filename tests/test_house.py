"""The rules of the house, as tests: lean imports, the import law, sizes, docstrings, names, documentation."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kvfold

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "kvfold"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FILE_LINES, FUNCTION_LINES = 400, 60

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> list[Path]:
    """Every Python file of the package."""
    return sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    """Path from the repository's root, for messages."""
    return path.relative_to(ROOT).as_posix()


def module_names() -> list[str]:
    """Every importable module of the package, found as files; ``__main__`` would run."""
    paths = [path.relative_to(SOURCE.parent).with_suffix("").parts for path in sources()]
    names = [".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in paths]
    return sorted(name for name in names if not name.endswith("__main__"))


def run_python(code: str) -> dict[str, object]:
    """Run ``code`` in a fresh interpreter that sees the package; its last printed line is JSON."""
    env = os.environ | {"PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


# == what an import does

RECORDER = '''
import os, sys

class Recorder(dict):
    """An environment that notes who reads it."""

    reads = []

    def _note(self, key):
        frame = sys._getframe(2)
        while frame and frame.f_globals.get("__name__", "") in ("os", "_collections_abc"):
            frame = frame.f_back
        reader = frame.f_globals.get("__name__", "") if frame else ""
        if not reader.startswith("_editable_"):  # the import hook of an editable installation reads its own switch
            self.reads.append((reader, key))

    def __getitem__(self, key):
        self._note(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self._note(key)
        return super().get(key, default)

    def __contains__(self, key):
        self._note(key)
        return super().__contains__(key)

    def __iter__(self):
        self._note("*")
        return super().__iter__()

    def items(self):
        self._note("*")
        return super().items()

    def copy(self):
        self._note("*")
        return dict(super().items())

os.environ = Recorder(dict(os.environ))
'''


def test_importing_kvfold_is_lean() -> None:
    """No torch, no transformers, no thread, no look at the environment."""
    code = RECORDER + (
        "import json, threading, kvfold\n"
        "heavy = sorted({'torch', 'transformers', 'tokenizers', 'numpy', 'pydantic', 'typer'} & set(sys.modules))\n"
        "tasks = len(os.listdir('/proc/self/task')) if os.path.isdir('/proc/self/task') else 1\n"
        "found = {'heavy': heavy, 'threads': threading.active_count(), 'tasks': tasks, 'reads': Recorder.reads}\n"
        "print(json.dumps(found))"
    )
    assert run_python(code) == {"heavy": [], "threads": 1, "tasks": 1, "reads": []}


def test_the_recorder_does_record() -> None:
    """The test above can fail: each way to read the environment is noted, with the name of the reader."""
    code = RECORDER + (
        "import json\n"
        "os.environ.get('A'); os.getenv('B'); 'C' in os.environ; list(os.environ); os.environ.copy()\n"
        "print(json.dumps({'reads': Recorder.reads}))"
    )
    reads = run_python(code)["reads"]
    assert reads == [["__main__", "A"], ["__main__", "B"], ["__main__", "C"], ["__main__", "*"], ["__main__", "*"]]


def test_importing_every_module_reads_no_environment_and_starts_no_thread() -> None:
    """Other libraries may read theirs; kvfold's modules do not, at import."""
    code = RECORDER + (
        "import importlib, json, threading\n"
        f"for name in {module_names()!r}: importlib.import_module(name)\n"
        "ours = [read for read in Recorder.reads if read[0].split('.')[0] == 'kvfold']\n"
        "print(json.dumps({'reads': ours, 'threads': threading.active_count()}))"
    )
    assert run_python(code) == {"reads": [], "threads": 1}


SNAPSHOT = """
import inspect, json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.integrations import sdpa_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

def snapshot(modules):
    seen = {}
    for name in modules:
        for key, value in list(vars(sys.modules[name]).items()):
            seen[name, key] = id(value)
            if inspect.isclass(value) and value.__module__ == name:
                seen.update({(name, key, attribute): id(held) for attribute, held in list(vars(value).items())})
    return seen

modules = [name for name in sys.modules if name.split(".")[0] == "transformers"]
registries = lambda: [sorted(ALL_ATTENTION_FUNCTIONS.keys()), sorted(ALL_MASK_ATTENTION_FUNCTIONS.keys())]
torch_state = lambda: [torch.get_num_threads(), str(torch.get_default_dtype()), torch.is_grad_enabled()]
before, had, state = snapshot(modules), registries(), torch_state()
import kvfold.engine, kvfold.hf
after = snapshot(modules)
# A lazy module may gain names when they are asked for; what stood there has to stay.
changed = [".".join(place) for place, identity in before.items() if after.get(place) != identity]
changed = [place for place in changed if not place.endswith(("__abstractmethods__", "_abc_impl", "__annotations__"))]
same = {"registries": registries() == had, "torch": torch_state() == state}
print(json.dumps({"compared": len(before) > 1000, "changed": changed, **same}))
"""


def test_importing_the_faces_changes_nothing_in_transformers_or_torch() -> None:
    """No patched class, no replaced function, no entry in a registry, no default moved."""
    assert run_python(SNAPSHOT) == {"compared": True, "changed": [], "registries": True, "torch": True}


def test_imports_run_downwards_only() -> None:
    """The contracts of import-linter (pyproject.toml) hold."""
    pytest.importorskip("importlinter")
    code = (
        "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command(['--no-cache']))"
    )
    env = os.environ | {"PYTHONPATH": str(SOURCE.parent)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# == the sources


def test_files_and_functions_stay_small() -> None:
    """A file is one thing, a function one thought."""
    large = []
    for path in sources():
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > FILE_LINES:
            large.append(f"{name_of(path)}: {lines} lines, at most {FILE_LINES}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    large.append(f"{name_of(path)}:{node.lineno} {node.name}: {length} lines, at most {FUNCTION_LINES}")
    assert not large, "\n".join(large)


def public_definitions(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Public classes, functions and methods with dotted names; what lies inside a function is its own affair, and an
    overload is described where the function is defined.
    """
    for child in node.body:
        if isinstance(child, Definition) and not child.name.startswith("_"):
            if any(isinstance(each, ast.Name) and each.id == "overload" for each in child.decorator_list):
                continue
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public_definitions(child, f"{prefix}{child.name}.")


def test_everything_public_has_a_docstring() -> None:
    """Modules, classes, functions and methods whose name does not begin with an underscore."""
    bare = []
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree):
            bare.append(name_of(path))
        bare += [f"{name_of(path)}: {name}" for name, node in public_definitions(tree) if not ast.get_docstring(node)]
    assert not bare, "\n".join(bare)


def reads_environment(node: ast.AST) -> bool:
    """Whether a node is ``os.environ``, ``os.getenv`` or an import of either."""
    names = {"environ", "environb", "getenv", "getenvb"}
    if isinstance(node, ast.Attribute):
        return node.attr in names and isinstance(node.value, ast.Name) and node.value.id == "os"
    return isinstance(node, ast.ImportFrom) and node.module == "os" and any(alias.name in names for alias in node.names)


def test_the_environment_is_read_in_one_place() -> None:
    """Only telemetry.py knows os.environ."""
    readers = [p for p in sources() if any(map(reads_environment, ast.walk(ast.parse(p.read_text(encoding="utf-8")))))]
    assert [name_of(path) for path in readers] == ["src/kvfold/telemetry.py"]


def catches_all(node: ast.AST) -> bool:
    """Whether an ``except`` takes every error and does not raise again."""
    if not isinstance(node, ast.ExceptHandler):
        return False
    broad = node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"))
    return broad and not isinstance(node.body[-1], ast.Raise)


def test_nothing_is_swallowed() -> None:
    """No catch-all, unless it cleans up and raises again."""
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if catches_all(node)
    ]
    assert not found, found


def test_nothing_is_left_open() -> None:
    """No open end in the sources, no suppression without a reason, no figure still to be filled in."""
    pattern = re.compile(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b|# noqa$|# type: ignore$|@@FIGURE")
    found = [
        f"{name_of(path)}:{number}: {line.strip()[:80]}"
        for path in [*sources(), *PAGES]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


# == public names


def sort_key(name: str) -> tuple[int, list[int | str]]:
    """The order ruff keeps: CONSTANTS, then Classes, then the rest; numbers in a name count as numbers."""
    bare = name.strip("_")
    kind = 0 if bare.isupper() and len(bare) > 1 else 1 if name[:1].isupper() else 2
    return kind, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


@pytest.mark.parametrize("name", module_names())
def test_public_names_are_sorted_and_there(name: str) -> None:
    """Each name in ``__all__`` exists, once, in order, and is not private."""
    module = importlib.import_module(name)
    public = list(getattr(module, "__all__", []))
    assert public == sorted(set(public), key=sort_key)
    for item in public:
        assert item == "__version__" or not item.startswith("_")
        assert hasattr(module, item), item


def test_the_package_lists_and_resolves_its_names() -> None:
    """``dir`` shows the public names; a wrong one is an AttributeError, so that hasattr and autocompletion work."""
    assert dir(kvfold) == kvfold.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kvfold.nothing  # noqa: B018 - the access is the test


# == project


def project() -> dict[str, object]:
    """The [project] table of pyproject.toml."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        table: dict[str, object] = tomllib.load(file)["project"]
    return table


def test_version_is_one() -> None:
    """pyproject.toml, the package and the changelog name the same version."""
    assert project()["version"] == kvfold.__version__
    assert f"## [{kvfold.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_pin_what_pyproject_asks_for() -> None:
    """Every direct dependency has an exact pin, and the pin lies in its range."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    table = project()
    extras = table["optional-dependencies"]
    assert isinstance(extras, dict)
    texts = [*table["dependencies"], *(text for name in extras if name != "dev" for text in extras[name])]  # type: ignore[misc]
    wanted = [Requirement(text) for text in texts]
    for requirement in wanted:
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert all(name == canonicalize_name(name) for name in pins)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links in the documentation point at files of the repository."""
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing, missing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_in_the_documentation_parses(page: Path) -> None:
    """Fenced Python is Python."""
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        compile(block, page.name, "exec")


@pytest.mark.parametrize("page", ["bytes.md", "recipes.md", "retention.md", "retrieval.md"])
def test_what_the_documentation_computes_is_true(page: str) -> None:
    """These pages compute in front of the reader; their assertions hold."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "assert" in "".join(blocks)
    scope: dict[str, object] = {"__name__": page}
    for block in blocks:
        exec(compile(block, page, "exec"), scope)
