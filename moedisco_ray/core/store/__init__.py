"""The files of a run, in a directory or at a URI."""
