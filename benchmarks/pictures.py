"""The pictures of the documentation, from the demo's own data: every one of them comes from this command.

    python -m benchmarks.pictures --work DIR [--only verify,compare] [--out docs/images]

What is there in DIR already is not computed again: the demo with its damaged model, a verification with a sweep of budgets, a
comparison, a drill. All of it takes about an hour of two cores; the pictures themselves need Chromium and take a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.demo import SETTINGS
from safer_engine.demo_data import RECIPE

WIDTH, TALLEST = 1100, 900
BUDGETS = "0.05,0.15"


@dataclass(frozen=True)
class Picture:
    """A part of a page: from the top of one element to the bottom of another, no taller than `TALLEST`."""

    name: str
    page: str
    first: str
    last: str


PICTURES = (
    Picture("report", "demo/audit/report.html", "main, body", "main, body"),
    Picture("features", "demo/audit/report.html", "#features", "#features"),
    Picture("causal", "demo/audit/report.html", "#causal", "#causal"),
    Picture("verify", "verified/report.html", "#verification", "#verification > .panel"),
    Picture("sweep", "swept/report.html", "#verification > h3:last-of-type", "#verification .wide-panels"),
    Picture("compare", "compared/comparison.html", "main, body", "main, body"),
    Picture("drill", "drill/drill.html", "#detection", "#detection .table-wrap"),
)


def main() -> None:
    """Compute what is missing, then take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--only", help="comma-separated names of pictures")
    given = parser.parse_args()
    wanted = [one for one in PICTURES if given.only is None or one.name in given.only.split(",")]
    work = given.work.resolve()
    for folder in dict.fromkeys(one.page.split("/")[0] for one in wanted):
        if not (work / next(one.page for one in wanted if one.page.startswith(folder))).exists():
            {"demo": _demo, "verified": _verified, "swept": _swept, "compared": _compared, "drill": _drill}[folder](work)
    given.out.mkdir(parents=True, exist_ok=True)
    _take(wanted, work, given.out)


def _run(arguments: Sequence[str], **environment: str) -> None:
    subprocess.run([sys.executable, "-m", "cli.main", *arguments], check=True, env=os.environ | environment)


def _sections(prefix: str, sections: dict[str, Any]) -> list[str]:
    return [
        part
        for section, values in sections.items()
        for name, value in values.items()
        for part in ("--set", f"{prefix}{section}.{name}={json.dumps(value)}")
    ]


def _demo(work: Path) -> None:
    _run(["demo", "--damaged", "--out", str(work / "demo")])


def _data(work: Path) -> list[str]:
    data = work / "demo" / "data"
    if not data.exists():
        _demo(work)
    return ["-d", str(data / "preferences.jsonl"), "-e", str(data / "evaluation.jsonl"), "--device", "cpu"]


def _audit(work: Path, model: str) -> list[str]:
    shape = ["-m", str(work / "demo" / model), "--set", "model.max_length=256", "--store", str(work / "demo" / "store")]
    return [*_data(work), *shape, *_sections("", SETTINGS)]


def _verified(work: Path) -> None:
    _run(["verify", *_retraining(work), "--out", str(work / "verified")])


def _swept(work: Path) -> None:
    asked = ["--seeds", "2", "--set", f"verification.budgets=[{BUDGETS}]"]
    _run(["verify", *_retraining(work), *asked, "--out", str(work / "swept")])


def _retraining(work: Path) -> list[str]:
    recipe = _sections("retraining.", {"recipe": RECIPE})
    return [*_audit(work, "reward-model"), *recipe, "--base", str(work / "demo" / "data" / "base")]


def _compared(work: Path) -> None:
    given = ["--set", f"sae.given={work / 'demo' / 'audit' / 'sae'}"]
    _run(["run", *_audit(work, "damaged/reward-model"), *given, "--out", str(work / "damaged-audit")])
    folders = [str(work / "demo" / "audit"), str(work / "damaged-audit")]
    _run(["compare", *folders, "--store", str(work / "demo" / "store"), "--out", str(work / "compared")])


def _drill(work: Path) -> None:
    audit = _sections("audit.", {"sae": SETTINGS["sae"], "causal": {"pairs": 0}})
    what = ["--rules", "score,random", "--budgets", "2.5,5", "--seeds", "2", *_sections("", {"recipe": RECIPE})]
    where = ["-b", str(work / "demo" / "data" / "base"), "--store", str(work / "demo" / "store"), "--out", str(work / "drill")]
    _run(["drill", *_data(work), *where, *what, *audit], SAFER_ENABLE_REDTEAM="1")


def _take(pictures: Sequence[Picture], work: Path, out: Path) -> None:
    from tests.helpers.browser import chromium

    with chromium() as browser:
        for one in pictures:
            page = browser.new_page(viewport={"width": WIDTH, "height": TALLEST}, color_scheme="light", bypass_csp=True)
            page.goto((work / one.page).as_uri())
            page.add_style_tag(content="header, nav { position: static !important }")
            top, bottom = (page.locator(where).first.bounding_box() for where in (one.first, one.last))
            height = min(TALLEST, bottom["y"] + bottom["height"] - top["y"] + 16)
            clip = {"x": 0, "y": max(0, top["y"] - 8), "width": WIDTH, "height": height}
            page.screenshot(path=str(out / f"{one.name}.png"), clip=clip, full_page=True)
            page.close()
            print(out / f"{one.name}.png")


if __name__ == "__main__":
    main()
