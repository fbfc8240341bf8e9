from collections.abc import Callable
from typing import Any

PIECE_BYTES: int

class StateImage:
    @property
    def description(self) -> dict[str, Any]: ...
    def close(self) -> None: ...
    def write(self, sink: Callable[[bytes], object]) -> bool: ...
