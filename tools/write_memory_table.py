"""Write the table of docs/memory.md: which flags train a model at a resolution within a memory. Takes minutes.

python tools/write_memory_table.py
"""

from pathlib import Path

from sd_recipes.assets import CONFIGURATIONS
from sd_recipes.errors import RecipeError
from sd_recipes.memory.plan import Planner
from sd_recipes.memory.remedies import differing, fastest_that_fits
from sd_recipes.recipe import Recipe
from sd_recipes.sizes import bytes_of, size_in_words

PAGE = Path(__file__).parent.parent / "docs" / "memory.md"
BEGIN, END = "<!-- table: written by `make memory-table` -->", "<!-- end of the table -->"
MODELS = {"SD 1.5": (1, (256, 512, 768, 1024)), "SD 2.1": (2, (256, 512, 768, 1024)), "SDXL": ("XL", (1024,))}
BUDGETS = ("8GB", "12GB", "16GB", "24GB", "48GB", "80GB")
BATCH = 8
# Settings as the table has them, where whole flags would not be read.
SHORT = {
    "gradient_checkpointing": "ckpt", "optimizer": "8-bit", "weights_dtype": "bf16 weights", "vae_slicing": "slicing",
    "fused_backward_pass": "fused", "mixed_precision": "", "max_grad_norm": "",
}  # fmt: skip


def cell(planner: Planner, recipe: Recipe, budget: str) -> str:
    planner.capacity = bytes_of(budget)
    try:
        plan = fastest_that_fits(planner, recipe, "--memory")
    except RecipeError:
        return "does not fit"
    changes = differing(recipe, plan.recipe)
    words = [SHORT.get(name, f"micro {value}") for name, value in sorted(changes.items())]
    return f"{', '.join(filter(None, words)) or 'none'} ({size_in_words(plan.total)})"


def table() -> str:
    lines = [f"| model, pixels | {' | '.join(BUDGETS)} |", f"|---|{'---|' * len(BUDGETS)}"]
    for name, (generation, resolutions) in MODELS.items():
        for resolution in resolutions:
            planner = Planner("cuda")
            recipe = Recipe(
                pretrained_model_name_or_path=str(CONFIGURATIONS[generation]),
                train_data_dir="unread",
                resolution=resolution,
                train_batch_size=BATCH,
            )
            cells = [cell(planner, recipe, budget) for budget in BUDGETS]
            lines.append(f"| {name}, {resolution}² | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}", encoding="utf-8")
