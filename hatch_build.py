"""Wheels with compiled modules: `HATCH_BUILD_HOOK_ENABLE_CUSTOM=1 pip install .`, else they are plain."""

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg, misc]  # hatchling is not there when mypy runs
    """Compiles before the wheel's files are collected; a failure leaves a plain wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and make the wheel one of this platform."""
        if version == "editable":  # `make compile` does it
            return
        sys.path.insert(0, self.root)
        from isthmus import compiler  # noqa: PLC0415 - from the tree that is built

        problem = compiler.find_obstacle()
        if problem is None:
            root = Path(self.root)
            try:
                compiler.compile_modules(root, root / "isthmus" / "_compiled")
            except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, plain Python works
                problem = str(error)
        if problem is not None:
            self.app.display_warning(f"not compiled, the wheel is plain Python: {problem}")
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["artifacts"].append("isthmus/_compiled/**")
