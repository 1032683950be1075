"""`qkit predict`: what a model says of every record of a file, written line by line, and continued where an earlier attempt ended.

In: a run, an artifact or a server, and a file. Out: one line for each record, in its order. source.py reads records, predictors.py and
servers.py answer them, sink.py writes and continues. Start with predict.py.
"""
