"""vmkit.image.recipe: what a user writes about an image: recipes, settings, templates, files."""
