"""Tasks of lmms-eval whose prompts and messages carry interleaved shots.

Each is a YAML file and a JSON file of one row, the settings that the documents are made from: the same
queries, shots and templates as `flamingo eval run`. `python -m flamingo.eval.tasks folder` says where they
are, for --include_path; `... write OUT --benchmark NAME` writes those of another benchmark.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
BASE = "few_shot_base"  # what all tasks have in common; not a task, so it does not end in .yaml
