"""Write src/dcris/assets/recipes.json, which `dcris recipes` prints: all recipes with their weight
counts. Run `python tools/list_recipes.py` after a change of the recipes or the network.
"""

import argparse
from pathlib import Path
from typing import Any

from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import RECIPES
from dcris.utils.device import shapes_only
from dcris.utils.files import write_json

LIST = Path(__file__).parents[1] / "src/dcris/assets/recipes.json"


def rows() -> list[dict[str, Any]]:
    """Return the name, the weight counts and the summary of each recipe."""
    counts: dict[str, dict[str, int]] = {}
    listed = []
    for name, recipe in RECIPES.items():
        network = recipe.config.model.model_dump_json()  # recipes for several data sets have the same
        if network not in counts:
            with shapes_only():
                counts[network] = ReferringSegmenter(recipe.config.model).count_weights()
        listed.append({"name": name, **counts[network], "summary": recipe.summary})
    return listed


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    write_json(LIST, rows())
