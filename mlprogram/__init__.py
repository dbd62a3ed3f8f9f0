"""A reference evaluator for Core ML's ML Programs: executes a saved `.mlpackage` on any host, without Core ML.

    program = Program.open("model.mlpackage")
    outputs = program({"x": array})

It needs numpy, torch and coremltools (for the protobuf definitions), and nothing of the package it lives beside.
"""

from mlprogram.errors import ProgramError
from mlprogram.kernel import Accumulate
from mlprogram.program import Feature, Operation, Program

__all__ = ["Accumulate", "Feature", "Operation", "Program", "ProgramError"]
