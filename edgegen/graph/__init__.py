"""The IR: helpers over `torch.export.ExportedProgram`, and the tensor specs that every stage shares."""
