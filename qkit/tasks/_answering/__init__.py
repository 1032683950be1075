"""Questions whose answer is a part of a context, for an encoder with a head that says where it begins and ends.

A record goes through reading.py (record -> question) and windows.py (question -> rows of token ids: a long context becomes several windows
that overlap). spans.py turns the logits of all windows of a question into one answer, squad.py compares it with the accepted ones, and
set_checks.py looks at a whole data set. service.py answers requests with a finished model. What texts with labels decide alike is in
tasks/_encoder/. Start with windows.py.
"""
