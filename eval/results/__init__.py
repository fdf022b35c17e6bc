"""What is made of an evaluation's answers: figures with intervals, a page, comparisons.

eval.json, which `flamingo.eval.run.collect` writes and everything here reads:

{"benchmark": name, "title", "description", "split", "blind": float | null,
 "model": folder, "fingerprint": str, "config": {EvalConfig}, "versions": {package: version},
 "seconds": float,
 "metrics": [{"name", "title", "scale"}],           the first is the score
 "settings": [{"name": "4-shot", "shots": 4, "control": str | null, "source": "random",
               "seeds": [int], "n": queries of each seed,
               "metrics": {name: {"value": mean over seeds, "interval": [low, high],
                                  "by_seed": [float], "spread": standard deviation over seeds | null,
                                  "by_kind": {kind: {"n": int, "value": float}}}},
               "note": why a metric has no value, only where one has none,
               "copied": share of predictions that are a shot's answer | null without shots}]}

answers/<setting.slug>.<rank>.jsonl, one line per query:

{"id", "question", "answers": [str], "kind", "image": path, "prediction": str, "raw": str,
 "scores": [log-likelihood of each class], "shots": [{"id", "image", "answer"}], "score": float | null}
"score" is the query's own value of the first metric, where it has one by itself.
"""
