"""Pictures of results: time, and share of the floor, over batch. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ArgumentValueError, UnsupportedError
from .contestants import NAMES
from .grid import GRIDS, Grid, Wanted
from .report import EVERYTHING, Cell, Result, names_in

__all__ = ["plot"]


def plot(result: Result, folder: str | Path, wanted: Wanted = EVERYTHING) -> list[Path]:
    """Draw a result into PNG files in `folder`, one for each state dtype and shape of a layer.

    Raises `ArgumentValueError` for a section that has no pictures, `UnsupportedError` without
    matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise UnsupportedError(
            "plots need matplotlib; pip install 'ssmgen[bench]'"
        ) from None  # fmt: skip
    section = result["section"]
    if section not in GRIDS:
        raise ArgumentValueError(
            f"plot: a result of {section} found; allowed: {', '.join(GRIDS)}"
        )  # fmt: skip
    matplotlib.use("Agg")
    Path(folder).mkdir(parents=True, exist_ok=True)
    pictures: dict[tuple[str, ...], list[Cell]] = {}
    for cell in result["cells"]:
        if wanted.takes(cell):
            pictures.setdefault(_picture(GRIDS[section], cell), []).append(cell)
    gpu = result["environment"].get("gpu", "")
    short = gpu.removeprefix("NVIDIA ").replace(" ", "-").lower()
    written = []
    for parts, cells in pictures.items():
        stem = "-".join(filter(None, (section, short, *parts))).replace(" ", "-")
        path = Path(folder) / f"{stem}.png"
        _draw(path, f"{', '.join(parts)}, {gpu}", GRIDS[section], cells)
        written.append(path)
    return written


def _picture(grid: Grid, cell: Cell) -> tuple[str, ...]:
    """The parts of a picture's name: the layer's shape, and the state dtype if they differ."""
    parts = []
    for name in grid.group:
        if name == "state":
            continue
        if name == "heads":
            parts.append(f"{cell['heads']} heads")
        elif name == "k_heads":
            parts.append(f"{cell['k_heads']} key heads")
        elif name == "dim" and "heads" not in grid.group:
            parts.append(f"{cell['dim']} channels")
        elif name == "dstate":
            parts.append(f"dstate {cell['dstate']}")
        elif name != "dim":
            parts.append(str(cell[name]))
        elif cell["dim"] != 64:
            parts.append(f"dim {cell['dim']}")
    if "state" in cell:
        parts.append(cell["state"].partition(" ")[0])
    return tuple(parts)


def _draw(path: Path, title: str, grid: Grid, cells: Sequence[Cell]) -> None:
    import matplotlib.pyplot as plt

    row, over = grid.panels, grid.over
    rows = list(dict.fromkeys(cell[row] for cell in cells))
    figure, axes = plt.subplots(
        len(rows), 2, figsize=(9, 1 + 2.8 * len(rows)), sharex=True, squeeze=False
    )
    for (time, share), value in zip(axes, rows):
        chosen = [cell for cell in cells if cell[row] == value]
        for name in names_in(chosen):
            mine = [cell for cell in chosen if name in cell["us"]]
            xs = [cell[over] for cell in mine]
            style: dict[str, Any] = {
                "marker": "o",
                "markersize": 4,
                "label": name,
                "color": f"C{NAMES.index(name)}",
            }
            time.plot(xs, [cell["us"][name] for cell in mine], **style)
            share.plot(xs, [100 * c["floor_us"] / c["us"][name] for c in mine], **style)
        time.plot([cell[over] for cell in chosen], [cell["floor_us"] for cell in chosen],
                  color="grey", linestyle=":", label="floor")  # fmt: skip
        label = value if isinstance(value, str) else f"{value} {row}"
        ticks = sorted({cell[over] for cell in chosen})
        for axis, what in ((time, "us"), (share, "share of the floor, %")):
            axis.set_title(f"{label}: {what}", fontsize=10)
            axis.set_xscale("log")
            axis.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        time.set_yscale("log")
        time.yaxis.set_major_formatter("{x:g}")
        share.set_ylim(0, 100)
        time.legend(fontsize=8)
    figure.supxlabel(cells[0].get("axis", over))
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)
