"""Inner loops in C++: what compiles, keeps and calls them, and the vectors that they are written in."""

from lorakit.native.library import INTEGER, POINTER, REAL, TYPES, Library

__all__ = ["INTEGER", "POINTER", "REAL", "TYPES", "Library"]
