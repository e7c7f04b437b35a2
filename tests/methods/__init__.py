"""Each method against the paper, and its files against PEFT.

A package, so that it is not mistaken for `benchmarks/methods.py`.
"""
