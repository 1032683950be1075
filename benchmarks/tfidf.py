"""Classification without a neural network: TF-IDF and logistic regression. Prints one line of JSON.

pip install scikit-learn==1.9.1        # in an environment of its own: qkit does not need it
PYTHON benchmarks/tfidf.py train.csv test.csv --columns text category
"""

import argparse
import csv
import json
import resource
import time
from pathlib import Path

import sklearn
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union


def read(file, text, label):
    with Path(file).open(encoding="utf-8", newline="") as source:
        rows = [(row[text], row[label]) for row in csv.DictReader(source)]
    return [row[0] for row in rows], [row[1] for row in rows]


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("files", nargs=2, metavar=("TRAIN", "TEST"))
parser.add_argument("--columns", nargs=2, metavar=("TEXT", "LABEL"), default=["text", "category"])
parser.add_argument("--inverse-regularization", type=float, default=10.0, help="C of the logistic regression")
given = parser.parse_args()
texts, labels = read(given.files[0], *given.columns)
asked, expected = read(given.files[1], *given.columns)

words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
regression = LogisticRegression(C=given.inverse_regularization, max_iter=1000)
model = make_pipeline(make_union(words, characters), regression)
begin = time.perf_counter()
model.fit(texts, labels)
seconds = time.perf_counter() - begin
figures = {
    "accuracy": float(model.score(asked, expected)),
    "right": [bool(a == b) for a, b in zip(model.predict(asked), expected, strict=True)],
    "seconds": seconds,
    "rows_per_second": len(texts) / seconds,
    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "trainable_parameters": int(regression.coef_.size + regression.intercept_.size),
    "scikit-learn": sklearn.__version__,
}
print(json.dumps(figures))
