"""The import laws: arrows point down, never in a circle, and only some rooms know Flower or Hydra."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fedlp"
FLOORS = [
    {"types", "errors", "rng", "progress", "registry"},
    {"config", "models"},
    {"pruning", "allocation", "data", "training", "tasks"},
    {"federation", "simulation"},
    {"apps", "report"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MOST_ROOMS, MOST_ARROWS = 17, 70  # an arrow is a pair of rooms of which one imports from the other
MOST_LINES, MOST_CODE, USUAL_CODE = 300, 50, 30  # of a file; of a function without its docstring: of any, of 95 %
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[str]:
    """Yield every module a file imports, at its top or inside a function; type-checking imports count too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_runs_upwards(path: Path) -> None:
    room = room_of(path)
    assert room in FLOOR, f"{room} has no floor"
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "fedlp" and len(parts) > 1 and parts[1] in FLOOR:
            assert FLOOR[parts[1]] <= FLOOR[room], f"{path} imports {name} from a higher floor"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_some_rooms_know_flower_and_hydra(path: Path) -> None:
    outside = {name.split(".")[0] for name in imports_of(path)}
    room = room_of(path)
    if room not in ("federation", "simulation"):
        assert "flwr" not in outside
    if room not in ("cli", "config"):
        assert not outside & {"hydra", "omegaconf"}


def test_private_names_of_flower_are_used_in_one_place() -> None:
    public = ("flwr.app", "flwr.serverapp", "flwr.clientapp", "flwr.serverapp.strategy")
    for path in MODULES:
        if path.name == "flower_compat.py":
            continue
        for name in imports_of(path):
            if name.startswith("flwr"):
                module = name if name in public else name.rpartition(".")[0]
                assert module in public, f"{path} imports {name}"


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(p) == "pruning"], ids=lambda p: p.name)
def test_pruning_kernels_do_not_know_the_config(path: Path) -> None:
    assert not any(name.startswith("fedlp.config") for name in imports_of(path))


def test_no_room_asks_for_the_name_of_a_task() -> None:
    names = {"classification", "language", "causal_lm", "regression", "multi_label", "sequence_classification"}
    for path in MODULES:
        if room_of(path) in ("tasks", "data", "registry"):
            continue
        found = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)} & names
        assert not found, f"{path} asks for the task {found}"


def test_there_are_no_circles() -> None:
    names = {".".join(("fedlp", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in MODULES}
    packages = {name.removesuffix(".__init__"): name for name in names}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        found = {packages[imported] for imported in imports_of(path) if imported in packages}
        graph[name] = found - {name}
    assert_acyclic(graph)


def test_rooms_form_no_circle_and_their_arrows_stay_few() -> None:
    graph: dict[str, set[str]] = {room_of(path): set() for path in MODULES}
    for path in MODULES:
        found = {name.split(".")[1] for name in imports_of(path) if name.startswith("fedlp.")}
        graph[room_of(path)] |= {room for room in found if room in graph} - {room_of(path)}
    assert_acyclic(graph)
    assert len(graph) <= MOST_ROOMS, sorted(graph)
    arrows = [(room, target) for room, targets in graph.items() for target in targets]
    assert len(arrows) <= MOST_ARROWS, f"{len(arrows)} arrows between rooms: {sorted(arrows)}"


def assert_acyclic(graph: Mapping[str, Collection[str]]) -> None:
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle: {' -> '.join((*trail, name))}"
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_contributing_names_the_same_floors() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", text, re.MULTILINE)
    told = {int(floor): set(re.findall(r"`(\w+)`", rooms)) for floor, rooms in rows}
    assert told == {number + 1: rooms for number, rooms in enumerate(FLOORS)}


def test_a_long_file_says_why() -> None:
    for path in MODULES:
        text = path.read_text()
        if len(text.splitlines()) > MOST_LINES:
            reason = ast.get_docstring(ast.parse(text)) or ""
            assert "Longer than other files: " in reason, f"{path} is long, and does not say why"


def test_functions_are_short() -> None:
    lengths = sorted(
        (lines_of_code(node), f"{path}: {node.name}")
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert lengths[-1][0] <= MOST_CODE, lengths[-1]
    assert lengths[int(0.95 * len(lengths))][0] <= USUAL_CODE


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function without its docstring."""
    assert function.end_lineno is not None
    count = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        first = function.body[0]
        assert first.end_lineno is not None
        count -= first.end_lineno - first.lineno + 1
    return count


def test_nothing_is_unpickled() -> None:
    unpicklers = {"pickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "copyreg"}
    for path in PACKAGE.rglob("*.py"):
        imported = {name.split(".")[0] for name in imports_of(path)}
        assert not imported & unpicklers, f"{path} can unpickle"
        assert "concurrent.futures.ProcessPoolExecutor" not in imports_of(path), f"{path} can unpickle"
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            if ast.unparse(call.func) == "torch.load":
                assert given.get("weights_only") == "True", f"{path}:{call.lineno}: torch.load is not safe"
            assert given.get("allow_pickle", "False") == "False", f"{path}:{call.lineno} unpickles arrays"
            assert call.func.attr != "read_pickle", f"{path}:{call.lineno} unpickles a table"
            if "multiprocessing" in imported:  # what these send between processes is pickled
                pickling = {"Pool", "Manager", "Queue", "SimpleQueue", "JoinableQueue", "recv"}
                assert call.func.attr not in pickling, f"{path}:{call.lineno} unpickles what another process sends"


def test_help_needs_neither_torch_nor_flower() -> None:
    code = (
        "import sys, fedlp.cli; heavy = {'torch', 'flwr', 'transformers', 'matplotlib'} & set(sys.modules); "
        "sys.exit(' '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"importing the command line imports {done.stderr}"


def test_a_run_needs_no_compiler(tmp_path: Path) -> None:
    """Clients train in the run's own process, so that what they import counts too."""
    code = (
        "import sys, fedlp; fedlp.run(['strategy=fedavg', 'model=fedlp_mlp', 'local=adam', 'num_rounds=1', "
        "'num_clients=2', 'clients_per_round=2', 'dataset.max_train_examples=40', 'simulation.workers=0'], out='run'); "
        "heavy = {'torch._dynamo', 'torch._inductor', 'sympy', 'sklearn', 'scipy', 'pandas', 'matplotlib', "
        "'transformers', 'torchvision', 'ray'} & set(sys.modules); sys.exit(' '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"a run imports {done.stderr}"
