"""Words and their tags. In: CoNLL columns, lists, or a text with spans. Out: one tag for each word, in IOB2, and the entities they mean.

A record becomes an example in records.py, which conll.py, words.py and spans.py serve; encoder.py and windows.py make token ids of it, rows.py
label ids, checks.py says what is odd about it. tagger.py turns logits into tags. schemes.py recognises and converts the schemes of tags, crf.py
scores and decodes whole sequences, transitions.py keeps a CRF's scores beside a model's head. Start with schemes.py.
"""
