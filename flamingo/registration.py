"""Makes Flamingo known to transformers' Auto classes and pipelines, without `trust_remote_code`."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from flamingo.config import FlamingoConfig
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor  # registers its image processor


def register() -> None:
    """Importing this module has done it; calling it again changes nothing."""
    AutoConfig.register(FlamingoConfig.model_type, FlamingoConfig, exist_ok=True)
    AutoModelForImageTextToText.register(FlamingoConfig, FlamingoForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(FlamingoConfig, FlamingoProcessor, exist_ok=True)


register()
