"""
What fits the library into other people's frameworks: a module for each, imported by name.

Nothing here is imported by the rest of the library, and no framework is among its dependencies: you have yours.
"""
