"""python -m flamingo.eval.lm_eval ...: lm-evaluation-harness, once transformers knows Flamingo's classes.

That harness loads models through transformers' Auto classes and has no way to register others; the
arguments are its own (`lm-eval run --model hf-multimodal --model_args pretrained=FOLDER ...`).
"""

from __future__ import annotations

from flamingo.registration import register


def main() -> None:
    from lm_eval.__main__ import cli_evaluate

    register()
    cli_evaluate()


if __name__ == "__main__":
    main()
