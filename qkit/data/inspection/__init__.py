"""`qkit inspect`: what the data stage makes of a recipe's rows, to look at before training.

In: a recipe or a run. Out: a view (view.py), as text or JSON (screen.py) or a page (page.py). Start with view.py.
"""
