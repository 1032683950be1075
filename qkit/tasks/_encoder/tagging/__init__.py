"""Words and their tags. In: CoNLL columns, or a text with spans. Out: one tag for each word, in the scheme IOB2, and the entities they mean.

conll.py reads columns, spans.py turns character spans into tags, schemes.py recognises and converts the schemes of tags, crf.py scores and
decodes whole sequences. Start with schemes.py.
"""
