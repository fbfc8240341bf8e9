from collections.abc import Callable
from typing import Any

from typing_extensions import disjoint_base

PIECE_BYTES: int

@disjoint_base
class StateImage:
    @property
    def description(self) -> dict[str, Any]: ...
    def close(self) -> None: ...
    def discard(self) -> None: ...
    def write(self, sink: Callable[[memoryview], object]) -> bool: ...
