"""DeepSpeed where there is no GPU, which the package refuses: slow, but all of its arithmetic and its files."""

from __future__ import annotations

from lit_llm.zero import DeepSpeed


class DeepSpeedOnCPU(DeepSpeed):
    """Takes any machine."""

    def _require_machine(self) -> None:
        pass
