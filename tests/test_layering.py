"""Who may import whom, read from the sources; and what an import of the light parts must not load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("router", "worker", "transceiver", "kernels")
ALLOWED = {
    "core": {"core"},
    "router": {"core", "router"},
    "transceiver": {"core", "transceiver", "kernels"},
    "worker": {"core", "worker", "transceiver", "kernels"},
    "kernels": {"kernels"},
}
# The command line hands over to the parts, inside its commands.
EXCEPTIONS = {"diptych/cli.py": {"router", "worker", "transceiver"}}
# Third parties stay behind one door each.
DOORS = {
    "torch": ("worker/", "transceiver/", "kernels/"),
    "flashinfer": ("kernels/",),
    "triton": ("kernels/",),
    "nixl": (),  # by name, in transceiver/packages.py
    "nixl_cu13": (),
    "nixl_cu12": (),
    "ucxx": (),
}


def sources() -> Iterator[Path]:
    for part in ("diptych", *PARTS):
        for path in sorted((ROOT / part).rglob("*.py")):
            if not any((ROOT / "diptych" / link) in path.parents for link in PARTS):
                yield path


def part_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return "core" if first == "diptych" else first


def imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield node.module or "", node.lineno
            if node.module == "diptych":
                for name in node.names:
                    yield f"diptych.{name.name}", node.lineno


def target_of(module: str) -> str | None:
    first, _, rest = module.partition(".")
    if first != "diptych":
        return None
    second = rest.partition(".")[0]
    return second if second in PARTS else "core"


@pytest.mark.parametrize("path", list(sources()), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stay_within_their_layer(path: Path):
    name = str(path.relative_to(ROOT))
    allowed = ALLOWED[part_of(path)] | EXCEPTIONS.get(name, set())
    for module, line in imports(path):
        first = module.partition(".")[0]
        assert first not in PARTS, f"{name}:{line}: write diptych.{module}"
        target = target_of(module)
        where = f"{name}:{line}"
        assert target is None or target in allowed, f"{where}: {part_of(path)} may not import {module}"
        doors = DOORS.get(first)
        assert doors is None or name.startswith(doors), f"{where}: {first} belongs into {doors}"


def test_every_part_was_found():
    assert {part_of(path) for path in sources()} == {"core", *PARTS}


def test_kernels_have_no_package_file():
    # Their build would take an __init__.py for a kernel of its own.
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("part", PARTS)
def test_links_of_the_package(part: str):
    assert (ROOT / "diptych" / part).resolve() == ROOT / part


LIGHT = (
    "diptych",
    "diptych.cli",
    "diptych.config",
    "diptych.launcher",
    "diptych.router.app",
    "diptych.worker.app",
)


@pytest.mark.parametrize("module", LIGHT)
def test_light_parts_load_nothing_heavy(module: str):
    heavy = ["torch", "transformers", "gguf"]
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_version_command_starts_nothing():
    code = "import sys; from diptych.cli import main\n"
    code += "try: main(['version'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('aiohttp', 'torch', 'numpy', 'yaml') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[1:] == ["[]"], done.stdout + done.stderr
