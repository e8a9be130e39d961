"""Ordinary differential equations by steps of fixed size, as the recurrences they are: forward and backward in parallel over time.

    y = seqparc.ode.solve(func, y0, t)            # dy/dt = func(t, y), called as torchdiffeq's odeint is

A step of a method is a cell like any other: it is traced, its structure proved, its kernel generated, and its gradient is that of the
discrete solution, exactly (the discrete adjoint), through the same driver.
"""

from __future__ import annotations

from seqparc.ode.methods import METHODS
from seqparc.ode.paths import Path
from seqparc.ode.solver import Settings, Solver, solve

__all__ = ["METHODS", "Path", "Settings", "Solver", "solve"]
