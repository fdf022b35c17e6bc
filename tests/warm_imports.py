"""What processes of the tests begin with: the imports of a command, done once. See `tests.warm`.

Nothing here may start a thread, which a fork would lose.
"""

from __future__ import annotations

import sys

sys.argv[:1] = ["flamingo"]  # as in a command: `flamingo/__init__.py` looks

from flamingo.runtime import quiet_libraries  # noqa: E402

quiet_libraries()

import deepspeed.launcher.constants  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401

import flamingo.eval.gallery  # noqa: E402, F401
import flamingo.eval.predictor  # noqa: E402, F401
import flamingo.eval.report  # noqa: E402, F401
import flamingo.eval.results.summary  # noqa: E402, F401
import flamingo.folders  # noqa: E402, F401
import flamingo.train.session  # noqa: E402, F401
