"""Which file may import which, and that no file unpickles: read from the sources of all files."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_vaeplus"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
# From below: a file imports from its own floor and from those under it. A wing or a file stands for all that is in it.
FLOORS = (
    {"fields", "files", "metrics", "progress", "provenance", "version"},
    {"image_processing_vaeplus", "modeling_baselines", "modeling_detail", "modeling_priors", "modeling_vaeplus"},
    {"data"},
    {"directions", "pictures", "pipeline_vaeplus"},
    {"diagnosis", "evaluation", "hub", "training"},
    {"cli", "demo", "registration"},
    {"__init__"},
)
ALONE = {  # an exported repository carries the first five
    "image_processing_vaeplus.py": set(),
    "modeling_vaeplus.py": set(),
    "pipeline_vaeplus.py": set(),
    "modeling_priors.py": {"modeling_vaeplus"},
    "modeling_detail.py": {"modeling_vaeplus"},
    "modeling_baselines.py": {"metrics.mmd", "modeling_vaeplus"},
}
UNPICKLING = {"torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "yaml.load"}
UNPICKLING |= {"yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle", "runpy.run_path"}
UNPICKLING |= {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "importlib.import_module"}
UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle", "hickle"}


def module_of(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


MODULES = frozenset(map(module_of, FILES))


def package_imports(source: str, file: str, modules=MODULES) -> set[str]:
    """Modules of this package that a source imports, anywhere in it: "data.cache", or "__init__" for its top level."""
    folder = ["hf_vaeplus", *Path(file).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) - node.level + 1] if node.level else []
            names = [".".join([*start, *filter(None, [node.module]), alias.name]) for alias in node.names]
        else:
            continue
        for words in (name.split(".") for name in names):
            if words[0] == "hf_vaeplus":  # the longest beginning that is a module: what follows is a name in it
                starts = (".".join(words[1:stop]) for stop in range(len(words), 1, -1))
                found.add(next((start for start in starts if start in modules), "__init__"))
    return found


def floor(module: str) -> int:
    return next(number for number, wings in enumerate(FLOORS) if module.split(".")[0] in wings)


def circle(imports: dict[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return None


IMPORTS = {module_of(file): package_imports(path.read_text(), file) for file, path in FILES.items()}


def dotted_calls(source: str) -> set[str]:
    """Names of the functions that a source calls, with the names that its imports give them undone.

    Without those that say weights_only=True: PyTorch's reader of tensors, which runs no code (evaluation/features.py
    needs it for the published FID weights).
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


def test_imports_run_one_way():
    assert circle(IMPORTS) is None
    upwards = [(module, each) for module, found in IMPORTS.items() for each in found if floor(each) > floor(module)]
    assert not upwards


@pytest.mark.parametrize(("file", "allowed"), ALONE.items())
def test_files_that_stand_alone(file, allowed):
    assert IMPORTS[module_of(file)] == allowed


def test_a_planted_circle_and_a_planted_way_up_are_found():
    planted = "def late():\n    from ..hub.cards import write_card\n"
    found = package_imports(planted, "evaluation/tables.py")
    assert found == {"hub.cards"}
    assert set(circle({**IMPORTS, "evaluation.tables": found})) >= {"hub.cards", "evaluation.tables"}
    assert package_imports("from .cli.main import main", "files.py") == {"cli.main"}
    assert floor("cli.main") > floor("files")


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
        "import torch as t\nfrom . import data\nfrom .stages import x\nimport hf_vaeplus.cli.main\n"
        "def f():\n    from pickle import load as read\n    return read(t.load('x'))\n"
    )
    modules = {"data", "stages", "cli.main", "hub.cards", "metrics.fid"}
    assert package_imports(source, "a.py", modules) == {"data", "stages", "cli.main"}
    found = package_imports(
        "from .. import data, Name\nfrom ..hub.cards import x\nfrom .fid import y", "metrics/a.py", modules
    )
    assert found == {"data", "__init__", "hub.cards", "metrics.fid"}
    assert dotted_calls(source) >= {"pickle.load", "torch.load"}
    assert not dotted_calls("import torch\ntorch.load('x', weights_only=True)") & UNPICKLING


def _locale_dependent(source: str) -> list[str]:
    """Calls that read or write text in whatever encoding the machine's locale has."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        modes = [each.value for each in [*node.args[1:2], given.get("mode")] if isinstance(each, ast.Constant)]
        is_open = isinstance(node.func, ast.Name) and name == "open" and not any("b" in str(mode) for mode in modes)
        is_text = isinstance(node.func, ast.Attribute) and name in ("read_text", "write_text")
        if "text" in given or (is_open or is_text) and "encoding" not in given:
            found.append(ast.unparse(node))
    return found


def test_text_is_utf8_whatever_the_locale():
    wrong = 'open(a), open(a, "w"), a.read_text(), a.write_text(b), run(c, text=True)'
    right = (
        'open(a, "rb"), open(a, encoding="utf-8"), a.write_text(b, encoding="utf-8"), write_text(a, b), Image.open(a)'
    )
    assert len(_locale_dependent(wrong)) == 5 and not _locale_dependent(right)
    folders = (PACKAGE, PACKAGE.parent / "examples", PACKAGE.parent / "benchmarks")
    found = {path.name: _locale_dependent(path.read_text()) for folder in folders for path in folder.rglob("*.py")}
    assert not {name: calls for name, calls in found.items() if calls}
