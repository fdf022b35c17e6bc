"""Few-shot figures that others have published, to be drawn beside one's own.

Values as in their tables, at `SHOTS`. They were made with other samples of shots and, of VQAv2, on other
splits (Flamingo asked the test server), so they are marks to steer by, no side of a paired test.
"""

from __future__ import annotations

from dataclasses import dataclass

SHOTS = (0, 4, 8, 16, 32)
SOURCES = {
    "Flamingo": "Alayrac et al. 2022, arXiv:2204.14198",
    "OpenFlamingo": "Awadalla et al. 2023, arXiv:2308.01390, means of 3 seeds",
    "IDEFICS": "Laurençon et al. 2023, arXiv:2306.16527, and the model card of IDEFICS",
}
# Benchmark -> model -> figures at SHOTS: CIDEr of COCO, VQA accuracy of the others.
FIGURES: dict[str, dict[str, tuple[float, ...]]] = {
    "coco": {
        "Flamingo-3B": (73.0, 85.0, 90.6, 95.4, 99.0),
        "Flamingo-9B": (79.4, 93.1, 99.0, 102.2, 106.3),
        "Flamingo-80B": (84.3, 103.2, 108.8, 110.5, 113.8),
        "OpenFlamingo-3B": (74.9, 77.3, 85.9, 89.8, 93.0),
        "OpenFlamingo-4B": (76.7, 81.8, 90.7, 93.9, 95.1),
        "OpenFlamingo-9B": (79.5, 89.0, 96.3, 98.8, 99.5),
        "OpenFlamingo-9B, similar shots": (76.8, 93.1, 99.8, 105.6, 109.0),
        "IDEFICS-9B": (46.0, 93.0, 97.0, 99.7, 98.0),
        "IDEFICS-80B": (91.8, 110.3, 114.3, 116.6, 116.6),
    },
    "vqav2": {
        "Flamingo-3B": (49.2, 53.2, 55.4, 56.7, 57.1),
        "Flamingo-9B": (51.8, 56.3, 58.0, 59.4, 60.4),
        "Flamingo-80B": (56.3, 63.1, 65.6, 66.8, 67.6),
        "OpenFlamingo-3B": (44.6, 45.8, 46.2, 46.6, 47.0),
        "OpenFlamingo-4B": (45.1, 49.0, 48.3, 45.5, 43.0),
        "OpenFlamingo-9B": (52.7, 54.8, 54.8, 54.3, 53.3),
        "OpenFlamingo-9B, similar shots": (53.0, 55.1, 56.0, 56.6, 56.8),
        "IDEFICS-9B": (50.9, 55.4, 56.4, 57.0, 57.9),
        "IDEFICS-80B": (60.0, 63.6, 64.8, 65.4, 65.9),
    },
    "okvqa": {
        "Flamingo-3B": (41.2, 43.3, 44.6, 45.6, 45.9),
        "Flamingo-9B": (44.7, 49.3, 50.0, 50.8, 51.0),
        "Flamingo-80B": (50.6, 57.4, 57.5, 57.8, 57.8),
        "OpenFlamingo-3B": (28.2, 30.3, 31.1, 30.9, 31.0),
        "OpenFlamingo-4B": (30.7, 35.1, 33.9, 28.5, 26.4),
        "OpenFlamingo-9B": (37.8, 40.1, 41.1, 42.7, 42.4),
        "OpenFlamingo-9B, similar shots": (38.3, 42.0, 44.1, 45.1, 46.3),
        "IDEFICS-9B": (38.4, 45.5, 47.7, 48.4, 49.6),
        "IDEFICS-80B": (45.2, 52.4, 55.1, 56.8, 57.8),
    },
}


@dataclass(frozen=True)
class Published:
    """A model's figures at numbers of shots, as the paper shows them."""

    model: str
    shots: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def family(self) -> str:
        return self.model.split("-")[0]


def of(benchmark: str) -> list[Published]:
    """All that is known of a benchmark; none of most."""
    found = FIGURES.get(benchmark.replace("-", "_"), {})
    return [Published(model, SHOTS, values) for model, values in found.items()]
