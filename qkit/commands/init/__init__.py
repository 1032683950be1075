"""`qkit init`: a file of examples goes in, a commented recipe that works comes out.

dataset.py reads the data as a table (layout.py: what kind of file it is), reading.py asks every task how it would read it, base.py picks a
model, lengths.py measures rows, compose.py chooses every value with its reason, text.py writes them; troubles.py says what is wrong with the
data, examples.py copies the recipes that ship with qkit. Start with init.py.
"""
