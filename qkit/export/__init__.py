"""The export stage: writes the merged model in every format that the recipe names.

In: RUN/merge/. Out: RUN/export/FORMAT/, each complete. Start with stage.py; formats/ has one exporter for each kind of format.
"""
