"""``--model``: names and paths, and the models that are built here."""
