"""The only package that imports Ray.

It places work and waits for it; the stages compute, and are tested without Ray.
"""
