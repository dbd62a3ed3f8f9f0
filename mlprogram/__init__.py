"""A reference evaluator for Core ML's ML Programs: executes a saved `.mlpackage` on any host, without Core ML.

    program = Program.open("model.mlpackage")
    outputs = program({"x": array})

It needs numpy, torch and coremltools (for the protobuf definitions), and nothing of the package it lives beside.
"""

from mlprogram.errors import ProgramError
from mlprogram.kernel import Accumulate, Arithmetic
from mlprogram.program import Program, State
from mlprogram.reading import Feature, Operation

__all__ = ["Accumulate", "Arithmetic", "Feature", "Operation", "Program", "ProgramError", "State"]
