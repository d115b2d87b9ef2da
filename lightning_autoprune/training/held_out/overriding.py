"""Objects that stand in for a user's object, and share all of its attributes, but have a method of ours."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, TypeVar

__all__ = ["MethodHook", "original_of", "override"]

T = TypeVar("T")
_ORIGINAL = "__autoprune_original__"


def override(original: T, **methods: Callable[[], Any]) -> T | None:
    """Return an object that is the original in everything but some methods; the original does not change.

    The two share their attributes. A pickle or a copy of the stand-in is one of the original.

    Args:
        original: an object of a Python class.
        methods: functions without arguments that take the place of its methods.

    Returns:
        The stand-in, an instance of a subclass of the original's class; None for a class that allows no subclass, or
        that keeps attributes elsewhere than in the instance's ``__dict__``.

    Example:
        >>> class Words:
        ...     text = "one two"
        ...     def __iter__(self):
        ...         return iter(self.text.split())
        >>> words = Words()
        >>> stand_in = override(words, __iter__=lambda: iter(["three"]))
        >>> words.text = "four"
        >>> isinstance(stand_in, Words), stand_in.text, [*stand_in], [*words]
        (True, 'four', ['three'], ['four'])
    """
    cls = type(original)
    if not hasattr(original, "__dict__") or any(vars(base).get("__slots__") for base in cls.__mro__):
        return None
    members: dict[str, Any] = {
        name: lambda self, function=function: function()  # the class calls it with the instance
        for name, function in methods.items()
    }
    members |= {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        _ORIGINAL: (original,),  # in a tuple, since a class calls `__get__` of what it finds in its members
        "__copy__": lambda self: copy(original),
        "__reduce_ex__": lambda self, protocol: (_same, (original,)),
    }
    try:
        kind: Any = type(cls)(cls.__name__, (cls,), members)  # type: ignore[misc]
        stand_in: T = object.__new__(kind)
        object.__setattr__(stand_in, "__dict__", vars(original))
    except TypeError:
        return None
    return stand_in


def original_of(thing: T) -> T:
    """Return what an object of :func:`override` stands in for, and any other object itself."""
    members = vars(type(thing))
    return members[_ORIGINAL][0] if _ORIGINAL in members else thing


def _same(original: T) -> T:
    return original


class MethodHook:
    """Takes the place of a method of one object, until it is removed.

    A pickle of the object has the original method.

    Args:
        owner: the object.
        name: the name of its method.
        function: called with the original method, followed by the arguments of the call.
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self._owner, self._name, self._function = owner, name, function
        self._original = getattr(owner, name)
        self._replaced = vars(owner).get(name)  # what the user has set in place of the method
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self._function(self._original, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_same, (self._replaced,)) if self._replaced is not None else (getattr, (self._owner, self._name))

    def remove(self) -> None:
        """Put the original method back."""
        if vars(self._owner).get(self._name) is not self:
            return
        if self._replaced is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._replaced)
