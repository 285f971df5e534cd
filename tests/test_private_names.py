"""Private names of libraries, which a new version may change: each is used in one place, and held here as it was."""

import ast
import inspect
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import accelerate
import datasets
import torch
from accelerate.commands import launch
from accelerate.state import AcceleratorState
from conftest import ROOT
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

from sd_recipes.data import images
from sd_recipes.data.batches import end_workers
from sd_recipes.runtime.out_of_memory import times_changed
from sd_recipes.runtime.signals import outlive_signals

USED = {
    "_shutdown_workers": "torch",
    "_foreach_lerp_": "torch",
    "_generate_tables": "datasets",
    "_cast_table": "datasets",
    "_generate_examples": "datasets",
    "_info": "datasets",
    "_reset_state": "accelerate",
    "_validate_launch_command": "accelerate, in tests",
    "_set_pg_timeout": "torch, in tests",
    "_coalescing_manager": "torch",
    "_init_group": "torch",
    "_version": "torch",
    "_cdata": "torch",
    "_execution_engine": "torch",
    "_local_scalar_dense": "torch",
    "_to_copy": "torch",
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def names_of(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Private names in a module, and whether they are its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, True
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, True
        elif isinstance(node, ast.Name):
            yield node.id, isinstance(node.ctx, ast.Store)
        elif isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "os"):
            yield node.attr, isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.name, False) for alias in node.names)


def test_no_other_private_name_of_a_library_is_used() -> None:
    found: dict[str, set[Path]] = {}
    own: set[str] = set()
    for path in [*(ROOT / "sd_recipes").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        for name, is_own in names_of(ast.parse(path.read_text())):
            if is_private(name):
                found.setdefault(name, set()).add(path.relative_to(ROOT))
                own |= {name} if is_own else set()
    overridden = {"_generate_tables", "_generate_examples", "_info"}  # look like our own
    foreign = {name: paths for name, paths in found.items() if name not in own or name in overridden}
    assert foreign.keys() <= USED.keys(), "use what is public, or add the name to USED with a test of it here"
    for name, paths in foreign.items():
        assert len({*paths} - {Path("tests/test_private_names.py")}) == 1, f"{name} of {USED[name]} is in several files"
    assert foreign.keys() == USED.keys(), "a name in USED is used no more"


def test_a_loaders_workers_are_ended() -> None:
    before = set(multiprocessing.active_children())
    iterator = iter(
        torch.utils.data.DataLoader([1, 2, 3], num_workers=1, worker_init_fn=outlive_signals, prefetch_factor=1)
    )
    assert hasattr(iterator, "_shutdown_workers"), (
        f"torch {torch.__version__} ends a loader's workers in another way: mend {inspect.getsourcefile(end_workers)}"
    )
    assert next(iterator) == 1
    (worker,) = set(multiprocessing.active_children()) - before
    end_workers(iterator)
    assert not worker.is_alive()


def test_torch_moves_many_tensors_towards_others_at_once() -> None:
    tensors, others = [torch.zeros(2), torch.ones(3)], [torch.ones(2), torch.zeros(3)]
    torch._foreach_lerp_(tensors, others, 0.25)
    assert [each.tolist() for each in tensors] == [[0.25] * 2, [0.75] * 3], f"not in torch {torch.__version__}"


def test_datasets_reads_parquet_by_the_function_that_is_overridden() -> None:
    changed = f"datasets {datasets.__version__} reads Parquet in another way: mend ParquetFiles"
    assert list(inspect.signature(Parquet._generate_tables).parameters) == ["self", "files", "row_groups_list"], changed
    assert list(inspect.signature(Parquet._cast_table).parameters) == ["self", "pa_table"], changed


def test_datasets_reads_shards_by_the_functions_that_are_overridden() -> None:
    changed = f"datasets {datasets.__version__} reads WebDataset shards in another way: mend TarFiles"
    wanted = ["self", "tar_paths", "tar_iterators"]
    assert list(inspect.signature(WebDataset._generate_examples).parameters) == wanted, changed
    assert list(inspect.signature(WebDataset._info).parameters) == ["self"], changed


def test_accelerates_state_and_launcher_are_as_the_tests_use_them() -> None:
    changed = f"accelerate {accelerate.__version__} has changed: mend forget_accelerator or tests/launching.py"
    assert "reset_partial_state" in inspect.signature(AcceleratorState._reset_state).parameters, changed
    assert list(inspect.signature(launch._validate_launch_command).parameters) == ["args"], changed


def test_torchs_time_out_between_processes_is_set_as_the_tests_do() -> None:
    changed = f"torch {torch.__version__} sets it in another way: mend tests/slow_first.py"
    assert list(inspect.signature(distributed_c10d._set_pg_timeout).parameters) == ["timeout", "group"], changed


def test_torch_sums_many_tensors_at_once() -> None:
    changed = f"torch {torch.__version__} does so in another way: mend sd_recipes/runtime/gradients.py"
    names = list(inspect.signature(distributed_c10d._coalescing_manager).parameters)
    assert names == ["group", "device", "async_ops"], changed


def test_torchs_adafactor_lists_its_state_in_the_order_in_which_ours_takes_it() -> None:
    _, _, *lists = inspect.signature(torch.optim.Adafactor._init_group).parameters
    changed = f"torch {torch.__version__} has another Adafactor: mend sd_recipes/training/adafactor.py"
    assert lists == ["params_with_grad", "grads", "row_vars", "col_vars", "variances", "state_steps"], changed


def test_torch_counts_changes_of_a_tensor() -> None:
    tensor = torch.zeros(2)
    before = times_changed(tensor)
    tensor.add_(1)
    assert times_changed(tensor) > before, f"torch {torch.__version__} does not: mend times_changed"


def test_torch_is_traced_as_the_memory_plan_does() -> None:
    changed = f"torch {torch.__version__} has changed: mend sd_recipes/memory"
    one, other = torch.zeros(2), torch.zeros(2)
    assert one.untyped_storage()._cdata == one.view(2, 1).untyped_storage()._cdata, changed
    assert one.untyped_storage()._cdata != other.untyped_storage()._cdata, changed
    assert callable(torch.autograd.Variable._execution_engine.run_backward), changed
    called = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **kwargs or {})

    with Noting():
        one.sum().item()
        one.to(torch.float64)
    assert torch.ops.aten._local_scalar_dense.default in called, changed
    assert torch.ops.aten._to_copy.default in called, changed


def test_which_filters_torch_has_is_found_by_trying(monkeypatch) -> None:
    images.torch_filters.cache_clear()
    monkeypatch.setattr(torch.nn.functional.interpolate, "__doc__", None)  # as python -OO leaves it
    assert images.torch_filters() == {"bilinear", "bicubic", "lanczos"}

    def old_interpolate(pixels: torch.Tensor, *, mode: str, **options: object) -> torch.Tensor:
        if mode == "lanczos":
            raise ValueError("Anti-alias option is restricted to bilinear and bicubic modes")
        return pixels

    images.torch_filters.cache_clear()
    monkeypatch.setattr(torch.nn.functional, "interpolate", old_interpolate)
    assert images.torch_filters() == {"bilinear", "bicubic"}
    images.torch_filters.cache_clear()
