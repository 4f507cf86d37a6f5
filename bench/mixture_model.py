"""Trains the classifier of use cases in instructlite/data/use_cases.json and measures it on held-out labels.

    python bench/mixture_model.py DEMONSTRATIONS.jsonl... [--write] [--json bench/results/mixture_model.json]

The rows need a `category`. A fifth of the prompt clusters is held out. Features are the words and word pairs that `use_case_features`
gives; L1 keeps some thousand of them. Needs scikit-learn; what comes out is weights in JSON that prepare reads without it.
"""

import argparse
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import recording
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from instructlite.data.formats import Row, rows
from instructlite.data.preparing.duplicates import key64
from instructlite.data.preparing.mixture import MODEL_FILE, SAME_AS, category_of, use_case_features
from instructlite.data.preparing.steps import Sample

LEAST = 20


def labelled(paths: list[Path]) -> tuple[list[list[str]], list[str], list[str]]:
    """Features, labels and prompts of the rows that have a category, if it has enough of them to be learnt."""
    found = []
    for path in paths:
        for row in rows(path, "demonstrations"):
            if isinstance(row, Row) and (label := row.record.get("category")):
                sample = Sample(row.record, row.kind, row.file, row.line)
                found.append((use_case_features(sample), SAME_AS.get(label, label), " ".join(sample.prompt.casefold().split())))
    common = {label for label, number in Counter(label for _, label, _ in found).items() if number >= LEAST}
    features, labels, prompts = zip(*[row for row in found if row[1] in common], strict=True)
    return list(features), list(labels), list(prompts)


def matrix(features: list[list[str]], vocabulary: dict[str, int]) -> csr_matrix:
    known = [[vocabulary[feature] for feature in row if feature in vocabulary] for row in features]
    ends = np.cumsum([0, *map(len, known)])
    return csr_matrix((np.ones(ends[-1]), np.concatenate(known).astype(int), ends), shape=(len(features), len(vocabulary)))


def fit(features: list[list[str]], labels: list[str], strength: float) -> dict:
    """The weights of the features that L1 keeps: {labels, intercepts, weights: {feature: one number a label}}."""
    counts = Counter(feature for row in features for feature in row)
    vocabulary = {feature: number for number, feature in enumerate(sorted(f for f, n in counts.items() if n >= 5))}
    one = LogisticRegression(C=strength, l1_ratio=1, solver="liblinear", class_weight="balanced", random_state=0)
    names = sorted(set(labels))
    fitted = [
        one.fit(matrix(features, vocabulary), [label == name for label in labels]) and (one.coef_[0], one.intercept_[0]) for name in names
    ]
    coefficients = np.array([weights for weights, _ in fitted])
    kept = {name: coefficients[:, number] for name, number in vocabulary.items() if np.abs(coefficients[:, number]).max() > 0.01}
    weights = {name: np.round(row, 3).tolist() for name, row in kept.items()}
    return {"labels": names, "intercepts": np.round([intercept for _, intercept in fitted], 3).tolist(), "weights": weights}


def measure(model: dict, features: list[list[str]], labels: list[str]) -> dict:
    told = [category_of(row, model) for row in features]
    confusion = Counter(zip(labels, told, strict=True))
    recall = {name: confusion[name, name] / number for name, number in sorted(Counter(labels).items())}
    precision = {name: confusion[name, name] / number for name, number in sorted(Counter(told).items())}
    accuracy = sum(a == b for a, b in zip(labels, told, strict=True)) / len(labels)
    return {
        "rows": len(labels),
        "accuracy": round(accuracy, 4),
        "most_common_label": round(Counter(labels).most_common(1)[0][1] / len(labels), 4),
        "recall": {name: round(value, 3) for name, value in recall.items()},
        "precision": {name: round(value, 3) for name, value in precision.items()},
        "labels": dict(Counter(labels).most_common()),
        "confused": {f"{a} taken for {b}": n for (a, b), n in confusion.most_common() if a != b and n > 2},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="write the weights (of the training rows only) into the package")
    parser.add_argument("--strength", type=float, default=0.3, help="scikit-learn's C")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    features, labels, prompts = labelled(args.files)
    # The same prompt, and what begins alike, is held out together.
    held = [key64(prompt[:40]) / 2**64 < 0.2 for prompt in prompts]
    train = [i for i, out in enumerate(held) if not out]
    test = [i for i, out in enumerate(held) if out]
    model = fit([features[i] for i in train], [labels[i] for i in train], args.strength)
    result = measure(model, [features[i] for i in test], [labels[i] for i in test])
    print(json.dumps(result, indent=2))
    print(f"{len(model['weights'])} features, {len(train)} rows trained on; the first: {list(islice(model['weights'], 8))}")
    if args.write:
        about = {"trained_on": len(train), "heldout": result["rows"], "accuracy": result["accuracy"], "recall": result["recall"]}
        weights = ((json.dumps(name), json.dumps(row, separators=(",", ":"))) for name, row in model["weights"].items())
        lines = ",\n".join(f"{name}:{row}" for name, row in weights)
        head = json.dumps({"about": about, "labels": model["labels"], "intercepts": model["intercepts"]}, ensure_ascii=False)
        MODEL_FILE.write_text(f'{head[:-1]},\n"weights":{{\n{lines}\n}}}}\n', encoding="utf-8")
    if args.json:
        recording.write(args.json, result)


if __name__ == "__main__":
    main()
