"""What tests of the experiments import from here. Everything else is in tests.zoo."""

from tests.zoo import QUICK, compile_quickly

__all__ = ["QUICK", "compile_quickly"]
