"""The structure of the package: which room may import which, so that one can be changed without opening the next."""

import ast
from pathlib import Path

import trl_rlad


PACKAGE = Path(trl_rlad.__file__).parent
# From the ground up: a room imports those before it
ROOMS = (
    "objective",
    "evaluation",
    "packing",
    "alignment",
    "trials",
    "columns",
    "runs",
    "_trl",
    "config",
    "lm_head",
    "rollouts",
    "teachers",
    "scoring",
    "rollout_log",
    "checkpoints",
    "model_card",
    "teacher_guide",
    "trainer",
    "reports",
    "scripts",
    "commands",
    "cli",
    "__init__",
    "__main__",
)


def imports():
    """The modules that each module imports, all by their paths in the package."""
    modules = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
    found = {}
    for module, path in modules.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = (
                    (*module[: len(module) - node.level], *(node.module or "").split("."))
                    if node.module
                    else module[:-1]
                )
                names = {(*base, name.name) for name in node.names} & modules.keys()
                found[module] |= names or {base if base in modules else (*base, "__init__")}
    return found


def test_nothing_imports_upwards():
    upwards = [
        f"{'/'.join(module)} imports {'/'.join(other)}"
        for module, others in imports().items()
        for other in others
        if ROOMS.index(other[0]) > ROOMS.index(module[0])
    ]
    assert not upwards


def test_no_circle():
    left = {module: others - {module} for module, others in imports().items()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        left = {module: others for module, others in left.items() if module not in free}
    assert not left, "these import each other"


def test_the_map_would_notice():
    found = imports()
    assert ("objective", "guidance") in found[("teacher_guide",)] and ("scoring", "__init__") in found[
        ("teacher_guide",)
    ]


def test_every_folder_comes_along_in_a_wheel():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)
