"""qcompiler: a quantizing compiler for model graphs."""

__version__ = "0.1.0"
