import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import lit_llm

ROOT = Path(lit_llm.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
MODULES = ["lit_llm", *(m.name for m in pkgutil.walk_packages(lit_llm.__path__, "lit_llm."))]
MODULES.remove("lit_llm.__main__")  # importing it runs the command
CHECKED_ERRORS = {"ValueError", "TypeError", "FileNotFoundError", "FloatingPointError"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT.parent).as_posix()


def public_things(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Public classes and functions that a module defines, and the public methods of those classes."""
    for name, value in vars(module).items():
        defined_here = getattr(value, "__module__", None) == module.__name__
        if name.startswith("_") or not defined_here or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        yield f"{module.__name__}.{name}", value
        if inspect.isclass(value):
            for attribute, member in vars(value).items():
                member = getattr(member, "__func__", member)
                if not attribute.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                    yield f"{module.__name__}.{name}.{attribute}", member


@pytest.mark.parametrize("name", MODULES)
def test_every_module_and_all_that_is_public_in_it_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    found = {name: module, **dict(public_things(module))}
    assert [key for key, value in found.items() if not (value.__doc__ or "").strip()] == []


def test_the_walk_over_the_package_finds_its_classes_functions_and_methods() -> None:
    found = {key for name in MODULES for key, _ in public_things(importlib.import_module(name))}
    assert {"lit_llm.models.llama.Llama", "lit_llm.data.packing.cut_rows", "lit_llm.optimizers.Muon.step"} <= found
    assert len(MODULES) > 30


def raised_messages(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each literal message that is raised; a value put into it becomes `…`."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
            continue
        kind, message = node.exc.func, node.exc.args[0]
        if not (isinstance(kind, ast.Name) and kind.id in CHECKED_ERRORS):
            continue
        if isinstance(message, ast.JoinedStr):
            yield node.lineno, "".join(p.value if isinstance(p, ast.Constant) else "…" for p in message.values)
        elif isinstance(message, ast.Constant) and isinstance(message.value, str):
            yield node.lineno, message.value


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_error_says_what_must_be_but_is_not(path: Path) -> None:
    messages = list(raised_messages(path.read_text(encoding="utf-8")))
    assert [(line, text) for line, text in messages if not re.search(r"\bmust\b.+\bbut\b", text)] == []
    assert [(line, text) for line, text in messages if "\n" in text or text.endswith(".")] == []


def test_messages_are_found_in_every_form_they_are_written_in() -> None:
    source = """
def f(x):
    raise ValueError("a must be b, but is c")
    raise TypeError(f"a must be {x}, "
                    f"but is {x!r}") from None
    raise FileNotFoundError("no" "thing")
    raise RuntimeError("ours")
    raise
"""
    found = [text for _, text in raised_messages(source)]
    assert found == ["a must be b, but is c", "a must be …, but is …", "nothing"]
    assert sum(1 for path in SOURCES for _ in raised_messages(path.read_text(encoding="utf-8"))) > 40


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_module_has_a_name_that_says_nothing(path: Path) -> None:
    parts = {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
    assert not {"utils", "util", "common", "helpers", "helper", "core", "misc"} & parts


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_the_package_never_reaches_for_experiments_or_opens_its_configs(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.split(".")[0] in ("experiments", "tests") for name in names)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_are_right(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_there_are_examples_to_be_right() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = {t.name for name in MODULES for t in finder.find(importlib.import_module(name)) if t.examples}
    assert {"lit_llm.models.llama.Llama", "lit_llm.data.text.TextData", "lit_llm.optimizers.Muon"} <= examples


def test_dependencies_point_one_way() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    options = ["--config", ".importlinter", "--no-cache", "--no-logo"]
    found = subprocess.run([*command, *options], cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert " 0 broken" in found.stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, lit_llm, lit_llm.cli; print(sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
