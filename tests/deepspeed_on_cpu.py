"""DeepSpeed on a CPU, which the package refuses: slow, but with all of its arithmetic and files."""

from __future__ import annotations

from lit_llm.zero import DeepSpeed


class DeepSpeedOnCPU(DeepSpeed):
    """Accepts any machine."""

    def _require_machine(self) -> None:
        pass
