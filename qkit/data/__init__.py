"""The data stage: rows become token ids, and the ledger says what became of each.

In: recipe.data. Out: RUN/data/ with a Parquet file for each split and ledger.parquet. No other stage imports it.
Start with stage.py; then read.py, prepare.py, select.py and ledger.py, in the order in which a row comes by.
"""
