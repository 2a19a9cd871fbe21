"""``python -m launch.models NAME``: builds a model that ``--model NAME`` serves."""

from __future__ import annotations

import sys
from importlib import import_module

from launch.models.recipes import RECIPES, build_into, is_model, model_folder
from launch.settings import BadConfig


def main(argv: list[str]) -> int:
    """Build one of the known models and print its folder."""
    if len(argv) != 1 or argv[0] not in RECIPES:
        print(f"usage: python -m launch.models {{{','.join(RECIPES)}}}", file=sys.stderr)
        return 2
    folder = model_folder(argv[0])
    if not is_model(folder):
        recipe = import_module(RECIPES[argv[0]][0][0])
        try:
            build_into(folder, recipe.build)
        except BadConfig as error:
            print(f"{argv[0]}: {error}", file=sys.stderr)
            return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
