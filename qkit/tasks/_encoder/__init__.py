"""Tasks on encoders: what a model says of a text, or of each of its words.

tagging/ reads the words of named-entity recognition and their tags, and decodes tag sequences; metrics/ counts what is right, with intervals;
label_checks.py examines the labels of a data set before training.
"""
