"""`qkit predict`: what a model says of every record of a file, written line by line, and continued where an earlier attempt ended.

In: a run, an artifact or a server, and a file. Out: one line for each record, in its order. source.py reads records, targets.py finds
the model, predictors.py and servers.py answer, sink.py writes and continues what state.py lets it. Start with predict.py.
"""
