"""How a finished model with labels is used: service.py answers requests with an artifact, usage.py writes how to load one, for its card.

In: an artifact's folder, or a recipe. Out: answers, or Markdown. Start with service.py.
"""
