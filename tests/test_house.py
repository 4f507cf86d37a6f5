"""The rules of the house that a reader would otherwise have to trust: what may import what, what loads torch, what the recipes say."""

import ast
import itertools
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from instructlite.config import SECTIONS, load_loop, recipes

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "instructlite"
LAYERS = {
    "errors": 0,
    "config": 1,
    "progress": 1,
    "data": 2,
    "models": 2,
    "training": 3,
    "evaluation": 4,
    "feedback": 5,
    "sharing": 5,
    "planning": 5,
    "pipeline": 6,
    "rounds": 6,
    "commands": 7,
    "cli": 8,
    "__main__": 8,
}
FILES = sorted(PACKAGE.rglob("*.py"))
PRINTERS = {"cli.py", "evaluation/report.py", *(str(path.relative_to(PACKAGE)) for path in (PACKAGE / "commands").glob("*.py"))}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below, but for what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from statements(child)


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in it, as 'room.module'."""
    above = ["instructlite", *path.relative_to(PACKAGE).parts[:-1]]
    modules = {name_of(file) for file in FILES}
    found = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            parts = above[: len(above) + 1 - node.level] if node.level else []
            base = [*parts, *(node.module or "").split(".")]
            names = [[*base, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        for name in names:
            name = [part for part in name if part]
            dotted = ".".join(name[1:])
            if name[0] == "instructlite" and dotted.rpartition(".")[0] in modules | {""} and dotted not in modules:
                dotted = dotted.rpartition(".")[0]
            if name[0] == "instructlite" and dotted:
                found.add(dotted)
    return found


GRAPH = {name_of(path): imports(path) for path in FILES if path.name != "__init__.py"}


def test_imports_point_down_only():
    upward = [
        f"{module} imports {imported}"
        for module, found in GRAPH.items()
        for imported in found
        if LAYERS[imported.split(".")[0]] > LAYERS[module.split(".")[0]]
    ]
    assert not upward


def test_no_import_is_circular():
    def walk(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above, module])
        for imported in GRAPH.get(module, ()):
            walk(imported, (*above, module))

    for module in GRAPH:
        walk(module, ())


def test_every_room_has_a_layer_and_is_packaged():
    rooms = {name.split(".")[0] for name in GRAPH}
    assert rooms <= set(LAYERS)
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert set(listed) == packages | {"instructlite.recipes"}


def test_the_maths_of_ppo_knows_torch_only():
    tree = ast.parse((PACKAGE / "training" / "ppo_math.py").read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) == {"torch"}
    assert not GRAPH["training.ppo_math"]


def test_chat_templates_are_applied_in_one_place_and_to_tokens():
    calls = [
        (path, node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "apply_chat_template"
    ]
    assert calls
    for path, call in calls:
        assert path == PACKAGE / "models" / "base.py", f"{path}:{call.lineno}"
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert said["tokenize"] == "True", f"{path}:{call.lineno}: text would be tokenized a second time, with control tokens in it"


def test_only_the_command_line_and_the_report_print():
    printing = [
        f"{path}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and node.id == "print" and str(path.relative_to(PACKAGE)) not in PRINTERS
    ]
    assert not printing


def test_files_and_functions_stay_small():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") < 600, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 80, f"{path}:{node.lineno}"


def run_python(code: str) -> tuple[subprocess.CompletedProcess, float]:
    """The process and the seconds of processor time it took: unlike seconds by the clock, those do not depend on who else runs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return process, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


HEAVY = "assert not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules), 'loaded torch'"


def test_votes_are_stored_exported_and_counted_without_torch():
    process, _ = run_python(f"import sys, instructlite.feedback.exchange, instructlite.feedback.insight; {HEAVY}")
    assert process.returncode == 0, process.stderr


def test_importing_the_package_loads_no_torch():
    process, seconds = run_python(f"import sys, instructlite; {HEAVY}; import instructlite.config, instructlite.data.records; {HEAVY}")
    assert process.returncode == 0, process.stderr
    assert seconds < 1


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["votes", "--help"], ["recipes"], ["--version"]])
def test_the_command_line_answers_at_once_and_loads_no_torch(arguments):
    code = f"import sys\nfrom instructlite.cli import main\ntry: main({arguments})\nexcept SystemExit as end: assert not end.code\n{HEAVY}"
    process, seconds = run_python(code)
    assert process.returncode == 0, process.stderr
    assert process.stdout
    assert seconds < 1


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_loads_and_its_training_blocks_fit_the_real_config_classes(name, tmp_path):
    from trl import DPOConfig, RewardConfig, SFTConfig

    from instructlite import PPOConfig

    text = recipes()[name].read_text(encoding="utf-8")
    header = "".join(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()))
    assert "easured" in header, "the header says what was measured and what was not"
    required = [key for key in ("demonstrations", "comparisons") if f"{key}: ???" in text]
    loop = load_loop(name, [f"data.{key}={key}.jsonl" for key in required])
    configs = {"sft": SFTConfig, "reward": RewardConfig, "judge": RewardConfig, "ppo": PPOConfig, "dpo": DPOConfig}
    for stage in SECTIONS:
        options = loop.options(stage)
        SECTIONS[stage](**options, **{"model": "m", "data": "d", **({"reward": "r"} if stage == "ppo" else {})})
        given = options.get("training", {})
        config = configs[stage](output_dir=str(tmp_path), use_cpu=True, **given)
        assert {key: getattr(config, key) for key in given} == given
