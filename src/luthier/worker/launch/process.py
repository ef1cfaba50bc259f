"""One rank's process: `python -m luthier.worker.launch.process`, started by `worker/launch/local.py`.

Its order comes as one JSON line on standard input, messages go to standard output. SIGTERM, or the end of standard
input (who started it is gone), saves and stops.
"""

from __future__ import annotations

import sys
from typing import Any

from luthier.imports import importing
from luthier.worker.child import serve_order
from luthier.worker.launch.place import RankPlace
from luthier.worker.messages import SendingProgress


def work(order: dict[str, Any], progress: SendingProgress) -> None:
    """Train the order's recipes at the order's place, and say what came of it."""
    with importing():
        from luthier.recipe import load_recipe
        from luthier.worker.train import train_ranked

    recipes = [load_recipe(recipe) for recipe in order["recipes"]]
    results = train_ranked(recipes, RankPlace(**order["place"]), resume=order["resume"], progress=progress)
    values = [{"status": r.status, "evaluation": r.evaluation, "result": r.result} for r in results]
    progress.send(verb="results", results=values)


if __name__ == "__main__":
    sys.exit(serve_order(work))
