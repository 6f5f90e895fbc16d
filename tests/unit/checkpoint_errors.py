"""What is wrong with a checkpoint, in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moco_scale.utils.errors import UserError


def error_of(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        action()
    return str(error.value)
