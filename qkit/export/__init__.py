"""The export stage: the merged model in every format that the recipe names.

In: RUN/merge/. Out: RUN/export/FORMAT/, each whole. Start with stage.py; formats/ holds one file for each kind of format.
"""
