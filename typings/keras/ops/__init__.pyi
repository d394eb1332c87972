# keras.ops takes and gives tensors of whatever backend is in use, which no type can say; what
# pyright infers from its sources ("None" for most) is wrong.
from typing import Any

def __getattr__(name: str) -> Any: ...
