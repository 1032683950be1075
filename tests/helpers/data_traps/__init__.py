"""Small data sets with one trap each, and the models without weights that they are prepared for."""
