"""The packages as a whole: layers, sizes, docstrings, import cost, and the public names."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import echoquad

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "echoquad": ROOT / "echoquad",
    "echoquad_runtime": ROOT / "runtime" / "echoquad_runtime",
    "echoquad_serve": ROOT / "runtime" / "echoquad_serve",
    "echoquad_train": ROOT / "train" / "echoquad_train",
    "echoquad_export": ROOT / "export" / "echoquad_export",
    "echoquad_deploy": ROOT / "export" / "echoquad_deploy",
}

MOST_MODULES = 12
"""In a folder."""

MOST_LINES = 450
"""In a module."""

DIALECT = {"Give", "Gives", "Have", "Hear", "Let", "Say", "Tell"}
"""First words of docstrings for which "Return" or another standard verb stands."""


def python(code: str, *options: str) -> str:
    ended = subprocess.run(
        [sys.executable, *options, "-c", code], check=False, capture_output=True, encoding="utf-8", cwd=ROOT
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    return ended.stdout


def test_import_contracts_hold() -> None:
    """Run the command of `make lint`: layers of every package, no cycle, and no new module outside a layer."""
    pytest.importorskip("importlinter")
    # --no-cache: the cache is a folder in the checkout, and a test leaves no file behind.
    code = "import sys; from importlinter.cli import lint_imports_command; sys.argv[1:] = ['--no-cache'];"
    ended = subprocess.run(
        [sys.executable, "-c", f"{code} lint_imports_command()"],
        check=False,
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "0 broken" in ended.stdout


def folders() -> list[Path]:
    return sorted({path.parent for folder in PACKAGES.values() for path in folder.rglob("*.py")})


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_folder_is_small_and_says_what_belongs_in_it(folder: Path) -> None:
    names = {path.name for path in folder.glob("*.py")}
    assert "__init__.py" in names
    assert len(names - {"__init__.py", "__main__.py", "_version.py"}) <= MOST_MODULES
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8")))
    assert docstring and docstring.splitlines()[0].endswith(".")


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_are_short_and_their_docstrings_begin_with_standard_verbs(package: str) -> None:
    for path in PACKAGES[package].rglob("*.py"):
        text = path.read_text("utf-8")
        assert text.count("\n") <= MOST_LINES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = (ast.get_docstring(node) or "Return").split(maxsplit=1)[0]
                assert first not in DIALECT, f"{path}:{node.lineno}: {first}"


@pytest.mark.parametrize("package", PACKAGES)
def test_package_alone_imports_nearly_nothing(package: str) -> None:
    code = f"import sys; before = set(sys.modules); import {package}; print(*sorted(set(sys.modules) - before))"
    imported = python(code, "-W", "error").split()
    others = {name.partition(".")[0] for name in imported} - set(PACKAGES) - set(sys.stdlib_module_names)
    assert others == set()


def test_runtime_and_cli_modules_import_without_warnings_and_without_torch() -> None:
    names = [*modules("echoquad_runtime"), *modules("echoquad")]
    code = f"import importlib, sys; [importlib.import_module(name) for name in {names}]; print(*sys.modules)"
    imported = {name.partition(".")[0] for name in python(code, "-W", "error").split()}
    assert imported & {"torch", "torchvision", "onnx", "onnxscript", "sklearn", "matplotlib", "onnxruntime"} == set()


def modules(package: str) -> list[str]:
    folder = PACKAGES[package]
    names = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if parts[-1] != "__main__":
            names.append(".".join([package, *(part for part in parts if part != "__init__")]))
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_typed(package: str) -> None:
    assert (PACKAGES[package] / "py.typed").is_file()


def test_public_names_are_exactly_these() -> None:
    assert echoquad.__all__ == [
        "Bundle",
        "Contract",
        "EchoQuadError",
        "Failure",
        "Prediction",
        "Predictor",
        "Verification",
        "__version__",
        "verify",
    ]
    assert dir(echoquad) == sorted(echoquad.__all__)
    assert all(getattr(echoquad, name) is not None for name in echoquad.__all__)
    assert not hasattr(echoquad, "Oracle")


def test_importing_the_predictor_imports_no_training_package() -> None:
    imported = python("import sys; from echoquad import Predictor, verify; print(Predictor.__name__, *sys.modules)")
    assert imported.startswith("Predictor ")
    unwanted = {"torch", "onnx", "matplotlib", "typer", "rich", "ray", "pyarrow", "pandas"}
    assert unwanted & set(imported.split()) == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_module_defines_what_it_exports(package: str) -> None:
    """Hold every ``__all__`` against its module's text: sorted, and each name defined there (nothing is imported)."""
    for name in modules(package):
        path = PACKAGES[package].joinpath(*name.split(".")[1:])
        file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        tree = ast.parse(file.read_text("utf-8"))
        bound = set()
        exported: list[str] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                bound.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                bound |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                bound |= {target.id for target in targets if isinstance(target, ast.Name)}
                if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                    exported = ast.literal_eval(node.value)
        assert set(exported) <= bound, file
        assert len(set(exported)) == len(exported), file


def test_version_is_that_of_the_distribution() -> None:
    from importlib import metadata

    assert metadata.version("echoquad") == echoquad.__version__
    assert importlib.import_module("echoquad_runtime._version").__version__ == echoquad.__version__
