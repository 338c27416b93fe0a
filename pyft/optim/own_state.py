"""Whether anybody but the optimizer itself can have changed its state."""

from __future__ import annotations

from typing import Any


class Access:
    """Attributes:
    given: somebody has asked for the state, and may have kept it.
    """

    def __init__(self, given: bool) -> None:
        self.given = given


class OwnState:
    """`state`, of which it is known whether it was ever given to somebody.

    A step looks at its state tensors to see whether they are still those of its plan and where they are: of small
    parameters that takes longer than their update. Nobody can have changed what nobody has asked for.
    """

    # An object, so that wrappers that take over the attributes of an optimizer (Lightning's) share it.
    _access: Access

    @property
    def state(self) -> Any:
        """State tensors of each parameter by name, as in `torch.optim`. Who has asked for it may keep and change it:
        from then on every step looks at all of them."""
        self._access.given = True
        return self._own_state

    @state.setter
    def state(self, value: Any) -> None:
        self._access = Access(True)
        self.__dict__["state"] = value

    @property
    def _own_state(self) -> Any:
        return self.__dict__["state"]
