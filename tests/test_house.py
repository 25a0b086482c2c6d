"""The rules of docs/architecture.md, read from the code itself, and each rule broken once to see it fail."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMON, DATA = {"common"}, {"data", "common"}
BELOW_MODEL = {"ops", "lamb", "common"}
USES = {  # which rooms each room may import beside itself
    "training": {"checkpoint", "optim", "modeling", "data", "parallel", "devices"} | BELOW_MODEL,
    "checkpoint": {"optim", "modeling", "data"} | BELOW_MODEL,
    "optim": BELOW_MODEL, "modeling": BELOW_MODEL, "ops": COMMON, "lamb": COMMON,
    "data": COMMON, "parallel": COMMON, "devices": COMMON, "common": set(),
}
COMMANDS = ("run_pretraining", "pack_pretraining_data_pytorch", "pytorch_packed_data_checker",
            "create_pretraining_data", "evaluate", "fill_mask", "plot_training", "export_to_huggingface",
            "upload_shards")
USE_FLAGS = (*COMMANDS, "training", "data.bertPrep")  # where the namespace of the flags may go
FIRST_LINE_WITHOUT_TORCH = "No torch here"


def sources() -> dict[str, str]:
    """Module name → text, for the commands and the rooms."""
    files = [*ROOT.glob("*.py"), *(path for room in USES for path in (ROOT / room).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8") for path in files}


def imported(text: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(text)))
    return ({node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
            | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names})


def upward_imports(modules: dict[str, str]) -> list[str]:
    found = []
    for module, text in modules.items():
        room = module.split(".")[0]
        allowed = (USES[room] | {room}) if room in USES else set(USES)
        allowed = allowed | {"data"} if module == "data.bertPrep" else allowed
        for name in imported(text):
            used = name.split(".")[0]
            if (used in USES or used in COMMANDS) and used not in allowed:
                found.append(f"{module} imports {name}")
    return found


def flags_below_the_commands(modules: dict[str, str]) -> list[str]:
    return [f"{module}: args in line {node.lineno}" for module, text in modules.items()
            if not module.startswith(USE_FLAGS)
            for node in ast.walk(ast.parse(text)) if isinstance(node, ast.arg) and node.arg == "args"
            and not module.endswith((".cli", ".workers", "op_list_mode", "memory_estimate"))]  # *args of what they call


def device_kinds(modules: dict[str, str]) -> list[str]:
    return [f"{module}: line {node.lineno}" for module, text in modules.items() if not module.startswith("devices.")
            for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute) and node.attr == "kind"
            and "device" in ast.unparse(node.value)]


def classes_of_one_name(modules: dict[str, str]) -> list[str]:
    places = defaultdict(list)
    for module, text in modules.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(module)
    return [f"{name}: {', '.join(modules)}" for name, modules in places.items() if len(modules) > 1]


def functions_of_one_name(modules: dict[str, str]) -> list[str]:
    places = defaultdict(list)
    for module, text in modules.items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name not in ("main", "parse_arguments"):
                places[node.name].append(module)
    return [f"{name}: {', '.join(modules)}" for name, modules in places.items() if len(modules) > 1]


def functions_in_attributes(modules: dict[str, str]) -> list[str]:
    found = []
    for module, text in modules.items():
        tree = ast.parse(text)
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("self."):
                value = ast.unparse(node.value).removeprefix("self.")
                if isinstance(node.value, ast.Lambda) or (value in functions and "(" not in value
                                                          and not isinstance(node.value, ast.Name)):
                    found.append(f"{module}: {ast.unparse(node)}")
    return found


RULES = {
    upward_imports: {"optim.lr_schedule": "from training.log import FIGURES"},
    flags_below_the_commands: {"ops.attention": "def choose(args): return args"},
    device_kinds: {"training.trainer": "def f(device): return device.kind == 'hpu'"},
    classes_of_one_name: {"ops.attention": "class Attention: pass", "modeling": "class Attention: pass"},
    functions_of_one_name: {"data.shards": "def read(): pass", "data.tokenizer": "def read(): pass"},
    functions_in_attributes: {"lamb": "class A:\n def f(self): self.update = self.g\n def g(self): pass"},
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(rule):
    assert rule(sources()) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_broken_rule_is_found(rule):
    assert len(rule(RULES[rule])) == 1


def test_nothing_imports_a_command():
    assert upward_imports({"data.shards": "import run_pretraining"}) == ["data.shards imports run_pretraining"]
    assert upward_imports({"evaluate": "from fill_mask import main"}) == ["evaluate imports fill_mask"]


def test_files_that_say_so_and_the_commands_load_no_torch():
    """Flags are read, and Gaudi's environment set, before torch is imported."""
    quiet = [module for module, text in sources().items() if FIRST_LINE_WITHOUT_TORCH in text.partition("\n")[0]]
    assert {"training.arguments", "devices.gaudi_environment", "devices.op_lists", "parallel.rendezvous", "common.cli",
            "common.errors", "data.shards", "data.shard_reader", "data.masking"} <= set(quiet)
    program = f"import sys; import {', '.join([*quiet, *COMMANDS])}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    broken = subprocess.run([sys.executable, "-c", program.replace("sys; import ", "sys; import lamb, ")], cwd=ROOT,
                            capture_output=True, text=True)
    assert "AssertionError" in broken.stderr


def test_the_tests_mirror_the_folders():
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert {path.name for path in (ROOT / "tests").iterdir() if (path / "__init__.py").is_file()} <= rooms | {"support"}
