"""Make groups of bench_step.py silent: their samples have no advantage and no teacher.

    python _silent.py bench_step.py SHARE [arguments of bench_step.py]

runs another commit's bench_step.py with a share of silent groups.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def silence(groups: Sequence[Sequence[Any]], share: float) -> list[tuple[Any, ...]]:
    """Return the groups, a share of them, evenly spread, as if all their samples were right, or all wrong."""
    silenced = []
    for number, group in enumerate(groups):
        is_silent = int((number + 1) * share) > int(number * share)
        silenced.append(tuple(map(_silent, group)) if is_silent else tuple(group))
    return silenced


def _silent(sample: Any) -> Any:
    update = {"branch": "grpo", "policy_weight": 1.0, "distillation_weight": 0.0, "advantage": 0.0}
    route = sample.route.model_copy(update=update | {"teacher_ids": None})
    return sample.model_copy(update={"route": route})


def main() -> None:
    """Run the script with silent groups."""
    script, share = Path(sys.argv[1]), float(sys.argv[2])
    sys.argv[:3] = [str(script)]
    sys.path.insert(0, str(script.parent))  # its own helpers, not this folder's
    spec = importlib.util.spec_from_file_location("bench_step", script)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules["bench_step"] = module
    spec.loader.exec_module(module)
    make_groups = module.make_groups
    module.make_groups = lambda *arguments: silence(make_groups(*arguments), share)
    module.main()


if __name__ == "__main__":
    main()
