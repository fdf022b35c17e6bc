"""The whole model of the quickstart's recipe: what is frozen, what is trained, where the blocks stand."""

from __future__ import annotations

from docs.drawings.resampler import quickstart_config
from docs.drawings.svg import Drawing

STEP, LAYER_TOP, LAYER_HEIGHT = 14, 190, 96


def draw() -> Drawing:
    config = quickstart_config()
    layers = config.get_text_config().num_hidden_layers
    blocks = config.block_positions
    drawing = Drawing("model", 740, 352)
    drawing.box(8, 26, 62, 62, "three", round_=4)
    drawing.dot(32, 62, "on", 12)
    drawing.text(39, 108, "a picture", "soft", "middle", 12)
    vision = config.vision_config
    drawing.line([(74, 57), (104, 57)], arrow=True)
    drawing.labelled(104, 26, 150, 62, ["vision encoder", "EfficientNet-Lite0"], False)
    drawing.line([(254, 57), (310, 57)], arrow=True)
    drawing.text(282, 48, f"{vision.grid[0]} × {vision.grid[1]}", "soft", "middle", 11)  # type: ignore[union-attr]
    drawing.labelled(310, 26, 150, 62, ["resampler", f"{config.resampler_latents} latents"], True)
    drawing.text(478, 46, "pink: trained", "trained-edge", size=12.5, bold=True)
    drawing.text(478, 64, "blue: frozen, as it came", "two", size=12.5, bold=True)
    x, gates = 92.0, []
    middle = LAYER_TOP + LAYER_HEIGHT / 2
    for layer in range(layers):
        if layer in blocks:
            drawing.box(x, LAYER_TOP - 14, 20, LAYER_HEIGHT + 28, "trained", "trained-edge", 4)
            gates.append(x + 10)
            x += 24
        drawing.box(x, LAYER_TOP, STEP - 3, LAYER_HEIGHT, "frozen", "frozen-edge", 2)
        x += STEP
    drawing.line([(385, 88), (385, 132)], "trained-edge", 2)
    drawing.line([(gates[0], 132), (gates[-1], 132)], "trained-edge", 2)
    for gate in gates:
        drawing.line([(gate, 132), (gate, LAYER_TOP - 14)], "trained-edge", 2, arrow=True)
    drawing.text(397, 122, "keys and values, once per picture", "soft", size=11.5)
    drawing.text(6, middle - 12, "words,", size=12)
    drawing.text(6, middle + 4, "with an", size=12)
    drawing.text(6, middle + 20, "<image>", size=12)
    drawing.line([(58, middle), (90, middle)], arrow=True)
    drawing.line([(x, middle), (x + 26, middle)], arrow=True)
    drawing.text(x + 30, middle - 4, "next", size=12)
    drawing.text(x + 30, middle + 12, "word", size=12)
    said = ", ".join(map(str, blocks[:-1])) + f" and {blocks[-1]}"
    below = LAYER_TOP + LAYER_HEIGHT
    drawing.text(92, below + 36, f"SmolLM2-135M: {layers} layers (blue)", size=12.5)
    what = f"gated blocks (pink) before layers {said}: cross-attention and feed-forward"
    drawing.text(92, below + 54, what, size=12.5)
    return drawing
