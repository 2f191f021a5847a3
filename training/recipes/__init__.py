"""The papers' tables as files, and what runs them."""

from credence.training.recipes.page import document, page
from credence.training.recipes.recipe import Recipe, load_recipe, recipe_names, recipe_text
from credence.training.recipes.run import Outcome, Reproduction, reproduce

__all__ = [
    "Outcome",
    "Recipe",
    "Reproduction",
    "document",
    "load_recipe",
    "page",
    "recipe_names",
    "recipe_text",
    "reproduce",
]
