"""The only package that imports Ray. It places and waits; what is computed lives in the stages and is tested without Ray."""
