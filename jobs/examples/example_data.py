"""Generate the data of the example jobs; nothing is downloaded.

    python jobs/examples/example_data.py            # all three, into ~/.cache/trainyard/examples
    python jobs/examples/example_data.py churn --to data

churn.parquet    5,000 customers and whether they leave (table.yaml)
houses.parquet   4,000 houses and their prices (regression.yaml)
shapes/          1,500 images of circles, squares and triangles, one folder per class (pictures.yaml, finetune.yaml)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

CITIES = [f"town-{number:02d}" for number in range(40)]


def churn(folder: Path, rows: int = 5000) -> None:
    """Write numbers, a flag, columns with few and many categories, an embedding, nulls, a key and a day. About a
    quarter of the customers leave."""
    rng = np.random.default_rng(1)
    months, calls = rng.gamma(2.0, 12.0, rows), rng.poisson(1.5, rows)
    spend = rng.lognormal(3.2, 0.5, rows)
    plan, city = rng.choice(["basic", "plus", "pro"], rows, p=[0.5, 0.3, 0.2]), rng.integers(0, len(CITIES), rows)
    paperless = rng.random(rows) < 0.6
    habits = rng.normal(size=(rows, 4))
    pull = np.array([0.9, 0.0, -0.9])[np.searchsorted(["basic", "plus", "pro"], plan)]
    town = rng.normal(0, 0.6, len(CITIES))[city]
    score = -1.6 - 0.04 * months + 0.6 * calls + 0.02 * (spend - 25) + pull + town + 0.8 * habits[:, 0] * habits[:, 1]
    leaves = rng.random(rows) < 1 / (1 + np.exp(-score))
    day = np.datetime64("2026-01-01") + rng.integers(0, 300, rows)
    table = pa.table(
        {
            "customer_id": np.arange(rows),
            "day": pa.array(day.astype("datetime64[D]")),
            "num_months": pa.array(months, mask=rng.random(rows) < 0.05),
            "num_calls": calls,
            "num_spend": spend,
            "plan": pa.array(plan, mask=rng.random(rows) < 0.02),
            "city": pa.array(np.array(CITIES)[city]),
            "paperless": paperless,
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(habits.astype(np.float32).ravel()), 4),
            "churned": np.where(leaves, "yes", "no"),
        }
    )
    pq.write_table(table, folder / "churn.parquet")


def houses(folder: Path, rows: int = 4000) -> None:
    """Write prices in thousands: a product of area and location, plus noise that limits R2 to about 0.95."""
    rng = np.random.default_rng(2)
    area, age, rooms = rng.gamma(8.0, 15.0, rows), rng.uniform(0, 90, rows), rng.integers(1, 8, rows)
    place = rng.choice(["centre", "suburb", "village"], rows, p=[0.3, 0.5, 0.2])
    worth = np.array([4.2, 2.8, 1.9])[np.searchsorted(["centre", "suburb", "village"], place)]
    garden = rng.random(rows) < 0.4
    price = area * worth * (1 - 0.004 * age) + 12 * rooms + 25 * garden
    price += rng.normal(0, 0.23 * price.std(), rows)
    table = pa.table(
        {
            "house_id": np.arange(rows),
            "area": area,
            "age": pa.array(age, mask=rng.random(rows) < 0.1),
            "rooms": rooms,
            "place": place,
            "garden": garden,
            "price": price,
        }
    )
    pq.write_table(table, folder / "houses.parquet")


def shapes(folder: Path, each: int = 500) -> None:
    """Write PNG and JPEG images of 40 to 64 pixels per side: shapes of any color, size and position on a noisy
    background."""
    rng = np.random.default_rng(3)
    for kind in ("circle", "square", "triangle"):
        (folder / "shapes" / kind).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            width, height = (int(side) for side in rng.integers(40, 65, 2))
            background = rng.integers(0, 110, 3) + rng.normal(0, 12, (height, width, 3))
            image = Image.fromarray(background.clip(0, 255).astype(np.uint8))
            radius = rng.uniform(11, 19)
            across, down = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
            color = tuple(int(value) for value in rng.integers(130, 256, 3))
            corners = {"circle": 60, "square": 4, "triangle": 3}[kind]
            angles = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(corners) / corners
            points = [(across + radius * np.cos(angle), down + radius * np.sin(angle)) for angle in angles]
            ImageDraw.Draw(image).polygon(points, fill=color)
            image.save(folder / "shapes" / kind / f"{number:04d}.{'png' if number % 2 else 'jpg'}")


MAKERS = {"churn": churn, "houses": houses, "shapes": shapes}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"{', '.join(MAKERS)}; default: all")
    parser.add_argument("--to", type=Path, default=Path("~/.cache/trainyard/examples"), metavar="DIR")
    args = parser.parse_args()
    if unknown := [name for name in args.what if name not in MAKERS]:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(MAKERS)}")
    target = args.to.expanduser()
    target.mkdir(parents=True, exist_ok=True)
    for name in args.what or MAKERS:
        MAKERS[name](target)
        print(f"wrote {name} to {target}")
