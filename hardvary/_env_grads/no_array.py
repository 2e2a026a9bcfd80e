"""Refuse to be taken for an array, in words that say what to do instead."""

from typing import Any, NoReturn

from hardvary import _validate


class NoArrayType(type):
    """Gives a class a name that says what to do: JAX's messages show it."""

    _mend: str

    def __repr__(cls) -> str:
        return f"<class 'hardvary.{cls.__name__}'; {cls._mend}>"


class NoArray(metaclass=NoArrayType):
    """A base of classes that stand where arrays are expected and take no arithmetic.

    A subclass sets `_mend`, a sentence without a full stop.
    """

    _mend = ""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            f"{_validate.a_or_an(type(self).__name__)} is not an array: {self._mend}"
        )

    __array__ = __len__ = __iter__ = __getitem__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = _refuse
    __mod__ = __rmod__ = __pow__ = __rpow__ = __matmul__ = __rmatmul__ = _refuse
    __neg__ = __pos__ = __abs__ = __float__ = __int__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse
