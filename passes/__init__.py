"""The compiler passes: each takes a program (or a plan) and returns one, and says what it proved."""

if __name__ != "seqparc.passes":
    raise ImportError("this package is seqparc.passes; import it under that name")
