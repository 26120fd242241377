"""Which file may import which, and that no file unpickles: read from the sources."""

import ast
import re
from pathlib import Path

import pytest

from hf_vaeplus.hub import _PACKAGE_ONLY

PACKAGE = Path(__file__).parents[1] / "hf_vaeplus"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
# An exported Hub repository carries the first three alone; the others must stay readable and replaceable on their own.
ALLOWED = {
    "modeling_vaeplus.py": set(),
    "pipeline_vaeplus.py": set(),
    "image_processing_vaeplus.py": set(),
    "rendered_faces.py": set(),
    "checkpoints.py": set(),
    "training.py": {"checkpoints", "hub"},
    "data.py": {"image_processing_vaeplus", "rendered_faces"},
}
UNPICKLING = {"torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "yaml.load"}
UNPICKLING |= {"yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle", "runpy.run_path"}
UNPICKLING |= {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "importlib.import_module"}
UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle", "hickle"}


def package_imports(source: str, file: str) -> set[str]:
    """Modules of this package that a source imports, anywhere in it: "data", "metrics", or "" for its top level."""
    folder = ["hf_vaeplus", *Path(file).parent.parts]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) - node.level + 1] if node.level else []
            module = start + (node.module.split(".") if node.module else [])
            found += [module + [alias.name] for alias in node.names] if len(module) == 1 else [module]
    return {module[1] if len(module) > 1 else "" for module in found if module[0] == "hf_vaeplus"}


def dotted_calls(source: str) -> set[str]:
    """Names of the functions that a source calls, with the names that its imports give them undone.

    Without those that say weights_only=True: PyTorch's reader of tensors, which runs no code (features.py needs it for
    the published FID weights).
    """
    tree = ast.parse(source)
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    calls = {
        ast.unparse(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and "weights_only=True" not in map(ast.unparse, node.keywords)
    }
    return {".".join([names.get(head, head), *rest]) for head, *rest in (call.split(".") for call in calls)}


@pytest.mark.parametrize("file", ALLOWED)
def test_imports_inside_the_package(file):
    source = _PACKAGE_ONLY.sub("", FILES[file].read_text())  # as an exported repository carries it
    assert package_imports(source, file) <= ALLOWED[file]


@pytest.mark.parametrize("file", FILES)
def test_no_file_imports_the_examples_or_unpickles(file):
    source = FILES[file].read_text()
    imported = {alias.name for node in ast.walk(ast.parse(source)) for alias in getattr(node, "names", [])
                if isinstance(node, ast.Import)}  # fmt: skip
    imported |= {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name and name.split(".")[0] == "examples"]
    assert not {name.split(".")[0] for name in imported if name} & UNPICKLERS
    assert not dotted_calls(source) & UNPICKLING
    assert "allow_pickle" not in source and "trust_remote_code=True" not in code_without_texts(source)
    assert not re.search(r"weights_only=(?!True)|shell=", code_without_texts(source))


def code_without_texts(source: str) -> str:
    """A source without its comments and the texts in it, docstrings among them."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.unparse(tree)


def test_the_readers_find_what_they_look_for():
    source = (
        "import torch as t\nfrom . import data\nfrom .stages import x\nimport hf_vaeplus.cli\n"
        "def f():\n    from pickle import load as read\n    return read(t.load('x'))\n"
    )
    assert package_imports(source, "a.py") == {"data", "stages", "cli"}
    assert package_imports("from .. import data\nfrom ..hub import x\nfrom .fid import y", "metrics/a.py") == {
        "data",
        "hub",
        "metrics",
    }
    assert dotted_calls(source) >= {"pickle.load", "torch.load"}
    assert not dotted_calls("import torch\ntorch.load('x', weights_only=True)") & UNPICKLING
