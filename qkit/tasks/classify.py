"""Classification: one label for a text, or for a pair of texts."""

from __future__ import annotations

from qkit.plugins.task import ModelHead
from qkit.tasks._encoder.task import EncoderTask


class Classify(EncoderTask):
    """Records with a text and a label; the most likely label is compared with the record's."""

    METRIC = "accuracy"
    HEAD = ModelHead("AutoModelForSequenceClassification", "SEQ_CLS", "text-classification", generates=False)


TASK = Classify()
