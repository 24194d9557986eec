"""torch.compile learns to fuse what follows low-rank layers when its compiler is imported.

The pass runs on the graph that Dynamo recorded, before autograd: there an activation is still one call, and the fused
op's own autograd makes the backward pass, in training as well.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from types import ModuleType

from wrapt import register_post_import_hook


def is_wanted() -> bool:
    """Unless the environment says SHRANK_FUSE=0."""
    return os.environ.get("SHRANK_FUSE", "1") != "0"


def install(config: ModuleType) -> None:
    """Enter the pass into torch._inductor.config, behind a pass that is there already."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class FuseLowRank(CustomGraphPass):
        """The pass, and what was entered before it."""

        def __init__(self, before: object) -> None:
            self.before = before

        def __call__(self, graph: object) -> None:
            if self.before is not None:
                self.before(graph)
            if is_wanted():
                import_module("shrank.fusing.rewrite").fuse(graph)

        def uuid(self) -> object:
            """Of the code and the switch: Inductor's cache must know both. None, which turns the cache off, where the
            pass before has none."""
            before = getattr(self.before, "uuid", lambda: None)()
            if self.before is not None and before is None:
                return None
            files = sorted(map(str, Path(__file__).parent.glob("*.py")))
            return before, is_wanted(), get_hash_for_files(tuple(files))

    config.pre_grad_custom_pass = FuseLowRank(config.pre_grad_custom_pass)


register_post_import_hook(install, "torch._inductor.config")
