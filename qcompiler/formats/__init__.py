"""Checkpoint formats: serialisations of QTensor, read and written without ever quantizing again."""
