"""The documentation agrees with the code: error classes, commands, recipe fields, links, and the drawing."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
import tomllib
import typing
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import pytest
from packaging.requirements import Requirement

from echoquad_deploy.fleet import errors as fleet_errors
from echoquad_deploy.stick import errors as stick_errors
from echoquad_runtime import errors
from echoquad_serve import config as service_config
from echoquad_serve import errors as service_errors

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ERROR_MODULES = (errors, service_errors, fleet_errors, stick_errors)
LOCKED = ("cpu", "train", "tensorboard", "dicom", "video", "export", "sign", "ray", "docs", "dev")
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])


def extension(name: str) -> ModuleType:
    """Import a module of docs/_ext."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "_ext" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ENTRY = r"^### (E_\w+)\n\n(.+)\n\nCause\n: \S.+\n\nRemedy\n: \S.+$"


def test_error_page_lists_every_class_with_code_cause_and_remedy() -> None:
    text = (DOCS / "reference" / "errors.md").read_text("utf-8")
    entries = dict(re.findall(ENTRY, text, re.MULTILINE))
    classes = [getattr(module, name) for module in ERROR_MODULES for name in module.__all__]
    shown = {code: line for code, line in entries.items() if line.startswith("`")}
    assert shown == {error.code: f"`{error.__name__}`, exit code {error.exit_code}" for error in classes}
    assert len(entries) == text.count("\n### "), "an entry lacks its cause or its remedy"


def test_error_page_lists_every_code_that_the_service_answers_without_a_class() -> None:
    text = (DOCS / "reference" / "errors.md").read_text("utf-8")
    shown = {code for code, line in re.findall(ENTRY, text, re.MULTILINE) if not line.startswith("`")}
    classes = {getattr(module, name).code for module in ERROR_MODULES for name in module.__all__}
    source = "".join(path.read_text("utf-8") for path in (ROOT / "runtime/echoquad_serve").rglob("*.py"))
    assert shown == set(re.findall(r'"(E_(?:HTTP|NOT|RESULT|INTERRUPTED)\w*)"', source)) - classes


def test_service_page_lists_every_option_with_its_default() -> None:
    text = (DOCS / "reference" / "service.md").read_text("utf-8").partition("\n## HTTP API")[0]
    shown: dict[str, list[tuple[str, str]]] = {}
    for section in text.split("\n### ")[1:]:
        rows = re.findall(r"^\| `(\w+)` \| (.+?) \| \S.* \|$", section, re.MULTILINE)
        shown |= dict.fromkeys(re.findall(r"`(\[.+?\]+)`", section.partition("\n")[0]), rows)
    assert shown == _tables(service_config.ServiceConfig, "")


def _tables(kind: type, header: str) -> dict[str, list[tuple[str, str]]]:
    """Return key and default of each field of a table of the service's configuration, and of the tables in it."""
    hints, found = typing.get_type_hints(kind), {}
    fields = dataclasses.fields(kind)
    for field in fields:
        hint = hints[field.name]
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                name = f"{header.strip('[]')}.{field.name}".strip(".")
                found |= _tables(part, f"[[{name}]]" if typing.get_origin(hint) is tuple else f"[{name}]")
    return found | ({header: [(field.name, _default(field)) for field in fields]} if header else {})


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else "none"
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return f"`{json.dumps(list(value))}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{json.dumps(str(value) if isinstance(value, Path) else value)}`"


def test_configuration_page_lists_every_recipe_field_with_its_defaults() -> None:
    recipe = pytest.importorskip("echoquad_train.recipe").Recipe
    text = (DOCS / "reference" / "configuration.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| `(.*?)` \| `(.*?)` \| \S.* \|$", text, re.MULTILINE)
    shown = {name: tuple(values) for name, *values in rows}
    shipped = [recipe.load(name) for name in ("transfer", "scratch", "lite")]
    assert shown == {name: tuple(_show(getattr(of, name)) for of in shipped) for name in recipe.__dataclass_fields__}


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(f'{item:.4g}' for item in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def test_command_reference_has_every_command_and_option() -> None:
    from echoquad.cli.framework.main import COMMANDS

    generated = extension("generated")
    text = generated.commands_markdown()
    assert (DOCS / "reference" / "cli.md").read_text("utf-8").count(generated.MARK) == 1
    assert re.findall(r"^## echoquad (.+)$", text, re.MULTILINE) == list(COMMANDS)
    for option in ("--out", "--resume", "--precision", "--patient-regex", "--abstain-below", "--public-key"):
        assert f"| `{option}`" in text
    for name in COMMANDS:
        assert f"$ echoquad {name}" in text


def test_python_page_documents_every_public_name() -> None:
    import echoquad

    text = (DOCS / "reference" / "python.md").read_text("utf-8")
    assert sorted(re.findall(r"^\.\. \w+:: echoquad\.(\w+)$", text, re.MULTILINE)) == sorted(echoquad.__all__)


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'\bsrc="([^"]+)"', text)]
    broken = []
    for target in targets:
        path, _, anchor = unquote(target).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in _anchors(file)):
            broken.append(target)
    assert broken == []


def test_paths_of_pages_in_the_code_exist() -> None:
    folders = ("echoquad", "export", "runtime", "train", "benchmarks", "examples", "tests")
    files = [path for name in folders for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".mjs", ".md")]
    files = [path for path in files if "node_modules" not in path.parts]
    named = {(path, page) for path in files for page in re.findall(r"docs/[\w/-]+\.md", path.read_text("utf-8"))}
    assert {(path.relative_to(ROOT).as_posix(), page) for path, page in named if not (ROOT / page).is_file()} == set()


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("folder", ["tutorials", "how-to", "reference", "explanation"])
def test_every_page_is_in_the_table_of_contents(folder: str) -> None:
    contents = (DOCS / folder / "index.md").read_text("utf-8")
    listed = set(re.findall(r"^([\w-]+)$", contents, re.MULTILINE))
    included = {"pareto"}  # a table that another page includes
    assert listed == {page.stem for page in (DOCS / folder).glob("*.md")} - {"index"} - included


def test_readme_has_at_most_120_lines_and_names_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 120
    assert any("make demo" in line for line in lines)
    assert any("make test" in line for line in lines)
    assert any("Research use only" in line for line in lines)


def test_citation_and_lock_file_match_the_project() -> None:
    import echoquad

    assert f"\nversion: {echoquad.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    lines = (ROOT / "requirements-dev.lock").read_text("utf-8").splitlines()
    locked = {name.lower(): version for name, _, version in (line.partition("==") for line in lines)}
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = wanted["optional-dependencies"]
    requirements = map(Requirement, [*wanted["dependencies"], *(item for extra in LOCKED for item in extras[extra])])
    versions = {item.name.lower(): item.specifier for item in requirements if item.name != "echoquad"}
    assert [name for name, allowed in versions.items() if locked.get(name, "") not in allowed] == []


def test_drawing_of_the_packages_matches_the_import_contracts() -> None:
    architecture = extension("architecture")
    drawn = architecture.TARGET.read_text("utf-8")
    assert drawn == architecture.draw(), "run: python docs/_ext/architecture.py"


def test_page_that_loads_from_another_host_is_found(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    offline = extension("offline")
    (tmp_path / "link.html").write_text('<a href="https://example.org">a link is no request</a><img src="a.svg">')
    assert offline.outside_requests(tmp_path) == []
    (tmp_path / "font.css").write_text("@font-face { src: url(https://fonts.example.org/a.woff2) }")
    (tmp_path / "script.html").write_text('<script src="//cdn.example.org/a.js"></script>')
    assert offline.outside_requests(tmp_path) == ["font.css", "script.html"]
