"""The resampler of the quickstart's recipe: its shapes, as its module gives them."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig

from docs.drawings.svg import Drawing
from flamingo.config import FlamingoConfig, FlamingoVisionConfig
from flamingo.resampler import PerceiverResampler

RECIPE = Path(__file__).parents[2] / "train" / "recipes" / "quickstart.yaml"


def quickstart_config() -> FlamingoConfig:
    """Of the recipe, with its encoder's grid and its language model's layers."""
    fields = yaml.safe_load(RECIPE.read_text())["model"]["architecture"]
    return FlamingoConfig(
        text_config=LlamaConfig(num_hidden_layers=30, hidden_size=576),  # SmolLM2-135M
        vision_config=FlamingoVisionConfig(name="tf_efficientnet_lite0"),
        **fields,
    )


def draw() -> Drawing:
    config = quickstart_config()
    module = PerceiverResampler(config).eval()
    (rows, columns), width = module.grid, config.vision_config.width  # type: ignore[union-attr]
    places = rows * columns
    with torch.no_grad():
        out = module(torch.zeros(1, places, width))
    latents = out.shape[1]
    drawing = Drawing("resampler", 740, 300)
    side = 16
    top = 96
    for row in range(rows):
        for column in range(columns):
            drawing.box(6 + side * column, top + side * row, side - 2, side - 2, "two", round_=2)
    middle = top + side * rows / 2
    end = 6 + side * columns
    drawing.text(6, 34, "grid of the encoder", bold=True)
    drawing.text(6, 52, f"{rows} × {columns} = {places} places", "soft", size=12)
    drawing.text(6, 68, f"{width} numbers each", "soft", size=12)
    x = end + 30
    drawing.line([(end + 4, middle), (x, middle)], arrow=True)
    drawing.labelled(x, middle - 38, 92, 76, ["projection", f"{width} → {module.width}"], True)
    depth = len(module.layers)
    layer_x, layer_width = x + 134, 246
    drawing.line([(x + 92, middle), (layer_x, middle)], arrow=True)
    drawing.box(layer_x, 78, layer_width, 148, "cell", "line", 8)
    drawing.text(layer_x + layer_width / 2, 68, f"{depth} layers", "soft", "middle", 12)
    drawing.labelled(
        layer_x + 14, 90, layer_width - 28, 66,
        ["attention", f"{latents} latents ask; what is looked at:", f"{places} places + {latents} latents"],
        True,
    )  # fmt: skip
    drawing.line([(layer_x + layer_width / 2, 156), (layer_x + layer_width / 2, 174)], arrow=True)
    drawing.labelled(layer_x + 14, 174, layer_width - 28, 42, ["feed-forward"], True)
    _latents(drawing, layer_x + 16, 262, (layer_width - 32) / latents, latents, 14, "trained-edge")
    drawing.text(
        layer_x + layer_width / 2, 294, f"{latents} learned latents, to begin with", "soft", "middle", 12
    )
    drawing.line([(layer_x + layer_width / 2, 260), (layer_x + layer_width / 2, 226)], arrow=True)
    right = layer_x + layer_width + 34
    drawing.line([(layer_x + layer_width, middle), (right, middle)], arrow=True)
    for latent in range(latents):
        drawing.box(right + 6, middle - 4.5 * latents + 9 * latent, 96, 7, "one", round_=2)
    drawing.text(right + 6, 34, "what the words see", bold=True)
    drawing.text(right + 6, 52, f"{out.shape[1]} × {out.shape[2]} numbers,", "soft", size=12)
    drawing.text(right + 6, 68, "for any size of picture", "soft", size=12)
    return drawing


def _latents(
    drawing: Drawing, x: float, y: float, step: float, count: int, height: float, colour: str
) -> None:
    for latent in range(count):
        drawing.box(x + step * latent, y, step - 3, height, colour, round_=2)
