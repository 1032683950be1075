"""The verify stage: every artifact's distance to the model as trained, its gate, and the serve contract.

In: RUN/merge/ and RUN/export/. Out: RUN/verify/parity.json. The measures are in qkit/measure. Start with stage.py.
"""
