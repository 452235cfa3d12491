"""The spellings of the operators that `canonicalize` knows, one family to a file."""
